"""TCP sockets as the ends of streams: client, socket end, link, link, socket end, server."""

import contextlib
import hashlib
import random
import socket
import struct

import pytest
import trio

from actors import draining
from actors.draining import unacknowledged
from actors.pump import Outcome
from actors.sockets import SMALL_BUFFER
from actors.switchboard import budget as budget_module
from actors.switchboard.link import LinkClosedError
from actors.switchboard.socket_end import SocketEnd
from protocol import yamux
from protocol.errors import ProtocolError
from protocol.stream_descriptor import ResetCode
from tests.actors.dataplane import Ends, no_leaks, receive_tcp, running, send_tcp, tcp_pair, until

NO_LINGER = struct.pack("ii", 1, 0)


class Tunnel:
    """A client's socket and a server's, joined by a stream between two links."""

    def __init__(self, ends):
        self.ends = ends
        self.done = [[], []]
        self.client, self.near = tcp_pair()
        self.server, self.far = tcp_pair()

    async def open(self):
        """Attach both."""
        count = len(self.ends.opened)
        self.near_end = SocketEnd(self.ends.client.open_stream(), lambda *how: self.done[0].append(how))
        self.near_end.attach(self.near)
        await until(lambda: len(self.ends.opened) > count, "the stream's arrival")
        self.far_end = SocketEnd(self.ends.opened[-1], lambda *how: self.done[1].append(how))
        self.far_end.attach(self.far)
        return self

    def close(self):
        self.client.close()
        self.server.close()

    async def over(self):
        await until(lambda: self.done[0] and self.done[1], "the end of both")
        return self.done[0] + self.done[1]


@contextlib.asynccontextmanager
async def linked(*, direct=True, **options):
    async with no_leaks(), running(direct=direct) as reactor:
        ends = Ends(reactor, **options)
        yield ends
        await ends.close()


@contextlib.asynccontextmanager
async def tunnelled(**options):
    async with linked(**options) as ends:
        tunnel = await Tunnel(ends).open()
        yield tunnel
        tunnel.close()
        await tunnel.over()


async def hears(sock):
    """What a client sees next: bytes, `b""` at a clean end, or "reset"."""
    while True:
        try:
            return sock.recv(65536)
        except BlockingIOError:
            with trio.fail_after(10):
                await trio.lowlevel.wait_readable(sock)
        except ConnectionResetError:
            return "reset"


def shuts_with_reset(sock):
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
    sock.close()


@pytest.mark.parametrize("direct", [True, False])
async def test_each_direction_ends_by_itself_and_both_end_cleanly(direct):
    async with tunnelled(direct=direct) as tunnel:
        await send_tcp(tunnel.client, b"question")
        tunnel.client.shutdown(socket.SHUT_WR)
        assert await receive_tcp(tunnel.server) == b"question"
        await send_tcp(tunnel.server, b"answer")
        assert not tunnel.done[0]
        tunnel.server.shutdown(socket.SHUT_WR)
        assert await receive_tcp(tunnel.client) == b"answer"
        assert await tunnel.over() == [(Outcome.FINISHED, 0)] * 2
        near, far = tunnel.near_end, tunnel.far_end
        assert (near.sent, near.received, far.sent, far.received) == (8, 6, 6, 8)
        assert tunnel.ends.client.streams == tunnel.ends.server.streams == 0


async def test_much_both_ways_at_once():
    content = [random.Random(seed).randbytes(30_000_000) for seed in (1, 2)]
    async with tunnelled() as tunnel:
        got = {}

        async def write(sock, data):
            await send_tcp(sock, data)
            sock.shutdown(socket.SHUT_WR)

        async def read(name, sock):
            got[name] = await receive_tcp(sock)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write, tunnel.client, content[0])
            nursery.start_soon(write, tunnel.server, content[1])
            nursery.start_soon(read, "server", tunnel.server)
            nursery.start_soon(read, "client", tunnel.client)
        assert hashlib.sha256(got["server"]).digest() == hashlib.sha256(content[0]).digest()
        assert hashlib.sha256(got["client"]).digest() == hashlib.sha256(content[1]).digest()
        assert await tunnel.over() == [(Outcome.FINISHED, 0)] * 2


async def test_bytes_that_are_on_their_way_when_both_have_finished_still_arrive():
    # the stream is finished both ways, and most of what it carried waits for a slow reader
    content = random.Random(3).randbytes(8_000_000)
    async with linked() as ends:
        tunnel = Tunnel(ends)
        tunnel.far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        await tunnel.open()
        tunnel.server.shutdown(socket.SHUT_WR)
        assert await receive_tcp(tunnel.client) == b""
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def write():
                await send_tcp(tunnel.client, content)
                tunnel.client.close()

            assert await receive_tcp(tunnel.server) == content
        assert await tunnel.over() == [(Outcome.FINISHED, 0)] * 2
        tunnel.close()


async def test_a_slow_reader_stops_the_writer_and_nobody_else():
    limits = yamux.Limits(stream_window=1 << 20)
    async with linked(limits=limits) as ends:
        slow, other = await Tunnel(ends).open(), await Tunnel(ends).open()
        total = 0
        with trio.move_on_after(0.7) as scope:
            while total < 1 << 30:
                await trio.lowlevel.wait_writable(slow.client)
                with contextlib.suppress(BlockingIOError):
                    total += slow.client.send(bytes(60_000))
        assert scope.cancelled_caught, "somebody buffers without bound"
        assert sum(map(len, slow.far_end._pending)) <= limits.stream_window
        await send_tcp(other.client, b"hello")
        assert await hears(other.server) == b"hello"
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def finish():
                slow.client.shutdown(socket.SHUT_WR)

            assert len(await receive_tcp(slow.server)) == total
        slow.close()
        other.close()
        await slow.over()
        await other.over()


async def test_an_idle_or_stopped_tunnel_does_not_keep_the_reactor_busy():
    async with linked(limits=yamux.Limits(stream_window=1 << 18)) as ends:
        tunnel = await Tunnel(ends).open()
        tunnel.server.shutdown(socket.SHUT_WR)  # one direction is over, the other stands still
        with trio.move_on_after(0.5):
            await send_tcp(tunnel.client, bytes(100_000_000))
        tunnel.client.shutdown(socket.SHUT_WR)
        await trio.sleep(0.1)
        rounds = ends.client.reactor.rounds
        await trio.sleep(0.5)
        assert ends.client.reactor.rounds - rounds < 50
        tunnel.close()
        await tunnel.over()


@pytest.mark.parametrize("stopped", [False, True])
async def test_a_reset_crosses_even_when_nothing_moves(stopped, monkeypatch):
    monkeypatch.setattr(draining, "PATIENCE", 0.2)
    async with tunnelled() as tunnel:
        if stopped:
            with trio.move_on_after(0.5):
                await send_tcp(tunnel.client, bytes(1 << 30))
        shuts_with_reset(tunnel.client)
        near, far = await tunnel.over()
        assert near == (Outcome.LOCAL_RESET, ResetCode.LOCAL_RESET)
        assert far == (Outcome.STREAM_RESET, ResetCode.LOCAL_RESET)
        while (heard := await hears(tunnel.server)) != "reset":
            assert heard, "a broken tunnel looked like a clean end"


async def read_to_the_end(sock):
    """All that comes, and whether a reset ended it."""
    data = bytearray()
    while (heard := await hears(sock)) not in (b"", "reset"):
        data += heard
    return bytes(data), heard


async def upload(sock):
    """Send until the other end does not want it."""
    with contextlib.suppress(ConnectionError):
        while True:
            await send_tcp(sock, bytes(30_000))


async def say_and_break_off(sock, answer):
    """Close with input unread, when the kernel at the other end has all of the answer."""
    await send_tcp(sock, answer)
    await until(lambda: not unacknowledged(sock))
    sock.close()


@pytest.mark.parametrize("size", [30, 1_000_000])
async def test_an_answer_before_a_reset_arrives(size):
    # as a service does that answers 413 and closes, with the rest of an upload unread
    answer = random.Random(6).randbytes(size)
    async with linked() as ends:
        for _ in range(20):
            tunnel = await Tunnel(ends).open()
            got = []
            async with trio.open_nursery() as nursery:
                nursery.start_soon(upload, tunnel.client)
                await hears(tunnel.server)

                @nursery.start_soon
                async def read(tunnel=tunnel, got=got):
                    got.append(await read_to_the_end(tunnel.client))

                await say_and_break_off(tunnel.server, answer)
            assert got[0][0] == answer
            assert [outcome for outcome, _ in await tunnel.over()] == [Outcome.STREAM_RESET, Outcome.LOCAL_RESET]
            tunnel.close()


async def test_an_answer_that_ended_before_the_reset_ends():
    async with tunnelled() as tunnel:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(upload, tunnel.client)
            await hears(tunnel.server)
            await send_tcp(tunnel.server, b"HTTP/1.0 401 Who are you?")
            tunnel.server.shutdown(socket.SHUT_WR)
            tunnel.server.close()
        assert await read_to_the_end(tunnel.client) == (b"HTTP/1.0 401 Who are you?", b"")


async def test_what_a_client_said_before_it_broke_off_reaches_the_service():
    async with tunnelled() as tunnel:
        await send_tcp(tunnel.server, b"a greeting that nobody reads")
        await trio.lowlevel.wait_readable(tunnel.client)
        await send_tcp(tunnel.client, b"a line for the log")
        tunnel.client.close()
        assert await read_to_the_end(tunnel.server) == (b"a line for the log", "reset")


async def test_what_came_before_a_reset_waits_for_a_slow_reader():
    content = random.Random(7).randbytes(400_000)  # more than a window
    async with linked() as ends:
        tunnel = Tunnel(ends)
        tunnel.near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
        tunnel.client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        await tunnel.open()
        await send_tcp(tunnel.client, b"unread")
        await trio.lowlevel.wait_readable(tunnel.server)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(say_and_break_off, tunnel.server, content)
            await until(lambda: tunnel.far_end.sent == yamux.INITIAL_WINDOW)
            assert await read_to_the_end(tunnel.client) == (content, "reset")
        await tunnel.over()
        tunnel.close()


async def test_what_this_side_ends_waits_for_nobody():
    async with linked() as ends:
        tunnel = await Tunnel(ends).open()
        with trio.move_on_after(0.5):
            await send_tcp(tunnel.client, bytes(1 << 30))
        began = ends.server.reactor.clock()
        ends.opened[0].reset(ResetCode.GATED)
        assert tunnel.done[1] == [(Outcome.STREAM_RESET, ResetCode.GATED)]
        assert ends.server.reactor.clock() - began < draining.PATIENCE
        await until(lambda: tunnel.done[0])
        tunnel.close()


async def test_what_a_broken_connection_had_brought_reaches_the_client():
    async with linked() as ends:
        tunnel = await Tunnel(ends).open()
        await send_tcp(tunnel.server, bytes(200_000))
        await until(lambda: tunnel.near_end.received == 200_000)
        ends.server.abort()
        assert await read_to_the_end(tunnel.client) == (bytes(200_000), "reset")
        await tunnel.over()
        tunnel.close()


async def test_a_reset_after_a_half_close_is_a_reset():
    async with tunnelled() as tunnel:
        tunnel.client.shutdown(socket.SHUT_WR)
        assert await hears(tunnel.server) == b""
        shuts_with_reset(tunnel.server)
        assert await hears(tunnel.client) == "reset"
        near, far = await tunnel.over()
        assert (near[0], far[0]) == (Outcome.STREAM_RESET, Outcome.LOCAL_RESET)


async def test_the_end_of_the_link_resets_both():
    async with linked() as ends:
        tunnel = await Tunnel(ends).open()
        await send_tcp(tunnel.client, b"x")
        assert await hears(tunnel.server) == b"x"
        ends.client.abort()
        assert await hears(tunnel.client) == "reset"
        assert await hears(tunnel.server) == "reset"
        assert await tunnel.over() == [(Outcome.STREAM_RESET, ResetCode.CONNECTION_LOST)] * 2
        tunnel.close()


async def test_an_abort_resets_both_and_is_told_once():
    async with tunnelled() as tunnel:
        tunnel.near_end.abort(ResetCode.SHUTDOWN)
        tunnel.near_end.abort(ResetCode.GATED)
        assert tunnel.done[0] == [(Outcome.ABORTED, ResetCode.SHUTDOWN)]
        assert await hears(tunnel.client) == "reset"
        assert await hears(tunnel.server) == "reset"
        assert (await tunnel.over())[1:] == [(Outcome.STREAM_RESET, ResetCode.SHUTDOWN)]


async def test_an_end_waits_for_its_socket_with_one_window_at_most():
    async with linked() as ends:
        tunnel = Tunnel(ends)
        near = SocketEnd(ends.client.open_stream(), lambda *how: tunnel.done[0].append(how))
        near.attach(tunnel.near)
        content = random.Random(4).randbytes(3_000_000)
        await until(lambda: ends.opened)
        far = SocketEnd(ends.opened[0], lambda *how: tunnel.done[1].append(how), unread=b"first ")
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def write():
                await send_tcp(tunnel.client, content)
                tunnel.client.shutdown(socket.SHUT_WR)

            await until(lambda: far.received == yamux.INITIAL_WINDOW + 6)
            far.attach(tunnel.far)
            assert await receive_tcp(tunnel.server) == b"first " + content
        tunnel.server.shutdown(socket.SHUT_WR)
        assert await tunnel.over() == [(Outcome.FINISHED, 0)] * 2
        tunnel.close()


async def test_an_end_that_was_told_all_before_it_had_a_socket():
    async with linked() as ends:
        tunnel = Tunnel(ends)
        SocketEnd(ends.client.open_stream(), lambda *how: tunnel.done[0].append(how)).attach(tunnel.near)
        await until(lambda: ends.opened)
        far = SocketEnd(ends.opened[0], lambda *how: tunnel.done[1].append(how))
        await send_tcp(tunnel.client, b"all")
        tunnel.client.shutdown(socket.SHUT_WR)
        await until(lambda: ends.opened[0].stream.remote_finished)
        far.attach(tunnel.far)
        assert await receive_tcp(tunnel.server) == b"all"
        tunnel.server.shutdown(socket.SHUT_WR)
        assert await tunnel.over() == [(Outcome.FINISHED, 0)] * 2
        tunnel.close()


async def test_a_negotiation_that_is_still_open_keeps_its_bytes_from_the_socket():
    async with linked() as ends:
        tunnel = Tunnel(ends)
        heard = bytearray()

        def negotiation(data):
            heard.extend(data)
            return bytes(heard[6:]) if len(heard) >= 6 else None

        near = SocketEnd(ends.client.open_stream(), lambda *how: tunnel.done[0].append(how), negotiation=negotiation)
        near.attach(tunnel.near)
        await until(lambda: ends.opened)
        channel = ends.opened[0]
        channel.send(b"agr")
        channel.send(b"eed!")
        assert await hears(tunnel.client) == b"!"
        assert near.received == 1
        channel.send(bytes(1_000_000))
        received = 0
        while received < 1_000_000:
            received += len(await hears(tunnel.client))
        channel.reset(ResetCode.GATED)
        assert await hears(tunnel.client) == "reset"
        assert tunnel.done[0] == [(Outcome.STREAM_RESET, ResetCode.GATED)]
        tunnel.close()
        tunnel.far.close()


@pytest.mark.parametrize("answer", [ProtocolError("no"), None])
async def test_a_negotiation_that_fails_resets_the_socket(answer):
    async with linked() as ends:
        tunnel = Tunnel(ends)

        def negotiation(data):
            if answer is not None:
                raise answer

        near = SocketEnd(ends.client.open_stream(), lambda *how: tunnel.done[0].append(how), negotiation=negotiation)
        near.attach(tunnel.near)
        await until(lambda: ends.opened)
        if answer is not None:
            ends.opened[0].send(b"na")
        ends.opened[0].finish()
        assert await hears(tunnel.client) == "reset"
        assert tunnel.done[0] == [(Outcome.STREAM_RESET, ResetCode.NEGOTIATION_FAILED)]
        tunnel.close()
        tunnel.far.close()


async def test_a_stream_that_is_over_takes_no_socket():
    async with linked() as ends:
        channel = ends.client.open_stream()
        channel.reset(ResetCode.NONE)
        with pytest.raises(LinkClosedError):
            SocketEnd(channel, lambda *_: None)


async def test_streams_share_fairly():
    async with linked() as ends:
        tunnels = [await Tunnel(ends).open() for _ in range(8)]
        received = [0] * 8

        async def write(tunnel):
            while True:
                await send_tcp(tunnel.client, bytes(65_536))

        async def read(index, tunnel):
            while data := await hears(tunnel.server):
                received[index] += len(data)

        async with trio.open_nursery() as nursery:
            for index, tunnel in enumerate(tunnels):
                nursery.start_soon(write, tunnel)
                nursery.start_soon(read, index, tunnel)
            await until(lambda: sum(received) > 80_000_000)  # by then the windows of all have grown
            before = list(received)
            await until(lambda: sum(received) > 240_000_000)
            nursery.cancel_scope.cancel()
        shares = [now - then for now, then in zip(received, before, strict=True)]
        assert min(shares) > max(shares) / 4
        for tunnel in tunnels:
            tunnel.close()
            await tunnel.over()


def send_buffer(sock):
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)


@pytest.mark.parametrize("large", [0, 2])
async def test_the_kernels_buffers_are_large_where_much_goes_through_and_for_a_few(monkeypatch, large):
    monkeypatch.setattr(budget_module, "LARGE", large)
    async with tunnelled() as tunnel:
        assert send_buffer(tunnel.far) <= 2 * SMALL_BUFFER
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def write():
                await send_tcp(tunnel.client, bytes(3_000_000))
                tunnel.client.shutdown(socket.SHUT_WR)

            assert len(await receive_tcp(tunnel.server)) == 3_000_000
        assert (send_buffer(tunnel.far) > 2 * SMALL_BUFFER) is (large > 0)


async def test_a_large_buffer_goes_to_who_needs_it_from_who_does_not(monkeypatch):
    monkeypatch.setattr(budget_module, "LARGE", 1)
    async with linked() as ends:
        first, second = await Tunnel(ends).open(), await Tunnel(ends).open()
        for tunnel, other in ((first, second), (second, first)):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(send_tcp, tunnel.client, bytes(3_000_000))
                got = 0
                while got < 3_000_000:
                    got += len(await hears(tunnel.server))
            assert send_buffer(tunnel.far) > 2 * SMALL_BUFFER
            assert send_buffer(other.far) <= 2 * SMALL_BUFFER
        for tunnel in (first, second):
            tunnel.close()
            await tunnel.over()


async def test_readers_that_do_not_read_cost_little_of_the_kernels_memory():
    async with linked() as ends:
        tunnels = [await Tunnel(ends).open() for _ in range(8)]
        async with trio.open_nursery() as nursery:
            for tunnel in tunnels:
                nursery.start_soon(send_tcp, tunnel.client, bytes(2_000_000))
            await until(lambda: all(tunnel.far_end.received >= yamux.INITIAL_WINDOW for tunnel in tunnels))
            assert all(unacknowledged(tunnel.far) <= 4 * SMALL_BUFFER for tunnel in tunnels)
            nursery.cancel_scope.cancel()
        for tunnel in tunnels:
            tunnel.close()
            await tunnel.over()
