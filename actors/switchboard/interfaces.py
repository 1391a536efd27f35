"""The IP addresses of this machine, for listeners that are bound to all of them."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import socket
import struct
from pathlib import Path

from protocol.multiaddr import Multiaddr

_SIOCGIFADDR = 0x8915
_IF_INET6 = Path("/proc/net/if_inet6")


def machine_addresses(*, link_local: bool = False) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """The addresses of all interfaces; IPv6 link-local ones, useless without an interface's name, only if asked for."""
    found: list[ipaddress.IPv4Address | ipaddress.IPv6Address] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            # An interface without an IPv4 address, or one that has just gone, is an OSError.
            with contextlib.suppress(OSError):
                reply = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                found.append(ipaddress.IPv4Address(reply[20:24]))
    with contextlib.suppress(OSError), _IF_INET6.open(encoding="ascii") as table:  # absent where IPv6 is off
        for line in table:
            address = ipaddress.IPv6Address(bytes.fromhex(line.split()[0]))
            if link_local or not address.is_link_local:
                found.append(address)
    return list(dict.fromkeys(found))


def expand(listening: Multiaddr) -> list[Multiaddr]:
    """The addresses that others can use for one that we listen on: `0.0.0.0` and `::` stand for each interface's own.

    Loopback addresses are left out there, for they mean something else on each machine.
    """
    endpoint, ip = listening.endpoint, listening.ip
    if endpoint is None or ip is None or not ip.is_unspecified:
        return [listening]
    rest = listening.components[2:]
    return [
        Multiaddr.from_components(
            (*Multiaddr.from_endpoint(str(address), endpoint.port, endpoint.transport).components, *rest)
        )
        for address in machine_addresses()
        if address.version == ip.version and not address.is_loopback
    ]
