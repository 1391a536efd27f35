"""The file `state/proxies.yaml`: the proxies that should exist, as asked for, so that they come back after a restart.

Written by the actor `config` alone, whole and atomically. People may read it; what they edit is taken over at
the next start of the node.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from actors.config.reader import Problem, SectionReader
from actors.config.schema import check_proxy_listen
from actors.config.yaml_text import YamlSyntaxError, parse_yaml, render_entry
from actors.files import FileMissingError, check_not_writable_by_others, read_limited, write_atomic
from protocol.errors import PeerupError
from protocol.peer_id import PeerId
from protocol.service import ServiceName

_HEADER = "# Proxies of this node, kept by the running node; use `peerup proxy` to change them.\n"
_MAX_BYTES = 4 * 1024 * 1024


class ProxiesFileError(PeerupError):
    """The file of desired proxies is broken. The node runs without them rather than guess."""

    code = "bad-proxies-file"


@dataclasses.dataclass(frozen=True)
class DesiredProxy:
    """A proxy that should exist.

    Attributes:
        actor: the name of its actor, `proxy/<peer as given>/<service>`.
        listen: `host:port`, port 0 until the first start has picked one; or `unix:` and an absolute path.
        only_me: serve only connections of the user as whom the node runs.
    """

    actor: str
    peer: PeerId
    peer_name: str
    service: str
    listen: str
    only_me: bool = False


def load_proxies(path: Path) -> tuple[DesiredProxy, ...]:
    """The proxies in the file; none if there is no file.

    Raises:
        ProxiesFileError: it is broken.
        FileError: it cannot be read, or others may write to it.
    """
    try:
        content, status = read_limited(path, _MAX_BYTES)
    except FileMissingError:
        return ()
    check_not_writable_by_others(path, status)
    problems: list[Problem] = []
    found: list[DesiredProxy] = []
    try:
        root = SectionReader(parse_yaml(content.decode()), "", problems, [])
    except (YamlSyntaxError, UnicodeDecodeError) as error:
        raise ProxiesFileError(f"{path}: {error}") from error
    proxies = root.section("proxies", may_be_empty=True)
    for actor in proxies.keys():  # noqa: SIM118  # not a dict
        entry = proxies.section(actor)
        peer = entry.parsed("peer", None, PeerId.from_text)
        service = entry.parsed("service", None, ServiceName)
        listen = entry.parsed("listen", None, _listen)
        peer_name = entry.text("peer_name", str(peer))
        only_me = entry.boolean("only_me", False)
        if peer is not None and service is not None and listen is not None:
            found.append(DesiredProxy(str(actor), peer, peer_name, str(service), listen, only_me))
        elif not problems:
            proxies.problem(actor, "needs peer, service and listen")
    if problems:
        raise ProxiesFileError("; ".join(f"{path}: {problem}" for problem in problems))
    return tuple(found)


def save_proxies(path: Path, proxies: Sequence[DesiredProxy]) -> None:
    """Replace the file.

    Raises:
        FileError: it cannot be written; the old one is unharmed.
    """
    values = {
        proxy.actor: {
            "peer": str(proxy.peer),
            "peer_name": proxy.peer_name,
            "service": proxy.service,
            "listen": proxy.listen,
            **({"only_me": True} if proxy.only_me else {}),
        }
        for proxy in proxies
    }
    write_atomic(path, (_HEADER + render_entry("proxies", values, 0)).encode(), mode=0o600)


def _listen(text: str) -> str:
    check_proxy_listen(text)
    return text
