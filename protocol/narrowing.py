"""What stays in force while the file that should say it is broken: never more than before, never more than it says.

A change that narrows the policy always counts, one that widens it waits for a file that is whole. So from a file that
is not whole comes the intersection of what was in force and of what the lines that can be read still allow::

    in force now  =  in force before  ∩  readable

These functions are pure, and applying them again and again to whatever broken content only ever narrows further.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, Final, TypeVar

from protocol.messages.config import ConfigSnapshot, RelayService, ServiceEntry
from protocol.messages.relay import CircuitLimit, RelayRules, ScopedLimit
from protocol.peer_id import PeerId
from protocol.policy import PeerRule

T = TypeVar("T", int, float)
L = TypeVar("L", ScopedLimit, CircuitLimit)

WITHDRAWN: Final = -math.inf
"""The `expires` of a rule whose line can be read no longer: it passed before any clock began."""


def narrowed_peers(before: Iterable[PeerRule], readable: Iterable[PeerRule]) -> tuple[PeerRule, ...]:
    """The rules that both allow: each peer until the earlier of both times, under the line that can be read.

    A peer without a readable line has no rule any more, and one that had none before gets none. The exception are rules
    with an `expires`. Where connection gating is off, such a rule also shuts its peer out afterwards, and without it
    the peer would come in as a guest; so these stay, as rules that have expired (`WITHDRAWN`).
    """
    known, said = _by_peer(before), _by_peer(readable)
    rules = []
    for peer in (*known, *(peer for peer in said if peer not in known)):
        old, new = known.get(peer), said.get(peer)
        if old is not None and new is not None:
            rules.append(dataclasses.replace(new, expires=_lower(old.expires, new.expires)))
        elif (one := old or new) is not None and one.expires is not None:
            rules.append(dataclasses.replace(one, expires=WITHDRAWN))
    return tuple(rules)


def held_back(in_force: Iterable[PeerRule], readable: Iterable[PeerRule]) -> tuple[PeerRule, ...]:
    """The readable rules that allow more than what is in force: what waits for the file to be whole."""
    known = _by_peer(in_force)
    return tuple(
        rule
        for peer, rule in _by_peer(readable).items()
        if (old := known.get(peer)) is None or _lower(old.expires, rule.expires) != rule.expires
    )


def _by_peer(rules: Iterable[PeerRule]) -> dict[PeerId, PeerRule]:
    """One rule for each peer; of several the one that ends first, as in `PolicyIndex`."""
    found: dict[PeerId, PeerRule] = {}
    for each in rules:
        # A time that is none must not become "never", and compares with nothing.
        unclear = each.expires is not None and math.isnan(each.expires)
        rule = dataclasses.replace(each, expires=WITHDRAWN) if unclear else each
        present = found.setdefault(rule.peer, rule)
        if _lower(present.expires, rule.expires) != present.expires:
            found[rule.peer] = rule
    return found


def _lower(one: T | None, other: T | None) -> T | None:
    """The lower of two numbers; None is above all of them."""
    if one is None or other is None:
        return other if one is None else one
    return min(one, other)


def narrowed_config(before: ConfigSnapshot, readable: ConfigSnapshot) -> ConfigSnapshot:
    """What both configurations allow: gating if either wants it, and of services, relays and limits what both grant.

    A service is offered as long as both offer it at the same address, to the peers that both let in. A relay is one as
    long as both name it. Each limit is the lower one. Names and addresses of peers grant nothing and stay as before; so
    does whether this node serves as a relay, which counts from its next start in any case.
    """
    services = {service.name: service for service in readable.services}
    served, other = before.relay_service, readable.relay_service
    if served is not None and other is not None:
        served = RelayService(served.announce, narrowed_rules(served.rules, other.rules))
    return dataclasses.replace(
        before,
        gating=before.gating or readable.gating,
        services=tuple(_narrowed_service(service, services.get(service.name)) for service in before.services),
        relays=tuple(address for address in before.relays if address in readable.relays),
        relay_service=served,
    )


def _narrowed_service(before: ServiceEntry, readable: ServiceEntry | None) -> ServiceEntry:
    if readable is None or not readable.enabled or readable.address != before.address:
        return dataclasses.replace(before, enabled=False)
    if before.allowed_peers is None or readable.allowed_peers is None:
        allowed = before.allowed_peers if readable.allowed_peers is None else readable.allowed_peers
    else:
        both = frozenset(readable.allowed_peers)
        allowed = tuple(peer for peer in before.allowed_peers if peer in both)
    return dataclasses.replace(before, allowed_peers=allowed)


def narrowed_rules(before: RelayRules, readable: RelayRules) -> RelayRules:
    """The lower of each two limits of a relay."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(RelayRules):
        old, new = getattr(before, field.name), getattr(readable, field.name)
        values[field.name] = _lower_each(old, new) if isinstance(old, ScopedLimit | CircuitLimit) else min(old, new)
    return RelayRules(**values)


def _lower_each(before: L, readable: L) -> L:
    limits: dict[str, Any] = {
        field.name: _lower(getattr(before, field.name), getattr(readable, field.name))
        for field in dataclasses.fields(before)
    }
    return dataclasses.replace(before, **limits)
