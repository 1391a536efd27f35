"""The keeper of a reservation, driven by hand and against a relay that misbehaves. Time and chance are arguments."""

from __future__ import annotations

import itertools
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import keeper as module
from protocol.circuit.hop_client import Grant
from protocol.circuit.messages import Refusal, Status
from protocol.errors import InvalidValueError
from protocol.keeper import (
    ALWAYS_ALLOWED_PAUSE,
    CHECK_INTERVAL,
    CONNECT_TIMEOUT,
    DOUBTED_LIFETIME,
    LEAVING_PAUSE,
    LONGEST_LIFETIME,
    LONGEST_PAUSE,
    PLAUSIBLE_LIFETIME,
    RESERVE_TIMEOUT,
    RETURN_PAUSE,
    SHORTEST_LIFETIME,
    TRANSITIONS,
    Connect,
    Keeper,
    Publish,
    Reserve,
    Withdraw,
)
from protocol.keys import PrivateKey
from protocol.multiaddr import Multiaddr
from protocol.reservations import DRAINING

RELAY = PrivateKey.from_seed(b"r" * 32).peer_id
US = PrivateKey.from_seed(b"u" * 32).peer_id
ADDRESS = Multiaddr(f"/ip4/192.0.2.1/tcp/4001/p2p/{RELAY}/p2p-circuit/p2p/{US}")
EPOCH = 1_700_000_000.0
FULL = Refusal(Status.RESERVATION_REFUSED, "full")
DENIED = Refusal(Status.PERMISSION_DENIED, "not listed")


def longest(_, high):
    """Chance at its worst."""
    return high


def grant(expire, *addresses):
    return Grant(RELAY, int(expire), addresses or (ADDRESS,), None, None)


class World:
    """A keeper, and the clocks that it is told."""

    def __init__(self, uniform=longest):
        self.keeper = Keeper(uniform)
        self.now = 1000.0
        self.offset = EPOCH
        self.said = []

    @property
    def wall(self):
        return self.now + self.offset

    def do(self, name, *arguments, **options):
        commands = getattr(self.keeper, name)(*arguments, self.now, self.wall, **options)
        self.said += commands
        return commands

    def answer(self, name, *arguments, **options):
        return self.do(name, self.keeper.attempt, *arguments, **options)

    def grant(self, lifetime=3600.0):
        return self.answer("granted", grant(self.wall + lifetime))

    def wake(self):
        """Sleep until the keeper wants to be woken."""
        self.now = max(self.now, self.keeper.next_wakeup)
        return self.do("tick")

    def sleep(self, seconds):
        """Pass time, waking the keeper whenever it wants, until it asks for something."""
        until = self.now + seconds
        while self.keeper.next_wakeup is not None and self.keeper.next_wakeup <= until:
            if commands := self.wake():
                return commands
        self.now = until
        return []

    def reach(self, state):
        for act in {
            "stopped": [],
            "connecting": ["start"],
            "waiting": ["start", "failed"],
            "reserving": ["start", "connected"],
            "held": ["start", "connected", "granted"],
            "renewing": ["start", "connected", "granted", "renew"],
        }[state]:
            act_on(self, act)
        assert self.keeper.state == state
        return self


def act_on(world, event):
    match event:
        case "start" | "stop" | "network_changed" | "leaving":
            return world.do(event)
        case "disconnected" | "silent":
            world.now += 60
            return world.do(event)
        case "connected":
            return world.answer("connected")
        case "granted":
            return world.grant()
        case "refused":
            return world.answer("refused", FULL)
        case "denied":
            return world.answer("refused", DENIED)
        case "failed":
            world.now += 60 if world.keeper.grant else 0
            return world.answer("failed", "broken")
        case "flapped":
            return world.do("disconnected")
        case "renew" | "retry":
            return world.sleep(3000.0 if event == "renew" else 1.0)
        case "expired":
            world.now += 4000.0
            return world.do("tick")
    raise AssertionError(event)


def test_drawing_and_table_agree():
    drawing = module.__doc__.split("stateDiagram-v2")[1]
    drawn = {((before, event), after) for before, after, event in re.findall(r"(\w+) --> (\w+): (\w+)", drawing)}
    assert drawn == set(TRANSITIONS.items())


@pytest.mark.parametrize(("state", "event"), list(TRANSITIONS))
def test_the_machine_does_what_the_table_says(state, event):
    world = World().reach("held" if state == "renewing" else state)
    if state == "renewing":
        # Either early, so that the reservation is young, or when it is time.
        act_on(world, "network_changed" if event == "flapped" else "renew")
        assert world.keeper.state == "renewing"
    act_on(world, event)
    assert world.keeper.state == TRANSITIONS[state, event]


@pytest.mark.parametrize(
    ("state", "event"),
    [
        (state, event)
        for state in sorted({state for state, _ in TRANSITIONS})
        for event in ("connected", "granted", "refused", "failed")
    ],
)
def test_answers_to_what_was_given_up_are_ignored(state, event):
    world = World().reach(state)
    arguments = {"connected": [], "granted": [grant(world.wall + 60)], "refused": [FULL], "failed": ["x"]}[event]
    assert world.do(event, world.keeper.attempt - 1, *arguments) == []
    assert world.keeper.state == state


def test_from_nothing_to_a_reservation_and_back():
    world = World()
    assert world.keeper.next_wakeup is None
    assert world.do("start") == [Connect(1)]
    assert world.do("start") == []
    assert world.answer("connected") == [Reserve(2)]
    world.now += 0.04
    (published,) = world.grant()
    assert published == Publish(world.keeper.grant)
    assert world.keeper.health.round_trip == pytest.approx(0.04)
    assert world.keeper.health.held_since == world.now
    assert world.do("stop") == [Withdraw("stopped")]
    assert world.do("stop") == []
    assert world.keeper.next_wakeup is None
    assert world.do("tick") == world.do("network_changed") == world.do("disconnected") == []


@pytest.mark.parametrize(("uniform", "share"), [(longest, 0.75), (lambda low, _: low, 0.5)])
def test_it_renews_early_with_jitter_and_says_nothing_new(uniform, share):
    world = World(uniform).reach("held")
    began = world.now
    while not (commands := world.wake()):
        assert world.now - began < 3600
    assert world.now - began == pytest.approx(3600 * share)
    assert commands == [Reserve(3)]
    assert world.grant() == []
    assert world.keeper.health.successes == 2
    assert world.keeper.health.held_since == began


def test_new_addresses_are_published():
    world = World().reach("renewing")
    other = grant(world.wall + 100, Multiaddr(str(ADDRESS).replace("4001", "4002")))
    assert world.answer("granted", other) == [Publish(other)]


def test_two_keepers_do_not_renew_together():
    moments = set()
    for seed in range(20):
        world = World(random.Random(seed).uniform).reach("held")
        while not world.wake():
            pass
        moments.add(round(world.now))
    assert len(moments) > 15


def test_failures_back_off_and_a_short_outage_ends_in_a_moment():
    world = World().reach("held")
    world.now += 600
    assert [type(command) for command in world.do("disconnected")] == [Withdraw, Connect]
    pauses = []
    while world.now < 1600 + 3600 * 10:
        world.answer("failed", "connection refused")
        before = world.now
        while not world.wake():
            pass
        pauses.append((before - 1600, world.now - before))
    first = [round(pause, 3) for _, pause in pauses[:5]]
    assert first == [0.25, 0.5, 1.0, 1.5, 1.5]
    for outage, pause in pauses:
        assert pause <= max(ALWAYS_ALLOWED_PAUSE, outage / 20) + 1e-6
        assert pause <= LONGEST_PAUSE
    assert pauses[-1][1] == LONGEST_PAUSE
    assert len(pauses) < 400


def test_a_relay_that_refuses_is_asked_less_often():
    for refusal, first in ((FULL, 5.0), (DENIED, 15.0)):
        world = World().reach("reserving")
        asked = []
        for _ in range(12):
            world.answer("refused", refusal)
            before = world.now
            while not world.wake():
                pass
            asked.append(world.now - before)
            world.answer("connected")
        assert asked[0] == pytest.approx(first)
        assert asked[1] == pytest.approx(first * 2)
        assert asked[-1] == pytest.approx(LONGEST_PAUSE)
        assert "the relay refused" in world.keeper.health.last_error


def test_a_refused_renewal_keeps_the_reservation_while_it_lasts():
    world = World().reach("renewing")
    expires = world.keeper._expires
    assert expires == 1000 + 3600
    assert world.answer("refused", FULL) == []
    assert world.keeper.state == "held"
    said = []
    while world.keeper.grant is not None:
        said = world.wake()
        if world.keeper.state == "renewing":
            world.answer("refused", FULL)
    assert said == [Withdraw("the reservation has expired"), Connect(world.keeper.attempt)]
    assert world.now == expires


def test_a_denied_renewal_ends_it_at_once():
    world = World().reach("renewing")
    assert world.answer("refused", DENIED) == [Withdraw(f"the relay refused: {DENIED}")]
    assert world.keeper.state == "waiting"


def test_a_reservation_that_is_lost_again_and_again_costs_pauses():
    world = World().reach("held")
    commands = []
    for _ in range(200):
        world.now += 0.05
        commands += world.do("disconnected")
        while world.keeper.state == "waiting":
            commands += world.wake()
        world.answer("connected")
        commands += world.grant()
    assert world.now > 1000 + 190 * ALWAYS_ALLOWED_PAUSE


def test_a_relay_that_shuts_down_has_not_failed_and_is_asked_again_when_it_has_ended():
    world = World().reach("held")
    world.now += 3000
    failures = world.keeper.health.failures
    assert world.do("leaving") == [Withdraw(DRAINING)]
    assert world.keeper.health.last_error == DRAINING
    assert world.sleep(25) == [], "it is still there, and told us not to ask"
    assert world.do("disconnected") == []
    assert world.keeper.due == pytest.approx(world.now + RETURN_PAUSE[1])
    assert world.sleep(2) == [Connect(world.keeper.attempt)]
    assert world.keeper.health.failures == failures
    world.answer("failed", "connection refused")  # it takes some time until it is back
    assert world.keeper.due - world.now <= ALWAYS_ALLOWED_PAUSE
    world.sleep(2)
    world.answer("connected")
    assert world.grant() == [Publish(world.keeper.grant)]


@pytest.mark.parametrize("state", ["reserving", "renewing"])
def test_a_relay_that_says_as_it_refuses_that_it_shuts_down_is_one_that_leaves(state):
    world = World().reach(state)
    world.answer("refused", Refusal(Status.RESERVATION_REFUSED, DRAINING))
    assert (world.keeper.state, world.keeper.grant) == ("waiting", None)
    assert world.keeper.health.failures == 0
    assert world.keeper.health.departures == 1
    assert world.keeper.due == pytest.approx(world.now + LEAVING_PAUSE)
    assert world.sleep(LEAVING_PAUSE) == [Connect(world.keeper.attempt)]


def test_a_relay_that_is_always_about_to_leave_is_asked_ever_less_often():
    world = World().reach("reserving")
    asked = []
    for _ in range(20):
        world.answer("refused", Refusal(Status.RESERVATION_REFUSED, DRAINING))
        world.do("disconnected")
        before = world.now
        while not world.wake():
            pass
        asked.append(world.now - before)
        world.answer("connected")
    assert asked[0] < asked[3] < asked[-1] == LONGEST_PAUSE
    world.grant()
    world.now += 60
    world.do("leaving")
    world.do("disconnected")
    assert world.keeper.due <= world.now + RETURN_PAUSE[1], "what was before it was good does not count"


def test_a_change_of_network_ends_the_wait_for_a_relay_that_leaves():
    world = World().reach("held")
    world.do("leaving")
    assert world.do("network_changed") == [Connect(world.keeper.attempt)]
    assert world.do("disconnected") == []
    assert world.keeper.state == "connecting"


def test_a_connection_that_does_not_answer_is_replaced():
    world = World().reach("renewing")
    asked = world.now
    (withdrawn, connect) = world.wake()
    assert world.now - asked == RESERVE_TIMEOUT
    assert isinstance(withdrawn, Withdraw)
    assert connect == Connect(world.keeper.attempt)
    world.answer("connected")
    world.grant()
    world.now += 60
    assert world.do("disconnected")[-1] == Connect(world.keeper.attempt)


def test_a_dial_that_hangs_is_given_up():
    world = World().reach("connecting")
    began = world.now
    assert world.wake() == []
    assert (world.now - began, world.keeper.state) == (CONNECT_TIMEOUT, "waiting")
    assert world.keeper.health.last_error == "no connection to the relay in time"


def test_a_change_of_network_is_acted_on_at_once():
    for _ in range(20):
        world = World().reach("waiting")
        assert world.do("network_changed") == [Connect(world.keeper.attempt)]
    world = World().reach("reserving")
    assert world.do("network_changed") == [Connect(world.keeper.attempt)]
    world = World().reach("connecting")
    assert world.do("network_changed") == [Connect(2)]
    world = World().reach("held")
    assert world.do("network_changed") == [Reserve(world.keeper.attempt)]
    asked = world.now
    world.now = world.keeper.next_wakeup
    assert world.now - asked == RESERVE_TIMEOUT
    world.do("tick")
    assert world.said[-1] == Connect(world.keeper.attempt)
    world = World().reach("held")
    assert world.do("silent")
    assert world.keeper.state == "waiting"  # the reservation was young; an old one connects at once


def test_a_change_of_network_forgets_back_off():
    world = World().reach("waiting")
    for _ in range(8):
        while world.keeper.state == "waiting":
            world.wake()
        world.answer("failed", "x")
    world.do("network_changed")
    world.answer("failed", "x")
    assert world.keeper.next_wakeup - world.now == 0.25


@pytest.mark.parametrize("jump", [3600.0, -3600.0, 1e9, -1e9])
def test_a_clock_that_jumps_proves_the_reservation_and_does_not_lose_it(jump):
    world = World().reach("held")
    world.sleep(100)
    world.offset += jump
    asked = world.sleep(CHECK_INTERVAL + 1)
    assert asked == [Reserve(world.keeper.attempt)]
    assert world.answer("granted", grant(world.wall + 3600)) == []
    assert world.sleep(1000) == []


def test_a_machine_that_slept_asks_at_once():
    world = World().reach("waiting")
    for _ in range(30):
        world.answer("failed", "x")
        world.sleep(1000)
    world.answer("failed", "x")
    world.now += 1
    world.offset += 8 * 3600
    assert world.do("tick") == [Connect(world.keeper.attempt)]


def test_a_clock_that_is_adjusted_slowly_is_no_jump():
    world = World().reach("held")
    for _ in range(60):
        world.now += 30
        world.offset += 0.5
        assert world.do("tick") == []


@pytest.mark.parametrize(
    ("told", "counted", "warning"),
    [
        (-1e9, DOUBTED_LIFETIME, "ended 1000000000 s ago: the clock of the relay or of this machine is wrong"),
        (0.0, DOUBTED_LIFETIME, "the clock of the relay or of this machine is wrong"),
        (3.0, SHORTEST_LIFETIME, "ends in 3 s, and one of less than 10 s cannot be kept"),
        (SHORTEST_LIFETIME, SHORTEST_LIFETIME, ""),
        (20.0, 20.0, ""),
        (LONGEST_LIFETIME + 60, LONGEST_LIFETIME, ""),
        (PLAUSIBLE_LIFETIME, LONGEST_LIFETIME, ""),
        (PLAUSIBLE_LIFETIME + 60, DOUBTED_LIFETIME, "ends in 8 days: the clock"),
        (1e12, DOUBTED_LIFETIME, "the clock of the relay or of this machine is wrong"),
    ],
)
def test_the_expiry_that_is_told_is_believed_within_bounds(told, counted, warning):
    world = World().reach("reserving")
    world.answer("granted", grant(max(0, world.wall + told)))
    assert warning in world.keeper.warning
    assert bool(world.keeper.warning) == bool(warning)
    began = world.now
    while not world.wake():
        pass
    assert world.now - began == pytest.approx(counted * 0.75)


def test_a_warning_ends_with_what_it_was_about():
    world = World().reach("reserving")
    world.grant(3)
    assert world.keeper.warning
    world.sleep(60)
    world.grant(3600)
    assert world.keeper.warning == ""
    world.sleep(3600)
    world.grant(3)
    assert world.keeper.warning
    world.do("disconnected")
    assert world.keeper.warning == ""


@settings(deadline=None)
@given(st.integers(0, 1 << 32), st.integers(int(SHORTEST_LIFETIME), 8000), st.sampled_from([0, 40, -40]))
def test_short_and_long_reservations_never_end_before_they_are_renewed(seed, lifetime, jump):
    world = World(random.Random(seed).uniform).reach("reserving")
    world.grant(lifetime)
    until = world.now + lifetime
    error = 0
    for turn in range(30):
        if turn == 15 and lifetime > 200:  # our clock is set; what is shorter than its error cannot be told
            world.offset += jump
            error = jump
        assert world.sleep(lifetime) == [Reserve(world.keeper.attempt)]
        assert world.now < until
        world.now += 0.2  # a slow round trip
        assert world.answer("granted", grant(world.wall + lifetime - error)) == []
        until = world.now + lifetime
    assert [type(command) for command in world.said if isinstance(command, (Publish, Withdraw))] == [Publish]
    assert world.keeper.warning == "" or lifetime < SHORTEST_LIFETIME + 1


@given(st.integers(0, 1 << 32), st.lists(st.floats(-1e4, 30), min_size=1, max_size=8))
def test_a_relay_that_grants_next_to_nothing_cannot_make_us_spin(seed, lifetimes):
    world = World(random.Random(seed).uniform).reach("reserving")
    world.grant(lifetimes[0])
    asked = []
    while world.now < 4600:
        (reserve,) = world.sleep(60)
        assert isinstance(reserve, Reserve)
        asked.append(world.now)
        world.grant(lifetimes[len(asked) % len(lifetimes)])
    assert min(after - before for before, after in itertools.pairwise(asked)) >= SHORTEST_LIFETIME / 2 - 1e-6
    assert world.keeper.grant is not None


def test_wrong_steps_are_not_taken():
    with pytest.raises(InvalidValueError):
        Keeper(longest)._step("granted")


def test_it_never_sleeps_for_longer_than_it_may():
    world = World().reach("held")
    assert world.keeper.next_wakeup == world.now + CHECK_INTERVAL
    world.sleep(2650)
    assert world.keeper.next_wakeup <= world.now + CHECK_INTERVAL


class Relay:
    """What a relay and the network to it are like at a moment, and what comes of commands."""

    def __init__(self, world):
        self.world = world
        self.mood = "good"
        self.connected = False
        self.reserved_until = None
        self.connects = 0

    def carry_out(self, commands):
        queue = list(commands)
        while queue:
            match queue.pop(0):
                case Connect(attempt):
                    self.connects += 1
                    if self.mood == "down":
                        queue += self.world.do("failed", attempt, "connection refused")
                    elif self.mood != "black hole":
                        self.connected = True
                        queue += self.world.do("connected", attempt)
                case Reserve(attempt):
                    assert self.connected
                    if self.mood == "good":
                        queue += self.world.do("granted", attempt, grant(self.world.wall + 600))
                        self.reserved_until = self.world.now + 600
                    elif self.mood == "full":
                        queue += self.world.do("refused", attempt, FULL)
                    elif self.mood == "down":
                        queue += self.world.do("failed", attempt, "reset")
                case Withdraw():
                    self.reserved_until = None

    def change(self, mood):
        self.mood = mood
        if mood == "down" and self.connected:
            self.connected = False
            self.carry_out(self.world.do("disconnected"))

    def run(self, seconds):
        until = self.world.now + seconds
        while (wakeup := self.world.keeper.next_wakeup) is not None and wakeup <= until:
            assert wakeup >= self.world.now - 1e-6
            self.world.now = max(self.world.now, wakeup)
            self.carry_out(self.world.do("tick"))
        self.world.now = until


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["good", "down", "black hole", "full"]),
        st.floats(0, 400),
        st.sampled_from(["nothing", "network", "jump"]),
    ),
    max_size=12,
)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 1 << 32), STEPS)
def test_whatever_happens_it_heals_without_help(seed, steps):
    world = World(random.Random(seed).uniform)
    relay = Relay(world)
    relay.carry_out(world.do("start"))
    for mood, seconds, event in steps:
        relay.change(mood)
        if event == "network":
            relay.carry_out(world.do("network_changed"))
        elif event == "jump":
            world.offset += 10_000
        connects, began = relay.connects, world.now
        relay.run(seconds)
        # Never a storm: some quick attempts, then one in about 0.7 s at most.
        assert relay.connects - connects <= 8 + (world.now - began) / 0.7
        published = [command for command in world.said if isinstance(command, (Publish, Withdraw))]
        assert bool(published and isinstance(published[-1], Publish)) == (world.keeper.grant is not None)
        assert (world.keeper.grant is not None) == (world.keeper.state in {"held", "renewing"})
    relay.change("good")
    relay.run(CONNECT_TIMEOUT + RESERVE_TIMEOUT + LONGEST_PAUSE)
    assert world.keeper.grant is not None
    assert relay.reserved_until > world.now


@given(st.integers(0, 1 << 32), st.floats(0.1, 30))
def test_it_is_back_within_two_seconds_of_a_relay_that_was_restarted(seed, outage):
    world = World(random.Random(seed).uniform)
    relay = Relay(world)
    relay.carry_out(world.do("start"))
    relay.run(60)
    relay.change("down")
    relay.run(outage)
    relay.change("good")
    relay.run(2.0)
    assert world.keeper.grant is not None
