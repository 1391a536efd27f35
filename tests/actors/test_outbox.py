"""Nothing that waits for another actor is lost by that one's end, and nothing waits without bound."""

from __future__ import annotations

import contextlib

import pytest
import trio

from actors import outbox as outbox_module
from actors.outbox import Outbox
from protocol.messages import Request, message
from protocol.messages.system import Ok
from protocol.peer_id import PeerId
from supervisor.actor import Actor, handles
from supervisor.errors import RefusedError
from tests.actors.local_node import key_of
from tests.support.stage import Stage


@message("test-outbox.news")
class News(Request[Ok]):
    number: int


@message("test-outbox.news-of")
class NewsOf(Request[Ok]):
    number: int
    peer: PeerId


class Reader(Actor):
    """Notes what it gets; dies or is silent as `plan` says, by number."""

    def __init__(self, got, plan=None):
        self.got = got
        self.plan = plan or {}

    @handles(News)
    async def news(self, message):
        what = self.plan.pop(message.number, None)
        if what == "refuse":
            raise RefusedError("no", "not this one")
        if what == "no room":
            raise RefusedError("mailbox-full", "later")
        if what == "hang":
            await trio.sleep_forever()
        self.got.append(message.number)


class Writer(Actor):
    async def start(self, checkpoint):
        self.outbox = Outbox(self.context, "reader", limit=10)
        return {}

    async def stop(self, reason):
        self.outbox.close()


@contextlib.asynccontextmanager
async def writing():
    async with Stage() as stage:
        writer = Writer()
        await stage.start("writer", writer)
        yield stage, writer.outbox


async def until(condition, seconds=60):
    with trio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110 - conditions are of all kinds
            await trio.sleep(0.01)


def lost(stage):
    return stage.metrics("writer").get(("peerup_reports_lost_total", ("target", "reader")), 0)


async def test_what_is_sent_arrives_once_and_in_order(autojump_clock):
    async with writing() as (stage, outbox):
        got = []
        await stage.start("reader", Reader(got))
        for number in range(9):
            outbox.send(News(number))
        await until(lambda: not len(outbox))
        assert got == list(range(9))
        outbox.send(News(9))
        await until(lambda: not len(outbox))
        assert got == list(range(10))
        assert lost(stage) == 0


async def test_what_is_sent_while_the_other_is_away_arrives_when_it_is_back(autojump_clock):
    async with writing() as (stage, outbox):
        got = []
        await stage.start("reader", Reader(got))
        outbox.send(News(0))
        await until(lambda: got == [0])
        await stage.kill("reader")
        for number in range(1, 8):
            outbox.send(News(number))
        await trio.sleep(outbox_module.PATIENCE * 3)  # longer than it waits at a time
        assert len(outbox) == 7
        await stage.start("reader", Reader(got))
        await until(lambda: not len(outbox))
        assert got == list(range(8))


async def test_many_messages_about_one_peer_do_not_displace_those_about_others(autojump_clock):
    flood, other = key_of("flood").peer_id, key_of("other").peer_id
    async with writing() as (stage, outbox):
        got = []
        for number in range(2):
            outbox.send(NewsOf(number, other))
        for number in range(30):
            outbox.send(NewsOf(number, flood))
        outbox.send(NewsOf(2, other))
        assert len(outbox) == 10
        assert lost(stage) == 23

        class Listener(Actor):
            @handles(NewsOf)
            async def news(self, message):
                got.append((message.peer, message.number))

        await stage.start("reader", Listener())
        await until(lambda: not len(outbox))
        assert [number for peer, number in got if peer == other] == [0, 1, 2]
        assert [number for peer, number in got if peer == flood] == list(range(23, 30))


async def test_one_that_is_killed_with_a_message_in_its_hands_gets_it_again(autojump_clock):
    async with writing() as (stage, outbox):
        got = []
        await stage.start("reader", Reader(got, {2: "hang"}))
        for number in range(5):
            outbox.send(News(number))
        await until(lambda: got == [0, 1])
        await stage.kill("reader")
        await stage.start("reader", Reader(got))
        await until(lambda: not len(outbox))
        assert got == list(range(5))


async def test_silence_and_want_of_room_pass(autojump_clock):
    async with writing() as (stage, outbox):
        got = []
        await stage.start("reader", Reader(got, {1: "no room"}))
        for number in range(3):
            outbox.send(News(number))
        await until(lambda: not len(outbox))
        assert got == [0, 1, 2]
        assert lost(stage) == 0


async def test_what_the_other_does_not_take_is_given_up_and_counted(autojump_clock):
    async with writing() as (stage, outbox):
        got = []
        await stage.start("reader", Reader(got, {1: "refuse"}))
        for number in range(3):
            outbox.send(News(number))
        await until(lambda: not len(outbox))
        assert got == [0, 2]
        assert lost(stage) == 1


async def test_the_oldest_make_room_and_are_counted(autojump_clock):
    async with writing() as (stage, outbox):
        for number in range(25):
            outbox.send(News(number))
        assert len(outbox) == 10
        assert lost(stage) == 15
        got = []
        await stage.start("reader", Reader(got))
        await until(lambda: not len(outbox))
        assert got == list(range(15, 25))


@pytest.mark.parametrize("count", [1, 5])
async def test_a_writer_that_stops_tells_what_is_left_once(count, autojump_clock):
    async with Stage() as stage:
        writer, got = Writer(), []
        await stage.start("writer", writer)
        await stage.start("reader", Reader(got))
        for number in range(count):
            writer.outbox.send(News(number))
        await stage.stop("writer")
        await until(lambda: len(got) == count)
        await trio.sleep(10)
        assert got == list(range(count))
