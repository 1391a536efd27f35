"""The supervision logic: each rule by example, and everything at once under a random driver."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from protocol.messages.system import ChildSpec, Restart, Strategy, SupervisorSpec, Work
from supervisor import strategy as module
from supervisor.port import NameState
from supervisor.strategy import (
    TRANSITIONS,
    AskToStop,
    ChildState,
    Finished,
    Forget,
    Kill,
    PingChild,
    RequestRefused,
    Start,
    StartAnswered,
    StopAnswered,
    SupervisorLogic,
    TreeReady,
    Warn,
)


def child(name, restart=Restart.PERMANENT, **more):
    return ChildSpec(name=name, factory="actors.x:X", arguments={}, restart=restart, **more)


def spec(*children, strategy=Strategy.ONE_FOR_ONE, intensity=3, window=10.0, initial=0.1, limit=2.0):
    return SupervisorSpec(strategy, intensity, window, initial, limit, tuple(children))


class Tree:
    """Drives a SupervisorLogic by hand; keeps who lives, checks that nobody lives twice."""

    def __init__(self, spec, seed=0):
        self.logic = SupervisorLogic("root", spec, random.Random(seed))
        self.now = 100.0
        self.alive = {}
        self.log = []
        self.do(self.logic.begin(self.now))

    def do(self, commands):
        for command in commands:
            match command:
                case Start(spec, incarnation, _):
                    assert spec.name not in self.alive, "two incarnations at once"
                    self.alive[spec.name] = incarnation
                    self.log.append(f"start {spec.name}")
                case AskToStop(name):
                    self.log.append(f"stop {name}")
                case Kill(name):
                    self.log.append(f"kill {name}")
                case PingChild(name):
                    self.log.append(f"ping {name}")
                case TreeReady():
                    self.log.append("tree ready")
                case Finished(failed):
                    assert not self.alive
                    self.log.append("failed" if failed else "finished")
                case Forget(name):
                    assert name not in self.alive
                    self.log.append(f"forget {name}")
                case StartAnswered(token):
                    self.log.append(f"{token} started")
                case StopAnswered(token):
                    self.log.append(f"{token} stopped")
                case RequestRefused(token, code):
                    self.log.append(f"{token} {code}")
        return commands

    def ready(self, name):
        self.do(self.logic.child_ready(name, self.alive[name], self.now))

    def exit(self, name, *, failed=True, reason="killed"):
        self.do(self.logic.child_exited(name, self.alive.pop(name), self.now, failed=failed, reason=reason))

    def pass_time(self, seconds):
        """Let time pass, ticking whenever the logic wants it."""
        end = self.now + seconds
        while (due := self.logic.next_wakeup()) is not None and due <= end:
            self.now = max(self.now, due)
            self.do(self.logic.tick(self.now))
        self.now = end

    def take(self):
        log, self.log = self.log, []
        return log

    def state(self, name):
        return {status.name: status.state for status in self.logic.status(self.now)}[name]


def quiet(name, restart=Restart.PERMANENT, **more):
    return child(name, restart, heartbeat=0.0, **more)


def started(*names, **more):
    tree = Tree(spec(*(quiet(name) for name in names), **more))
    for name in names:
        tree.ready(name)
    tree.take()
    return tree


def test_children_start_in_order_each_when_the_one_before_is_ready():
    tree = Tree(spec(quiet("a"), quiet("b"), quiet("c")))
    assert tree.take() == ["start a"]
    tree.ready("a")
    assert tree.take() == ["start b"]
    tree.ready("b")
    tree.ready("c")
    assert tree.take() == ["start c", "tree ready"]


def test_shutdown_stops_in_reverse_order_and_then_finishes():
    tree = started("a", "b", "c")
    tree.do(tree.logic.shutdown_requested("bye", tree.now))
    for name in "cba":
        assert tree.take() == [f"stop {name}"]
        tree.exit(name, failed=False)
    assert tree.take() == ["finished"]


def test_a_child_that_does_not_stop_is_killed_at_its_deadline():
    tree = started("a")
    tree.do(tree.logic.shutdown_requested("bye", tree.now))
    tree.pass_time(4.99)
    assert tree.take() == ["stop a"]
    tree.pass_time(0.02)
    assert tree.take() == ["kill a"]
    tree.exit("a")
    assert tree.take() == ["finished"]


def end_with_words(tree, name, code):
    tree.do(tree.logic.child_exited(name, tree.alive.pop(name), tree.now, failed=True, reason="in use", code=code))


def test_a_child_that_explains_why_it_cannot_start_ends_the_first_start_soon():
    tree = Tree(spec(quiet("a"), quiet("b"), intensity=100))
    tree.ready("a")
    for _ in range(2):
        end_with_words(tree, "b", "port-in-use")
        tree.pass_time(1.0)
    end_with_words(tree, "b", "port-in-use")
    tree.exit("a", failed=False)
    assert tree.take() == ["start a", "start b", "start b", "start b", "stop a", "failed"]


def test_ends_without_an_explanation_and_later_failures_are_borne():
    tree = Tree(spec(quiet("a"), intensity=100))
    for _ in range(5):
        end_with_words(tree, "a", "crash")
        tree.pass_time(3.0)
    tree.ready("a")
    for _ in range(5):
        end_with_words(tree, "a", "port-in-use")
        tree.pass_time(3.0)
    assert "failed" not in tree.take()


def test_one_for_one_restarts_only_the_one_that_ended():
    tree = started("a", "b", "c")
    tree.exit("b")
    assert tree.take() == ["start b"]
    assert tree.alive == {"a": 1, "b": 2, "c": 1}


def test_rest_for_one_restarts_the_later_ones_too_in_order():
    tree = started("a", "b", "c", "d", strategy=Strategy.REST_FOR_ONE)
    tree.exit("b")
    assert tree.take() == ["stop d"]
    tree.exit("d", failed=False)
    assert tree.take() == ["stop c"]
    tree.exit("c", failed=False)
    assert tree.take() == ["start b"]
    tree.ready("b")
    assert tree.take() == ["start c"]
    tree.ready("c")
    tree.ready("d")
    assert tree.take() == ["start d"]
    assert tree.alive == {"a": 1, "b": 2, "c": 2, "d": 2}


def test_one_for_all_restarts_everybody():
    tree = started("a", "b", "c", strategy=Strategy.ONE_FOR_ALL)
    tree.exit("b")
    tree.exit("c", failed=False)
    tree.exit("a", failed=False)
    assert tree.take() == ["stop c", "stop a", "start a"]
    assert [status.restarts for status in tree.logic.status(tree.now)] == [0, 1, 0]


def test_a_whole_group_waits_for_the_backoff_of_the_one_that_failed():
    tree = started("a", "b", "c", strategy=Strategy.ONE_FOR_ALL, initial=1.0)
    for _ in range(2):
        tree.exit("b")
        tree.exit("c", failed=False)
        tree.exit("a", failed=False)
        if tree.alive:
            tree.ready("a")
            tree.ready("b")
            tree.ready("c")
            tree.take()
    tree.pass_time(0.49)
    assert tree.take() == ["stop c", "stop a"]
    tree.pass_time(0.52)
    assert tree.take() == ["start a"]


def test_a_sibling_that_dies_while_it_is_stopped_for_a_restart_counts_no_second_failure():
    tree = started("a", "b", strategy=Strategy.ONE_FOR_ALL, intensity=1)
    tree.exit("a")
    tree.exit("b", failed=True)
    assert tree.take() == ["stop b", "start a"]


@pytest.mark.parametrize(
    ("restart", "failed", "outcome"),
    [
        (Restart.PERMANENT, True, "starting"),
        (Restart.PERMANENT, False, "starting"),
        (Restart.TRANSIENT, True, "starting"),
        (Restart.TRANSIENT, False, "stopped"),
        (Restart.TEMPORARY, True, "failed"),
        (Restart.TEMPORARY, False, "stopped"),
    ],
)
def test_who_is_restarted(restart, failed, outcome):
    tree = Tree(spec(quiet("a", restart)))
    tree.ready("a")
    tree.exit("a", failed=failed)
    assert tree.state("a") == outcome
    assert tree.logic.names()["a"][0] is (NameState.STARTING if outcome == "starting" else NameState.UNKNOWN)


def test_backoff_grows_is_limited_and_forgets_after_the_window():
    tree = started("a", intensity=100, window=60.0, initial=1.0, limit=4.0)
    waits = []
    for _ in range(6):
        before = tree.now
        tree.exit("a")
        while "a" not in tree.alive:
            assert tree.state("a") == "backing-off"
            tree.now = tree.logic.next_wakeup()
            tree.do(tree.logic.tick(tree.now))
        waits.append(tree.now - before)
        tree.ready("a")
    assert waits[0] == 0.0
    for wait, full in zip(waits[1:], (1, 2, 4, 4, 4), strict=True):
        assert full / 2 <= wait <= full
    tree.pass_time(61.0)
    tree.take()
    tree.exit("a")
    assert tree.take() == ["start a"]


def end_and_wait(tree, name, **how):
    """Seconds between an end of this child and its next start."""
    before = tree.now
    tree.exit(name, **how)
    while name not in tree.alive:
        tree.now = tree.logic.next_wakeup()
        tree.do(tree.logic.tick(tree.now))
    return tree.now - before


def test_a_child_that_ran_well_for_a_while_comes_back_at_once():
    tree = started("a", intensity=100, window=600.0, initial=1.0, limit=64.0)
    for _ in range(5):
        end_and_wait(tree, "a")
        tree.ready("a")
    assert end_and_wait(tree, "a") > 1.0
    tree.ready("a")
    tree.pass_time(module.STEADY)
    assert end_and_wait(tree, "a") == 0.0
    tree.ready("a")
    assert end_and_wait(tree, "a") > 0.0


def test_the_wait_of_a_child_is_bounded_by_its_own_limit():
    tree = Tree(spec(quiet("a", backoff_limit=1.0), quiet("b"), intensity=100, window=600.0, initial=1.0, limit=64.0))
    tree.ready("a")
    tree.ready("b")
    waits = {}
    for name in "ab":
        for _ in range(8):
            waits[name] = end_and_wait(tree, name)
            tree.ready(name)
    assert waits["a"] <= 1.0
    assert waits["b"] > 20.0


def test_an_end_that_was_wished_for_is_not_held_against_the_child():
    tree = started("a", intensity=2, window=600.0, initial=1.0)
    for _ in range(20):
        tree.logic.end_wished("a")
        assert end_and_wait(tree, "a") == 0.0
        tree.ready("a")
    assert not tree.logic.ending
    assert tree.logic.status(tree.now)[0].restarts == 20
    end_and_wait(tree, "a")  # only the next end was wished for
    tree.ready("a")
    end_and_wait(tree, "a")
    tree.ready("a")
    tree.exit("a")
    assert tree.logic.ending


def starts_until_ready(tree, fails):
    """Whether each start of `a` went without its checkpoint, for as long as `fails(fresh)`."""
    fresh = []
    original = tree.do

    def watched(commands):
        fresh.extend(command.fresh for command in commands if isinstance(command, Start))
        return original(commands)

    tree.do = watched
    tree.exit("a")
    while len(fresh) < 20:
        while "a" not in tree.alive:
            tree.now = tree.logic.next_wakeup()
            tree.do(tree.logic.tick(tree.now))
        if not fails(fresh[-1]):
            break
        tree.exit("a")
    tree.do = original
    return fresh


def test_a_start_that_fails_again_and_again_is_tried_once_without_the_checkpoint():
    tree = started("a", intensity=1000)
    assert starts_until_ready(tree, lambda fresh: not fresh) == [False, False, False, True]
    tree = started("a", intensity=1000)
    tries = starts_until_ready(tree, lambda _: True)
    assert tries == [False, False, False, True] + [False, False, True] * 5 + [False]


def test_kills_of_a_running_child_do_not_cast_doubt_on_its_checkpoint():
    tree = started("a", intensity=1000)
    for _ in range(10):
        assert starts_until_ready(tree, lambda _: False) == [False]
        tree.ready("a")
    # but failures of its own, just after its start, do
    fresh = []
    for _ in range(3):
        exited = tree.logic.child_exited("a", tree.alive.pop("a"), tree.now, failed=True, reason="bad", code="crash")
        tree.do(exited)
        while "a" not in tree.alive:
            tree.now = tree.logic.next_wakeup()
            exited = tree.do(tree.logic.tick(tree.now))
        fresh += [command.fresh for command in exited if isinstance(command, Start)]
        tree.ready("a")
    assert fresh == [False, False, True]


def beat(tree, name, mailbox, handled, work=None):
    """Answer the next heartbeat of this child like this; what the logic makes of it."""
    while f"ping {name}" not in tree.take():
        tree.now = tree.logic.next_wakeup()
        tree.do(tree.logic.tick(tree.now))
    return tree.do(
        tree.logic.heartbeat_answered(name, tree.alive[name], tree.now, mailbox=mailbox, handled=handled, work=work)
    )


def test_a_child_that_answers_and_does_not_work_is_told_of_and_then_killed():
    tree = Tree(spec(child("a", heartbeat=1.0, stall_warning=10.0, stall_deadline=30.0)))
    tree.ready("a")
    work = Work("config.read", 40.0, "gate", 39.0)
    assert beat(tree, "a", 3, 9) == []
    began, warned = tree.now, None
    while (commands := beat(tree, "a", 3, 9, work)) == [] or isinstance(commands[0], Warn):
        if commands:
            assert warned is None
            [warning], warned = commands, tree.now
            assert warning.text == (
                "it has handled nothing for 10 s, though messages wait for it: 3;"
                " it has been handling config.read for 40 s, waiting for gate"
            )
    assert warned - began == 10.0
    assert tree.now - began == 30.0
    [kill] = commands
    assert "it has handled nothing for 30 s" in kill.reason
    assert tree.state("a") == "stopping"


def test_a_child_that_works_slowly_or_has_nothing_to_do_is_left_alone():
    tree = Tree(spec(child("a", heartbeat=1.0, stall_warning=10.0, stall_deadline=30.0)))
    tree.ready("a")
    for number in range(100):
        assert beat(tree, "a", 3, number // 9) == []
    for _ in range(100):
        assert beat(tree, "a", 0, 12, Work("x.wait", 1e6)) == []


def test_a_temporary_sibling_is_stopped_with_its_group_and_not_started_again():
    tree = Tree(spec(quiet("a"), quiet("b", Restart.TEMPORARY), quiet("c"), strategy=Strategy.ONE_FOR_ALL))
    for name in "abc":
        tree.ready(name)
    tree.take()
    tree.exit("a")
    tree.exit("c", failed=False)
    tree.exit("b", failed=False)
    assert tree.take() == ["stop c", "stop b", "start a"]
    tree.ready("a")
    assert tree.take() == ["start c"]
    assert tree.state("b") == "stopped"


def test_more_failures_than_the_intensity_end_the_supervisor_as_failed():
    tree = started("a", "b", intensity=2, initial=0.001)
    for _ in range(2):
        tree.exit("a")
        tree.pass_time(0.01)
        tree.ready("a")
    tree.take()
    tree.exit("a", reason="no luck")
    assert tree.take() == ["stop b"]
    assert tree.logic.names()["a"] == (NameState.STARTING, 3)
    commands = tree.logic.child_exited("b", 1, tree.now, failed=False, reason="")
    assert commands == [Finished(True, "3 failures within 10 s, the last of a: no luck")]


def test_failures_spread_wider_than_the_window_are_borne():
    tree = started("a", intensity=1, window=5.0)
    for _ in range(20):
        tree.pass_time(5.01)
        tree.exit("a")
        tree.ready("a")
    assert not tree.logic.ending


def test_a_child_that_is_not_ready_in_time_is_killed_and_tried_again():
    tree = Tree(spec(quiet("a", start_deadline=3.0)))
    tree.pass_time(3.0)
    assert tree.take() == ["start a", "kill a"]
    tree.exit("a", reason="SIGKILL")
    assert tree.take() == ["start a"]
    assert tree.logic.status(tree.now)[0].last_failure == "it was not ready within 3 s"


def test_heartbeats_one_outstanding_and_the_hung_are_killed():
    tree = Tree(spec(child("a", heartbeat=1.0, heartbeat_deadline=2.0)))
    tree.ready("a")
    tree.pass_time(1.0)
    assert tree.take() == ["start a", "tree ready", "ping a"]
    tree.do(tree.logic.heartbeat_answered("a", 1, tree.now, mailbox=4, handled=9))
    assert (tree.logic.status(tree.now)[0].mailbox, tree.logic.status(tree.now)[0].handled) == (4, 9)
    tree.pass_time(1.0)
    assert tree.take() == ["ping a"]
    tree.pass_time(1.99)
    assert tree.take() == []
    tree.pass_time(0.01)
    assert tree.take() == ["kill a"]
    tree.exit("a")
    assert tree.logic.status(tree.now)[0].last_failure == "it did not answer a heartbeat for 2 s"


def test_a_supervisor_that_slept_itself_does_not_kill_its_children_for_it():
    tree = Tree(spec(child("a", heartbeat=1.0, heartbeat_deadline=2.0)))
    tree.ready("a")
    tree.pass_time(1.0)
    tree.take()
    tree.now += 3600.0  # stopped and continued: nobody ticked
    tree.do(tree.logic.tick(tree.now))
    assert tree.take() == []
    tree.pass_time(2.0)
    assert tree.take() == ["kill a"]


def test_dynamic_children_are_answered_when_ready():
    tree = started("a")
    tree.do(tree.logic.start_requested(quiet("d"), "r1", tree.now))
    assert tree.take() == ["start d"]
    tree.do(tree.logic.start_requested(quiet("d"), "r2", tree.now))
    assert tree.take() == ["r2 already-started"]
    tree.ready("d")
    assert tree.take() == ["r1 started"]
    tree.do(tree.logic.stop_requested("d", "r3", tree.now))
    tree.do(tree.logic.stop_requested("d", "r4", tree.now))
    tree.do(tree.logic.start_requested(quiet("d"), "r5", tree.now))
    assert tree.take() == ["stop d", "r5 already-started"]
    tree.exit("d", failed=False)
    assert tree.take() == ["forget d", "r3 stopped", "r4 stopped"]
    tree.do(tree.logic.stop_requested("d", "r6", tree.now))
    assert tree.take() == ["r6 no-such-child"]


def test_a_dynamic_child_that_fails_its_first_start_is_refused_and_not_tried_again():
    tree = started("a", intensity=0)
    tree.do(tree.logic.start_requested(quiet("d"), "r", tree.now))
    commands = tree.logic.child_exited("d", 1, tree.now, failed=True, reason="port 80 is in use", code="port-in-use")
    assert commands == [RequestRefused("r", "port-in-use", "port 80 is in use"), Forget("d")]
    assert not tree.logic.ending


def test_a_dynamic_child_that_was_ready_once_is_restarted_like_any_other():
    tree = started("a")
    tree.do(tree.logic.start_requested(quiet("d"), "r", tree.now))
    tree.ready("d")
    tree.exit("d")
    assert tree.take() == ["start d", "r started", "start d"]


def test_a_temporary_dynamic_child_is_forgotten_when_it_ends():
    tree = started("a")
    tree.do(tree.logic.start_requested(quiet("d", Restart.TEMPORARY), "r", tree.now))
    tree.ready("d")
    tree.exit("d")
    assert tree.take() == ["start d", "r started", "forget d"]


def test_stopping_a_child_that_waits_for_its_backoff_is_done_at_once():
    tree = started("a", initial=1.0)
    tree.exit("a")
    tree.ready("a")
    tree.exit("a")
    assert tree.state("a") == "backing-off"
    tree.take()
    tree.do(tree.logic.stop_requested("a", "r", tree.now))
    assert tree.take() == ["forget a", "r stopped"]
    assert tree.logic.next_wakeup() is None


def test_dynamic_children_stop_side_by_side_and_before_the_static_ones():
    tree = started("a", "b")
    for name in ("d", "e"):
        tree.do(tree.logic.start_requested(quiet(name), name, tree.now))
        tree.ready(name)
    tree.take()
    tree.do(tree.logic.shutdown_requested("bye", tree.now))
    assert tree.take() == ["stop e", "stop d"]
    tree.exit("d", failed=False)
    assert tree.take() == []
    tree.exit("e", failed=False)
    assert tree.take() == ["stop b"]


def test_shutdown_refuses_requests_that_wait_and_new_ones():
    tree = started("a")
    tree.do(tree.logic.start_requested(quiet("d"), "r1", tree.now))
    tree.do(tree.logic.shutdown_requested("bye", tree.now))
    tree.do(tree.logic.start_requested(quiet("e"), "r2", tree.now))
    assert tree.take() == ["start d", "r1 shutting-down", "stop d", "r2 shutting-down"]


def test_news_of_a_former_incarnation_changes_nothing():
    tree = started("a")
    tree.exit("a")
    before = tree.logic.status(tree.now)
    assert tree.logic.child_ready("a", 1, tree.now) == []
    assert tree.logic.child_exited("a", 1, tree.now, failed=True, reason="again") == []
    assert tree.logic.status(tree.now) == before


def test_a_restarted_supervisor_goes_on_counting_incarnations():
    logic = SupervisorLogic("root", spec(quiet("a")), random.Random(0), lambda _: 7)
    assert logic.begin(0.0) == [Start(quiet("a"), 8)]


def test_the_table_the_drawing_and_the_code_agree():
    text = module.__doc__
    rows = re.findall(r"^\| ([a-z-]+) +\| [^|]+ \| ([a-z-]+) +\|", text, re.MULTILINE)
    table = {pair for pair in rows if pair != ("from", "to")}
    drawing = set(re.findall(r"^    ([a-z-]+) --> ([a-z-]+)$", text, re.MULTILINE))
    code = {(source.value, target.value) for source, targets in TRANSITIONS.items() for target in targets}
    assert table == drawing == code
    assert {state.value for pair in code for state in map(ChildState, pair)} == {state.value for state in ChildState}


class Supervision(RuleBasedStateMachine):
    """Children that start, fail, hang and stop at random, requests at random; the host below does what it is told."""

    def __init__(self):
        super().__init__()
        self.now = 1000.0
        self.alive = {}  # name -> incarnation
        self.ready = set()
        self.stopping = []  # names asked to stop, in order of asking
        self.killed = set()
        self.finished = None
        self.seen = {}  # name -> highest incarnation ever
        self.tokens = {}  # token -> outcome
        self.pings = set()
        self.individually = set()
        self.next_token = 0

    @initialize(
        strategy=st.sampled_from(Strategy),
        restarts=st.lists(st.sampled_from(Restart), min_size=0, max_size=5),
        intensity=st.integers(0, 4),
        seed=st.integers(0, 1000),
    )
    def begin(self, strategy, restarts, intensity, seed):
        children = [child(f"s{n}", restart) for n, restart in enumerate(restarts)]
        self.strategy = strategy
        self.order = [c.name for c in children]
        self.logic = SupervisorLogic(
            "root", spec(*children, strategy=strategy, intensity=intensity), random.Random(seed)
        )
        self.do(self.logic.begin(self.now))

    def do(self, commands):
        for command in commands:
            assert self.finished is None, "nothing comes after Finished"
            match command:
                case Start(spec, incarnation):
                    name = spec.name
                    assert name not in self.alive, "two live incarnations"
                    assert incarnation > self.seen.get(name, 0), "incarnations only grow"
                    assert not self.logic.ending, "no start while ending"
                    if self.strategy is not Strategy.ONE_FOR_ONE:
                        before = self.order[: self.order.index(name)] if name in self.order else self.order
                        states = {s.name: s.state for s in self.logic.status(self.now)}
                        for earlier in before:
                            if earlier in self.alive and earlier not in self.ready:
                                assert states[earlier] == "stopping"
                                assert earlier in self.individually
                    self.seen[name] = incarnation
                    self.alive[name] = incarnation
                case AskToStop(name, incarnation):
                    assert self.alive[name] == incarnation
                    assert name not in self.stopping, "asked once"
                    self.stopping.append(name)
                case Kill(name, incarnation):
                    assert self.alive[name] == incarnation
                    assert name not in self.killed, "killed once"
                    self.killed.add(name)
                case PingChild(name, incarnation):
                    assert self.alive[name] == incarnation
                    assert name not in self.pings, "one outstanding ping"
                    self.pings.add(name)
                case Forget(name):
                    assert name not in self.alive
                    if name in self.order:
                        self.order.remove(name)
                case StartAnswered(token) | StopAnswered(token) | RequestRefused(token):
                    assert self.tokens[token] is None, "answered once"
                    self.tokens[token] = command
                case Finished():
                    assert not self.alive
                    self.finished = command

    def token(self):
        self.next_token += 1
        self.tokens[self.next_token] = None
        return self.next_token

    def pick(self, data, names):
        return data.draw(st.sampled_from(sorted(names)))

    def ended(self, name, *, failed):
        incarnation = self.alive.pop(name)
        for group in (self.ready, self.killed, self.pings, self.individually):
            group.discard(name)
        if name in self.stopping:
            self.stopping.remove(name)
        self.do(self.logic.child_exited(name, incarnation, self.now, failed=failed, reason="because"))

    @precondition(lambda self: self.alive.keys() - self.ready)
    @rule(data=st.data())
    def becomes_ready(self, data):
        name = self.pick(data, self.alive.keys() - self.ready)
        if name not in self.stopping and name not in self.killed:  # otherwise the news comes too late to matter
            self.ready.add(name)
        self.do(self.logic.child_ready(name, self.alive[name], self.now))

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), failed=st.booleans())
    def ends(self, data, failed):
        self.ended(self.pick(data, self.alive), failed=failed)

    @precondition(lambda self: self.pings)
    @rule(data=st.data())
    def answers_ping(self, data):
        name = self.pick(data, self.pings)
        self.pings.discard(name)
        self.do(self.logic.heartbeat_answered(name, self.alive[name], self.now, mailbox=0, handled=1))

    @precondition(lambda self: self.finished is None)
    @rule(number=st.integers(0, 3), restart=st.sampled_from(Restart))
    def start_dynamic(self, number, restart):
        known = {status.name for status in self.logic.status(self.now)}
        token = self.token()
        self.do(self.logic.start_requested(child(f"d{number}", restart), token, self.now))
        if f"d{number}" not in known and self.tokens[token] is None:
            self.order.append(f"d{number}")

    @precondition(lambda self: self.finished is None)
    @rule(data=st.data())
    def stop_some(self, data):
        name = data.draw(st.sampled_from(["s0", "s1", "s2", "d0", "d1", "d2"]))
        if name in self.alive:
            self.individually.add(name)
        self.do(self.logic.stop_requested(name, self.token(), self.now))

    @precondition(lambda self: self.finished is None)
    @rule()
    def shut_down(self):
        self.do(self.logic.shutdown_requested("enough", self.now))

    @rule(seconds=st.floats(0.01, 30.0))
    def time_passes(self, seconds):
        end = self.now + seconds
        while (due := self.logic.next_wakeup()) is not None and due <= end:
            assert due > self.now - 1e-9 or self.now == due
            self.now = max(self.now, due)
            before = due
            self.do(self.logic.tick(self.now))
            for name in sorted(self.killed & self.alive.keys()):
                self.ended(name, failed=True)
            after = self.logic.next_wakeup()
            assert after is None or after > before, "a tick makes progress"
        self.now = end

    @invariant()
    def group_stops_go_backwards(self):
        """Whoever was asked to stop as part of a group had nobody alive behind it that must stop too."""
        if not hasattr(self, "logic") or self.strategy is Strategy.ONE_FOR_ONE:
            return
        in_group = [name for name in self.stopping if name not in self.individually]
        assert len(in_group) <= 1, in_group

    @invariant()
    def names_tell_the_truth(self):
        if not hasattr(self, "logic"):
            return
        names = self.logic.names()
        for name in self.alive:
            assert names[name][1] == self.alive[name]
            assert (names[name][0] is NameState.READY) == (name in self.ready)
        for name, (state, _) in names.items():
            if name not in self.alive:
                assert state is not NameState.READY

    def teardown(self):
        """From wherever it is: with children that behave from now on, the tree gets whole again, or has ended."""
        if not hasattr(self, "logic"):
            return
        for _ in range(400):
            if self.finished is not None:
                break
            for name in sorted(self.killed | set(self.stopping)):
                self.ended(name, failed=False)
            for name in sorted(self.alive.keys() - self.ready - set(self.stopping)):
                self.ready.add(name)
                self.do(self.logic.child_ready(name, self.alive[name], self.now))
            for name in sorted(self.pings):
                self.pings.discard(name)
                self.do(self.logic.heartbeat_answered(name, self.alive[name], self.now, mailbox=0, handled=1))
            if (due := self.logic.next_wakeup()) is not None:
                self.now = max(self.now, due)
                self.do(self.logic.tick(self.now))
            states = {status.state for status in self.logic.status(self.now)}
            if states <= {"running", "stopped", "failed"} and not self.logic.ending:
                break
        else:
            raise AssertionError(f"neither whole nor over: {self.logic.status(self.now)}")
        assert all(outcome is not None for outcome in self.tokens.values()), "every request is answered"
        if self.finished is not None:
            assert not self.alive


Supervision.TestCase.settings = settings(
    max_examples=300, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestSupervision = Supervision.TestCase
