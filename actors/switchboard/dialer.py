"""From a peer's addresses to one connection.

Theory of operation (in the manner of RFC 8305, "happy eyeballs"). The addresses are ranked; an attempt starts for the
first, and for each further one when the one before has failed or after a head start of `HEAD_START` seconds. The first
attempt that ends with a proven connection wins and the others are cancelled. All who ask for the same peer meanwhile
share one dial; it is bounded by its own deadline, and an asker who goes away does not end it for the others. What
happened at each address is told in words, in success and in failure.

Relayed addresses run in a lane of their own. It begins when all direct attempts have failed, or after a head start of
`RELAY_HEAD_START` seconds; at once where there is no direct address, or where a relay was what worked last. Within its
lane the address that worked last is tried first.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Generic, TypeVar

import trio

from actors.switchboard.errors import (
    NoAddressesError,
    NotAuthorisedError,
    SwitchboardError,
    TooManyError,
    UnreachableError,
    WrongPeerError,
)
from protocol.dialing import MAX_ADDRESSES, MAX_RELAYED
from protocol.errors import PeerupError
from protocol.multiaddr import Multiaddr
from protocol.peer_id import PeerId

HEAD_START = 0.25
"""Seconds before the next address is tried beside the one that has not answered (RFC 8305, section 8)."""
RELAY_HEAD_START = 0.25
"""Seconds that direct addresses have before relays are tried beside them: what one takes across a continent."""
MAX_WORKED = 256
"""Peers of which it is remembered what worked; the one dialled longest ago is forgotten first."""
DIAL_DEADLINE = 15.0
"""Seconds for one dial of all addresses."""
MAX_ATTEMPTS = 8
"""Attempts of one dial that run at once."""

_VERDICTS = (WrongPeerError, NotAuthorisedError, TooManyError)

C = TypeVar("C")
R = TypeVar("R")


@dataclasses.dataclass(frozen=True)
class Dialed(Generic[R]):
    """A successful dial: the connection, the seconds it took, and each attempt in words."""

    connection: R
    elapsed: float
    tried: tuple[str, ...]


class _Dial(Generic[R]):
    """One dial under way and where its result goes.

    `add` has it try further addresses, too; `begin_anew` has it give up its attempts and start with all addresses.
    """

    def __init__(self) -> None:
        self.done = trio.Event()
        self.add: Callable[[Sequence[Multiaddr]], None] = _too_early
        self.begin_anew: Callable[[], None] = lambda: None
        self.result: Dialed[R] | SwitchboardError | None = None


def rank(address: Multiaddr) -> tuple[int, int]:
    """The place of an address in the order of attempts: same machine, LAN, IPv6, IPv4, names.

    At each of these first the ways with less upon them: TCP, then WebSocket, then WebSocket in TLS.
    """
    return _nearness(address), len(address.components)


def _nearness(address: Multiaddr) -> int:
    host = address.ip
    if host is None:
        return 4
    if host.is_loopback:
        return 0
    if host.is_private or host.is_link_local:
        return 1
    return 2 if host.version == 6 else 3


def _too_early(_: Sequence[Multiaddr]) -> None:
    """The race has not begun, or is over."""


class Dialer(Generic[C, R]):
    """Dials peers.

    Args:
        nursery: where dials run; it outlives the askers.
        resolve: the concrete addresses behind one that may hold a name.
        attempt: reaches exactly this peer at this (concrete) address, or raises a :class:`PeerupError`.
        establish: makes a connection of the attempt that won.
        discard: disposes of an attempt that came too late.
        now: the clock.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        *,
        resolve: Callable[[Multiaddr], Awaitable[Sequence[Multiaddr]]],
        attempt: Callable[[PeerId, Multiaddr], Awaitable[C]],
        establish: Callable[[C], R],
        discard: Callable[[C], None],
        now: Callable[[], float],
        head_start: float = HEAD_START,
        relay_head_start: float = RELAY_HEAD_START,
        deadline: float = DIAL_DEADLINE,
    ) -> None:
        self._nursery = nursery
        self.resolve = resolve
        self.attempt = attempt
        self._establish = establish
        self.discard = discard
        self.now = now
        self.head_start = head_start
        self.relay_head_start = relay_head_start
        self._deadline = deadline
        self._dials: dict[PeerId, _Dial[R]] = {}
        self._worked: OrderedDict[PeerId, Multiaddr] = OrderedDict()

    @property
    def dialing(self) -> frozenset[PeerId]:
        """Peers with a dial under way."""
        return frozenset(self._dials)

    def begin_anew(self) -> None:
        """The network has changed: what was sent over the old one will not be answered."""
        for dial in self._dials.values():
            dial.begin_anew()

    async def dial(self, peer: PeerId, addresses: Sequence[Multiaddr]) -> Dialed[R]:
        """A connection to the peer at one of these addresses; joins a dial that is already under way.

        Raises:
            NoAddressesError: there is nothing to dial.
            WrongPeerError: everything that answered was somebody else.
            UnreachableError: nothing led to a connection.
        """
        dial = self._dials.get(peer)
        if dial is not None:
            dial.add(addresses)
        else:
            if not addresses:
                raise NoAddressesError("no address of the peer is known")
            dial = self._dials[peer] = _Dial()
            self._nursery.start_soon(self._run, peer, tuple(addresses), dial)
        await dial.done.wait()
        if isinstance(dial.result, Dialed):
            return dial.result
        assert dial.result is not None
        raise dial.result

    async def _run(self, peer: PeerId, addresses: Sequence[Multiaddr], dial: _Dial[R]) -> None:
        try:
            dial.result = UnreachableError("the dial was cancelled")
            dial.result = await self._race(peer, addresses, dial)
        except SwitchboardError as error:
            dial.result = error
        finally:
            del self._dials[peer]
            dial.done.set()

    async def _race(self, peer: PeerId, addresses: Sequence[Multiaddr], dial: _Dial[R]) -> Dialed[R]:
        began = self.now()
        known = list(addresses)
        again = True
        while again:
            again = False
            with trio.move_on_after(self._deadline) as deadline:
                async with trio.open_nursery() as nursery:
                    race = _Race(self, peer, nursery)

                    def add(more: Sequence[Multiaddr], race: _Race[C] = race) -> None:
                        known.extend(more)
                        race.add(more)

                    def begin_anew(race: _Race[C] = race, scope: trio.CancelScope = nursery.cancel_scope) -> None:
                        nonlocal again
                        if not race.winner:
                            again = True
                            scope.cancel()

                    dial.add, dial.begin_anew = add, begin_anew
                    race.start(known)
            again = again and not race.winner
        if race.winner:
            self._remember(peer, race.won_at)
            return Dialed(self._establish(race.winner[0]), self.now() - began, tuple(race.tried.values()))
        verdict = next((error for error in race.failures if isinstance(error, _VERDICTS)), None)
        if verdict is not None and all(type(error) is type(verdict) for error in race.failures):
            raise verdict  # every address that answered says the same, and it is more than "unreachable"
        reason = f"no answer within {self._deadline:g} s" if deadline.cancelled_caught else "no address answered"
        raise UnreachableError(reason, tuple(race.tried.values()))

    def lanes(self, peer: PeerId, addresses: Sequence[Multiaddr]) -> tuple[list[Multiaddr], list[Multiaddr]]:
        """The direct and the relayed ones of these addresses, each in the order of attempts."""
        worked = self._worked.get(peer)
        ranked = sorted(dict.fromkeys(addresses), key=lambda address: (address != worked, rank(address)))
        direct = [address for address in ranked if not address.is_relayed]
        return direct[:MAX_ADDRESSES], [address for address in ranked if address.is_relayed][:MAX_RELAYED]

    def relay_worked(self, peer: PeerId) -> bool:
        """Whether the last dial of the peer ended with a relayed connection."""
        worked = self._worked.get(peer)
        return worked is not None and worked.is_relayed

    def _remember(self, peer: PeerId, address: Multiaddr) -> None:
        self._worked[peer] = address
        self._worked.move_to_end(peer)
        if len(self._worked) > MAX_WORKED:
            self._worked.popitem(last=False)


class _Race(Generic[C]):
    """The attempts of one dial, in a nursery that closes when none is left or one has won.

    Attributes:
        tried: what became of each address, in words, in the order of the attempts.
    """

    def __init__(self, dialer: Dialer[C, Any], peer: PeerId, nursery: trio.Nursery) -> None:
        self.tried: dict[Multiaddr, str] = {}
        self.failures: list[PeerupError] = []
        self.winner: list[C] = []
        self.won_at: Multiaddr
        self._dialer = dialer
        self._peer = peer
        self._nursery = nursery
        self._room = trio.CapacityLimiter(MAX_ATTEMPTS)
        self._working = 0  # tasks in the nursery; without any it is closing, and takes no more

    def start(self, addresses: Sequence[Multiaddr]) -> None:
        """Try these, one after another with head starts."""
        direct, relayed = self._dialer.lanes(self._peer, addresses)
        over = trio.Event()
        if direct:
            self._spawn(self._run_lane, direct, over)
        if relayed:
            wait = direct and not self._dialer.relay_worked(self._peer)
            self._spawn(self._run_relayed, relayed, over if wait else None)

    def add(self, addresses: Sequence[Multiaddr]) -> None:
        """Try these, too, unless the race is over."""
        if self._working:
            self.start(addresses)

    def _spawn(self, function: Callable[..., Awaitable[None]], *arguments: object) -> None:
        self._working += 1
        self._nursery.start_soon(self._run, function, arguments)

    async def _run(self, function: Callable[..., Awaitable[None]], arguments: tuple[object, ...]) -> None:
        try:
            await function(*arguments)
        finally:
            self._working -= 1

    async def _run_lane(self, addresses: Sequence[Multiaddr], over: trio.Event) -> None:
        await self._launch(addresses)
        over.set()

    async def _run_relayed(self, addresses: Sequence[Multiaddr], after: trio.Event | None) -> None:
        if after is not None:
            with trio.move_on_after(self._dialer.relay_head_start):
                await after.wait()
        await self._launch(addresses)

    async def _launch(self, addresses: Sequence[Multiaddr]) -> None:
        """Start an attempt at each; return when all have ended."""
        attempts = []
        for address in addresses:
            if address not in self.tried:
                self.tried[address] = f"{address}: no answer"
                ended = trio.Event()
                attempts.append(ended)
                self._spawn(self._attempt, address, ended)
                with trio.move_on_after(self._dialer.head_start):
                    await ended.wait()
        for ended in attempts:
            await ended.wait()

    async def _attempt(self, address: Multiaddr, ended: trio.Event) -> None:
        dialer = self._dialer
        began = dialer.now()
        try:
            async with self._room:
                concrete = await dialer.resolve(address)
                if list(concrete) == [address]:
                    self._win(await dialer.attempt(self._peer, address), address)
                    self.tried[address] = f"{address}: connected in {(dialer.now() - began) * 1000:.0f} ms"
                    return
            self.tried[address] = f"{address}: {', '.join(map(str, concrete))}"
            await self._launch(sorted(concrete, key=rank))
        except PeerupError as error:
            self.tried[address] = f"{address}: {error}"
            self.failures.append(error)
        finally:
            ended.set()

    def _win(self, candidate: C, address: Multiaddr) -> None:
        if self.winner:
            self._dialer.discard(candidate)
        else:
            self.won_at = address
            self.winner.append(candidate)
            self._nursery.cancel_scope.cancel()
