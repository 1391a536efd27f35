"""Which user of this machine is at the other end of a local connection.

For a Unix socket the kernel says so (SO_PEERCRED). For TCP over loopback it says which user owns each socket, in
`/proc/net/tcp` and `/proc/net/tcp6` (proc_pid_net(5)); the caller's own is the one whose ends are ours, exchanged.
"""

from __future__ import annotations

import ipaddress
import socket
import sys
from pathlib import Path
from typing import Final

_TABLES: Final = {socket.AF_INET: Path("/proc/self/net/tcp"), socket.AF_INET6: Path("/proc/self/net/tcp6")}
_CARRIES_BYTES: Final = frozenset((b"01", b"04", b"05", b"08"))
"""ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT: states in which the caller's process may still hold the socket."""


def user_of_caller(accepted: socket.socket) -> int | None:
    """The user id of the process that made this TCP connection over loopback; None where that cannot be had.

    That is so when it comes from another machine, when the caller has closed it meanwhile (then the kernel no longer
    says whose it was), and where `/proc` is hidden.
    """
    try:
        ours, theirs = accepted.getsockname(), accepted.getpeername()
        family = accepted.family
        wanted = f" {_as_in_table(family, theirs)} {_as_in_table(family, ours)} ".encode()
        found = _find(family, wanted)
        if found is None and family == socket.AF_INET:
            # The caller may have made it with an IPv6 socket and a mapped address.
            mapped = [(f"::ffff:{host}", port) for host, port in (theirs, ours)]
            six = " ".join(_as_in_table(socket.AF_INET6, end) for end in mapped)
            found = _find(socket.AF_INET6, f" {six} ".encode())
    except (OSError, ValueError, KeyError):
        return None
    return found


def _find(family: int, wanted: bytes) -> int | None:
    table = _TABLES[socket.AddressFamily(family)].read_bytes()
    at = table.find(wanted)
    if at < 0:
        return None
    state, _, _, _, user, _, inode = table[at + len(wanted) : table.index(b"\n", at)].split()[:7]
    # A socket that no process holds any more has no inode, and its user is said to be root.
    return int(user) if state in _CARRIES_BYTES and inode != b"0" else None


def _as_in_table(family: int, address: tuple[str, int] | tuple[str, int, int, int]) -> str:
    """An address as the kernel prints it: words of 32 bits in the byte order of the machine, then the port."""
    packed = ipaddress.ip_address(address[0].partition("%")[0]).packed
    assert len(packed) == (4 if family == socket.AF_INET else 16)
    words = (int.from_bytes(packed[at : at + 4], sys.byteorder) for at in range(0, len(packed), 4))
    return f"{''.join(f'{word:08X}' for word in words)}:{address[1]:04X}"
