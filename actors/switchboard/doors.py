"""Doors of this machine that the switchboard goes through by itself: it accepts for proxies, and connects to services.

Theory of operation. What decides about a tunnel, which peer and service a port leads to, which address a service has,
how many there may be, belongs to an actor (decision 9). When a tunnel is wanted, nothing is left to decide most of the
time, and to ask would cost more than all the rest. So the actor says it in advance:

    lent listener     a client connects -> accept -> a stream to the peer -> joined
    known address     a peer opens a stream -> connect -> joined

All of it happens within one callback, or not at all: where something has to be waited for or put into words (the peer
is not connected, the service does not accept at once), the actor gets the socket, or the stream, and does it. The actor
owns what was joined, and is told of it in the next report (`actors.switchboard.attached`).

While the peer has yet to accept as many streams as may be opened in advance, the next client waits a moment, and those
behind it wait in the listener's backlog, where they cost nothing. So it is when as many streams are open as the peer
takes: for `FULL` seconds somebody waits for one to end, and from then on whoever comes is turned away, until one does.

A door is open while its *lease* is: a pipe whose other end its lender holds. So it closes in the moment in which the
lender ends, however it ends, and never because of old news of a predecessor.
"""

from __future__ import annotations

import dataclasses
import errno
import ipaddress
import socket
from collections.abc import Callable
from typing import NamedTuple

from actors.local_user import user_of_caller
from actors.proxy.tunnels import MAX_TUNNELS
from actors.reactor import READ, Reactor
from actors.sockets import RESET_ON_CLOSE, fit_for_loopback, send_at_once
from actors.switchboard.attached import AttachedStreams, socket_of
from actors.switchboard.connections import Connection
from actors.switchboard.errors import SwitchboardError, TooManyError
from actors.switchboard.link import Channel
from actors.switchboard.protocols import Agreed
from actors.switchboard.streams import Negotiation, open_ahead
from protocol.errors import InvalidValueError, PeerupError
from protocol.messages import Descriptor, Message
from protocol.messages.doors import CallerAccepted, LendListener
from protocol.peer_id import PeerId
from protocol.service import ServiceAddress
from protocol.shares import share
from protocol.yamux import BacklogError, TooManyStreamsError

BATCH = 16
"""Clients accepted in a row before others get a turn: where much goes on, a round is long, and one in each too few."""
PAUSE = 0.2
"""Seconds without accepting when no descriptor is left."""
MOMENT = 0.005
"""Seconds until the next try when the peer has yet to accept other streams."""
PATIENCE = 10.0
"""Seconds of such tries; then the client's proxy finds words for it."""
FULL = 2.0
"""Seconds to wait for an end when as many streams are open as the peer takes."""
WARN_SECONDS = 60.0
"""Seconds between warnings that the same peer has its share of a service."""
TELL_AGAIN = 60.0
"""Seconds between two warnings of callers that are other users."""
MAX_ADDRESSES = 4
"""Addresses of one service: a host of this machine has two, one of each family."""


class NotAListenerError(SwitchboardError):
    """A descriptor that was lent is not a listening TCP socket."""

    code = "not-a-listener"


class NotLocalError(SwitchboardError):
    """An address of a service is not a literal one of the loopback interface."""

    code = "not-local"


class _Target(NamedTuple):
    owner: str
    addresses: tuple[tuple[socket.AddressFamily, tuple[str, int]], ...]
    limit: int


@dataclasses.dataclass(eq=False, slots=True)
class _Door:
    owner: str
    listener: socket.socket
    lease: Descriptor
    peer: PeerId
    protocol: str
    limit: int
    only_user: int | None
    waiting: socket.socket | None = None  # accepted, for the next stream that can be opened
    full_since: float | None = None  # since when there have been as many streams as the peer takes


class Doors:
    """All doors.

    Args:
        reactor: where listeners and leases are watched.
        attached: who gets the streams.
        speaking: the connection to a peer that is known to speak a protocol, if there is one.
        opened: told of each stream that was opened for a caller.
        tell: sends a message to an actor.
        warn: tells a person, in words.
    """

    def __init__(
        self,
        reactor: Reactor,
        attached: AttachedStreams,
        *,
        speaking: Callable[[PeerId, str], Connection | None],
        opened: Callable[[], None],
        tell: Callable[[str, Message], None],
        warn: Callable[[str], None],
    ) -> None:
        self._reactor = reactor
        self._attached = attached
        self._speaking = speaking
        self._opened = opened
        self._tell = tell
        self._warn = warn
        self._doors: dict[str, _Door] = {}
        self._told_wrong_user = float("-inf")
        self._targets: dict[str, _Target] = {}
        self._quiet_until: dict[tuple[str, PeerId], float] = {}

    # ---- listeners

    def lend(self, owner: str, request: LendListener) -> None:
        """Accept at this listener from now on, in place of any other of this owner's.

        Raises:
            NotAListenerError: it is not a listening TCP socket.
        """
        listener, lease = socket_of(request.listener), request.lease
        if listener is None or not _is_ready_to_accept(listener):
            if listener is not None:
                listener.close()
            lease.close()
            raise NotAListenerError("the descriptor is not a listening TCP socket")
        self.close(owner)
        door = self._doors[owner] = _Door(
            owner, listener, lease, request.peer, request.protocol, request.limit, request.only_user
        )
        self._reactor.register(lease.fileno(), READ, lambda _: self._ended(door), lambda _: self._ended(door))
        self._reactor.register(
            listener.fileno(), READ, lambda _: self._accept(door), lambda error: self._cannot_accept(door, error)
        )

    def close(self, owner: str) -> None:
        """Accept no more for this owner."""
        door = self._doors.pop(owner, None)
        if door is not None:
            self._reactor.unregister(door.listener.fileno())
            self._reactor.unregister(door.lease.fileno())
            door.listener.close()
            door.lease.close()
            if door.waiting is not None:
                door.waiting.close()

    def close_all(self) -> None:
        """Accept no more."""
        for owner in list(self._doors):
            self.close(owner)

    def describe(self) -> dict[str, str]:
        """For people: which actor's port is accepted at, and who is connected to for which protocol."""
        lent = {
            door.owner: f"accepts at port {door.listener.getsockname()[1]} for {door.protocol}"
            for door in self._doors.values()
        }
        known = {
            target.owner: f"connects to {' or '.join(f'{host} port {port}' for _, (host, port) in target.addresses)}"
            for target in self._targets.values()
        }
        return lent | known

    def _accept(self, door: _Door) -> None:
        turned_away = 0
        for _ in range(BATCH):
            try:
                sock, _address = door.listener.accept()
            except BlockingIOError:
                return
            except ConnectionAbortedError:
                continue
            sock.setblocking(False)
            if door.only_user is not None and user_of_caller(sock) != door.only_user:
                sock.close()  # with a reset
                self._tell_wrong_user(door)
                continue
            if door.full_since is not None and self._is_full(door):
                turned_away += 1
                self._turn_away(door, sock)
                continue
            if not self._attached.has_room(door.owner, door.limit):
                sock.close()  # with a reset
                self._attached.turn_away(door.owner)
            elif not self._serve(door, sock):
                door.waiting = sock
                self._reactor.modify(door.listener.fileno(), 0)
                self._try_later(door, self._reactor.clock() + PATIENCE)
                return
        if turned_away:
            # They come again at once, most likely. Until others have had their turn they wait in the backlog.
            self._pause(door)

    def _is_full(self, door: _Door) -> bool:
        """Whether there is still no room for one more stream to the peer after the time that is waited for it."""
        connection = self._speaking(door.peer, door.protocol)
        if connection is None or connection.link.session.has_room:
            door.full_since = None
        return door.full_since is not None and self._reactor.clock() - door.full_since >= FULL

    def _turn_away(self, door: _Door, sock: socket.socket) -> None:
        sock.close()  # with a reset
        self._attached.turn_away(door.owner, peer_full=True)

    def _tell_wrong_user(self, door: _Door) -> None:
        now = self._reactor.clock()
        if now - self._told_wrong_user >= TELL_AGAIN:
            self._told_wrong_user = now
            self._warn(f"{door.owner} serves its own user only, and refused a connection of another one")

    def _serve(self, door: _Door, sock: socket.socket, *, patient: bool = True) -> bool:
        """Open a stream for a client, or pass it to its proxy. False: it is worth another try."""
        connection = self._speaking(door.peer, door.protocol)
        if connection is not None:
            try:
                self._open(door, connection, sock)
            except BacklogError:
                if patient:
                    return False
            except TooManyStreamsError:
                if door.full_since is None:
                    door.full_since = self._reactor.clock()
                if not self._is_full(door):
                    return False
                self._turn_away(door, sock)
                return True
            except PeerupError:
                pass  # the slow way finds the words for it
            else:
                door.full_since = None
                self._opened()
                return True
        self._tell(door.owner, CallerAccepted(Descriptor(sock.detach())))
        return True

    def _try_later(self, door: _Door, until: float) -> None:
        self._reactor.call_later(MOMENT, lambda: self._try_again(door, until))

    def _try_again(self, door: _Door, until: float) -> None:
        if self._doors.get(door.owner) is not door or door.waiting is None:
            return
        waiting = door.waiting
        try:
            served = self._serve(door, waiting, patient=self._reactor.clock() < until)
        except OSError as error:  # no descriptor or no memory is left; from a timer that would end the process
            door.waiting = None
            waiting.close()
            self._cannot_accept(door, error)
            return
        if served:
            door.waiting = None
            self._reactor.modify(door.listener.fileno(), READ)
        else:
            self._try_later(door, until)

    def _open(self, door: _Door, connection: Connection, sock: socket.socket) -> None:
        def join(channel: Channel, negotiation: Negotiation) -> None:
            self._attached.open(
                door.owner,
                connection,
                door.protocol,
                channel,
                sock,
                negotiation=negotiation,
                known=False,
                prepared=True,
            )

        open_ahead(connection, door.protocol, self._reactor.call_later, join)

    def _cannot_accept(self, door: _Door, error: Exception) -> None:
        # Out of descriptors. Level-triggered: pause, or this loop spins.
        self._warn(f"cannot accept connections for {door.owner}: {error}")
        self._pause(door)

    def _pause(self, door: _Door) -> None:
        self._reactor.modify(door.listener.fileno(), 0)
        self._reactor.call_later(PAUSE, lambda: self._accept_again(door))

    def _accept_again(self, door: _Door) -> None:
        if self._doors.get(door.owner) is door and door.waiting is None:
            self._reactor.modify(door.listener.fileno(), READ)

    def _ended(self, door: _Door) -> None:
        if self._doors.get(door.owner) is door:
            self.close(door.owner)

    # ---- services

    def serve_at(self, owner: str, protocol: str, addresses: tuple[str, ...], limit: int) -> None:
        """Connect streams of this protocol, which `owner` serves, to the first of these addresses that accepts.

        Raises:
            NotLocalError: one of them is not on the loopback interface, or there are none, or too many.
        """
        if not 0 < len(addresses) <= MAX_ADDRESSES:
            raise NotLocalError(f"a service has 1 to {MAX_ADDRESSES} addresses")
        self._targets[protocol] = _Target(owner, tuple(_parse(address) for address in addresses), limit)

    def forget(self, protocol: str) -> None:
        """Nobody knows any more where the service of this protocol is."""
        self._targets.pop(protocol, None)

    def carry(self, connection: Connection, channel: Channel, agreed: Agreed) -> bool:
        """Join a peer's stream with a connection to its service. Whether that could be done at once.

        Raises:
            TooManyError: the owner has as many streams as it may; it will be told.
            LinkClosedError: the stream is over.
            OSError: no descriptor is left.
        """
        self._check_share(connection.peer, agreed)
        sock = self.connect(agreed.actor, agreed.protocol)
        if sock is None:
            return False
        try:
            self._attached.open(
                agreed.actor,
                connection,
                agreed.protocol,
                channel,
                sock,
                unread=agreed.unread,
                known=False,
                prepared=True,
            )
        except BaseException:
            sock.close()
            raise
        return True

    def _check_share(self, peer: PeerId, agreed: Agreed) -> None:
        """Refuse a peer that has its share of the service's connections.

        Raises:
            TooManyError: it has; a person is told, once a minute for each peer.
        """
        owner = agreed.actor
        target = self._targets.get(agreed.protocol)
        limit = MAX_TUNNELS if target is None or target.owner != owner else target.limit
        if not self._attached.has_room(owner, limit) or self._attached.has_share(owner, peer, limit):
            return
        now = self._reactor.clock()
        if now >= self._quiet_until.get((owner, peer), 0.0):
            self._quiet_until = {key: until for key, until in self._quiet_until.items() if until > now}
            self._quiet_until[owner, peer] = now + WARN_SECONDS
            self._warn(
                f"{peer} has its share of the connections of {owner} ({share(limit)} of {limit}, or of this node's"
                " descriptors); the rest is kept for others, and more of its own are refused"
            )
        raise TooManyError(f"{peer} has its share of the connections of {owner}")

    def connect(self, owner: str, protocol: str) -> socket.socket | None:
        """A socket connected to the service, ready to be attached; None: its owner has to be asked.

        Raises:
            TooManyError: the owner has as many streams as it may; it will be told.
        """
        target = self._targets.get(protocol)
        if target is None or target.owner != owner:
            return None
        if not self._attached.has_room(owner, target.limit):
            self._attached.turn_away(owner)
            raise TooManyError(f"{target.limit} streams of {owner} are open, the limit")
        for family, address in target.addresses:
            try:
                sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
            except OSError:
                return None
            try:
                fit_for_loopback(sock, address[0])
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
                send_at_once(sock)
                number = sock.connect_ex(address)
                if number == errno.EINPROGRESS:
                    # Over loopback the answer has come before the call returned; asking again tells.
                    number = sock.connect_ex(address)
            except OSError:
                number = errno.EINVAL
            if number == 0:
                return sock
            sock.close()
            if number != errno.ECONNREFUSED:
                break
        return None


def _is_ready_to_accept(sock: socket.socket) -> bool:
    """Whether this is a listening TCP socket, and it could be told what accepted ones inherit."""
    try:
        if sock.family not in (socket.AF_INET, socket.AF_INET6) or not sock.getsockopt(
            socket.SOL_SOCKET, socket.SO_ACCEPTCONN
        ):
            return False
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    except OSError:
        return False
    send_at_once(sock)
    return True


def _parse(text: str) -> tuple[socket.AddressFamily, tuple[str, int]]:
    try:
        address = ServiceAddress.parse(text)
        host = ipaddress.ip_address(address.host)
    except (InvalidValueError, ValueError) as error:
        raise NotLocalError(f"{text} is not an address on the loopback interface") from error
    if not host.is_loopback:
        raise NotLocalError(f"{text} is not an address on the loopback interface")
    return (socket.AF_INET if host.version == 4 else socket.AF_INET6), (str(host), address.port)
