"""Who may connect and what each may use: pure decisions on an immutable policy.

Default deny: what no rule allows is refused, and each decision names the rule that made it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Final

from protocol.messages.codec import record
from protocol.peer_id import PeerId
from protocol.protocol_ids import CIRCUIT_HOP, DELIVERY, IDENTIFY, IDENTIFY_PUSH, PING, PINGPONG, RECALL
from protocol.service import service_of_protocol


@record
class PeerRule:
    """One line of authorized_keys. `expires` is in seconds since the Unix epoch, None for never."""

    peer: PeerId
    line: int
    expires: float | None
    comment: str


@record
class ServiceRule:
    """A service and, if not None, the only peers that may use it."""

    service: str
    allowed_peers: tuple[PeerId, ...] | None


@record
class Policy:
    """Everything that decides. `version` grows with each change.

    `gating` False (peer-up's `enable_connection_gating: false`) lets every peer connect and use
    the services that have no `allowed_peers`; it must be said explicitly.
    """

    version: int
    gating: bool
    peers: tuple[PeerRule, ...]
    services: tuple[ServiceRule, ...]


@dataclasses.dataclass(frozen=True)
class Decision:
    """Allowed or not, and by which rule, such as `authorized_keys:12`, `expired:12`, `not-listed`, `service:ssh`."""

    allowed: bool
    rule: str


BASIC_PROTOCOLS: Final = frozenset({IDENTIFY, IDENTIFY_PUSH, PING, PINGPONG, CIRCUIT_HOP, DELIVERY, RECALL})
"""What every peer that may be connected may use, where it is served. Each other protocol needs a service.

A relay's own rules (`protocol.reservations`) decide what a peer that may ask it gets.
"""

_NO_POLICY: Final = Decision(allowed=False, rule="no-policy")
_NOT_LISTED: Final = Decision(allowed=False, rule="not-listed")
_GATING_OFF: Final = Decision(allowed=True, rule="gating-off")
_UNKNOWN_SERVICE: Final = Decision(allowed=False, rule="unknown-service")
_UNKNOWN_PROTOCOL: Final = Decision(allowed=False, rule="unknown-protocol")


@dataclasses.dataclass(frozen=True, slots=True)
class _Listed:
    """A listed peer, with both decisions that can come of it made beforehand."""

    expires: float
    allowed: Decision
    expired: Decision

    def at(self, now_wall: float) -> Decision:
        # Not `now >= expires`: should the clock say NaN, the peer stays outside.
        return self.allowed if now_wall < self.expires else self.expired


@dataclasses.dataclass(frozen=True, slots=True)
class _Service:
    """A service; `peers` None for every peer that may be connected."""

    peers: frozenset[PeerId] | None
    allowed: Decision
    refused: Decision


class PolicyIndex:
    """A policy made ready for decisions, each of which takes a few dictionary look-ups whatever the policy's size.

    Where a policy says two things of one peer or service, the stricter counts: the earlier expiry, and the peers
    that both lists allow.

    The rules that decisions name: `no-policy` (none has arrived yet), `not-listed`, `authorized_keys:LINE`,
    `expired:LINE`, `withdrawn:LINE` (the line cannot be read any more, see `protocol.narrowing`), `gating-off`,
    `service:NAME` (by its `allowed_peers`), `unknown-service`, `unknown-protocol`.
    """

    __slots__ = ("_listed", "_services", "policy")

    def __init__(self, policy: Policy | None) -> None:
        self.policy = policy
        self._listed: dict[PeerId, _Listed] = {}
        self._services: dict[str, _Service] = {}
        if policy is None:
            return
        for rule in policy.peers:
            expires = math.inf if rule.expires is None else rule.expires
            if math.isnan(expires):
                expires = -math.inf  # a time that is none must not become "never"
            present = self._listed.get(rule.peer)
            if present is None or expires < present.expires:
                self._listed[rule.peer] = _Listed(
                    expires,
                    Decision(allowed=True, rule=f"authorized_keys:{rule.line}"),
                    Decision(allowed=False, rule=f"{_refused_as(rule.expires)}:{rule.line}"),
                )
        for service in policy.services:
            self._add_service(service)

    def _add_service(self, rule: ServiceRule) -> None:
        protocol = f"/peerup/{rule.service}/1.0.0"
        if service_of_protocol(protocol) is None:
            return  # a reserved or impossible name: its protocol id means something else and stays refused
        peers = None if rule.allowed_peers is None else frozenset(rule.allowed_peers)
        present = self._services.get(protocol)
        if present is not None and present.peers is not None:
            peers = present.peers if peers is None else peers & present.peers
        name = f"service:{rule.service}"
        self._services[protocol] = _Service(
            peers, Decision(allowed=True, rule=name), Decision(allowed=False, rule=name)
        )

    def decide_connection(self, peer: PeerId, now_wall: float) -> Decision:
        """See the function `decide_connection`."""
        if self.policy is None:
            return _NO_POLICY
        listed = self._listed.get(peer)
        if listed is not None:
            return listed.at(now_wall)
        return _NOT_LISTED if self.policy.gating else _GATING_OFF

    def decide_stream(self, peer: PeerId, protocol: str, now_wall: float) -> Decision:
        """See the function `decide_stream`."""
        connection = self.decide_connection(peer, now_wall)
        if not connection.allowed or protocol in BASIC_PROTOCOLS:
            return connection
        service = self._services.get(protocol)
        if service is not None:
            if service.peers is None:
                return connection
            return service.allowed if peer in service.peers else service.refused
        # The rule does not hold the name: a peer could make up any number of rules to be counted.
        return _UNKNOWN_PROTOCOL if service_of_protocol(protocol) is None else _UNKNOWN_SERVICE

    def protocols_for(self, peer: PeerId, now_wall: float) -> tuple[str, ...]:
        """Every protocol that the peer may use now: what it may be told in identify and in answer to `ls`."""
        if not self.decide_connection(peer, now_wall).allowed:
            return ()
        services = [
            protocol for protocol, service in self._services.items() if service.peers is None or peer in service.peers
        ]
        return (*sorted(BASIC_PROTOCOLS), *services)

    def next_expiry(self, now_wall: float) -> float | None:
        """When the next peer expires that is allowed now, in seconds since the epoch; None if none will."""
        coming = [listed.expires for listed in self._listed.values() if now_wall < listed.expires < math.inf]
        return min(coming, default=None)


def _refused_as(expires: float | None) -> str:
    return "withdrawn" if expires == -math.inf else "expired"


DENY_ALL: Final = PolicyIndex(None)
"""What is in force before the first policy has arrived: every decision is `no-policy`."""


def decide_connection(policy: Policy | PolicyIndex | None, peer: PeerId, now_wall: float) -> Decision:
    """May this peer be connected at all, whoever dialled?

    `now_wall` is in seconds since the Unix epoch; a peer is expired from the very second that its line says. An
    expired peer is refused also with gating off. Without a policy everything is refused. Who decides often keeps a
    `PolicyIndex`; from a plain policy one is made for this call.
    """
    index = policy if isinstance(policy, PolicyIndex) else PolicyIndex(policy)
    return index.decide_connection(peer, now_wall)


def decide_stream(policy: Policy | PolicyIndex | None, peer: PeerId, protocol: str, now_wall: float) -> Decision:
    """May this peer open a stream for this protocol?

    A peer that may not be connected may use nothing. Otherwise `BASIC_PROTOCOLS` are allowed by the rule that
    allows the connection, the protocol of a service likewise unless the service has `allowed_peers`, which then
    decide, and everything else is refused.
    """
    index = policy if isinstance(policy, PolicyIndex) else PolicyIndex(policy)
    return index.decide_stream(peer, protocol, now_wall)
