"""The allowances of all peers (`protocol.allowance`): each over all its connections, and what it owes after them."""

from __future__ import annotations

import weakref
from typing import Final

from protocol import allowance
from protocol.allowance import Allowance
from protocol.peer_id import PeerId

RELAY_FACTOR: Final = 10
"""Times as much for a relay that the configuration names: what it carries to us others have sent."""
MAX_DEBTORS: Final = 1024
"""Peers whose debt is remembered after their last connection has ended; the oldest is forgotten first."""


class Allowances:
    """Of all peers. Each lives as long as somebody uses it, or as it is not full."""

    def __init__(self) -> None:
        self._of: weakref.WeakValueDictionary[PeerId, Allowance] = weakref.WeakValueDictionary()
        self._debtors: dict[PeerId, Allowance] = {}

    def of(self, peer: PeerId, now: float, *, relay: bool = False) -> Allowance:
        """The one of this peer, `relay` if it is one of our own relays."""
        found = self._of.get(peer)
        if found is None:
            factor = RELAY_FACTOR if relay else 1
            found = Allowance(now, burst=allowance.BURST * factor, rate=allowance.RATE * factor)
            self._of[peer] = found
        return found

    def remember(self, peer: PeerId, now: float) -> None:
        """A connection to this peer has ended; what it owes is kept in mind."""
        for debtor in [debtor for debtor, owed in self._debtors.items() if owed.is_full(now)]:
            del self._debtors[debtor]
        found = self._of.get(peer)
        if found is None or found.is_full(now):
            return
        self._debtors.pop(peer, None)
        self._debtors[peer] = found
        if len(self._debtors) > MAX_DEBTORS:
            del self._debtors[next(iter(self._debtors))]
