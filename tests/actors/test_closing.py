"""Links that are closed while the last bytes of streams are under way: these arrive, or are known not to have."""

import contextlib
import random
import socket
import types

import pytest
import trio

from actors.switchboard import closing
from actors.switchboard.closing import MOST_WAITING, PACE, RETRY, Confirmations
from tests.actors.dataplane import Ends, no_leaks, receive_data, running, send_data, send_message, until
from tests.actors.switchboard.test_circuits import Through
from tests.support.slow_way import SlowWay

CONTENT = random.Random(3).randbytes(600_000)


@contextlib.asynccontextmanager
async def far_apart():
    """A reactor, and a TCP connection over a line that is slow from now on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        way = SlowWay(server.getsockname()[1])
        near = socket.create_connection(("127.0.0.1", way.port))
        far = server.accept()[0]
    near.setblocking(False)
    far.setblocking(False)
    async with running() as reactor:
        try:
            yield reactor, (near, far), way
        finally:
            way.stop()


async def send_all(ends, content=CONTENT):
    """A stream that has ended on the near side and is on its way to the far one, whose descriptor is returned."""
    near, far = await ends.pair()
    await send_message(far, b"F")
    await send_data(near, content)
    await send_message(near, b"F")
    await until(lambda: not ends.client.streams, "the end of the stream on the near side")
    near.close()
    return far


@pytest.mark.parametrize("relayed", [False, True])
async def test_what_is_under_way_arrives(relayed):
    async with far_apart() as (reactor, sockets, way):
        outer = ends = Ends(reactor, sockets)
        if relayed:
            channel = outer.client.open_stream()
            await until(lambda: outer.opened, "the stream of the circuit")
            ends = Through(reactor, outer, channel, outer.opened.pop())
        way.rate = 500_000.0
        known = []
        async with trio.open_nursery() as nursery:

            async def read():
                far = await send_all(ends)
                ends.client.confirm(known.append)
                ends.client.close()
                assert not ends.client.closed
                assert not known
                assert await receive_data(far) == (CONTENT, b"F")
                far.close()

            nursery.start_soon(read)
        await until(lambda: len(ends.ended) == 2, "the end of both links")
        await until(lambda: ends.client.closed, "the end of the wire")
        assert known == [True]
        assert ends.ended[list(ends.ended)[-1]].code in {"remote-close", "circuit-cut"}
        if relayed:
            await outer.close()


async def test_a_cut_is_immediate_even_while_it_is_being_closed():
    async with no_leaks(), far_apart() as (reactor, sockets, way):
        ends = Ends(reactor, sockets)
        way.rate = 20_000.0
        far = await send_all(ends, CONTENT[:200_000])
        known = []
        ends.client.confirm(known.append)
        ends.client.close()
        ends.client.abort("not-authorised", "for the test")
        assert ends.client.closed
        assert known == [False]
        way.stop()
        await until(lambda: len(ends.ended) == 2, "the end of both links")
        data, last = await receive_data(far)
        assert len(data) < 200_000
        assert last[:1] == b"R"
        far.close()


async def test_a_peer_that_takes_nothing_is_not_waited_for_without_end(monkeypatch):
    monkeypatch.setattr(closing, "SILENCE", 0.3)
    async with no_leaks(), far_apart() as (reactor, sockets, way):
        ends = Ends(reactor, sockets)
        way.rate = 20_000.0
        far = await send_all(ends, CONTENT[:200_000])
        way.rate = 0.0
        known = []
        ends.client.confirm(known.append)
        ends.client.close()
        await until(lambda: ends.client.closed, "the end of the wire")
        assert known == [False]
        way.stop()
        far.close()
        await until(lambda: len(ends.ended) == 2, "the end of both links")


async def test_the_end_of_the_connection_tells_what_is_known():
    async with no_leaks(), running() as reactor:
        ends = Ends(reactor)
        near, far = await ends.pair()
        await send_message(near, b"F")
        await send_message(far, b"F")
        await until(lambda: not ends.client.streams, "the end of the stream")
        known = []
        ends.client.confirm(known.append)
        await until(lambda: known, "the answer")
        assert known == [True]
        await ends.close()
        ends.client.confirm(known.append)  # all of it was confirmed while there was time
        assert known == [True, True]
        near.close()
        far.close()


async def test_many_questions_are_few_pings():
    async with running() as reactor:
        pings, known = [], []
        asked = Confirmations(reactor, pings.append, lambda: 7)
        for _ in range(100):
            asked.ask(known.append)
        assert len(pings) == 1
        assert asked.answered(pings[0])
        assert known == [True]
        assert not asked.pending
        await until(lambda: len(pings) == 2, f"the next one, {PACE} s later")
        assert not asked.answered(1), "a ping that measures a round trip"
        asked.answered(pings[1])
        assert known == [True] * 100
        asked.end(received=False)
        asked.ask(known.append)
        assert known[-1] is False


class Planned:
    """A reactor of which nothing but timers is wanted."""

    def __init__(self):
        self.now = 100.0
        self.timers = []

    def clock(self):
        return self.now

    def call_later(self, seconds, function):
        timer = types.SimpleNamespace(due=self.now + seconds, function=function)
        timer.cancel = lambda: self.timers.remove(timer)
        self.timers.append(timer)
        return timer

    def pass_time(self, seconds):
        self.now += seconds
        for timer in [one for one in self.timers if one.due <= self.now]:
            self.timers.remove(timer)
            timer.function()


def test_a_ping_that_was_dropped_is_asked_again():
    reactor, pings, known = Planned(), [], []
    asked = Confirmations(reactor, pings.append, lambda: 1)
    asked.ask(known.append)
    reactor.pass_time(RETRY - 1)
    assert len(pings) == 1
    reactor.pass_time(1)
    assert len(pings) == 2
    assert asked.answered(pings[0])
    assert not known
    asked.answered(pings[1])
    assert known == [True]
    assert not reactor.timers


def test_a_peer_that_answers_no_pings_makes_us_keep_a_bounded_number_of_ends():
    reactor, pings, known = Planned(), [], []
    asked = Confirmations(reactor, pings.append, lambda: 1)
    for number in range(3 * MOST_WAITING):
        asked.ask(lambda received, number=number: known.append((number, received)))
        if number % 500 == 0:
            reactor.pass_time(PACE)
    assert known == [(number, False) for number in range(2 * MOST_WAITING)], "the oldest are told that nobody knows"
    asked.hurry()
    asked.answered(pings[-1])
    assert known[2 * MOST_WAITING :] == [(number, True) for number in range(2 * MOST_WAITING, 3 * MOST_WAITING)]
    assert not asked.pending
    reactor.pass_time(RETRY)
    assert len(pings) < 30
    assert not reactor.timers
