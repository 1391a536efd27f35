"""The actor `relay/server`: has this node serve as a relay, by the rules of the configuration, at its public address.

Theory of operation. The relay itself is in the switchboard (`actors.switchboard.relaying`), which owns the connections;
this actor says what it grants and where it is. It follows the configuration (limits, announced addresses), the gate
(whose word about our address counts) and the switchboard, and compares what should be with what it has told, whenever
any of them has news, and each few seconds::

    rules of the configuration              --ServeRelay-->         switchboard
    announced or discovered addresses       --AnnounceAddresses-->  switchboard
    connections, and what their peers see   <--WatchConnections--   switchboard

A switchboard that was restarted is told everything anew. The end of this actor disturbs no circuit: the switchboard
goes on by the last rules. Its checkpoint holds the discovered addresses.

When the node stops this actor is stopped before the switchboard. Then it drains the relay: the ports are given up, so
that a successor may have them at once (docs/decisions/0021-restart-of-a-relay.md), nothing new is granted, clients are
told (`actors.switchboard.farewell`), open circuits get some time to end, and what is left is reset.
"""

from __future__ import annotations

import dataclasses
from typing import Final

import trio

from actors.config.relay_service import MAX_ANNOUNCED
from actors.relay.discovery import AddressDiscovery
from protocol.messages import Data
from protocol.messages.config import ConfigSnapshot, RelayService, SubscribeConfig
from protocol.messages.gate import PolicyPublished, SubscribePolicy
from protocol.messages.reachability import (
    AnnounceAddresses,
    ConnectionClosed,
    ConnectionJudged,
    ConnectionLeaving,
    ConnectionOpened,
    WatchConnections,
)
from protocol.messages.relay import (
    DrainRelay,
    ReadRelay,
    RelayRules,
    RelayServiceStatus,
    ScopedLimit,
    ServeRelay,
    StopListening,
    WithdrawRelay,
)
from protocol.messages.switchboard import ReadStatus
from protocol.messages.system import ActorDown, ActorUp, SuccessorMayStart
from protocol.multiaddr import Multiaddr
from protocol.policy import DENY_ALL, PolicyIndex
from protocol.reservations import GUEST_RULE
from supervisor.actor import Actor, Checkpoint, handles
from supervisor.boot import SERVICE
from supervisor.errors import AskError, DeadlineExceededError, RefusedError

SWITCHBOARD = "switchboard"
CONFIG = "config"
GATE = "gate"

ANSWER_DEADLINE = 3.0
"""Seconds for an answer from memory."""
TICK = 5.0
"""Seconds between looks at what the relay does, and at what could not be told before."""
RETRY = 1.0
"""Seconds until an actor that did not answer, though it is there, is asked again."""
WITHDRAW_DEADLINE = 1.0
"""Seconds for the switchboard to reset what is left when the relay stops."""
SUCCESSION = 0.7
"""Seconds that circuits get before a successor may start beside them: those that carry nothing are closed by then."""

RESTARTED: Final = "is restarted"
"""How the reason of a stop ends that is not the node's: a sibling's restart takes this actor along."""


class RelayServer(Actor):
    """See the module.

    Arguments:
        drain: seconds that open circuits get when the node stops.
    """

    def __init__(self, drain: float = 30.0) -> None:
        self._drain = drain
        self._service: RelayService | None = None
        self._config_version = 0  # of the configuration that was taken over last
        self._in_force = 0  # of the one that the switchboard goes by as well
        self._policy = DENY_ALL
        self._discovery = AddressDiscovery()
        self._listening: tuple[Multiaddr, ...] = ()
        self._missing = {CONFIG, GATE, SWITCHBOARD}  # whom it has to (re)subscribe to
        self._told_rules: RelayRules | None = None
        self._told_addresses: tuple[tuple[Multiaddr, ...], bool] | None = None
        self._refused = ""
        self._status: RelayServiceStatus | None = None
        self._status_at = 0.0
        self._news = trio.Event()
        self._saved: list[str] = []
        self._draining = False

    async def start(self, checkpoint: Checkpoint | None) -> dict[str, Data]:
        """Follow config, gate and switchboard, and have it serve."""
        if checkpoint is not None:
            self._saved = [str(ip) for ip in checkpoint.state.get("believed", [])]
            self._discovery = AddressDiscovery(self._saved)
        for name in (CONFIG, GATE, SWITCHBOARD):
            self.context.watch(name)
        await self._bring_up_to_date()
        self._news.set()
        self.context.nursery.start_soon(self._keep_up_to_date)
        return {"serving": self._told_rules is not None}

    async def stop(self, reason: str) -> None:
        """Drain the relay, if the node stops."""
        if reason.endswith(RESTARTED) or self._told_rules is None:
            return
        self._draining = True
        status = await self._read_status()
        circuits = status.circuits if status is not None else 0
        self.context.log.info(
            "the relay is shutting down: {} circuits get at most {:g} s to end; nothing new is granted",
            circuits,
            self._drain,
        )
        async with trio.open_nursery() as nursery:
            if circuits and await self._stop_listening():
                nursery.start_soon(self._let_successor_start)
            await self._drain_and_withdraw()
            nursery.cancel_scope.cancel()

    async def _drain_and_withdraw(self) -> None:
        began = self.context.now()
        try:
            await self.context.ask(SWITCHBOARD, DrainRelay(), timeout=self._drain)
        except DeadlineExceededError:
            self.context.log.info("circuits are still open after {:g} s and are reset now", self._drain)
        except AskError as error:
            self.context.log.info("the relay was not drained: {}", error)
            return
        else:
            self.context.log.info("no circuit is left after {:.1f} s", self.context.now() - began)
        try:
            await self.context.ask(SWITCHBOARD, WithdrawRelay(), timeout=WITHDRAW_DEADLINE)
        except AskError as error:
            self.context.log.info("the relay was not withdrawn: {}", error)

    async def _stop_listening(self) -> bool:
        """Whether another process may have the ports.

        It is done before clients are told, so that they do not come back to this process.
        """
        try:
            await self.context.ask(SWITCHBOARD, StopListening(), timeout=ANSWER_DEADLINE)
        except AskError as error:
            self.context.log.info("the ports stay in use until the end: {}", error)
            return False
        return True

    async def _let_successor_start(self) -> None:
        await trio.sleep(SUCCESSION)
        self.context.log.info("circuits run on; another relay may be started in the place of this one")
        self.context.tell(SERVICE, SuccessorMayStart())

    def describe(self) -> dict[str, Data]:
        """Whether it serves, where, by which limits, and what it does."""
        addresses, instead = self._addresses()
        status = self._status
        return {
            "serving": self._told_rules is not None,
            "draining": self._draining,
            "problem": self._refused,
            "announced": [str(address) for address in addresses],
            "announced_from": "configuration" if instead else "what peers see" if addresses else "listening addresses",
            "observed": [
                {"by": str(each.peer), "address": str(each.address), "dialled": each.dialled}
                for each in self._discovery.observations
            ],
            "config_version": self._in_force,
            "limits": _limits(self._service.rules) if self._service is not None else None,
            "status_age": self.context.now() - self._status_at if status is not None else None,
            "addresses": [str(address) for address in status.addresses] if status is not None else [],
            "reservations": status.reservations if status is not None else None,
            "circuits": status.circuits if status is not None else None,
            "requests": status.requests if status is not None else {},
            "bytes_to_destination": status.to_destination if status is not None else None,
            "bytes_to_source": status.to_source if status is not None else None,
        }

    # ---- news

    @handles(ConfigSnapshot)
    async def config_changed(self, message: ConfigSnapshot) -> None:
        """Limits or addresses may be other ones."""
        if self.context.current_sender == CONFIG and message.version >= self._config_version:
            self._take_config(message)
            self._news.set()

    @handles(PolicyPublished)
    async def policy_published(self, message: PolicyPublished) -> None:
        """Others may be whose word about our address counts, from their next word on."""
        known = self._policy.policy
        if self.context.current_sender == GATE and (known is None or message.policy.version >= known.version):
            self._policy = PolicyIndex(message.policy)

    @handles(ConnectionOpened)
    async def connection_opened(self, message: ConnectionOpened) -> None:
        """A peer is there, and may have said how it sees us."""
        connection = message.connection
        if self.context.current_sender != SWITCHBOARD or message.observed_address is None:
            return
        decision = self._policy.decide_connection(connection.peer, self.context.wall())
        if connection.path != "direct" or not decision.allowed or decision.rule == GUEST_RULE:
            return
        if self._discovery.observed(
            connection.id,
            connection.peer,
            connection.remote_address.ip,
            message.observed_address,
            dialled=connection.direction == "inbound",
        ):
            self._found_out()

    @handles(ConnectionJudged)
    async def connection_judged(self, message: ConnectionJudged) -> None:
        """What its peer has said counts while it is silent."""

    @handles(ConnectionLeaving)
    async def connection_leaving(self, message: ConnectionLeaving) -> None:
        """What its peer says counts until it is gone."""

    @handles(ConnectionClosed)
    async def connection_closed(self, message: ConnectionClosed) -> None:
        """What it said counts no more."""
        if self.context.current_sender == SWITCHBOARD and self._discovery.forget(message.connection.id):
            self._found_out()

    @handles(ActorUp)
    async def actor_up(self, message: ActorUp) -> None:
        """One that we follow was restarted: it knows nothing of us."""
        self._missing.add(message.name)
        self._news.set()

    @handles(ActorDown)
    async def actor_down(self, message: ActorDown) -> None:
        """Its last word stays in force; a switchboard takes what it was told along."""
        if message.name == SWITCHBOARD:
            self._told_rules = self._told_addresses = self._status = None

    # ---- what should be, and what was told

    def _take_config(self, snapshot: ConfigSnapshot) -> None:
        self._config_version = snapshot.version
        if snapshot.relay_service is not None:  # to be no relay any more takes effect with the next start
            self._service = snapshot.relay_service

    def _found_out(self) -> None:
        believed = [str(ip) for ip in self._discovery.believed.values()]
        if believed != self._saved:
            self.context.log.info("peers see this machine at {}", ", ".join(believed))
            self._saved = believed
            self.context.checkpoint({"believed": list(believed)})
        self._news.set()

    def _addresses(self) -> tuple[tuple[Multiaddr, ...], bool]:
        """What to announce, and whether instead of the listening addresses."""
        configured = self._service.announce if self._service is not None else ()
        if configured:
            return tuple(address.without_peer_id() for address in configured[:MAX_ANNOUNCED]), True
        return self._discovery.addresses(self._listening)[:MAX_ANNOUNCED], False

    async def _keep_up_to_date(self) -> None:
        while True:
            with trio.move_on_after(TICK if not self._missing else RETRY):
                await self._news.wait()
            self._news = trio.Event()
            await self._bring_up_to_date()
            status = await self._read_status()
            if status is not None:
                self._status, self._status_at = status, self.context.now()

    async def _bring_up_to_date(self) -> None:
        for name in sorted(self._missing):
            self._missing.discard(name)
            try:
                await self._subscribe(name)
            except AskError as error:
                self.context.log.debug("{} does not answer, what it said last stays in force: {}", name, error)
                self._missing.add(name)
        if self._draining:
            return
        try:
            await self._tell()
        except RefusedError as error:
            if str(error) != self._refused:
                self.context.log.warning("the switchboard refuses to serve as a relay: {}", error)
            self._refused = str(error)
        except AskError as error:
            self.context.log.debug("the switchboard does not answer: {}", error)
            self._missing.add(SWITCHBOARD)
        else:
            self._refused = ""

    async def _subscribe(self, name: str) -> None:
        if name == CONFIG:
            self._take_config(await self.context.ask(CONFIG, SubscribeConfig(), timeout=ANSWER_DEADLINE))
        elif name == GATE:
            published = await self.context.ask(GATE, SubscribePolicy(), timeout=ANSWER_DEADLINE)
            self._policy = PolicyIndex(published.policy)
        elif name == SWITCHBOARD:
            self._told_rules = self._told_addresses = None
            status = await self.context.ask(SWITCHBOARD, ReadStatus(), timeout=ANSWER_DEADLINE)
            self._listening = status.listen_addresses
            watched = await self.context.ask(SWITCHBOARD, WatchConnections(), timeout=ANSWER_DEADLINE)
            there = {connection.id for connection in watched.connections}
            for each in self._discovery.connections - there:
                self._discovery.forget(each)

    async def _tell(self) -> None:
        version, service = self._config_version, self._service
        if service is None:
            return
        if self._told_rules != service.rules:
            await self.context.ask(SWITCHBOARD, ServeRelay(service.rules), timeout=ANSWER_DEADLINE)
            self._told_rules = service.rules
            self.context.log.info("this node serves as a relay")
        wanted = self._addresses()
        if self._told_addresses != wanted:
            addresses, instead = wanted
            await self.context.ask(SWITCHBOARD, AnnounceAddresses(addresses, instead), timeout=ANSWER_DEADLINE)
            self._told_addresses = wanted
        self._in_force = version

    async def _read_status(self) -> RelayServiceStatus | None:
        try:
            return await self.context.ask(SWITCHBOARD, ReadRelay(), timeout=ANSWER_DEADLINE)
        except AskError:
            return None


def _limits(rules: RelayRules) -> dict[str, Data]:
    """The rules in the words of the configuration."""

    def said(value: int | None) -> Data:
        return "unlimited" if value is None else value

    told: dict[str, Data] = {"reservation_ttl": rules.ttl}
    for field in dataclasses.fields(RelayRules):
        value = getattr(rules, field.name)
        if isinstance(value, ScopedLimit):
            told[field.name] = {each.name: said(getattr(value, each.name)) for each in dataclasses.fields(ScopedLimit)}
        elif field.name != "ttl":
            told[field.name] = {"seconds": said(value.seconds), "bytes": said(value.data)}
    return told
