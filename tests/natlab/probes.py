"""Our own probes: find out from inside what a NAT does, with two servers of two ports each (RFC 5780's idea).

All sockets belong to the test's process, inside host and servers alike, so a probe sees both ends at once: what the
server sees as the source is the mapping, with no protocol in between that could hide a mistake. That a packet does
*not* arrive is shown by one that was sent later and did.
"""

from __future__ import annotations

import contextlib
import dataclasses
import socket
from collections.abc import Iterator

from tests.natlab.behaviour import Filtering, Mapping
from tests.natlab.lab import Host, Lab
from tests.natlab.namespaces import LabError

ANSWER = 5.0  # seconds for what must arrive
GRACE = 0.03  # seconds that a stray packet gets after a later one has arrived; without load it needs 0.0001
PORTS = (3478, 3479)

Address = tuple[str, int]


class Servers:
    """Two public addresses with two ports each, for UDP and TCP; the order is address 0 with both ports, address 1."""

    def __init__(self, lab: Lab, name: str = "servers") -> None:
        self.host = lab.host(name)
        self.host.uplink.add_address()
        self.addresses: list[Address] = [
            (str(address), port) for address in self.host.uplink.addresses for port in PORTS
        ]

    @contextlib.contextmanager
    def udp(self) -> Iterator[list[socket.socket]]:
        """The four bound UDP sockets."""
        with contextlib.ExitStack() as stack:
            yield [stack.enter_context(self.host.udp(port, address)) for address, port in self.addresses]

    @contextlib.contextmanager
    def tcp(self) -> Iterator[list[socket.socket]]:
        """The four listening TCP sockets."""
        with contextlib.ExitStack() as stack:
            listeners = []
            for address in self.addresses:
                listener = stack.enter_context(self.host.socket(socket.SOCK_STREAM))
                listener.settimeout(ANSWER)
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(address)
                listener.listen()
                listeners.append(listener)
            yield listeners


@dataclasses.dataclass(frozen=True)
class Seen:
    """What the probes saw of one UDP socket.

    Attributes:
        sources: the outside addresses from which it reached the four server ports, in the order of `Servers.addresses`.
    """

    mapping: Mapping
    filtering: Filtering
    sources: tuple[Address, ...]
    inside: Address


def exchange(client: socket.socket, server: socket.socket, payload: bytes = b"?", *, tries: int = 3) -> Address:
    """Send from client to server and back; returns the source that the server saw.

    Raises:
        LabError: nothing came through, in some tries.
    """
    to = server.getsockname()[:2]
    for _ in range(tries):
        client.sendto(payload, to)
        try:
            got, source = server.recvfrom(65536)
            while got != payload:
                got, source = server.recvfrom(65536)
            server.sendto(payload, source)
            while True:
                got, answering = client.recvfrom(65536)
                if got == payload and answering[:2] == to:
                    break
        except TimeoutError:
            continue
        return source[0], source[1]
    raise LabError(f"nothing goes from {client.getsockname()} to {to} and back")


def reaches(
    sender: socket.socket,
    to: Address,
    receiver: socket.socket,
    *,
    fence: socket.socket,
    fence_to: Address | None = None,
) -> bool:
    """Whether a packet from `sender` to `to` comes out at `receiver`.

    Args:
        fence: a socket whose packets to `fence_to` (or `to`, if not given) certainly do.
    """
    while True:  # what earlier probes left
        receiver.settimeout(0.0001)
        try:
            receiver.recv(65536)
        except TimeoutError:
            break
    sender.sendto(b"stray", to)
    fence.sendto(b"fence", fence_to or to)
    receiver.settimeout(ANSWER)
    found = False
    try:
        while True:
            match receiver.recv(65536):
                case b"stray":
                    return True
                case b"fence":
                    found = True
                    receiver.settimeout(GRACE)
    except TimeoutError:
        if not found:
            raise LabError("the packet that certainly arrives did not") from None
    finally:
        receiver.settimeout(ANSWER)
    return False


def judge_mapping(sources: tuple[Address, ...]) -> Mapping:
    """The mapping behaviour that gives these sources for (address, port), (address, other port), (other, port)."""
    first, other_port, other_address = sources[:3]
    if first == other_port == other_address:
        return Mapping.ENDPOINT_INDEPENDENT
    if first == other_port:
        return Mapping.ADDRESS_DEPENDENT
    return Mapping.ADDRESS_AND_PORT_DEPENDENT


def probe_udp(host: Host, servers: Servers, port: int = 0) -> Seen:
    """Find out how UDP from a fresh socket of `host` is mapped and filtered."""
    with servers.udp() as ends, host.udp(port) as client, host.udp() as second:
        # Filtering first, with a socket that has written to one server port only.
        outside = exchange(second, ends[0])
        if reaches(ends[2], outside, second, fence=ends[0]):
            filtering = Filtering.ENDPOINT_INDEPENDENT
        elif reaches(ends[1], outside, second, fence=ends[0]):
            filtering = Filtering.ADDRESS_DEPENDENT
        else:
            filtering = Filtering.ADDRESS_AND_PORT_DEPENDENT
        sources = tuple(exchange(client, end) for end in ends)
        return Seen(judge_mapping(sources), filtering, sources, (host.address, client.getsockname()[1]))


def probe_tcp(host: Host, servers: Servers, port: int) -> tuple[Address, ...]:
    """The sources with which connections from one local port reach the four server ports."""
    sources: list[Address] = []
    with contextlib.ExitStack() as stack:
        for end in stack.enter_context(servers.tcp()):
            client = stack.enter_context(host.socket(socket.SOCK_STREAM))
            client.settimeout(ANSWER)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            client.bind(("0.0.0.0", port))
            client.connect(end.getsockname())
            accepted, source = end.accept()
            stack.enter_context(accepted)
            sources.append((source[0], source[1]))
    return tuple(sources)


def hairpins(one: Host, other: Host, servers: Servers) -> Address | None:
    """The source with which `one` reaches `other` through the outside address that servers see; None if it does not."""
    with servers.udp() as ends, one.udp() as sender, other.udp() as receiver:
        outside = exchange(receiver, ends[0])
        exchange(sender, ends[0])
        sender.sendto(b"hairpin", outside)
        ends[0].sendto(b"fence", outside)
        source: Address | None = None
        fenced = False
        try:
            while True:
                got, at = receiver.recvfrom(65536)
                if got == b"hairpin":
                    source = at
                if fenced or got == b"fence":
                    fenced = True
                    if source:
                        return source
                    receiver.settimeout(GRACE)
        except TimeoutError:
            return source


@dataclasses.dataclass
class Connected:
    """Whether a TCP connection came about, and what the client saw when not."""

    ok: bool
    error: OSError | None = None


def connects(host: Host, to: Address, timeout: float = ANSWER) -> Connected:
    """Try to open a TCP connection."""
    family = socket.AF_INET6 if ":" in to[0] else socket.AF_INET
    with host.socket(socket.SOCK_STREAM, family) as client:
        client.settimeout(timeout)
        try:
            client.connect(to)
        except OSError as error:
            return Connected(ok=False, error=error)
    return Connected(ok=True)
