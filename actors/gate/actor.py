"""The actor `gate`: reads authorized_keys, publishes the policy, keeps the audit log and counts decisions.

Theory of operation. The policy has two sources: authorized_keys (watched, and read again on `Reload`) and the
configuration (gating, services and their `allowed_peers`, from the actor `config`). When either changes, the merged
policy gets the next version and is sent to every subscriber until it has it (`actors.publication`). The switchboard
decides with it on its own; whoever was never told a policy refuses everything.

A change that narrows the policy always counts, one that widens it waits for a file that is whole
(`protocol.narrowing`, decision 16):
- With a broken line, what the lines that can be read do not allow any more is refused at once. New lines, and later
  times, come into force with the file that has no broken line. Problems are reported by line.
- A file that is missing or cannot be read allows nobody any more. One that others may write to can take away, not give.
- At the first start nothing is in force yet. Then the lines that are right count, the others allow nobody, and the
  log says so loudly. (To refuse all of them would lock the owner out of a distant machine for a slip of the pen.)

A peer whose `expires` passes is cut off by republishing at that moment: subscribers then judge every live
connection anew.

A successor of this actor begins with the policy that its predecessor left, so versions always grow, a restart widens
nothing while the file is broken, and what the configuration said stays in force while it is not to be had.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import trio

from actors.files import BusyError
from actors.gate.audit import AuditLog, sync_and_close
from actors.gate.authorized_keys_file import Reading, inspect_authorized_keys
from actors.gate.shares import AuditShares
from actors.publication import Publication
from actors.watch import watch_file
from protocol.messages import Data
from protocol.messages.config import ConfigSnapshot, SubscribeConfig
from protocol.messages.gate import (
    Decided,
    LineProblem,
    PolicyPublished,
    Reload,
    Reloaded,
    SubscribePolicy,
    TunnelEnded,
)
from protocol.messages.system import ActorDown, ActorUp
from protocol.narrowing import WITHDRAWN, held_back, narrowed_peers
from protocol.peer_id import PeerId
from protocol.policy import PeerRule, Policy, PolicyIndex, ServiceRule
from protocol.service import service_of_protocol
from supervisor.actor import Actor, Checkpoint, handles
from supervisor.errors import AskError, DeadlineExceededError, RefusedError

CONFIG = "config"
SUBSCRIBE_SECONDS = 3.0
"""How long the configuration may take to answer; it answers from memory."""

SUBSCRIBE_PAUSE = 1.0
"""Seconds before a configuration that was there and did not answer is asked for again."""

LONGEST_SLEEP = 30.0
"""The wall clock may be set; so long, at most, an expiry then comes late."""

SYNC_SECONDS = 5.0
"""How old the newest audit line may be that a power cut can take."""

WARN_SECONDS = 60.0
"""A full disk is said once in so many seconds, not once for each event."""


CHECKPOINT_BYTES = 12 * 1024
"""A checkpoint stays small: some 200 peers. Of what is more, a successor has only the file to go by."""

CHECKPOINT_BYTES_BROKEN = 768 * 1024
"""The same while the file is not whole, when it does not say what is in force: some 15,000 peers."""

LOOK_AGAIN = 1.0
"""Seconds until the file is looked at again for which this machine had no descriptor or memory."""

MOST_WAITING = 1000
"""Peers that an answer names at most."""


class Gate(Actor):
    """See the module.

    Arguments:
        path: the authorized_keys file.
        audit: the audit log's file, or None for no audit log.
        watch: whether to watch the file; otherwise only `Reload` reads it again.
    """

    mailbox_limit = 4096

    def __init__(self, path: str, audit: str | None = None, *, watch: bool = True) -> None:
        self._path = Path(path).absolute()
        self._audit = AuditLog(Path(audit)) if audit is not None else None
        self._shares = AuditShares()
        self._watch = watch
        self._reading: Reading | None = None  # what the file was when it was last looked at
        self._problems: tuple[LineProblem, ...] = ()
        self._begun = False  # whether anything is in force that the file must not widen while it is broken
        self._withdrawn: frozenset[PeerId] = frozenset()  # who was allowed by lines that cannot be read any more
        self._waiting: tuple[PeerId, ...] = ()  # whose lines allow more than what is in force
        self._policy = Policy(0, gating=True, peers=(), services=())
        self._told_by_config = 0
        self._config_version = 0  # of the configuration that the policy goes by
        self._policy_changed = trio.Event()
        self._warned_at = float("-inf")

    async def start(self, checkpoint: Checkpoint | None) -> dict[str, Data]:
        """Read both sources; then the policy can be subscribed to."""
        self._published = Publication(self.context)
        if checkpoint is not None:
            self._policy, self._begun = _unpack(checkpoint.state)
        self.context.watch(CONFIG)
        await self._subscribe_config(publish=False)
        self._read_file(publish=False)
        self._publish(self._policy, again=True)
        self.context.nursery.start_soon(self._follow_expiry)
        if self._watch:
            self.context.nursery.start_soon(watch_file, self._path, self._file_changed)
        if self._audit is not None:
            self.context.nursery.start_soon(self._sync_audit, self._audit)
        return {"peers": len(self._policy.peers), "problems": len(self._problems)}

    async def stop(self, reason: str) -> None:
        """Bring the audit log to the disk."""
        if self._audit is not None:
            self._write_sums(everything=True)
            self._audit.close()

    def describe(self) -> dict[str, Data]:
        """The policy in numbers, who follows it, and what is wrong with the file."""
        now = self.context.wall()
        index = PolicyIndex(self._policy)
        next_expiry = index.next_expiry(now)
        return {
            "file": str(self._path),
            "version": self._policy.version,
            "config_version": self._config_version,
            "gating": self._policy.gating,
            "peers": len(self._policy.peers),
            "expired": sum(rule.expires is not None and WITHDRAWN < rule.expires <= now for rule in self._policy.peers),
            "whole": self._whole,
            "withdrawn": len(self._withdrawn),
            "waiting": [str(peer) for peer in self._waiting[:MOST_WAITING]],
            "digest": self._reading.digest if self._reading is not None else "",
            "next_expiry_seconds": None if next_expiry is None else next_expiry - now,
            "services": {
                rule.service: None if rule.allowed_peers is None else [str(peer) for peer in rule.allowed_peers]
                for rule in self._policy.services
            },
            "problems": [*self._not_whole(), *map(_in_words, self._problems)],
            "subscribers": list(self._published.subscribers),
            "behind": list(self._published.behind),
            "audit": None
            if self._audit is None
            else {"file": str(self._audit.path), "written": self._audit.written, "lost": self._audit.lost},
        }

    @handles(SubscribePolicy)
    async def subscribe(self, request: SubscribePolicy) -> PolicyPublished:
        """Answer with the policy, and tell the sender each later one."""
        self._published.subscribe(self.context.current_sender)
        return PolicyPublished(self._policy)

    @handles(Reload)
    async def reload(self, request: Reload) -> Reloaded:
        """Read the file now."""
        self._published.hurry()
        busy = self._read_file(publish=True)
        decision = (
            None
            if request.peer is None
            else PolicyIndex(self._policy).decide_connection(request.peer, self.context.wall())
        )
        reading = self._reading
        return Reloaded(
            self._policy.version,
            len(self._policy.peers),
            (*busy, *self._problems),
            str(self._path),
            reading.digest if reading is not None and not busy else "",
            self._whole and not busy,
            self._waiting[:MOST_WAITING],
            len(self._withdrawn),
            None if decision is None else decision.allowed,
            "" if decision is None else decision.rule,
        )

    @handles(ConfigSnapshot)
    async def config_changed(self, snapshot: ConfigSnapshot) -> None:
        """Take over what the configuration says."""
        if self.context.current_sender == CONFIG and snapshot.version >= self._config_version:
            self._told_by_config += 1
            self._publish(self._merged(snapshot))

    @handles(ActorUp)
    async def actor_up(self, message: ActorUp) -> None:
        """Follow the configuration again when its actor is back."""
        if message.name == CONFIG:
            await self._subscribe_config(publish=True)

    @handles(ActorDown)
    async def actor_down(self, message: ActorDown) -> None:
        """Forget a subscriber; its successor subscribes anew. The last configuration stays in force."""
        self._published.forget(message.name)

    @handles(Decided)
    async def decided(self, message: Decided) -> None:
        """Count a decision and write it to the audit log."""
        service = service_of_protocol(message.subject)
        known = service is not None and any(rule.service == service for rule in self._policy.services)
        # Labels are few and bounded: a peer must not be able to make up series.
        subject = "connection" if message.subject == "connection" else str(service) if known else "other"
        self.context.metrics.counter(
            "peerup_auth_decisions_total",
            decision="allow" if message.allowed else "deny",
            rule=message.rule.partition(":")[0],
            subject=subject,
        ).inc(message.count)
        fields: dict[str, object] = {
            "peer": str(message.peer) if message.peer is not None else None,
            "subject": message.subject,
            "allowed": message.allowed,
            "rule": message.rule,
            "path": message.path,
            "count": message.count,
            "from": self.context.current_sender,
        }
        if message.peer is None or not message.allowed or self._may_write(message.peer, "decision", fields):
            self._write_audit("decision", fields)

    @handles(TunnelEnded)
    async def tunnel_ended(self, message: TunnelEnded) -> None:
        """Write the end of a tunnelled connection to the audit log."""
        fields: dict[str, object] = {
            "peer": str(message.peer),
            "service": message.service,
            "role": message.role,
            "path": message.path,
            "sent": message.sent,
            "received": message.received,
            "duration": round(message.duration, 3),
            "outcome": message.outcome,
            "from": self.context.current_sender,
        }
        if self._may_write(message.peer, "tunnel", fields):
            self._write_audit("tunnel", fields)

    async def _subscribe_config(self, *, publish: bool) -> None:
        try:
            snapshot = await self.context.ask(CONFIG, SubscribeConfig(), timeout=SUBSCRIBE_SECONDS)
        except AskError as error:
            # When it is back, ActorUp brings us here again; until then nobody gets a service that was not published.
            self.context.log.warning("no configuration yet: {}", error)
            if isinstance(error, DeadlineExceededError | RefusedError):  # it is there, so no ActorUp will come
                self.context.nursery.start_soon(self._subscribe_config_later)
            return
        if publish:
            self._publish(self._merged(snapshot))
        else:
            self._policy = self._merged(snapshot)

    async def _subscribe_config_later(self) -> None:
        await trio.sleep(SUBSCRIBE_PAUSE)
        told = self._told_by_config
        try:
            snapshot = await self.context.ask(CONFIG, SubscribeConfig(), timeout=SUBSCRIBE_SECONDS)
        except (DeadlineExceededError, RefusedError):
            self.context.nursery.start_soon(self._subscribe_config_later)
        except AskError as error:
            self.context.log.debug("the configuration is asked for again when its actor is up: {}", error)
        else:
            if told == self._told_by_config:  # else something newer has come meanwhile
                self._publish(self._merged(snapshot))

    def _merged(self, snapshot: ConfigSnapshot) -> Policy:
        self._config_version = snapshot.version
        services = tuple(
            ServiceRule(service.name, service.allowed_peers) for service in snapshot.services if service.enabled
        )
        return dataclasses.replace(self._policy, gating=snapshot.gating, services=services)

    async def _file_changed(self) -> None:
        self._read_file(publish=True)

    @property
    def _whole(self) -> bool:
        return self._reading is not None and self._reading.whole

    def _read_file(self, *, publish: bool) -> tuple[LineProblem, ...]:
        """Look at the file; take it over if it is whole, else what of it narrows what is in force.

        Returns why it could not be looked at.
        """
        try:
            reading = inspect_authorized_keys(self._path)
        except BusyError as error:
            self.context.log.warning("{}; what is in force stays so until it can be read", error)
            self.context.nursery.start_soon(self._look_again)
            return (LineProblem(0, str(error)),)
        if reading == self._reading:
            return ()
        self._reading = reading
        problems = [LineProblem(0, reading.problem)] if reading.problem else []
        problems += [LineProblem(problem.line, problem.reason) for problem in reading.keys.problems]
        self._problems = tuple(problems)
        policy = dataclasses.replace(self._policy, peers=self._peers(reading))
        self._report()
        if publish:
            self._publish(policy)
        else:
            self._policy = policy
        return ()

    def _peers(self, reading: Reading) -> tuple[PeerRule, ...]:
        """What is in force by this reading of the file."""
        before, readable = self._policy.peers, reading.keys.rules()
        if reading.whole:
            self._begun, self._withdrawn, self._waiting = True, frozenset(), ()
            return readable
        if self._begun:
            after = narrowed_peers(before, readable)
            there = {rule.peer for rule in readable}
            self._withdrawn |= {rule.peer for rule in before if rule.peer not in there and rule.expires != WITHDRAWN}
        else:
            after = () if reading.problem else readable
            self._begun = True
        self._waiting = tuple(rule.peer for rule in held_back(after, readable))
        return after

    async def _look_again(self) -> None:
        await trio.sleep(LOOK_AGAIN)
        self._read_file(publish=True)

    def _report(self) -> None:
        self.context.metrics.gauge("peerup_authorized_keys_problems").set(len(self._problems))
        for problem in self._problems:
            where = f"{self._path}, line {problem.line}: " if problem.line else ""
            self.context.log.error("{}{}", where, problem.reason)
        for line in self._not_whole():
            self.context.log.error("{}", line)

    def _not_whole(self) -> list[str]:
        """What it means for the policy that the file is not whole; nothing if it is."""
        if self._reading is None or self._whole:
            return []
        refused, waiting = len(self._withdrawn), len(self._waiting)
        counts = (
            f"{refused} peer{'' if refused == 1 else 's'} without a readable line refused, "
            f"{waiting} line{'' if waiting == 1 else 's'} waiting"
        )
        return [f"{self._path} is not whole: what it takes away counts, what it adds waits until repaired ({counts})"]

    def _publish(self, policy: Policy, *, again: bool = False) -> None:
        """Give the policy the next version and tell it to everybody, unless it is the same (and not `again`)."""
        if policy == self._policy and not again:
            return
        self._policy = dataclasses.replace(policy, version=self._policy.version + 1)
        self.context.checkpoint(_pack(self._policy, whole=self._whole))
        self.context.metrics.gauge("peerup_policy_version").set(self._policy.version)
        self.context.metrics.gauge("peerup_authorized_peers").set(len(self._policy.peers))
        self.context.log.info(
            "policy {}: {} peers, {} services", self._policy.version, len(policy.peers), len(policy.services)
        )
        self._published.publish(PolicyPublished(self._policy))
        self._policy_changed.set()
        self._policy_changed = trio.Event()

    async def _follow_expiry(self) -> None:
        """Publish again when a peer expires."""
        while True:
            changed = self._policy_changed
            now = self.context.wall()
            expiry = PolicyIndex(self._policy).next_expiry(now)
            if expiry is None:
                await changed.wait()
                continue
            with trio.move_on_after(min(expiry - now, LONGEST_SLEEP)):
                await changed.wait()
            if not changed.is_set() and self.context.wall() >= expiry:
                self.context.log.info("a peer has expired")
                self._publish(self._policy, again=True)

    async def _sync_audit(self, audit: AuditLog) -> None:
        while True:
            await trio.sleep(SYNC_SECONDS)
            self._write_sums()
            audit.follow()
            descriptor = audit.unsynced()
            if descriptor is not None:
                audit.last_error = await trio.to_thread.run_sync(sync_and_close, descriptor) or audit.last_error

    def _may_write(self, peer: PeerId, event: str, fields: dict[str, object]) -> bool:
        """Whether this event is a line of its own; if not, it will be in a sum."""
        if self._audit is None:
            return False
        return self._shares.take(str(peer), event, fields, now=self.context.now(), wall=self.context.wall())

    def _write_sums(self, *, everything: bool = False) -> None:
        for event, fields in self._shares.due(self.context.now(), everything=everything):
            self._write_audit(event, fields)

    def _write_audit(self, event: str, fields: dict[str, object]) -> None:
        if self._audit is None:
            return
        if self._audit.write(event, self.context.wall(), fields):
            return
        self.context.metrics.counter("peerup_audit_events_lost_total").inc()
        now = self.context.now()
        if now - self._warned_at >= WARN_SECONDS:
            self._warned_at = now
            self.context.log.error("an audit event was lost: {}: {}", self._audit.path, self._audit.last_error)


def _in_words(problem: LineProblem) -> str:
    return f"line {problem.line}: {problem.reason}" if problem.line else problem.reason


def _pack(policy: Policy, *, whole: bool) -> dict[str, Data]:
    """The policy as plain data for a checkpoint.

    While the file is not whole it does not say what is in force, so then nothing but the comments is left out.
    """
    size = sum(64 + (len(rule.comment.encode()) if whole else 0) for rule in policy.peers)
    few = size <= (CHECKPOINT_BYTES if whole else CHECKPOINT_BYTES_BROKEN)
    return {
        "version": policy.version,
        "gating": policy.gating,
        "complete": few,
        "peers": [
            [rule.peer.to_wire(), rule.line, rule.expires, rule.comment if whole else ""]
            for rule in policy.peers
            if few
        ],
        "services": [
            [rule.service, None if rule.allowed_peers is None else [peer.to_wire() for peer in rule.allowed_peers]]
            for rule in policy.services
        ],
    }


def _unpack(state: dict[str, Data]) -> tuple[Policy, bool]:
    """A policy out of a checkpoint, and whether all its peers are in it."""
    peers = tuple(
        PeerRule(PeerId.from_wire(peer), line, expires, comment) for peer, line, expires, comment in state["peers"]
    )
    services = tuple(
        ServiceRule(service, None if allowed is None else tuple(map(PeerId.from_wire, allowed)))
        for service, allowed in state["services"]
    )
    return Policy(state["version"], state["gating"], peers, services), state["complete"]
