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
from typing import Final

from protocol.peer_id import PeerId
from protocol.policy import PeerRule

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
            rules.append(dataclasses.replace(new, expires=_earlier(old.expires, new.expires)))
        elif (one := old or new) is not None and one.expires is not None:
            rules.append(dataclasses.replace(one, expires=WITHDRAWN))
    return tuple(rules)


def held_back(in_force: Iterable[PeerRule], readable: Iterable[PeerRule]) -> tuple[PeerRule, ...]:
    """The readable rules that allow more than what is in force: what waits for the file to be whole."""
    known = _by_peer(in_force)
    return tuple(
        rule
        for peer, rule in _by_peer(readable).items()
        if (old := known.get(peer)) is None or _earlier(old.expires, rule.expires) != rule.expires
    )


def _by_peer(rules: Iterable[PeerRule]) -> dict[PeerId, PeerRule]:
    """One rule for each peer; of several the one that ends first, as in `PolicyIndex`."""
    found: dict[PeerId, PeerRule] = {}
    for each in rules:
        # A time that is none must not become "never", and compares with nothing.
        unclear = each.expires is not None and math.isnan(each.expires)
        rule = dataclasses.replace(each, expires=WITHDRAWN) if unclear else each
        present = found.setdefault(rule.peer, rule)
        if _earlier(present.expires, rule.expires) != present.expires:
            found[rule.peer] = rule
    return found


def _earlier(one: float | None, other: float | None) -> float | None:
    if one is None or other is None:
        return other if one is None else one
    return min(one, other)
