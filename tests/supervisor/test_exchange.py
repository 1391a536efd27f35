"""The synchronous message logic over a port that remembers everything."""

from __future__ import annotations

import os
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.messages import Descriptor, Envelope, Message, Request, decode_body, encode_body, message
from protocol.messages.system import (
    ActorDown,
    ActorUp,
    CollectMetrics,
    Describe,
    Description,
    EdgeFilter,
    FaultAction,
    FaultRule,
    Hang,
    MetricsSnapshot,
    Ok,
    Overflow,
    Ping,
    Pong,
    ReadDeadLetters,
    ReadJournal,
    Refusal,
    SetFaults,
    SetLogLevel,
    SetTaps,
    Stop,
    Tapped,
    TapRule,
)
from supervisor.authority import Authority
from supervisor.edges import compile_filter
from supervisor.errors import (
    ActorNotReadyError,
    ActorRestartingError,
    DeadlineExceededError,
    NoSuchActorError,
    RefusedError,
)
from supervisor.exchange import DEAD_LETTER_LIMIT, JOURNAL_LIMIT, Exchange
from supervisor.mailbox import Mailbox
from supervisor.port import NameState, NotDeliveredError
from supervisor.timers import Timers


@message("test-ex.reply")
class Reply(Message):
    value: int


@message("test-ex.query")
class Query(Request[Reply]):
    value: int


@message("test-ex.note")
class Note(Message):
    text: str


@message("test-ex.hand-over")
class HandOver(Message):
    it: Descriptor


class FakePort:
    def __init__(self):
        self.sent = []
        self.open_descriptors = []
        self.states = {}
        self.watched = []
        self.full = set()

    def send(self, envelope, descriptors):
        state = self.state(envelope.target)
        if state is not NameState.READY:
            raise NotDeliveredError(f"{envelope.target} is {state.value}")
        if envelope.target in self.full:
            raise NotDeliveredError("queue full")
        self.open_descriptors += [os.fstat(one.fileno()).st_ino for one in descriptors]
        self.sent.append(envelope)

    def state(self, name):
        return self.states.get(name, NameState.READY)

    def watch(self, name):
        self.watched.append(name)

    def take(self):
        sent, self.sent = self.sent, []
        return sent


class Bench:
    """An exchange called `me` with its surroundings."""

    def __init__(self, **more):
        self.time = 100.0
        self.port = FakePort()
        self.woken = 0
        self.calls = []
        self.mailbox = Mailbox(more.pop("limit", 3), more.pop("overflow", Overflow.REFUSE))
        self.exchange = Exchange(
            "me",
            2,
            self.port,
            now=lambda: self.time,
            wall=lambda: 0.0,
            random=random.Random(0),
            supervisor="boss",
            authority=Authority("boss", ("you",)),
            mailbox=self.mailbox,
            understands={Query.KIND, Note.KIND, HandOver.KIND, ActorDown.KIND, ActorUp.KIND},
            wake=self.wake,
            describe=lambda: {"mood": "good"},
            on_stop=lambda reason: self.calls.append(("stop", reason)),
            set_log_level=self.set_log_level,
            crash=lambda: self.calls.append("crash"),
            hang=lambda: self.calls.append("hang"),
            **{"allow_faults": True, **more},
        )
        self.numbers = iter(range(1, 10**6))

    def wake(self):
        self.woken += 1

    def set_log_level(self, level):
        if level == "loud":
            raise RefusedError("invalid-level", "no such level")
        self.calls.append(("level", level))

    def arrive(self, body, *, sender="you", reply_to=None, deadline=None, descriptors=()):
        packed, _ = encode_body(body)
        ident = f"{sender}:1:{next(self.numbers)}"
        envelope = Envelope(ident, None, reply_to, sender, "me", body.KIND, deadline, packed)
        self.exchange.deliver(envelope, list(descriptors))
        return envelope

    def said(self):
        """What was sent since the last call, decoded."""
        return [(envelope.target, decode_body(envelope.kind, envelope.body)) for envelope in self.port.take()]

    def pass_time(self, seconds):
        end = self.time + seconds
        while (due := self.exchange.next_timer()) is not None and due <= end:
            self.time = max(self.time, due)
            self.exchange.handle_timers(self.time)
        self.time = end


@pytest.fixture
def bench():
    return Bench()


# Telling and asking


def test_ids_tell_who_sent_and_causes_are_kept(bench):
    first = bench.exchange.tell("you", Note("a"))
    second = bench.exchange.tell("you", Note("b"), cause=first)
    prefix, colon, number = first.rpartition(":")
    assert re.fullmatch(r"me:2-[a-z2-9]{6}", prefix)
    assert (number, second) == ("1", f"{prefix}{colon}2")
    assert [(envelope.id, envelope.cause) for envelope in bench.port.take()] == [(first, None), (second, first)]


def test_an_answer_reaches_the_asker_once(bench):
    answers = []
    ident = bench.exchange.ask("you", Query(1), timeout=5, answer=answers.append)
    [envelope] = bench.port.take()
    assert envelope.deadline == 105.0
    bench.arrive(Reply(9), reply_to=ident)
    assert bench.exchange.next_timer() is None
    bench.arrive(Reply(10), reply_to=ident)
    bench.pass_time(10)
    assert answers == [Reply(9)]


def test_only_the_one_who_was_asked_can_answer(bench):
    answers = []
    ident = bench.exchange.ask("you", Query(1), timeout=5, answer=answers.append)
    bench.arrive(Reply(666), reply_to=ident, sender="mallory")
    bench.arrive(Refusal("x", "y"), reply_to=ident, sender="mallory")
    assert answers == []
    bench.arrive(Reply(1), reply_to=ident)
    assert answers == [Reply(1)]


def test_an_answer_of_another_class_is_a_refusal(bench):
    answers = []
    ident = bench.exchange.ask("you", Query(1), timeout=5, answer=answers.append)
    bench.arrive(Note("what?"), reply_to=ident)
    assert answers[0].code == "bad-answer"


def test_an_unreadable_answer_is_a_refusal(bench):
    answers = []
    ident = bench.exchange.ask("you", Query(1), timeout=5, answer=answers.append)
    bench.exchange.deliver(Envelope("you:1:1", None, ident, "you", "me", Reply.KIND, None, b"\xc1"), [])
    assert answers[0].code == "bad-message"


def test_refusals_carry_code_reason_and_action(bench):
    answers = []
    ident = bench.exchange.ask("you", Query(1), timeout=5, answer=answers.append)
    bench.arrive(Refusal("busy", "too much to do", "wait"), reply_to=ident)
    [refusal] = answers
    assert (refusal.code, refusal.reason, refusal.action) == ("busy", "too much to do", "wait")
    assert bench.exchange.dead_letters().letters == ()


def test_a_deadline_passes(bench):
    answers = []
    bench.exchange.ask("you", Query(1), timeout=5, answer=answers.append)
    bench.pass_time(4.9)
    assert answers == []
    bench.pass_time(0.2)
    assert isinstance(answers[0], DeadlineExceededError)


def test_the_end_of_the_target_fails_what_waits_for_it_and_nothing_else(bench):
    answers = []
    bench.exchange.ask("you", Query(1), timeout=5, answer=lambda outcome: answers.append(("you", outcome)))
    other = bench.exchange.ask("other", Query(1), timeout=5, answer=lambda outcome: answers.append(("other", outcome)))
    bench.exchange.name_down("you", "SIGKILL")
    [(who, error)] = answers
    assert who == "you"
    assert type(error) is ActorRestartingError, "whether it was done is unknown"
    bench.arrive(Reply(1), reply_to=other, sender="other")
    assert answers[-1] == ("other", Reply(1))


@pytest.mark.parametrize(
    ("state", "full", "error"),
    [
        (NameState.UNKNOWN, False, NoSuchActorError),
        (NameState.STARTING, False, ActorNotReadyError),
        (NameState.READY, True, RefusedError),
    ],
)
def test_a_request_that_cannot_be_sent_fails_at_once(bench, state, full, error):
    bench.port.states["you"] = state
    if full:
        bench.port.full.add("you")
    with pytest.raises(error):
        bench.exchange.ask("you", Query(1), timeout=5, answer=lambda _: pytest.fail("never called"))
    bench.pass_time(10)
    [letter] = bench.exchange.dead_letters().letters
    assert (letter.entry.target, letter.entry.kind) == ("you", Query.KIND)


def test_what_was_queued_and_then_lost_fails_its_request(bench):
    answers = []
    bench.exchange.ask("you", Query(1), timeout=5, answer=answers.append)
    [envelope] = bench.port.take()
    bench.port.states["you"] = NameState.STARTING
    bench.exchange.undelivered(envelope, "the socket closed")
    assert isinstance(answers[0], ActorNotReadyError)
    assert bench.exchange.dead_letters().letters[0].reason == "the socket closed"


def test_a_forgotten_request_is_silent(bench):
    ident = bench.exchange.ask("you", Query(1), timeout=5, answer=lambda _: pytest.fail("forgotten"))
    bench.exchange.forget(ident)
    bench.exchange.forget(ident)
    bench.arrive(Reply(1), reply_to=ident)
    bench.pass_time(10)


def test_dead_letters_are_bounded_and_counted(bench):
    bench.port.states["you"] = NameState.UNKNOWN
    for _ in range(DEAD_LETTER_LIMIT + 7):
        bench.exchange.tell("you", Note("x"))
    letters = bench.exchange.dead_letters()
    assert (len(letters.letters), letters.dropped) == (DEAD_LETTER_LIMIT, 7)


def test_a_refused_tell_becomes_a_dead_letter_of_its_sender(bench):
    told = bench.exchange.tell("you", Note("x"))
    bench.arrive(Refusal("mailbox-full", "no room"), reply_to=told)
    [letter] = bench.exchange.dead_letters().letters
    assert (letter.entry.id, letter.reason) == (told, "no room")


def test_sending_a_descriptor_closes_the_senders_copy_delivered_or_not(bench):
    for state in (NameState.READY, NameState.UNKNOWN):
        bench.port.states["you"] = state
        read, write = os.pipe()
        os.close(write)
        descriptor = Descriptor(read)
        bench.exchange.tell("you", HandOver(descriptor))
        assert descriptor.fileno() == -1
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(read)
    assert len(bench.port.open_descriptors) == 1


# Receiving


def test_messages_wait_in_the_mailbox_in_order(bench):
    bench.arrive(Note("a"))
    bench.arrive(Query(1))
    assert bench.woken == 2
    assert [bench.exchange.take().message for _ in range(2)] == [Note("a"), Query(1)]
    assert bench.exchange.take() is None


def test_what_is_not_understood_is_refused(bench):
    envelope = bench.arrive(Reply(1))
    [sent] = bench.port.take()
    assert sent.reply_to == envelope.id
    assert decode_body(sent.kind, sent.body).code == "not-understood"
    bench.exchange.deliver(Envelope("you:1:9", None, None, "you", "me", "no.such-kind", None, b"\x80"), [])
    assert bench.said()[0][1].code == "not-understood"


def test_an_unreadable_message_is_refused(bench):
    bench.exchange.deliver(Envelope("you:1:9", None, None, "you", "me", Query.KIND, None, b"\xc1"), [])
    assert bench.said()[0][1].code == "bad-message"
    assert len(bench.mailbox) == 0


def test_answers_are_never_answered(bench):
    bench.arrive(Reply(1), reply_to="me:2:77")
    bench.arrive(Refusal("x", "y"), reply_to="me:2:78")
    bench.exchange.deliver(Envelope("you:1:9", None, "me:2:79", "you", "me", "no.such-kind", None, b"\x80"), [])
    assert bench.port.take() == []


@pytest.mark.parametrize("overflow", list(Overflow))
def test_a_full_mailbox(overflow):
    bench = Bench(limit=2, overflow=overflow)
    for number in range(3):
        bench.arrive(Query(number))
    [(target, refusal)] = bench.said()
    assert target == "you"
    assert refusal.code == "mailbox-full"
    left = [bench.exchange.take().message.value for _ in range(2)]
    assert left == ([1, 2] if overflow is Overflow.DROP_OLDEST else [0, 1])


def test_told_messages_that_a_full_mailbox_drops_are_only_counted_but_refused_ones_are_told_back():
    for overflow in Overflow:
        bench = Bench(limit=1, overflow=overflow)
        bench.arrive(Note("a"))
        bench.arrive(Note("b"))
        assert len(bench.said()) == (1 if overflow is Overflow.REFUSE else 0)
        assert bench.mailbox.dropped == 1


def test_requests_whose_asker_has_given_up_are_passed_over(bench):
    bench.arrive(Query(1), deadline=101.0)
    bench.arrive(Query(2), deadline=110.0)
    bench.time = 105.0
    assert bench.exchange.take().message == Query(2)


def test_watching(bench):
    bench.exchange.watch("peer")
    bench.exchange.watch("peer")
    assert bench.port.watched == ["peer"]
    for _ in range(5):
        bench.arrive(Note("x"))
    bench.exchange.name_down("peer", "gone")
    bench.exchange.name_up("peer", 4)
    bench.exchange.name_down("stranger", "gone")
    while (item := bench.exchange.take()) is not None:
        last, before = item, locals().get("last")
    assert before.message == ActorDown("peer", "gone"), "notices fit into a full mailbox"
    assert last.message == ActorUp("peer", 4)
    assert last.envelope.sender == "peer"


def test_waiting_for_a_name(bench):
    ready = []
    bench.exchange.when_ready("peer", lambda: ready.append("at once"))
    assert ready == ["at once"]
    bench.port.states["peer"] = NameState.STARTING
    bench.exchange.when_ready("peer", lambda: ready.append("later"))
    bench.exchange.when_ready("peer", lambda: pytest.fail("taken back"))()
    bench.exchange.name_up("peer", 2)
    bench.exchange.name_up("peer", 3)
    assert ready == ["at once", "later"]


# What every process answers


def test_ping_is_answered_ahead_of_the_mailbox(bench):
    bench.arrive(Note("a"))
    bench.exchange.handled = 5
    bench.arrive(Ping())
    assert bench.said() == [("you", Pong(1, 5))]


def test_describe_stop_and_log_level(bench):
    bench.arrive(Describe())
    assert bench.said() == [("you", Description({"mood": "good"}))]
    bench.arrive(Stop("because"), sender="you")
    assert bench.said()[0][1].code == "sender-not-allowed"
    bench.arrive(Stop("because"), sender="boss")
    assert bench.calls == [("stop", "because")]


def test_a_log_level_comes_back_by_itself(bench):
    bench.arrive(SetLogLevel("debug", 60.0))
    bench.arrive(SetLogLevel("trace", 10.0))
    bench.arrive(SetLogLevel("loud", None))
    assert [answer for _, answer in bench.said()] == [Ok(), Ok(), Refusal("invalid-level", "no such level")]
    bench.pass_time(9.9)
    assert bench.calls == [("level", "debug"), ("level", "trace")]
    bench.pass_time(100)
    assert bench.calls == [("level", "debug"), ("level", "trace"), ("level", None)]


def test_the_journal_has_both_directions_and_no_heartbeats(bench):
    bench.arrive(Note("a"))
    bench.arrive(Ping())
    told = bench.exchange.tell("you", Note("b"))
    bench.port.take()
    bench.arrive(ReadJournal(()))
    [(_, journal)] = bench.said()
    assert [(entry.sender, entry.target, entry.kind, entry.at) for entry in journal.entries] == [
        ("you", "me", Note.KIND, 100.0),
        ("me", "you", Note.KIND, 100.0),
    ]
    bench.arrive(ReadJournal((told,)))
    assert [entry.id for entry in bench.said()[0][1].entries] == [told]


def test_the_journal_is_bounded(bench):
    for _ in range(JOURNAL_LIMIT + 5):
        bench.exchange.tell("you", Note("x"))
    assert len(bench.exchange.journal()) == JOURNAL_LIMIT
    assert bench.exchange.journal()[0].id.endswith(":6")


def samples(bench):
    bench.port.take()
    bench.arrive(CollectMetrics())
    [(_, snapshot)] = bench.said()
    assert isinstance(snapshot, MetricsSnapshot)
    return {(sample.name, *sample.labels.values()): sample.value for sample in snapshot.samples}


def test_metrics(bench):
    bench.exchange.metrics.counter("peerup_own_total").inc(4)
    for _ in range(5):
        bench.arrive(Note("x"))
    bench.port.states["nobody"] = NameState.UNKNOWN
    bench.exchange.tell("nobody", Note("x"))
    seen = samples(bench)
    assert seen["peerup_messages_received_total", Note.KIND] == 5
    assert seen["peerup_messages_sent_total", Refusal.KIND] == 2
    assert seen["peerup_dead_letters_total",] == 1
    assert seen["peerup_mailbox_depth",] == 3
    assert seen["peerup_mailbox_dropped_total",] == 2
    assert seen["peerup_faults_active",] == 0
    assert seen["peerup_own_total",] == 4


def test_made_up_kinds_make_up_no_series(bench):
    for number in range(100):
        envelope = Envelope(f"you:1:{number}", None, None, "you", "me", f"made-up.{number}", None, b"\x80")
        bench.exchange.deliver(envelope, [])
    bench.said()
    seen = samples(bench)
    assert seen["peerup_messages_received_total", "unknown"] == 100
    assert not any("made-up" in label for key in seen for label in key)


def test_dead_letters_can_be_read(bench):
    bench.port.states["nobody"] = NameState.UNKNOWN
    bench.exchange.tell("nobody", Note("x"))
    bench.arrive(ReadDeadLetters())
    [(_, letters)] = bench.said()
    assert letters.letters[0].entry.target == "nobody"


# Faults


def fault(action, ident="f", *, probability=1.0, nth=None, until=200.0, delay=0.5, **match):
    return FaultRule(ident, EdgeFilter(**match), action, probability, nth, 7, until, delay)


def tell_many(bench, count, target="you"):
    for number in range(count):
        bench.exchange.tell(target, Note(str(number)))
    return [note.text for _, note in bench.said()]


def test_faults_need_permission():
    bench = Bench(allow_faults=False)
    bench.arrive(SetFaults((fault(FaultAction.DROP),)))
    assert bench.said()[0][1].code == "faults-not-allowed"
    bench.arrive(Hang())
    assert bench.said()[0][1].code == "faults-not-allowed"
    assert bench.calls == []
    assert tell_many(bench, 3) == ["0", "1", "2"]


def test_drop_the_nth(bench):
    bench.arrive(SetFaults((fault(FaultAction.DROP, nth=2, target="you"),)))
    bench.exchange.tell("other", Note("x"))
    assert bench.said() == [("other", Note("x"))]
    assert tell_many(bench, 4) == ["0", "2", "3"]


def test_probability_is_repeatable_by_its_seed():
    def run():
        bench = Bench()
        bench.arrive(SetFaults((fault(FaultAction.DROP, probability=0.5),)))
        return tell_many(bench, 200)

    first = run()
    assert first == run()
    assert 60 < len(first) < 140


def test_delay(bench):
    bench.arrive(SetFaults((fault(FaultAction.DELAY, delay=2.0, nth=1),)))
    assert tell_many(bench, 2) == ["1"]
    bench.pass_time(1.99)
    assert bench.said() == []
    bench.pass_time(0.02)
    assert bench.said() == [("you", Note("0"))]


def test_a_delayed_request_that_cannot_be_delivered_then_fails(bench):
    answers = []
    bench.arrive(SetFaults((fault(FaultAction.DELAY, delay=2.0),)))
    bench.exchange.ask("you", Query(1), timeout=60, answer=answers.append)
    bench.port.states["you"] = NameState.UNKNOWN
    bench.pass_time(3)
    assert isinstance(answers[0], NoSuchActorError)


@pytest.mark.parametrize("action", [FaultAction.DUPLICATE, FaultAction.CORRUPT, FaultAction.REORDER])
def test_nothing_is_answered_before_the_request_has_been_made(bench, action):
    """Whoever asks may not know yet what it waits for."""
    bench.port.full.add("you")
    bench.arrive(SetFaults((fault(action, delay=1.0),)), sender="boss")
    bench.said()
    order = []
    for _ in range(2):  # the second one lets go of what a reordering has held back
        bench.exchange.ask("you", Query(1), timeout=5, answer=order.append)
        order.append("asked")
    assert order[0] == order[1] == "asked"
    bench.pass_time(6.0)
    assert [type(one) for one in order[2:]] == [RefusedError, RefusedError]


def test_duplicate(bench):
    bench.arrive(SetFaults((fault(FaultAction.DUPLICATE, nth=1),)))
    assert tell_many(bench, 2) == ["0", "0", "1"]
    read, write = os.pipe()
    os.close(write)
    bench.arrive(SetFaults((fault(FaultAction.DUPLICATE),)))
    bench.exchange.tell("you", HandOver(Descriptor(read)))
    assert len(bench.port.open_descriptors) == 2
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(read)


def test_reorder_swaps_with_the_next_and_keeps_nothing_for_ever(bench):
    bench.arrive(SetFaults((fault(FaultAction.REORDER, nth=1, delay=1.0),)))
    assert tell_many(bench, 3) == ["1", "0", "2"]
    bench.arrive(SetFaults((fault(FaultAction.REORDER, "g", nth=1, delay=1.0),)))
    assert tell_many(bench, 1) == []
    bench.pass_time(1.0)
    assert bench.said() == [("you", Note("0"))]
    bench.arrive(SetFaults((fault(FaultAction.REORDER, "h", nth=1, delay=50.0),)))
    assert tell_many(bench, 1) == []
    bench.arrive(SetFaults(()))
    assert bench.said() == [("you", Note("0"))], "lifting the fault lets go of what it held"


@given(st.integers(0, 1000))
def test_corrupt_flips_one_bit(seed):
    bench = Bench()
    rule = FaultRule("f", EdgeFilter(), FaultAction.CORRUPT, 1.0, None, seed, 200.0)
    bench.arrive(SetFaults((rule,)))
    bench.exchange.tell("you", Note("hello"))
    [envelope] = bench.port.take()
    clean = encode_body(Note("hello"))[0]
    difference = int.from_bytes(clean, "big") ^ int.from_bytes(envelope.body, "big")
    assert difference.bit_count() == 1


def test_crash_on_receipt(bench):
    bench.arrive(SetFaults((fault(FaultAction.CRASH, nth=2, kind=Note.KIND),)))
    bench.arrive(Note("a"))
    assert bench.calls == []
    bench.arrive(Note("b"))
    assert bench.calls == ["crash"]
    assert len(bench.mailbox) == 1, "the message that crashed it was not handled"


def test_hang(bench):
    bench.arrive(Hang())
    assert bench.calls == ["hang"]


def test_faults_end_by_themselves_are_counted_and_cannot_prevent_their_end(bench):
    bench.arrive(SetFaults((fault(FaultAction.DROP, until=110.0),)))
    assert tell_many(bench, 3) == []
    assert bench.exchange.faults != ()
    bench.pass_time(10.0)
    assert bench.exchange.faults == ()
    assert tell_many(bench, 1) == ["0"]
    assert bench.exchange._edges is None, "no rules, no cost"
    seen = samples(bench)
    assert seen["peerup_faults_hit_total", "drop"] == 3
    assert seen["peerup_faults_active",] == 0
    bench.arrive(SetFaults((fault(FaultAction.DROP),)))
    bench.exchange.tell("you", SetFaults(()))
    assert bench.said() == [("you", SetFaults(()))]
    bench.arrive(SetFaults(()))
    assert tell_many(bench, 1) == ["0"]


def test_a_fault_that_stays_goes_on_counting_when_another_comes(bench):
    rule = fault(FaultAction.DROP, nth=3)
    bench.arrive(SetFaults((rule,)))
    assert tell_many(bench, 2) == ["0", "1"]
    bench.arrive(SetFaults((rule, fault(FaultAction.DELAY, "other", kind="nothing.*"))))
    assert tell_many(bench, 2) == ["1"]


@pytest.mark.parametrize(
    ("match", "hit"),
    [
        (EdgeFilter(), True),
        (EdgeFilter("me", "proxy/home/ssh", "a.b"), True),
        (EdgeFilter(target="proxy/*"), True),
        (EdgeFilter(target="proxy/*/ssh"), True),
        (EdgeFilter(target="proxy/*/ss"), False),
        (EdgeFilter(target="proxy"), False),
        (EdgeFilter(kind="a.*"), True),
        (EdgeFilter(kind="a?b"), False),
        (EdgeFilter(kind="[a].b"), False),
        (EdgeFilter(sender="*e"), True),
        (EdgeFilter(sender="you", target="proxy/*"), False),
    ],
)
def test_filters(match, hit):
    envelope = Envelope("i", None, None, "me", "proxy/home/ssh", "a.b", None, b"")
    assert compile_filter(match)(envelope) is hit


# Taps


def tap(ident="t", *, until=200.0, rate=1000.0, **match):
    return TapRule(ident, EdgeFilter(**match), "viewer", until, rate)


def test_a_tap_copies_what_matches(bench):
    bench.arrive(SetTaps((tap(kind=Note.KIND),)))
    ident = bench.exchange.tell("you", Note("x"))
    bench.exchange.tell("you", Query(1))
    [(sink, copy), *_] = bench.said()
    assert sink == "viewer"
    assert isinstance(copy, Tapped)
    assert (copy.tap, copy.cut, copy.skipped, copy.at) == ("t", False, 0, 100.0)
    seen = Envelope.from_bytes(copy.envelope)
    assert (seen.id, seen.target, decode_body(seen.kind, seen.body)) == (ident, "you", Note("x"))


def test_a_tap_is_limited_and_says_what_it_skipped(bench):
    bench.arrive(SetTaps((tap(rate=2.0),)))
    for _ in range(10):
        bench.exchange.tell("you", Note("x"))
    assert len([1 for target, _ in bench.said() if target == "viewer"]) == 2
    bench.time += 1.0
    bench.exchange.tell("you", Note("x"))
    [copy] = [body for target, body in bench.said() if target == "viewer"]
    assert copy.skipped == 8


def test_a_tap_cuts_large_bodies_and_never_sees_itself(bench):
    bench.arrive(SetTaps((tap(),)))
    bench.exchange.tell("you", Note("x" * 10_000))
    bench.exchange.tell("you", Tapped("t", 0.0, b"", False, 0))
    copies = [body for target, body in bench.said() if target == "viewer"]
    assert len(copies) == 1
    assert copies[0].cut
    assert len(copies[0].envelope) < 5000


def test_a_tap_ends_by_itself_and_a_missing_viewer_harms_nobody(bench):
    bench.port.states["viewer"] = NameState.UNKNOWN
    bench.arrive(SetTaps((tap(until=105.0),)))
    assert tell_many(bench, 1) == ["0"]
    assert bench.exchange.dead_letters().letters == ()
    bench.pass_time(5.0)
    assert bench.exchange.taps == ()
    assert bench.exchange._edges is None


# Timers


def test_timers_run_in_order_of_time_and_then_of_making():
    order = []
    timers = Timers()
    timers.call_at(2.0, lambda: order.append("c"))
    timers.call_at(1.0, lambda: (order.append("a"), timers.call_at(1.0, lambda: order.append("new"))))
    timers.call_at(1.0, lambda: order.append("b"))
    timers.call_at(1.5, lambda: order.append("x")).cancel()
    assert timers.next() == 1.0
    timers.run(1.0)
    assert order == ["a", "b", "new"]
    timers.run(5.0)
    assert order == ["a", "b", "new", "c"]
    assert timers.next() is None
    assert len(timers) == 0


def test_who_drives_the_timers_is_told_of_an_earlier_one_only():
    told = []
    timers = Timers(told.append)
    timers.call_at(5.0, lambda: None)
    timers.call_at(6.0, lambda: None)
    timers.call_at(4.0, lambda: None)
    assert told == [5.0, 4.0]


@given(st.lists(st.tuples(st.floats(0, 100), st.booleans()), max_size=300))
def test_timers_forget_cancelled_ones_and_no_others(plan):
    fired = []
    timers = Timers()
    made = [timers.call_at(when, lambda number=number: fired.append(number)) for number, (when, _) in enumerate(plan)]
    for timer, (_, cancel) in zip(made, plan, strict=True):
        if cancel:
            timer.cancel()
            timer.cancel()
    kept = [number for number, (_, cancel) in enumerate(plan) if not cancel]
    assert len(timers) == len(kept)
    timers.run(100.0)
    assert fired == sorted(kept, key=lambda number: plan[number][0])


def test_cancelled_timers_do_not_pile_up():
    timers = Timers()
    for number in range(10_000):
        timers.call_at(float(number), lambda: None).cancel()
    assert len(timers._heap) < 200


def test_close_lets_go_of_waiting_descriptors(bench):
    read, write = os.pipe()
    os.close(write)
    bench.arrive(HandOver(Descriptor(os.dup(read))), descriptors=[Descriptor(read)])
    os.fstat(read)
    bench.exchange.close()
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(read)
