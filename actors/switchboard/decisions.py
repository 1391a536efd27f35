"""Decisions on their way to the gate's audit log, folded so that a flood costs a few messages a second."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from protocol.messages.gate import Decided
from protocol.peer_id import PeerId
from protocol.policy import Decision
from protocol.token_bucket import TokenBucket

WINDOW = 1.0
"""Seconds over which equal decisions are folded into one message."""
SINGLES = 16
"""Messages in one window that name their peer, for what is allowed and for what is refused apart, so that no crowd of
strangers can hide who was let in. What comes beyond is counted by rule alone."""
NAMED = 2048.0
"""Refused peers that may be named over time, at most so many at once:"""
NAMED_PER_SECOND = 0.2
"""and so many in each second later, 17,000 a day. The audit log is bounded, and strangers who come all day must not
push out of it who was let in. What comes beyond is counted by rule alone."""

_Key = tuple[PeerId | None, str, bool, str, str]


class DecisionLog:
    """Tells each decision at once while they are few, and counts of them once a window when they are many.

    `tell` gets what is to be sent to the gate. Call :meth:`flush` at the end of each window in which
    :attr:`pending` is true.
    """

    def __init__(self, tell: Callable[[Decided], None]) -> None:
        self._tell = tell
        self._window = float("-inf")
        self._told = {True: 0, False: 0}  # by whether it was allowed
        self._named: TokenBucket | None = None  # of those refused
        self._folded: Counter[_Key] = Counter()

    @property
    def pending(self) -> bool:
        """Whether there are counts that were not told yet."""
        return bool(self._folded)

    def note(self, peer: PeerId, subject: str, decision: Decision, path: str, now: float) -> None:
        """Add one decision."""
        if now - self._window >= WINDOW:
            self.flush()
            self._window = now
            self._told = {True: 0, False: 0}
        if self._told[decision.allowed] < SINGLES and self._may_name(decision, now):
            self._told[decision.allowed] += 1
            self._tell(Decided(peer=peer, subject=subject, allowed=decision.allowed, rule=decision.rule, path=path))
            return
        known = (peer, subject, decision.allowed, decision.rule, path)
        alike = sum(allowed is decision.allowed for _, _, allowed, _, _ in self._folded)
        if known in self._folded or (alike < SINGLES and self._may_name(decision, now)):
            self._folded[known] += 1
        else:
            kind = subject if decision.allowed or subject == "connection" else "stream"
            rule = decision.rule.partition(":")[0]
            self._folded[(None, kind, decision.allowed, rule, "")] += 1

    def _may_name(self, decision: Decision, now: float) -> bool:
        if decision.allowed:
            return True
        if self._named is None:
            self._named = TokenBucket(NAMED_PER_SECOND, NAMED, now)
        if self._named.level(now) < 1:
            return False
        self._named.take(1, now)
        return True

    def flush(self) -> None:
        """Tell the counts."""
        folded, self._folded = self._folded, Counter()
        for (peer, subject, allowed, rule, path), count in folded.items():
            self._tell(Decided(peer=peer, subject=subject, allowed=allowed, rule=rule, path=path, count=count))
