"""What a peer may make us keep, over all of its streams and connections."""

import contextlib
import gc
import hashlib
import socket

import pytest
import trio

from actors.pump import Outcome
from actors.switchboard.budget import Budget, Budgets
from actors.switchboard.socket_end import SocketEnd
from protocol.stream_descriptor import ResetCode, reset_message
from tests.actors.dataplane import (
    Ends,
    no_leaks,
    receive_data,
    receive_tcp,
    running,
    send_tcp,
    tcp_pair,
    until,
)
from tests.actors.local_node import peer_of

KIB = 1024


class Side:
    """One tunnel: the peer's channel, and here a socket whose reader reads when it is told to."""

    def __init__(self, ends):
        self.ends = ends
        self.done = []
        self.server, self.far = tcp_pair()
        for sock in (self.server, self.far):
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):  # so that what is kept is kept by us
                sock.setsockopt(socket.SOL_SOCKET, option, 16 * KIB)

    async def open(self):
        count = len(self.ends.opened)
        self.channel = self.ends.client.open_stream()
        await until(lambda: len(self.ends.opened) > count, "the stream's arrival")
        self.end = SocketEnd(self.ends.opened[-1], lambda *how: self.done.append(how))
        self.end.attach(self.far)
        return self

    def close(self):
        self.server.close()


@contextlib.asynccontextmanager
async def peer(*, limit, floor=16 * KIB):
    """Links to a peer whose budget is this, and a way to open tunnels."""
    budget = Budget(limit, floor)
    async with no_leaks(), running() as reactor:
        ends = Ends(reactor, budget=budget)
        sides = []

        async def open_side():
            sides.append(await Side(ends).open())
            return sides[-1]

        yield budget, open_side, ends
        for side in sides:
            side.close()
        await ends.close()
    assert budget.kept == 0


async def test_what_readers_leave_unread_is_bounded_for_all_streams_together():
    async with peer(limit=400 * KIB) as (budget, open_side, _):
        sides = [await open_side() for _ in range(8)]
        for side in sides:
            side.channel.send(bytes(250 * KIB))
        await until(lambda: sum(len(side.done) for side in sides) >= 5, "the end of those that are too many")
        assert budget.kept <= 400 * KIB + 8 * budget.floor
        lost = [side for side in sides if side.done]
        assert {one for side in lost for one in side.done} == {(Outcome.ABORTED, ResetCode.LIMIT_EXCEEDED)}
        await until(lambda: all(side.channel.closed for side in lost), "news of it to the peer")
        # the others lose nothing, and make room as they are read
        kept = [side for side in sides if not side.done]
        assert kept
        for side in kept:
            side.channel.finish()
            with trio.fail_after(20):
                assert len(await receive_tcp(side.server)) == 250 * KIB
        await until(lambda: budget.kept == 0, "an empty store")
        late = await open_side()
        late.channel.send(bytes(250 * KIB))
        late.channel.finish()
        assert len(await receive_tcp(late.server)) == 250 * KIB
        assert not late.done


async def test_a_little_may_be_kept_whatever_others_leave_unread():
    async with peer(limit=200 * KIB, floor=40 * KIB) as (budget, open_side, _):
        greedy, modest = await open_side(), await open_side()
        greedy.channel.send(bytes(250 * KIB))
        await until(lambda: greedy.done or budget.kept > 150 * KIB, "a full store")
        budget.kept += 1 << 30  # fuller than full
        content = hashlib.shake_256(b"modest").digest(30 * KIB)
        modest.channel.send(content)
        modest.channel.finish()
        assert await receive_tcp(modest.server) == content
        budget.give_back(1 << 30)


@pytest.mark.parametrize("end", ["reset", "finish", "link", "local"])
async def test_what_is_kept_is_given_back_however_a_stream_ends(end):
    async with peer(limit=1 << 20) as (budget, open_side, ends):
        side = await open_side()
        side.channel.send(bytes(200 * KIB))
        await until(lambda: budget.kept > 100 * KIB, "something kept")
        if end == "reset":
            side.channel.reset(ResetCode.NONE)
        elif end == "link":
            ends.client.abort()
        elif end == "local":
            side.close()
        else:
            side.channel.finish()
            await receive_tcp(side.server)
        await until(lambda: budget.kept == 0, "giving back")


async def test_one_byte_at_a_time_costs_no_more_than_its_bytes():
    async with peer(limit=1 << 20) as (budget, open_side, _):
        side = await open_side()
        for number in range(60_000):
            side.channel.send(bytes([number & 255]))
        side.channel.finish()
        await until(lambda: side.end.received == 60_000, "all of it")
        assert len(side.end._pending) <= 60_000 // (64 * KIB) + 2
        assert budget.kept == sum(map(len, side.end._pending))
        assert await receive_tcp(side.server) == bytes(number & 255 for number in range(60_000))


async def test_what_came_with_the_negotiation_is_delivered_first_and_counts_for_nothing():
    async with peer(limit=0, floor=1 << 20) as (budget, _, ends):
        channel = ends.client.open_stream()
        await until(lambda: ends.opened, "the stream's arrival")
        done = []
        end = SocketEnd(ends.opened[0], lambda *how: done.append(how), unread=b"first, ")
        channel.send(b"then ")
        channel.finish()
        await until(lambda: budget.kept == 5, "what is kept")
        near, far = tcp_pair()
        end.attach(far)
        assert await receive_tcp(near) == b"first, then "
        assert budget.kept == 0
        near.close()
        await until(lambda: done, "the end")


async def test_the_bound_holds_for_stream_descriptors_as_well():
    async with peer(limit=200 * KIB) as (budget, _, ends):
        channels, streams = [], []
        for _ in range(4):
            channels.append(ends.client.open_stream())
            await until(lambda: len(ends.opened) == len(channels), "the stream's arrival")
            stream = ends.opened[-1].hand_over()
            ends.opened[-1]._seam.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32 * KIB)
            streams.append(stream)
        for channel in channels:
            for _ in range(250 * KIB // 100):
                channel.send(bytes(100))
        await until(lambda: all(channel.closed or not channel._unsent for channel in channels), "sending all")
        await until(lambda: sum(channel.closed for channel in channels) >= 2, "the end of those that are too many")
        assert budget.kept <= 200 * KIB + 4 * budget.floor
        outcomes = []
        for channel, stream in zip(channels, streams, strict=True):
            if not channel.closed:
                channel.finish()
            data, last = await receive_data(stream)
            if last == b"F":
                assert len(data) == 250 * KIB // 100 * 100
            else:  # also one whose reset was still on its way
                outcomes.append(last)
            stream.close()
        assert set(outcomes) == {reset_message(ResetCode.LIMIT_EXCEEDED)}


async def test_bytes_that_go_on_at_once_are_never_counted():
    async with peer(limit=0, floor=0) as (_, _, ends):
        channel = ends.client.open_stream()
        await until(lambda: ends.opened, "the stream's arrival")
        done = []
        near, far = tcp_pair()
        SocketEnd(ends.opened[0], lambda *how: done.append(how)).attach(far)
        for _ in range(20):
            channel.send(bytes(10_000))
            received = 0
            while received < 10_000:
                with trio.fail_after(10):
                    await trio.lowlevel.wait_readable(near)
                received += len(near.recv(65536))
        assert not done
        await send_tcp(near, b"bye")
        near.close()
        await until(lambda: done, "the end")


def test_all_connections_of_a_peer_share_one_budget_and_peers_do_not():
    budgets = Budgets()
    first = budgets.of(peer_of("alice"))
    assert budgets.of(peer_of("alice")) is first
    assert budgets.of(peer_of("bob")) is not first
    assert first.take(10, 0)
    del first
    gc.collect()
    assert budgets.of(peer_of("alice")).kept == 0
