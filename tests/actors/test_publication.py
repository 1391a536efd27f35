"""What is published reaches every subscriber, in order, also one that had no room for it at first."""

from __future__ import annotations

import contextlib
import itertools
from typing import ClassVar

import pytest
import trio

from actors.publication import LAST_RESEND, PAUSE, RESEND, Publication
from protocol.messages import Message, Request, message
from protocol.messages.system import ActorDown, ActorUp, Ok
from supervisor.actor import Actor, handles
from supervisor.errors import RefusedError
from tests.support.stage import Stage

MINUTE = 60.0


@message("test-publication.value")
class Value(Request[Ok]):
    number: int


@message("test-publication.noise")
class Noise(Message):
    pass


@message("test-publication.work")
class Work(Message):
    pass


class Publisher(Actor):
    async def start(self, checkpoint):
        self.published = Publication(self.context)
        self.published.subscribe("reader")
        return {}

    @handles(ActorDown)
    async def down(self, message):
        self.published.forget(message.name)

    @handles(ActorUp)
    async def up(self, message):
        pass


class Reader(Actor):
    """Takes what it gets, but for numbers in `plan`; `Work` keeps it busy until `free` is set."""

    mailbox_limit: ClassVar[int] = 4

    def __init__(self, plan=None):
        self.got = []
        self.busy, self.free = trio.Event(), trio.Event()
        self._plan = plan or {}

    @handles(Value)
    async def take(self, value):
        match self._plan.pop(value.number, None):
            case "refuse":
                raise RefusedError("no", "not this one")
            case "hang":
                await trio.sleep(2 * MINUTE)
        self.got.append(value.number)

    @handles(Noise)
    async def hear(self, message):
        pass

    @handles(Work)
    async def work(self, message):
        self.busy.set()
        await self.free.wait()


@contextlib.asynccontextmanager
async def published_to(reader):
    async with Stage() as stage:
        await stage.start("reader", reader)
        publisher = Publisher()
        await stage.start("writer", publisher)
        yield stage, publisher.published


async def until(condition, seconds=MINUTE):
    with trio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110 - conditions are of all kinds
            await trio.sleep(0.01)


async def fill(stage, reader):
    """Have the reader's mailbox be full until it is free."""
    stage.visitor().tell("reader", Work())
    await reader.busy.wait()
    for _ in range(Reader.mailbox_limit):
        stage.visitor().tell("reader", Noise())
    await trio.sleep(1)


async def test_a_value_is_sent_once_and_is_there_when_it_was_answered(autojump_clock):
    reader = Reader()
    async with published_to(reader) as (_, published):
        published.publish(Value(1))
        assert (published.subscribers, published.behind) == (["reader"], ["reader"])
        await until(lambda: not published.behind)
        await trio.sleep(10 * MINUTE)
        assert reader.got == [1]


async def test_a_full_mailbox_gets_the_value_as_soon_as_it_has_room(autojump_clock):
    reader = Reader()
    async with published_to(reader) as (stage, published):
        await fill(stage, reader)
        published.publish(Value(1))
        await trio.sleep(10 * MINUTE)
        assert (reader.got, published.behind) == ([], ["reader"])
        reader.free.set()
        began = trio.current_time()
        await until(lambda: reader.got)
        assert trio.current_time() - began <= 2 * PAUSE
        await until(lambda: not published.behind)


async def test_only_the_newest_value_is_still_sent(autojump_clock):
    reader = Reader()
    async with published_to(reader) as (stage, published):
        await fill(stage, reader)
        for number in range(100):
            published.publish(Value(number))
            await trio.sleep(PAUSE)
        reader.free.set()
        await until(lambda: not published.behind)
        assert reader.got == [99]


@pytest.mark.parametrize("pause", [0.0, 0.01, RESEND, 10.0])
async def test_values_come_in_their_order(autojump_clock, pause):
    reader = Reader(plan={3: "hang"})
    reader.mailbox_limit = 1000
    async with published_to(reader) as (_, published):
        for number in range(20):
            published.publish(Value(number))
            await trio.sleep(pause)
        await until(lambda: not published.behind, 10 * MINUTE)
        assert reader.got == sorted(reader.got)
        assert reader.got[-1] == 19


async def test_what_got_lost_is_sent_again(autojump_clock):
    async with Stage() as stage:
        heard = []
        stage.visitor("reader", audience=lambda _: heard.append(trio.current_time()) or True)
        publisher = Publisher()
        await stage.start("writer", publisher)
        publisher.published.publish(Value(1))
        await trio.sleep(10 * MINUTE)
        pauses = [after - before for before, after in itertools.pairwise(heard)]
        assert pauses[0] == pytest.approx(RESEND, abs=0.1)
        assert max(pauses) == pytest.approx(LAST_RESEND, abs=0.1)
        assert publisher.published.behind == ["reader"]


async def test_what_somebody_waits_for_is_sent_again_at_once(autojump_clock):
    async with Stage() as stage:
        heard = []
        stage.visitor("reader", audience=lambda _: heard.append(trio.current_time()) or True)
        publisher = Publisher()
        await stage.start("writer", publisher)
        publisher.published.hurry()  # nothing was published yet
        publisher.published.publish(Value(1))
        await trio.sleep(10 * MINUTE)
        before, now = len(heard), trio.current_time()
        publisher.published.hurry()
        await until(lambda: len(heard) > before)
        assert heard[before] == pytest.approx(now, abs=0.05)


async def test_a_subscriber_that_has_ended_is_sent_nothing_more(autojump_clock):
    reader = Reader(plan={1: "hang"})
    async with published_to(reader) as (stage, published):
        published.publish(Value(1))
        await trio.sleep(1)
        await stage.kill("reader")
        await until(lambda: not published.behind)
        assert published.subscribers == []


async def test_a_refusal_that_is_no_want_of_room_is_not_repeated(autojump_clock):
    reader = Reader(plan={1: "refuse"})
    async with published_to(reader) as (_, published):
        published.publish(Value(1))
        await trio.sleep(MINUTE)
        assert (reader.got, published.behind) == ([], ["reader"])
        published.publish(Value(2))
        await until(lambda: not published.behind)
        assert reader.got == [2]
