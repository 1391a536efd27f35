"""TCP ports that are a test's own.

A port that the kernel chose for a socket which was closed again may belong to anybody's outgoing connection the next
moment, and the node that was told to listen there cannot. These lie below the range that the kernel chooses from, and
no two processes on this machine get the same: each takes them from blocks that it has claimed for its lifetime.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
from collections.abc import Iterator
from pathlib import Path

LOWEST = 12_000
BLOCK = 50
_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")

_claims: list[socket.socket] = []
"""One for each block of this process."""


def _blocks() -> Iterator[range]:
    """The blocks that this process can claim, each claimed when it is asked for."""
    end = int(_RANGE.read_text().split()[0])
    for start in range(LOWEST, end - BLOCK + 1, BLOCK):
        claim = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            claim.bind(f"\0peerup-test-ports-{start}")  # the kernel gives an abstract name to one socket at a time
        except OSError:
            claim.close()
        else:
            _claims.append(claim)
            yield range(start, start + BLOCK)


_candidates = itertools.chain.from_iterable(_blocks())


def own_port() -> int:
    """A port on which nobody listens and which nobody else will be given.

    Raises:
        RuntimeError: all are taken.
    """
    for port in _candidates:
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what ended lately is no obstacle
            probe.bind(("", port))
            return port
    raise RuntimeError(f"no port is left between {LOWEST} and what {_RANGE} says")
