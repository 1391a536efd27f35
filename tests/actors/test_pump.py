import contextlib
import hashlib
import random
import socket
import struct

import pytest
import trio

from actors import draining
from actors.pump import Outcome, Pump, PumpResult
from protocol.stream_descriptor import ResetCode, reset_message
from tests.actors.dataplane import (
    no_leaks,
    receive_data,
    receive_message,
    receive_tcp,
    running,
    send_data,
    send_message,
    send_tcp,
    tcp_pair,
    until,
)


class Bench:
    """A pump between `client` (TCP) and `peer` (the other end of the stream descriptor)."""

    def __init__(self, reactor, pair=tcp_pair):
        self.client, local = pair()
        self.client.setblocking(False)
        self.peer, stream = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.peer.setblocking(False)
        self.results: list[PumpResult] = []
        self.pump = Pump(reactor, local, stream, self.results.append)

    async def result(self):
        await until(lambda: self.results, "the end of the pump")
        self.client.close()
        self.peer.close()
        assert len(self.results) == 1
        return self.results[0]


@contextlib.asynccontextmanager
async def bench(**options):
    async with no_leaks(), running() as reactor:
        yield Bench(reactor, **options)


def unix_pair():
    return socket.socketpair()


@pytest.mark.parametrize("pair", [tcp_pair, unix_pair])
async def test_both_ways_and_half_close(pair):
    async with bench(pair=pair) as b:
        b.client.send(b"question")
        b.client.shutdown(socket.SHUT_WR)
        assert await receive_data(b.peer) == (b"question", b"F")
        await send_data(b.peer, b"answer")
        await send_data(b.peer, b", more")
        await send_message(b.peer, b"F")
        assert await receive_tcp(b.client) == b"answer, more"
        assert await b.result() == PumpResult(Outcome.FINISHED, 0, 8, 12)


async def test_the_peer_finishes_first():
    async with bench() as b:
        await send_message(b.peer, b"F")
        assert await receive_tcp(b.client) == b""
        await send_tcp(b.client, b"still here")
        b.client.shutdown(socket.SHUT_WR)
        assert await receive_data(b.peer) == (b"still here", b"F")
        assert (await b.result()).outcome is Outcome.FINISHED


@pytest.mark.parametrize("size", [1, 100, 65_507])
async def test_much_both_ways_at_once(size):
    up = random.Random(size).randbytes(min(16_000_000, size * 20_000))
    down = random.Random(-size).randbytes(min(16_000_000, size * 20_000))
    async with bench() as b:
        got = {}

        async def read(name, function, source):
            got[name] = await function(source)

        async def write_client():
            await send_tcp(b.client, up)
            b.client.shutdown(socket.SHUT_WR)

        async def write_peer():
            await send_data(b.peer, down, size)
            await send_message(b.peer, b"F")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write_client)
            nursery.start_soon(write_peer)
            nursery.start_soon(read, "down", receive_tcp, b.client)
            nursery.start_soon(read, "up", receive_data, b.peer)
        assert hashlib.sha256(got["up"][0]).digest() == hashlib.sha256(up).digest()
        assert hashlib.sha256(got["down"]).digest() == hashlib.sha256(down).digest()
        assert await b.result() == PumpResult(Outcome.FINISHED, 0, len(up), len(down))


async def test_a_peer_that_does_not_read_stops_the_client():
    async with bench() as b:
        total = 0
        with trio.move_on_after(0.5) as scope:
            while total < 1 << 30:
                await trio.lowlevel.wait_writable(b.client)
                total += b.client.send(bytes(1 << 16))
        assert scope.cancelled_caught
        assert b.pump.sent < 16 << 20
        b.client.shutdown(socket.SHUT_WR)
        data, last = await receive_data(b.peer)
        assert (len(data), last) == (total, b"F")
        await send_message(b.peer, b"F")
        assert (await b.result()).sent == total


async def test_a_client_that_does_not_read_stops_the_peer():
    async with bench() as b:
        total = 0
        with trio.move_on_after(0.5) as scope:
            while total < 1 << 30:
                await trio.lowlevel.wait_writable(b.peer)
                total += b.peer.send(b"D" + bytes(1 << 15)) - 1
        assert scope.cancelled_caught
        assert b.pump.received < 32 << 20
        b.client.shutdown(socket.SHUT_WR)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_message, b.peer, b"F")
            assert len(await receive_tcp(b.client)) == total
        assert (await b.result()).outcome is Outcome.FINISHED


async def test_the_switchboard_closes_while_the_client_still_reads():
    # both directions are finished, so the switchboard lets go; what the pump still holds must reach the client
    content = random.Random(3).randbytes(6_000_000)
    async with bench() as b:
        b.client.shutdown(socket.SHUT_WR)
        assert await receive_data(b.peer) == (b"", b"F")
        b.client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        got = []

        async def read():
            got.append(await receive_tcp(b.client))

        async with trio.open_nursery() as nursery:
            with trio.move_on_after(0.2):
                # fill everything between here and the client, who does not read yet
                await send_data(b.peer, content)
            sent = b.pump.received
            nursery.start_soon(read)
            # the peer's buffer takes the end of it while the pump is still busy
            await send_message(b.peer, b"F")
            b.peer.close()
        assert len(got[0]) >= sent
        assert content.startswith(got[0])
        assert (await b.result()).outcome is Outcome.FINISHED


async def test_reset_by_the_peer_resets_the_client():
    async with bench() as b:
        await send_data(b.peer, b"partial")
        await send_message(b.peer, reset_message(ResetCode.GATED))
        with pytest.raises(ConnectionResetError):
            await receive_tcp(b.client)  # a clean end would return
        result = await b.result()
        assert (result.outcome, result.code) == (Outcome.STREAM_RESET, ResetCode.GATED)


async def test_reset_by_the_peer_overtakes_what_the_client_does_not_read():
    async with bench() as b:
        with trio.move_on_after(0.3):
            while True:
                await send_message(b.peer, b"D" + bytes(60_000))
        b.client.send(b"and more from here")
        b.peer.close()
        # nobody reads the client: only its own reset can end this now
        b.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        b.client.close()
        assert (await b.result()).outcome in (Outcome.LOCAL_RESET, Outcome.STREAM_LOST)


@pytest.mark.parametrize("pair", [tcp_pair, unix_pair])
@pytest.mark.parametrize("last", [reset_message(ResetCode.LOCAL_RESET), None])
async def test_what_came_before_a_reset_by_the_peer_reaches_the_client(pair, last):
    answer = random.Random(5).randbytes(150_000)
    async with bench(pair=pair) as b:
        for start in range(0, len(answer), 60_000):  # all of it, and the reset, before the pump looks
            b.peer.send(b"D" + answer[start : start + 60_000])
        if last is not None:
            b.peer.send(last)
        b.peer.close()
        got = bytearray()
        with contextlib.suppress(ConnectionResetError):
            while len(got) < len(answer):
                await trio.lowlevel.wait_readable(b.client)
                got += b.client.recv(1 << 16)
        assert bytes(got) == answer
        outcome = Outcome.STREAM_LOST if last is None else Outcome.STREAM_RESET
        assert (await b.result()).outcome is outcome


@pytest.mark.parametrize("pair", [tcp_pair, unix_pair])
async def test_what_the_client_said_before_it_broke_off_reaches_the_peer(pair):
    async with bench(pair=pair) as b:
        # the client takes no more, and what it said meets the pump together with the failure of a write
        await send_data(b.peer, b"never read")
        await until(lambda: b.pump.received == 10)
        b.client.send(b"413 too large")
        await send_data(b.peer, b"more")
        b.client.close()  # with input unread: a reset
        data, last = await receive_data(b.peer)
        assert (data, last) == (b"413 too large", reset_message(ResetCode.LOCAL_RESET))
        assert (await b.result()).outcome is Outcome.LOCAL_RESET


async def test_reset_by_the_client_reaches_the_peer():
    async with bench() as b:
        b.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        b.client.close()
        assert await receive_message(b.peer) == reset_message(ResetCode.LOCAL_RESET)
        assert await receive_message(b.peer) == b""
        assert (await b.result()).outcome is Outcome.LOCAL_RESET


async def test_reset_by_the_client_while_the_peer_does_not_read(monkeypatch):
    monkeypatch.setattr(draining, "PATIENCE", 0.2)
    async with bench() as b:
        with trio.move_on_after(0.3):
            while True:
                await trio.lowlevel.wait_writable(b.client)
                b.client.send(bytes(1 << 16))
        b.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        b.client.close()
        assert (await b.result()).outcome is Outcome.LOCAL_RESET


@pytest.mark.parametrize("after", [b"", b"data"])
async def test_the_peers_process_dies(after):
    async with bench() as b:
        if after:
            await send_data(b.peer, after)
        b.peer.close()
        with pytest.raises(ConnectionResetError):
            await receive_tcp(b.client)  # a clean end would return
        result = await b.result()
        assert (result.outcome, result.code) == (Outcome.STREAM_LOST, ResetCode.LOST)


async def test_reset_with_messages_unread_by_the_other_end():
    # the switchboard closes with messages of ours unread: the kernel then reports ECONNRESET before its last words
    async with bench() as b:
        b.client.send(b"never read")
        await until(lambda: b.pump.sent == 10)
        b.peer.send(reset_message(ResetCode.SHUTDOWN))
        b.peer.close()
        result = await b.result()
        assert (result.outcome, result.code) == (Outcome.STREAM_RESET, ResetCode.SHUTDOWN)


async def test_abort():
    async with bench() as b:
        b.pump.abort(ResetCode.GATED)
        assert b.results == [PumpResult(Outcome.ABORTED, ResetCode.GATED, 0, 0)]
        b.pump.abort(ResetCode.GATED)
        assert await receive_message(b.peer) == reset_message(ResetCode.GATED)
        with pytest.raises(ConnectionResetError):
            b.client.recv(1)
        await b.result()


@pytest.mark.parametrize("message", [b"X", b"D", b"F?", b"R12", b"?" * 100])
async def test_nonsense_from_the_stream_ends_the_pump_not_the_reactor(message):
    async with bench() as b:
        await send_message(b.peer, message)
        result = await b.result()
        assert result.outcome is Outcome.STREAM_LOST
        assert result.received == 0


async def test_an_idle_pump_holds_no_buffers():
    import tracemalloc

    async with running() as reactor:
        benches = []
        first = Bench(reactor)  # what is made once is not counted
        first.pump.abort(0)
        await first.result()
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(50):
            benches.append(Bench(reactor))
            benches[-1].client.send(bytes(1000))
        for b in benches:
            assert (await receive_message(b.peer))[:1] == b"D"
        used = (tracemalloc.get_traced_memory()[0] - before) / 50
        tracemalloc.stop()
        assert used < 8 * 1024
        for b in benches:
            b.client.close()
            b.peer.close()
        await until(lambda: all(b.results for b in benches))
