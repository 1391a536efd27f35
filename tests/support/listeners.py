"""Every socket on which a tree of processes accepts strangers, read from /proc.

What counts: TCP sockets in state LISTEN, UDP sockets that are bound and not connected (anybody may send to them),
and Unix sockets that listen. Processes in another network namespace are read through their own /proc/PID/net.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import re
import struct

from tests.support.processes import PROC, descriptors, tree

_SOCKET = re.compile(r"socket:\[(\d+)\]")
_TCP_LISTEN = "0A"
_UDP_UNCONNECTED = "07"
_UNIX_ACCEPTING = 0x10000  # __SO_ACCEPTCON


@dataclasses.dataclass(frozen=True, order=True)
class Listener:
    """One listening socket.

    Attributes:
        kind: `tcp`, `udp` or `unix`.
        address: IP address, or the path of a Unix socket (`@name` for an abstract one, empty for an unnamed one).
        port: 0 for Unix sockets.
        pids: which processes of the tree hold it.
    """

    kind: str
    address: str
    port: int
    pids: tuple[int, ...]

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return self.kind == "unix" or ipaddress.ip_address(self.address).is_loopback


def listeners(*roots: int) -> list[Listener]:
    """All listening sockets of the processes `roots` and everything below them, sorted."""
    holders: dict[int, set[int]] = {}
    for process in tree(*roots):
        for target in descriptors(process.pid).values():
            match = _SOCKET.fullmatch(target)
            if match:
                holders.setdefault(int(match[1]), set()).add(process.pid)
    found: dict[int, tuple[str, str, int]] = {}
    for namespace_pid in _one_per_network_namespace({pid for pids in holders.values() for pid in pids}):
        found.update(_read_inet(namespace_pid, "tcp", _TCP_LISTEN))
        found.update(_read_inet(namespace_pid, "udp", _UDP_UNCONNECTED))
        found.update(_read_unix(namespace_pid))
    return sorted(
        Listener(kind, address, port, tuple(sorted(holders[inode])))
        for inode, (kind, address, port) in found.items()
        if inode in holders
    )


def _one_per_network_namespace(pids: set[int]) -> list[int]:
    by_namespace: dict[str, int] = {}
    for pid in sorted(pids):
        try:
            by_namespace.setdefault(str((PROC / str(pid) / "ns" / "net").readlink()), pid)
        except FileNotFoundError:
            continue
    return list(by_namespace.values())


def _lines(pid: int, table: str) -> list[list[str]]:
    try:
        text = (PROC / str(pid) / "net" / table).read_text()
    except (FileNotFoundError, ProcessLookupError):  # no IPv6 here, or the process has just ended
        return []
    return [line.split() for line in text.splitlines()[1:]]


def _read_inet(pid: int, kind: str, state: str) -> dict[int, tuple[str, str, int]]:
    found: dict[int, tuple[str, str, int]] = {}
    for table in (kind, kind + "6"):
        for field in _lines(pid, table):
            if field[3] == state:
                address, _, port = field[1].partition(":")
                found[int(field[9])] = (kind, _decode_address(address), int(port, 16))
    return found


def _decode_address(text: str) -> str:
    """The kernel prints each 32-bit word of an address in the byte order of the machine."""
    words = [int(text[at : at + 8], 16) for at in range(0, len(text), 8)]
    address = ipaddress.ip_address(b"".join(struct.pack("=I", word) for word in words))
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return str(address)


def _read_unix(pid: int) -> dict[int, tuple[str, str, int]]:
    found: dict[int, tuple[str, str, int]] = {}
    for field in _lines(pid, "unix"):
        if int(field[3], 16) & _UNIX_ACCEPTING:
            found[int(field[6])] = ("unix", field[7] if len(field) > 7 else "", 0)
    return found
