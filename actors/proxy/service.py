"""The serving side of a tunnel: streams of peers continue as connections to a local TCP service.

The actor `service/<name>`. Where the service is on the loopback interface, the switchboard is told the address and
connects by itself (decision 9). Each other stream, and each whose connection the kernel does not make at once, the
switchboard offers, having asked the policy; the service is connected, and the socket given to the switchboard, where it
lives from then on, whatever becomes of this process. A service that is not there resets the stream with a code that the
client side can put into words.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from collections.abc import Sequence

import trio

from actors.proxy.tunnels import MAX_TUNNELS, SWITCHBOARD, Tunnels, reset_on_close
from actors.reactor import WRITE, Reactor
from actors.sockets import fit_for_loopback
from protocol.messages import Data, Descriptor
from protocol.messages.doors import ServeAt
from protocol.messages.switchboard import AttachSocket, RejectStream, ServeProtocol, StreamOffered, StreamReport
from protocol.messages.system import ActorDown, ActorUp
from protocol.service import ServiceAddress, service_protocol
from protocol.stream_descriptor import ResetCode
from supervisor.actor import Actor, Checkpoint, handles
from supervisor.errors import ActorRestartingError, DeadlineExceededError, NoSuchActorError, RefusedError
from supervisor.timers import Timer

CONNECT_DEADLINE = 10.0
"""Seconds for the service to accept, as in peer-up."""
RESOLVE_DEADLINE = 5.0
"""Seconds for the name of the service's host to resolve."""
SERVE_DEADLINE = 5.0
"""Seconds for the switchboard to note what we serve."""

Target = tuple[int, tuple[str, int]]
"""An address family and what `connect` takes."""


class ServiceServer(Actor):
    """See the module.

    Arguments:
        name: the service's name.
        address: `host:port` of the local TCP service.
        limit: concurrent connections; more are refused.
    """

    def __init__(self, name: str, address: str, limit: int = MAX_TUNNELS) -> None:
        self._name = name
        self._protocol = service_protocol(name)
        self._address = ServiceAddress.parse(address)
        self._targets = _targets_without_lookup(self._address)
        self._looked_up_for: list[str] = []  # streams that wait for the lookup under way
        self._limit = limit
        self._serving = False

    async def start(self, checkpoint: Checkpoint | None) -> dict[str, Data]:
        """Tell the switchboard what we serve."""
        context = self.context
        self._reactor = Reactor(context.now)
        self._tunnels = Tunnels(context, self._reactor, self._name, "server", limit=self._limit)
        context.nursery.start_soon(self._reactor.run)
        context.watch(SWITCHBOARD)
        await self._tunnels.adopt()
        await self._serve()
        return {"address": str(self._address)}

    async def stop(self, reason: str) -> None:
        """Reset what runs."""
        await self._tunnels.close()

    def describe(self) -> dict[str, Data]:
        """What it serves and what runs."""
        return {
            "service": self._name,
            "address": str(self._address),
            "registered": self._serving,
            **self._tunnels.describe(),
        }

    @handles(ActorUp)
    async def actor_up(self, message: ActorUp) -> None:
        """A new switchboard does not know what we serve."""
        self._tunnels.switchboard_back(message.incarnation)
        await self._serve()

    @handles(ActorDown)
    async def actor_down(self, message: ActorDown) -> None:
        """Attached streams ended with it."""
        self._serving = False
        self._tunnels.switchboard_lost()

    @handles(StreamOffered)
    async def stream_offered(self, message: StreamOffered) -> None:
        """Connect a stream to the service."""
        if self.context.current_sender != SWITCHBOARD:
            return
        if not self._tunnels.reserve():
            self._tunnels.refused(f"{self._limit} connections are open, the limit", "limit-exceeded")
            self.context.tell(SWITCHBOARD, RejectStream(message.stream_id, int(ResetCode.LIMIT_EXCEEDED)))
            return
        self._tunnels.attached(message.stream_id, message.peer, message.path)
        if self._targets:
            _Attempt(self, message.stream_id, self._targets)
        else:
            self._looked_up_for.append(message.stream_id)
            if len(self._looked_up_for) == 1:
                self.context.nursery.start_soon(self._look_up)

    @handles(StreamReport)
    async def stream_report(self, report: StreamReport) -> None:
        """What attached streams carried, and how they ended."""
        if self.context.current_sender != SWITCHBOARD:
            raise RefusedError("not-allowed", "only the switchboard tells of streams")
        self._tunnels.reported(report)

    async def _serve(self) -> None:
        try:
            await self.context.ask(SWITCHBOARD, ServeProtocol(self._protocol, attach=True), timeout=SERVE_DEADLINE)
            await self._serve_at()
        except (ActorRestartingError, NoSuchActorError) as error:
            self.context.log.debug("the switchboard is not there, its start brings another try: {}", error)
        except DeadlineExceededError as error:  # it is there, so no ActorUp will come
            self.context.log.warning("asking the switchboard again: {}", error)
            self.context.nursery.start_soon(self._serve)
        else:
            self._serving = True

    async def _serve_at(self) -> None:
        addresses = _on_loopback(self._targets)
        if not addresses:
            return
        try:
            await self.context.ask(SWITCHBOARD, ServeAt(self._protocol, addresses, self._limit), timeout=SERVE_DEADLINE)
        except RefusedError as error:  # it was replaced between the two; its start brings another try
            self.context.log.debug("streams are connected here: {}", error)

    async def _look_up(self) -> None:
        """Look the service's host up once for all streams that wait for it.

        So a peer that opens many streams, or a slow name server, takes one thread and one query at a time; else the
        streams of others would wait for those of that peer.
        """
        targets: list[Target] = []
        reason = "no address"
        try:
            with trio.fail_after(RESOLVE_DEADLINE):
                answers = await trio.socket.getaddrinfo(self._address.host, self._address.port, type=socket.SOCK_STREAM)
            targets = [
                (family, (str(sockaddr[0]), int(sockaddr[1])))
                for family, _, _, _, sockaddr in answers
                if family in (socket.AF_INET, socket.AF_INET6)
            ]
        except (OSError, UnicodeError, trio.TooSlowError) as error:
            reason = str(error) or "no answer in time"
        waiting, self._looked_up_for = self._looked_up_for, []
        for stream_id in waiting:
            if targets:
                _Attempt(self, stream_id, targets)
            else:
                self.unreachable(stream_id, f"the name {self._address.host} cannot be resolved: {reason}")

    # ---- what an attempt calls

    def connected(self, local: socket.socket, stream_id: str) -> None:
        """The service has accepted: have the bytes carried."""
        reset_on_close(local)
        if self._tunnels.has_attached(stream_id):
            self.context.tell(SWITCHBOARD, AttachSocket(stream_id, Descriptor(local.detach())))
        else:
            local.close()  # the stream was over before

    def unreachable(self, stream_id: str, reason: str) -> None:
        """The service has not accepted: tell the peer."""
        self.context.tell(SWITCHBOARD, RejectStream(stream_id, int(ResetCode.SERVICE_UNREACHABLE)))
        self._tunnels.attach_failed(
            stream_id,
            f"the service {self._name} at {self._address} cannot be reached: {reason}",
            "service-unreachable",
        )

    @property
    def reactor(self) -> Reactor:
        """Where attempts wait."""
        return self._reactor


class _Attempt:
    """Connects to the service at one address after another, by callbacks: no task, no wake-up where none is needed."""

    __slots__ = ("_local", "_owner", "_stream_id", "_targets", "_timer")

    def __init__(self, owner: ServiceServer, stream_id: str, targets: Sequence[Target]) -> None:
        self._owner = owner
        self._stream_id = stream_id
        self._targets = list(targets)
        self._local: socket.socket | None = None
        self._timer: Timer | None = None
        self._next("no address")

    def _next(self, reason: str) -> None:
        while self._targets:
            family, sockaddr = self._targets.pop(0)
            try:
                local = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
            except OSError as error:
                reason = _words(error.errno)
                continue
            try:
                fit_for_loopback(local, str(sockaddr[0]))
                number = local.connect_ex(sockaddr)
                if number == errno.EINPROGRESS:
                    self._wait(local)
                    return
            except OSError as error:  # the zone of an IPv6 address is not there, or the kernel has no memory
                local.close()
                reason = error.strerror or str(error)
                continue
            if number == 0:
                self._owner.connected(local, self._stream_id)
                return
            local.close()
            reason = _words(number)
        self._owner.unreachable(self._stream_id, reason)

    def _wait(self, local: socket.socket) -> None:
        reactor = self._owner.reactor
        reactor.register(local.fileno(), WRITE, self._decided, self._failed)
        self._local = local
        self._timer = reactor.call_later(CONNECT_DEADLINE, self._too_slow)

    def _decided(self, _: int) -> None:
        local = self._take()
        number = local.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number:
            local.close()
            self._next(_words(number))
        else:
            self._owner.connected(local, self._stream_id)

    def _too_slow(self) -> None:
        self._take().close()
        self._next(f"no answer within {CONNECT_DEADLINE:g} s")

    def _failed(self, error: Exception) -> None:
        if self._local is not None:
            self._take().close()
        self._next(str(error))

    def _take(self) -> socket.socket:
        local, self._local = self._local, None
        assert local is not None
        assert self._timer is not None
        self._timer.cancel()
        self._owner.reactor.unregister(local.fileno())
        return local


def _targets_without_lookup(address: ServiceAddress) -> tuple[Target, ...]:
    if address.host == "localhost":
        return (socket.AF_INET, ("127.0.0.1", address.port)), (socket.AF_INET6, ("::1", address.port))
    try:
        version = ipaddress.ip_address(address.host.partition("%")[0]).version
    except ValueError:
        return ()
    return ((socket.AF_INET if version == 4 else socket.AF_INET6, (address.host, address.port)),)


def _on_loopback(targets: Sequence[Target]) -> tuple[str, ...]:
    """The addresses of a service that is on the loopback interface; none of any other."""
    if not all(ipaddress.ip_address(host.partition("%")[0]).is_loopback for _, (host, _) in targets):
        return ()
    return tuple(str(ServiceAddress(host, port)) for _, (host, port) in targets)


def _words(number: int | None) -> str:
    return os.strerror(number).lower() if number else "unknown failure"
