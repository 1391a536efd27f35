"""What the kernel tells of this machine's networks (rtnetlink(7)): what there is, and that something has changed.

Only reading. What there is is told as a set of facts in words, such as `address 192.168.1.2 on eth0`: two states are
compared as sets, and the difference is the explanation. Facts are left out that change without meaning anything for
connections: lifetimes of IPv6 addresses, signal strengths, links without addresses.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import struct
from collections.abc import Iterator
from typing import Final

from protocol.errors import PeerupError

GROUPS: Final = 0x1 | 0x10 | 0x40 | 0x100 | 0x400
"""RTMGRP_LINK, RTMGRP_IPV4_IFADDR, RTMGRP_IPV4_ROUTE, RTMGRP_IPV6_IFADDR, RTMGRP_IPV6_ROUTE."""

RECEIVE: Final = 64 * 1024
"""Bytes of one read; the kernel's messages are shorter."""

MAX_DUMP: Final = 4 * 1024 * 1024
"""Bytes of one answer. A router with more routes than fit is not a machine that moves between networks."""

DUMP_TIMEOUT: Final = 2.0
"""Seconds for the kernel to go on with an answer, which takes it microseconds."""

_NEWLINK, _DELLINK, _GETLINK = 16, 17, 18
_NEWADDR, _DELADDR, _GETADDR = 20, 21, 22
_NEWROUTE, _DELROUTE, _GETROUTE = 24, 25, 26
_ERROR, _DONE = 2, 3
_REQUEST_DUMP = 0x1 | 0x300
_HEADER = struct.Struct("=IHHII")
_LINK = struct.Struct("=BxHiII")
_ADDRESS = struct.Struct("=BBBBi")
_ROUTE = struct.Struct("=BBBBBBBBI")
_ATTRIBUTE = struct.Struct("=HH")

_RUNNING = 0x40
_UNIVERSE = 0
_NOT_YET_USABLE = 0x40 | 0x08  # IFA_F_TENTATIVE, IFA_F_DADFAILED
_UNICAST = 1
_LOCAL_TABLE = 255
_NEARLY_ALL = 1  # bits of a prefix: 0.0.0.0/1 and 128.0.0.0/1 are how some VPNs write a default route


class NetlinkError(PeerupError):
    """The kernel does not tell."""

    code = "netlink"


class Networks:
    """What there is on this machine.

    Attributes:
        facts: each a few words.
    """

    def __init__(self) -> None:
        self.facts: frozenset[str] = frozenset()
        self._names: dict[int, str] = {}

    def read(self) -> frozenset[str]:
        """Ask the kernel anew; the new facts.

        Raises:
            NetlinkError: it does not answer.
        """
        try:
            links = list(_dump(_GETLINK, _LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0)))
            addresses = list(_dump(_GETADDR, _ADDRESS.pack(socket.AF_UNSPEC, 0, 0, 0, 0)))
            routes = list(_dump(_GETROUTE, _ROUTE.pack(socket.AF_UNSPEC, 0, 0, 0, 0, 0, 0, 0, 0)))
        except OSError as error:
            raise NetlinkError(f"the kernel does not tell of its networks: {error}") from error
        self._names = {}
        running = []
        for _, body in links:
            _, _, index, flags, _ = _LINK.unpack_from(body)
            self._names[index] = _text(_attributes(body, _LINK.size).get(3)) or f"link {index}"
            if flags & _RUNNING:
                running.append(index)
        found = {fact for _, body in addresses if (fact := self._address(body))}
        with_address = {fact.rpartition(" ")[2] for fact in found}
        found.update(self._carrier(index) for index in running if self._names[index] in with_address)
        found.update(fact for _, body in routes if (fact := self._route(body)))
        self.facts = frozenset(found)
        return self.facts

    def lost(self, data: bytes) -> Iterator[str]:
        """The facts that these messages of the kernel's put an end to, even if they may hold again by now."""
        for kind, body in _messages(data):
            fact = None
            if kind == _DELADDR:
                fact = self._address(body)
            elif kind == _DELROUTE:
                fact = self._route(body)
            elif kind in (_NEWLINK, _DELLINK) and len(body) >= _LINK.size:
                _, _, index, flags, _ = _LINK.unpack_from(body)
                fact = self._carrier(index) if kind == _DELLINK or not flags & _RUNNING else None
            if fact in self.facts:
                yield fact

    def _carrier(self, index: int) -> str:
        return f"carrier on {self._name(index)}"

    def _address(self, body: bytes) -> str | None:
        if len(body) < _ADDRESS.size:
            return None
        family, _, flags, scope, index = _ADDRESS.unpack_from(body)
        found = _attributes(body, _ADDRESS.size)
        if 8 in found and len(found[8]) == 4:  # IFA_FLAGS, the same with more room
            flags = int.from_bytes(found[8], "little")
        host = _host(family, found.get(2) or found.get(1))  # IFA_LOCAL, IFA_ADDRESS
        if scope != _UNIVERSE or flags & _NOT_YET_USABLE or host is None or host.is_loopback:
            return None
        return f"address {host} on {self._name(index)}"

    def _route(self, body: bytes) -> str | None:
        if len(body) < _ROUTE.size:
            return None
        family, bits, _, _, table, _, _, kind, _ = _ROUTE.unpack_from(body)
        found = _attributes(body, _ROUTE.size)
        if bits > _NEARLY_ALL or kind != _UNICAST or table == _LOCAL_TABLE:
            return None
        gateway = _host(family, found.get(5))
        words = "IPv6 default route" if family == socket.AF_INET6 else "default route"
        if bits:
            words = f"route to {_host(family, found.get(1))}/{bits}"
        if gateway is not None:
            words += f" via {gateway}"
        if 9 in found:  # RTA_MULTIPATH
            words += " over several links"
        return f"{words} on {self._name(int.from_bytes(found.get(4, b''), 'little', signed=True))}"

    def _name(self, index: int) -> str:
        return self._names.get(index) or f"link {index}"


def open_events() -> socket.socket:
    """A socket that becomes readable when something has changed. Reading may raise ENOBUFS: messages were lost.

    Raises:
        NetlinkError: the kernel, or a sandbox around this process, does not let us.
    """
    sock = None
    try:
        sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        sock.bind((0, GROUPS))
        sock.setblocking(False)
    except OSError as error:
        if sock is not None:
            sock.close()
        raise NetlinkError(f"changes of the network cannot be watched: {error}") from error
    return sock


def _dump(kind: int, request: bytes) -> Iterator[tuple[int, bytes]]:
    """The messages that answer a request for all there is."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as sock:
        sock.settimeout(DUMP_TIMEOUT)
        sock.bind((0, 0))
        sock.sendto(_HEADER.pack(_HEADER.size + len(request), kind, _REQUEST_DUMP, 1, 0) + request, (0, 0))
        length = 0
        while length < MAX_DUMP:
            data = sock.recv(RECEIVE)
            length += len(data)
            for found, body in _messages(data):
                if found == _DONE:
                    return
                if found == _ERROR:
                    raise OSError(-int.from_bytes(body[:4], "little", signed=True), "refused")
                yield found, body


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Type and body of each message; what is cut off is left out."""
    position = 0
    while position + _HEADER.size <= len(data):
        length, kind, _, _, _ = _HEADER.unpack_from(data, position)
        if length < _HEADER.size or position + length > len(data):
            return
        yield kind, data[position + _HEADER.size : position + length]
        position += (length + 3) & ~3


def _attributes(body: bytes, position: int) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    while position + _ATTRIBUTE.size <= len(body):
        length, kind = _ATTRIBUTE.unpack_from(body, position)
        if length < _ATTRIBUTE.size or position + length > len(body):
            break
        found[kind & 0x3FFF] = body[position + _ATTRIBUTE.size : position + length]
        position += (length + 3) & ~3
    return found


def _host(family: int, packed: bytes | None) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    with contextlib.suppress(ValueError):
        if family == socket.AF_INET and packed is not None:
            return ipaddress.IPv4Address(packed)
        if family == socket.AF_INET6 and packed is not None:
            return ipaddress.IPv6Address(packed)
    return None


def _text(packed: bytes | None) -> str:
    return (packed or b"").rstrip(b"\0").decode("utf-8", "replace")
