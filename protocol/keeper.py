"""Keeping a reservation at one relay for as long as a node runs. No clock, no sockets, no randomness of its own.

Theory of operation
-------------------

The keeper is told what has happened and returns commands, each of which replaces what was under way: `Connect`,
`Reserve`, `Publish` (others may dial us through the relay), `Withdraw` (they may not any more). Its owner carries them
out and calls `tick` at `next_wakeup`. Each `Connect` and `Reserve` has the number of its attempt, and an answer to
another attempt than the present one is ignored, so that what was given up cannot come back::

    stateDiagram-v2
        [*] --> stopped
        stopped --> connecting: start
        connecting --> reserving: connected
        connecting --> waiting: failed
        connecting --> connecting: network_changed
        reserving --> held: granted
        reserving --> waiting: failed
        reserving --> waiting: refused
        reserving --> waiting: disconnected
        reserving --> connecting: network_changed
        waiting --> connecting: retry
        waiting --> connecting: network_changed
        held --> renewing: renew
        held --> renewing: network_changed
        held --> connecting: disconnected
        held --> connecting: silent
        reserving --> waiting: silent
        renewing --> connecting: silent
        renewing --> held: granted
        renewing --> held: refused
        renewing --> waiting: denied
        held --> waiting: flapped
        renewing --> waiting: flapped
        renewing --> connecting: failed
        renewing --> connecting: disconnected
        renewing --> connecting: expired
        renewing --> renewing: network_changed
        reserving --> waiting: leaving
        held --> waiting: leaving
        renewing --> waiting: leaving
        held --> connecting: expired
        connecting --> stopped: stop
        reserving --> stopped: stop
        waiting --> stopped: stop
        held --> stopped: stop
        renewing --> stopped: stop

- A reservation is renewed when between a half and three quarters of its time have passed, at random, so that a relay
  that was restarted does not hear from everybody at once ever after. A renewal that is refused leaves the reservation
  as it is and is tried again with back-off while there is time, unless the relay says that it does not serve us.
- A reservation ends with the connection that it was made over. So a lost connection is a lost reservation, and so is
  a renewal that gets no answer. One whose connection gives no sign of life may be in force at the relay, but peers do
  not get through; it is made anew over whatever connection there is next, the same one if it lives after all. The
  keeper itself closes no connection. Only where the reservation was lost right after it had been made does it back off
  first.
- Failures back off exponentially with jitter. The pause is at most a twentieth of the time since there was last a
  reservation (but 1.5 s are always allowed, and 5 minutes never exceeded): who was away for a moment is back in a
  moment. A relay that answers but refuses is asked less often, and one that says "not you" least.
- A relay that says that it is shutting down, be it by a go away or as it refuses, does not fail. What is held is
  withdrawn at once; when its connection has ended the relay is asked again after a short pause, as if nothing had
  happened before; only one that does so as soon as it is asked, again and again, is asked more rarely. If its
  connection does not end it is asked again after `LEAVING_PAUSE`.
- When the network has changed, waiting ends at once, and a reservation that seems to be held is proved by renewing it.
- Lifetimes are counted on a clock that never goes back (`now`). `now_wall` serves to read the expiry that the relay
  tells, and to notice jumps: when the wall clock runs away from the other, either somebody has set it, which means
  nothing here, or the machine has slept, and the reservation may be gone. So it is renewed.
- The expiry is told as a time of day by the relay's clock, which may disagree with ours. What is plausible is believed
  (but at most `LONGEST_LIFETIME`, which is what relays usually grant, so that a clock that is somewhat ahead does no
  harm). An expiry in the past, or years ahead, says only that a clock is wrong: then it is renewed often. So it is
  where the time is shorter than can be kept with a pause between two renewals that a hostile relay cannot take away.
  The reservation is used nevertheless, because it does serve for a part of the time, or all of it where the reason is a
  clock; `warning` says what is wrong.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Final, TypeAlias

from protocol.circuit.hop_client import Grant
from protocol.circuit.messages import Refusal, Status
from protocol.errors import InvalidValueError
from protocol.reservations import DRAINING, MAX_TTL, MIN_TTL

TRANSITIONS: Final = {
    ("stopped", "start"): "connecting",
    ("connecting", "connected"): "reserving",
    ("connecting", "failed"): "waiting",
    ("connecting", "network_changed"): "connecting",
    ("reserving", "granted"): "held",
    ("reserving", "failed"): "waiting",
    ("reserving", "refused"): "waiting",
    ("reserving", "disconnected"): "waiting",
    ("reserving", "network_changed"): "connecting",
    ("waiting", "retry"): "connecting",
    ("waiting", "network_changed"): "connecting",
    ("held", "renew"): "renewing",
    ("held", "network_changed"): "renewing",
    ("held", "disconnected"): "connecting",
    ("held", "silent"): "connecting",
    ("reserving", "silent"): "waiting",
    ("renewing", "silent"): "connecting",
    ("held", "expired"): "connecting",
    ("renewing", "granted"): "held",
    ("renewing", "refused"): "held",
    ("renewing", "denied"): "waiting",
    ("held", "flapped"): "waiting",
    ("renewing", "flapped"): "waiting",
    ("renewing", "failed"): "connecting",
    ("renewing", "disconnected"): "connecting",
    ("renewing", "expired"): "connecting",
    ("renewing", "network_changed"): "renewing",
    ("reserving", "leaving"): "waiting",
    ("held", "leaving"): "waiting",
    ("renewing", "leaving"): "waiting",
    ("connecting", "stop"): "stopped",
    ("reserving", "stop"): "stopped",
    ("waiting", "stop"): "stopped",
    ("held", "stop"): "stopped",
    ("renewing", "stop"): "stopped",
}
"""The machine: (state, event) to the next state."""

MAX_RELAYS = 16
"""Relays at which a node keeps places: more than a handful are a mistake, and each costs a connection."""

CONNECT_TIMEOUT: Final = 15.0
"""Seconds for a connection to the relay with its handshakes; a SYN that is lost three times is sent again by then."""

RESERVE_TIMEOUT: Final = 10.0
"""Seconds for the answer to a RESERVE, which takes a relay no time."""

FIRST_PAUSE: Final = 0.25
"""Seconds before the second attempt; each further pause is twice as long."""

ALWAYS_ALLOWED_PAUSE: Final = 1.5
"""Pauses may grow to this however short the outage was: less would burden a relay that is just coming back."""

PAUSE_SHARE: Final = 1 / 20
"""A pause is at most this share of the outage so far."""

LONGEST_PAUSE: Final = 300.0
"""No pause is longer, in seconds: a relay that was down for a week is found again within minutes."""

REFUSED_PAUSE: Final = 5.0
"""The first pause after a relay that has no room, in seconds."""

DENIED_PAUSE: Final = 15.0
"""The first pause after a relay that does not serve us: until somebody authorises us, asking is in vain."""

LEAVING_PAUSE: Final = 60.0
"""Seconds until a relay that is shutting down, and is still there, is asked again."""

RETURN_PAUSE: Final = (0.25, 1.5)
"""Seconds between which a relay that has shut down is asked again: a relay that is being restarted is back by then, and
its clients do not come at once."""

STABLE_AFTER: Final = 10.0
"""A reservation that was lost within so many seconds counts as one more failure, so that losing it costs a pause."""

RENEW_BETWEEN: Final = (0.5, 0.75)
"""The shares of a reservation's time between which it is renewed."""

SHORTEST_LIFETIME: Final = 10.0
"""A reservation is counted on for at least so many seconds, so that there are always 5 s between two renewals."""

LONGEST_LIFETIME: Final = 3600.0
"""And for at most so many: to ask once more than needed costs nothing, and clocks disagree."""

DOUBTED_LIFETIME: Final = float(MIN_TTL)
"""What is counted on where the expiry says nothing, in seconds: no relay should grant less."""

PLAUSIBLE_LIFETIME: Final = MAX_TTL + 86400.0
"""A reservation that is said to last longer, in seconds, shows that a clock is wrong."""

CLOCK_JUMP: Final = 5.0
"""Seconds by which the clocks may come apart between two wake-ups; adjusting a clock slowly stays far below."""

CHECK_INTERVAL: Final = 30.0
"""The longest sleep between two wake-ups, so that a jump is noticed: a clock that never goes back may sleep itself."""


@dataclasses.dataclass(frozen=True, slots=True)
class Connect:
    """Make sure of a connection to the relay; answer by `connected` or `failed`.

    Attributes:
        attempt: to be given with the answer.
    """

    attempt: int


@dataclasses.dataclass(frozen=True, slots=True)
class Reserve:
    """Send RESERVE over that connection; answer by `granted`, `refused` or `failed` with this attempt."""

    attempt: int


@dataclasses.dataclass(frozen=True, slots=True)
class Publish:
    """The reservation is in force: announce `grant.addresses`, in place of earlier ones of this relay."""

    grant: Grant


@dataclasses.dataclass(frozen=True, slots=True)
class Withdraw:
    """The reservation is not in force any more: do not announce the relay's addresses."""

    reason: str


Command: TypeAlias = Connect | Reserve | Publish | Withdraw

Uniform: TypeAlias = Callable[[float, float], float]
"""A random number between two; `random.Random.uniform` is one."""


@dataclasses.dataclass(frozen=True, slots=True)
class Health:
    """How a relay has been doing.

    Attributes:
        successes: reservations granted, renewals included.
        failures: attempts that failed or were refused, since the keeper was started.
        failures_in_row: since the last success.
        departures: how often the relay has said that it is shutting down, which counts as no failure.
        round_trip: seconds from RESERVE to its last OK; None before the first.
        last_error: why the last attempt failed, for a person; empty when the last one succeeded.
        held_since: since when there has been a reservation without a gap, on the clock of `now`; None without one.
    """

    successes: int = 0
    failures: int = 0
    failures_in_row: int = 0
    round_trip: float | None = None
    last_error: str = ""
    held_since: float | None = None
    departures: int = 0


class Keeper:
    """Keeps one reservation. Every method takes `now` and `now_wall`, both in seconds, and returns commands in order.

    Attributes:
        state: `stopped`, `connecting`, `reserving`, `waiting`, `held` or `renewing`.
        attempt: the number of the present attempt.
        grant: the reservation in force; None without one.
        health: how the relay has been doing.
        warning: why the reservation in force may not be relied upon, for a person; empty when nothing is wrong with it.
    """

    def __init__(self, uniform: Uniform) -> None:
        """A keeper that is stopped."""
        self.state = "stopped"
        self.attempt = 0
        self.grant: Grant | None = None
        self.health = Health()
        self.warning = ""
        self._uniform = uniform
        self._deadline: float | None = None  # of the state: time-out, end of the pause, or time to renew
        self._expires = 0.0  # of the grant
        self._asked = 0.0
        self._down_since = 0.0
        self._clock_difference = 0.0
        self._last_seen = 0.0
        self._failures = 0  # that back-off counts
        self._refusals = 0  # likewise
        self._leaving = False  # the relay has said that it is shutting down, and is still connected
        self._left = -math.inf  # when it did, unless what it ended had been good for some time
        self._partings = 0  # in a row that came to nothing so

    @property
    def next_wakeup(self) -> float | None:
        """When `tick` must be called at the latest, on the clock of `now`, if nothing else happens; None for never."""
        if self._deadline is None:
            return None
        # A pause that is long is looked after too: a machine that has slept should not wait it out.
        wakeup = min(self._deadline, self._last_seen + CHECK_INTERVAL)
        return wakeup if self.grant is None else min(wakeup, self._expires)

    @property
    def due(self) -> float | None:
        """When the relay is asked again, to renew or after a pause; None in other states."""
        return self._deadline if self.state in {"held", "waiting"} else None

    @property
    def expires(self) -> float | None:
        """When the reservation ends if it is not renewed; None without one."""
        return None if self.grant is None else self._expires

    def start(self, now: float, now_wall: float) -> list[Command]:
        """Begin to want a reservation. To start a keeper that runs has no effect."""
        if self.state != "stopped":
            return []
        self._look_at_clocks(now, now_wall)
        self._down_since = now
        self.health = Health()
        self._failures = self._refusals = 0
        return self._connect("start", now)

    def stop(self, now: float, now_wall: float) -> list[Command]:
        """Want no reservation any more. It ends at the relay when it expires, or with the connection."""
        if self.state == "stopped":
            return []
        self._look_at_clocks(now, now_wall)
        self._step("stop")
        self.attempt += 1
        self._deadline = None
        return self._lose("stopped", now)

    def connected(self, attempt: int, now: float, now_wall: float) -> list[Command]:
        """There is a connection to the relay."""
        if attempt != self.attempt or self.state != "connecting":
            return []
        self._look_at_clocks(now, now_wall)
        return self._reserve("connected", now)

    def granted(self, attempt: int, grant: Grant, now: float, now_wall: float) -> list[Command]:
        """The relay has answered OK to the RESERVE of this attempt."""
        if attempt != self.attempt or self.state not in {"reserving", "renewing"}:
            return []
        self._look_at_clocks(now, now_wall)
        self._step("granted")
        lifetime, self.warning = _believed(grant.expire - now_wall)
        self._expires = now + lifetime
        self._deadline = now + lifetime * self._uniform(*RENEW_BETWEEN)
        self._refusals = 0
        self.health = dataclasses.replace(
            self.health,
            successes=self.health.successes + 1,
            failures_in_row=0,
            round_trip=now - self._asked,
            last_error="",
            held_since=now if self.grant is None else self.health.held_since,
        )
        same = self.grant is not None and (self.grant.addresses, self.grant.limit) == (grant.addresses, grant.limit)
        self.grant = grant
        return [] if same else [Publish(grant)]

    def refused(self, attempt: int, refusal: Refusal, now: float, now_wall: float) -> list[Command]:
        """The relay has refused the RESERVE of this attempt."""
        if attempt != self.attempt or self.state not in {"reserving", "renewing"}:
            return []
        self._look_at_clocks(now, now_wall)
        if refusal.reason == DRAINING:
            return self._leave(now)
        reason = f"the relay refused: {refusal}"
        self._count_failure(reason)
        denied = refusal.status == Status.PERMISSION_DENIED
        commands = self._lose(reason, now) if denied else []
        self._step("denied" if denied and self.state == "renewing" else "refused")
        first = DENIED_PAUSE if denied else REFUSED_PAUSE
        longest = min(LONGEST_PAUSE, first * 2 ** min(self._refusals, 16))
        self._refusals += 1
        self._deadline = now + self._uniform(longest / 2, longest)
        return commands

    def failed(self, attempt: int, reason: str, now: float, now_wall: float) -> list[Command]:
        """The `Connect` or `Reserve` of this attempt has failed."""
        if attempt != self.attempt or self.state not in {"connecting", "reserving", "renewing"}:
            return []
        self._look_at_clocks(now, now_wall)
        return self._fail("failed", reason, now)

    def disconnected(self, now: float, now_wall: float) -> list[Command]:
        """The connection to the relay, over which the reservation was or is being made, has ended."""
        if self._leaving and self.state == "waiting":
            self._look_at_clocks(now, now_wall)
            self._leaving = False
            self._partings = self._partings + 1 if now - self._left < STABLE_AFTER else 0
            self._deadline = now + min(LONGEST_PAUSE, self._uniform(*RETURN_PAUSE) * 2 ** min(self._partings, 16))
            return []
        if self.state not in {"reserving", "held", "renewing"}:
            return []
        self._look_at_clocks(now, now_wall)
        return self._fail("disconnected", "the connection to the relay has ended", now)

    def silent(self, now: float, now_wall: float) -> list[Command]:
        """The connection over which the reservation was or is being made gives no sign of life."""
        if self.state not in {"reserving", "held", "renewing"}:
            return []
        self._look_at_clocks(now, now_wall)
        return self._fail("silent", "the relay does not answer", now)

    def leaving(self, now: float, now_wall: float) -> list[Command]:
        """The relay has said on the connection of the reservation that it goes away, and grants nothing more."""
        if self.state not in {"reserving", "held", "renewing"}:
            return []
        self._look_at_clocks(now, now_wall)
        return self._leave(now)

    def network_changed(self, now: float, now_wall: float) -> list[Command]:
        """This machine's addresses or routes have changed: try at once, and prove what seems to be held."""
        if self.state == "stopped":
            return []
        self._look_at_clocks(now, now_wall)
        self._failures = self._refusals = 0
        if self.state in {"held", "renewing"}:
            return self._reserve("network_changed", now)
        return self._connect("network_changed", now)

    def tick(self, now: float, now_wall: float) -> list[Command]:
        """Time has passed."""
        if self.state == "stopped":
            return []
        jumped = self._look_at_clocks(now, now_wall)
        if self.grant is not None and now >= self._expires:
            return self._fail("expired", "the reservation has expired", now)
        due = self._deadline is not None and now >= self._deadline
        match self.state:
            case "held" if due or jumped:
                return self._reserve("renew", now)
            case "waiting" if due or jumped:
                return self._connect("retry", now)
            case "connecting" if due:
                return self._fail("failed", "no connection to the relay in time", now)
            case "reserving" | "renewing" if due:
                return self._fail("failed", "the relay did not answer in time", now)
        return []

    def _step(self, event: str) -> None:
        after = TRANSITIONS.get((self.state, event))
        if after is None:
            raise InvalidValueError(f"a keeper in the state {self.state} cannot take {event}")
        self.state = after

    def _connect(self, event: str, now: float) -> list[Command]:
        self._step(event)
        self._leaving = False
        self.attempt += 1
        self._deadline = now + CONNECT_TIMEOUT
        return [Connect(self.attempt)]

    def _reserve(self, event: str, now: float) -> list[Command]:
        self._step(event)
        self.attempt += 1
        self._asked = now
        self._deadline = now + RESERVE_TIMEOUT
        return [Reserve(self.attempt)]

    def _fail(self, event: str, reason: str, now: float) -> list[Command]:
        """Give up the attempt, and the reservation if there was one."""
        self._count_failure(reason)
        held_since = self.health.held_since
        if held_since is not None and now - held_since < STABLE_AFTER:
            event = "flapped"
        commands = self._lose(reason, now)
        if TRANSITIONS.get((self.state, event)) == "connecting":
            return [*commands, *self._connect(event, now)]
        self._step(event)
        self.attempt += 1
        allowed = min(LONGEST_PAUSE, max(ALWAYS_ALLOWED_PAUSE, (now - self._down_since) * PAUSE_SHARE))
        longest = min(allowed, FIRST_PAUSE * 2 ** min(self._failures, 16))
        self._failures += 1
        self._deadline = now + self._uniform(longest / 2, longest)
        return commands

    def _leave(self, now: float) -> list[Command]:
        """The relay is shutting down: that is no failure of it, unless it does so again and again."""
        held_since = self.health.held_since
        stable = held_since is not None and now - held_since >= STABLE_AFTER
        self._left = -math.inf if stable else now
        commands = self._lose(DRAINING, now)
        self.health = dataclasses.replace(self.health, departures=self.health.departures + 1, last_error=DRAINING)
        self._step("leaving")
        self.attempt += 1
        self._failures = self._refusals = 0
        self._leaving = True
        self._deadline = now + self._uniform(LEAVING_PAUSE / 2, LEAVING_PAUSE)
        return commands

    def _lose(self, reason: str, now: float) -> list[Command]:
        if self.grant is None:
            return []
        if self.health.held_since is not None and now - self.health.held_since >= STABLE_AFTER:
            self._down_since = now
            self._failures = 0
        self.grant = None
        self.warning = ""
        self.health = dataclasses.replace(self.health, held_since=None)
        return [Withdraw(reason)]

    def _count_failure(self, reason: str) -> None:
        self.health = dataclasses.replace(
            self.health,
            failures=self.health.failures + 1,
            failures_in_row=self.health.failures_in_row + 1,
            last_error=reason,
        )

    def _look_at_clocks(self, now: float, now_wall: float) -> bool:
        """Whether the clocks have come apart since the last look."""
        before, self._clock_difference = self._clock_difference, now_wall - now
        self._last_seen = now
        return abs(self._clock_difference - before) > CLOCK_JUMP


def _believed(told: float) -> tuple[float, str]:
    """For how many seconds to count on a reservation that is said to last for so many, and what is wrong with it."""
    clocks = "the clock of the relay or of this machine is wrong"
    if told > PLAUSIBLE_LIFETIME:
        return DOUBTED_LIFETIME, f"the relay says that this reservation ends in {told / 86400:.0f} days: {clocks}"
    if told <= 0:
        return DOUBTED_LIFETIME, f"the relay says that this reservation ended {-told:.0f} s ago: {clocks}"
    if told < SHORTEST_LIFETIME:
        return SHORTEST_LIFETIME, (
            f"the relay says that this reservation ends in {told:.0f} s, and one of less than "
            f"{SHORTEST_LIFETIME:.0f} s cannot be kept: peers do not always get through, unless {clocks}"
        )
    return min(told, LONGEST_LIFETIME), ""
