import contextlib
import hashlib
import random
import socket
import struct

import pytest
import trio

from actors import draining
from actors.switchboard import channel as channel_module
from actors.switchboard import link as link_module
from actors.switchboard.link import LinkClosedError
from actors.switchboard.wire import SocketWire
from protocol import allowance as costs
from protocol import yamux
from protocol.allowance import Allowance
from protocol.errors import LimitExceededError
from protocol.noise_cipher import CipherState
from protocol.stream_descriptor import ResetCode, reset_message
from protocol.yamux import Role
from tests.actors.dataplane import (
    Ends,
    exchange,
    no_leaks,
    receive_data,
    receive_message,
    running,
    send_data,
    send_message,
    tcp_pair,
    until,
)


@contextlib.asynccontextmanager
async def linked(*, direct=True, **options):
    async with no_leaks(), running(direct=direct) as reactor:
        ends = Ends(reactor, **options)
        yield ends
        await ends.close()


def close(*streams):
    for stream in streams:
        stream.close()


@pytest.mark.parametrize("direct", [True, False])
async def test_a_stream_through_both_descriptors(direct):
    async with linked(direct=direct) as ends:
        near, far = await ends.pair()
        await send_data(near, b"question")
        await send_message(near, b"F")
        assert await receive_data(far) == (b"question", b"F")
        await send_data(far, b"answer")
        await send_message(far, b"F")
        assert await receive_data(near) == (b"answer", b"F")
        await until(lambda: ends.client.streams == ends.server.streams == 0)
        # both directions are finished: the link closes its ends
        assert await receive_message(near) == b""
        assert await receive_message(far) == b""
        close(near, far)


@pytest.mark.parametrize("size", [1, 1000, 65_507])
async def test_much_both_ways_at_once(size):
    content = [random.Random(seed).randbytes(min(24_000_000, 3000 * size)) for seed in (1, 2)]
    async with linked() as ends:
        near, far = await ends.pair()
        await exchange(near, far, content, size)
        close(near, far)


async def test_forty_streams_in_parallel_with_hashes():
    async with linked() as ends:

        async def one(index):
            channel = ends.client.open_stream()
            near = channel.hand_over(b"")
            await send_data(near, struct.pack(">I", index))
            content = random.Random(index).randbytes(2_000_000)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(send_all, near, content)
                echoed, last = await receive_data(near)
            assert last == b"F"
            assert hashlib.sha256(echoed).digest() == hashlib.sha256(struct.pack(">I", index) + content).digest()
            near.close()

        async def send_all(stream, content):
            await send_data(stream, content, 30_011)
            await send_message(stream, b"F")

        async def echo(stream):
            while (message := await receive_message(stream))[:1] == b"D":
                await send_message(stream, message)
            assert message == b"F"
            await send_message(stream, b"F")
            assert await receive_message(stream) == b""
            stream.close()

        async with trio.open_nursery() as nursery:
            ends.on_stream = lambda channel: nursery.start_soon(echo, channel.hand_over())
            for index in range(40):
                nursery.start_soon(one, index)
        assert ends.client.streams == ends.server.streams == 0


async def test_a_slow_reader_stops_the_far_writer_and_nobody_else():
    limits = yamux.Limits(stream_window=1 << 20)
    async with linked(limits=limits) as ends:
        near, far = await ends.pair()
        total = 0
        with trio.move_on_after(0.7) as scope:
            while total < 1 << 30:
                await trio.lowlevel.wait_writable(near)
                with contextlib.suppress(BlockingIOError):
                    total += near.send(b"D" + bytes(60_000)) - 1
        assert scope.cancelled_caught
        # what the kernel holds in two descriptors, one window, and one message
        bound = 4 * channel_module.SEAM_BUFFER + limits.stream_window + 65_507
        assert total <= bound
        waiting = sum(len(message) for message in ends.opened[0]._pending)
        assert waiting <= limits.stream_window + 100
        # another stream of the same link goes on
        other_near, other_far = await ends.pair()
        await send_data(other_near, b"hello")
        assert await receive_message(other_far) == b"Dhello"
        # and when the reader reads, all comes
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_message, near, b"F")
            data, last = await receive_data(far)
        assert (len(data), last) == (total, b"F")
        close(near, far, other_near, other_far)


async def test_streams_share_fairly():
    async with linked() as ends:
        pairs = [await ends.pair() for _ in range(8)]
        received = [0] * 8

        async def write(stream):
            while True:
                await send_message(stream, b"D" + bytes(65_507))

        async def read(index, stream):
            while message := await receive_message(stream):
                received[index] += len(message) - 1

        async with trio.open_nursery() as nursery:
            for index, (near, far) in enumerate(pairs):
                nursery.start_soon(write, near)
                nursery.start_soon(read, index, far)
            await until(lambda: sum(received) > 80_000_000)
            nursery.cancel_scope.cancel()
        assert min(received) > max(received) / 4
        close(*(stream for pair in pairs for stream in pair))


@pytest.mark.parametrize("side", [0, 1])
async def test_reset_crosses_with_its_code(side):
    async with linked() as ends:
        streams = await ends.pair()
        await send_data(streams[side], b"partial")
        await send_message(streams[side], reset_message(ResetCode.SERVICE_UNREACHABLE))
        data, last = await receive_data(streams[1 - side])
        assert data in (b"", b"partial")
        assert last == reset_message(ResetCode.SERVICE_UNREACHABLE)
        await until(lambda: ends.client.streams == ends.server.streams == 0)
        close(*streams)


@pytest.mark.parametrize("said", [b"", b"F"])
async def test_a_dead_process_is_a_reset(said):
    async with linked() as ends:
        near, far = await ends.pair()
        await send_data(near, b"partial")
        if said:
            await send_message(near, said)
        near.close()
        _, last = await receive_data(far)
        if last == b"F":
            last = await receive_message(far)
        assert last == reset_message(ResetCode.LOST)
        await until(lambda: ends.client.streams == ends.server.streams == 0)
        far.close()


async def test_a_reset_does_not_wait_behind_data_that_nobody_reads(monkeypatch):
    monkeypatch.setattr(draining, "PATIENCE", 0.2)
    async with linked() as ends:
        near, far = await ends.pair()
        with trio.move_on_after(0.5):
            while True:
                await send_message(near, b"D" + bytes(60_000))
        near.close()
        await until(lambda: ends.client.streams == ends.server.streams == 0)
        _, last = await receive_data(far)
        assert last == reset_message(ResetCode.LOST)
        far.close()


async def test_the_last_bytes_arrive_after_their_sender_is_gone():
    # both directions are finished for the actor, which closes, while the peer's window is still used up
    content = random.Random(5).randbytes(8_000_000)
    async with linked(limits=yamux.Limits(stream_window=1 << 18)) as ends:
        near, far = await ends.pair()
        await send_message(far, b"F")
        assert await receive_message(near) == b"F"

        async def write():
            await send_data(near, content)
            await send_message(near, b"F")
            near.close()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            await trio.sleep(0.05)
            assert await receive_data(far) == (content, b"F")
        far.close()


async def test_bytes_given_with_the_hand_over_come_first():
    async with linked() as ends:
        channel = ends.client.open_stream()
        handed_over = []

        def negotiate(inbound):
            inbound.on_data = lambda data: handed_over.append(inbound.hand_over(data.removeprefix(b"negotiation ")))

        ends.on_stream = negotiate
        channel.send(b"negotiation and then some")
        await until(lambda: handed_over)
        far = handed_over[0]
        near = channel.hand_over()
        await send_data(near, b"!")
        await send_message(near, b"F")
        assert await receive_data(far) == (b"and then some!", b"F")
        close(near, far)


async def test_channels_in_memory():
    async with linked() as ends:
        channel = ends.client.open_stream()
        events = []
        channel.on_data = events.append
        channel.on_finish = lambda: events.append("finish")
        channel.on_closed = lambda: events.append("closed")

        def answer(inbound):
            inbound.on_data = inbound.send
            # on_finish is not set: the answer to a finish is a finish

        ends.on_stream = answer
        channel.send(b"ping")
        await until(lambda: events == [b"ping"])
        channel.finish()
        await until(lambda: events == [b"ping", "finish", "closed"])
        assert channel.closed
        with pytest.raises(LinkClosedError):
            channel.send(b"late")
        with pytest.raises(LinkClosedError):
            channel.hand_over()


async def test_a_channel_queues_within_a_bound_and_sends_all():
    async with linked() as ends:
        handed_over = []
        ends.on_stream = lambda inbound: handed_over.append(inbound.hand_over())
        channel = ends.client.open_stream()
        content = random.Random(9).randbytes(1_000_000)
        channel.send(content)
        with pytest.raises(LimitExceededError):
            channel.send(bytes(100_000))
        channel.finish()
        await until(lambda: handed_over)
        far = handed_over[0]
        assert await receive_data(far) == (content, b"F")
        far.close()


async def test_reset_of_a_channel_in_memory():
    async with linked() as ends:
        channel = ends.client.open_stream()
        channel.send(b"x")
        await until(lambda: ends.opened)
        codes, closed = [], []
        channel.on_reset = codes.append
        channel.on_closed = lambda: closed.append(1)
        ends.opened[0].reset(ResetCode.GATED)
        await until(lambda: codes == [ResetCode.GATED])
        assert closed == [1]


async def test_reset_of_a_stream_that_was_handed_over_tells_both():
    async with linked() as ends:
        near, far = await ends.pair()
        closed = []
        ends.opened[0].on_closed = lambda: closed.append(1)
        ends.opened[0].reset(ResetCode.GATED)
        assert await receive_message(near) == reset_message(ResetCode.GATED)
        assert await receive_message(far) == reset_message(ResetCode.GATED)
        assert closed == [1]
        close(near, far)


async def test_closing_a_link_resets_its_streams():
    async with linked() as ends:
        near, far = await ends.pair()
        channel = ends.client.open_stream()
        codes = []
        channel.on_reset = codes.append
        ends.client.close()
        assert await receive_message(near) == reset_message(ResetCode.SHUTDOWN)
        assert (await receive_message(far))[:1] == b"R"
        await until(lambda: len(ends.ended) == 2)
        assert codes == [ResetCode.SHUTDOWN]
        assert ends.ended[Role.CLIENT].code == "local-close"
        assert ends.ended[Role.SERVER].code in ("remote-close", "connection-lost")
        with pytest.raises(LinkClosedError):
            ends.client.open_stream()
        close(near, far)


@pytest.mark.parametrize("raw", [b"\0\5xxxxx", b"\0\x20" + bytes(32), b"\0\0"])
async def test_bytes_that_are_not_the_peers_end_the_link(raw):
    async with no_leaks(), running() as reactor:
        near, far = tcp_pair()
        stranger, ends = near.dup(), Ends(reactor, (near, far))
        near_stream, far_stream = await ends.pair()
        stranger.send(raw)
        await until(lambda: len(ends.ended) == 2)
        assert ends.ended[Role.SERVER].code == "noise"
        assert (await receive_message(far_stream)) == reset_message(ResetCode.CONNECTION_LOST)
        assert (await receive_message(near_stream))[:1] == b"R"
        close(stranger, near_stream, far_stream)


async def test_bytes_that_came_with_the_handshake_are_not_lost():
    async with no_leaks(), running() as reactor:
        sealed = CipherState(b"1" * 32)
        body = struct.pack(">BBHII", 0, 0, 1, 1, 5) + b"early"
        message = sealed.encrypt(body)
        first = len(message).to_bytes(2, "big") + message
        for cut in (1, 20, len(first)):
            near, far = tcp_pair()
            opened, ended = [], []
            link = link_module.Link(
                reactor,
                SocketWire(reactor, far),
                role=Role.SERVER,
                send_cipher=CipherState(b"2" * 32),
                receive_cipher=CipherState(b"1" * 32),
                received=first[:cut],
                on_stream=opened.append,
                on_end=ended.append,
            )
            if rest := first[cut:]:
                near.send(rest)
            await until(lambda opened=opened: opened and opened[0].received == 5)
            link.abort()
            await until(lambda ended=ended: ended)
            near.close()


@contextlib.asynccontextmanager
async def charged(burst):
    """A link with an allowance of so many units: (link, the peer's socket, its cipher, how the link ended)."""
    async with no_leaks(), running() as reactor:
        near, far = tcp_pair()
        ended = []
        link = link_module.Link(
            reactor,
            SocketWire(reactor, far),
            role=Role.SERVER,
            send_cipher=CipherState(b"2" * 32),
            receive_cipher=CipherState(b"1" * 32),
            received=b"",
            on_stream=lambda _: None,
            on_end=ended.append,
            allowance=Allowance(reactor.clock(), burst=burst, rate=1e-6),
        )
        with near:
            yield link, near, CipherState(b"1" * 32), ended
            link.abort()
            await until(lambda: ended)


def message(cipher, plain):
    sealed = cipher.encrypt(plain)
    return len(sealed).to_bytes(2, "big") + sealed


async def arrive(link, near, ended, piece):
    """The piece is read on its own."""
    expected = link.received + len(piece)
    near.send(piece)
    await until(lambda: ended or link.received == expected)


async def test_a_message_byte_by_byte_is_charged_before_it_is_whole():
    async with charged(burst=20_000.0) as (link, near, cipher, ended):
        near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        whole = message(cipher, bytes(60_000))
        for at in range(1500):
            await arrive(link, near, ended, whole[at : at + 1])
            if ended:
                break
        assert [end.code for end in ended] == ["yamux-flood"]


async def test_messages_with_nothing_in_them_are_charged():
    async with charged(burst=20_000.0) as (link, near, cipher, ended):
        for _ in range(30):
            await arrive(link, near, ended, b"".join(message(cipher, b"") for _ in range(50)))
            if ended:
                break
        assert [end.code for end in ended] == ["yamux-flood"]


async def test_messages_whose_length_comes_on_its_own_cost_no_more_than_two_reads():
    """Some implementations write the length and the message one after the other, so that they travel so."""
    async with charged(burst=20_000.0) as (link, near, cipher, ended):
        near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        before = link.allowance.level(link.reactor.clock())
        frame = struct.pack(">BBHII", 0, 2, 1, 0, 7)  # a ping, which costs IDLE
        for _ in range(20):
            whole = message(cipher, frame)
            await arrive(link, near, ended, whole[:2])
            await arrive(link, near, ended, whole[2:])
        spent = before - link.allowance.level(link.reactor.clock())
        assert spent <= 20 * (costs.IDLE + costs.MESSAGE + 2 * costs.READING)


@contextlib.asynccontextmanager
async def lonely(monkeypatch, *, silence, interval=0.05):
    """A link whose other end is a socket of the test's: (link, that socket, how the link ended)."""
    monkeypatch.setattr(link_module, "KEEPALIVE_INTERVAL", interval)
    monkeypatch.setattr(link_module, "LOOK", 0.02)
    async with no_leaks(), running() as reactor:
        near, far = tcp_pair()
        far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        ended = []
        link = link_module.Link(
            reactor,
            SocketWire(reactor, near),
            role=Role.CLIENT,
            send_cipher=CipherState(b"1" * 32),
            receive_cipher=CipherState(b"2" * 32),
            received=b"",
            on_stream=lambda _: None,
            on_end=ended.append,
            patience=link_module.Patience(silence),
        )
        yield link, far, ended
        link.abort()
        await until(lambda: ended)
        far.close()


async def test_a_peer_that_vanishes_is_noticed(monkeypatch):
    async with lonely(monkeypatch, silence=0.3) as (_, _, ended):
        await until(lambda: ended)
        assert ended[0].code == "keepalive-timeout"


async def test_patience_that_changes_counts_at_once(monkeypatch):
    patience = link_module.Patience(3600.0)
    monkeypatch.setattr(link_module, "Patience", lambda _: patience)
    async with lonely(monkeypatch, silence=3600.0) as (link, _, ended):
        await until(lambda: link.asking)
        patience.silence = 0.1
        await until(lambda: ended)
        assert ended[0].code == "keepalive-timeout"


async def test_time_in_which_this_process_did_not_run_is_no_silence_of_the_peers(monkeypatch):
    clock = {"ahead": 0.0}
    honest = link_module.Reactor.__init__

    def begin(reactor, now, **options):
        honest(reactor, lambda: now() + clock["ahead"], **options)

    monkeypatch.setattr(link_module.Reactor, "__init__", begin)
    async with lonely(monkeypatch, silence=60.0) as (link, _, ended):
        await until(lambda: link.asking)
        for _ in range(10):  # all timers are due at once after it
            clock["ahead"] += 3600.0
            await trio.sleep(0.05)
        assert not ended


async def test_a_peer_that_answers_stays(monkeypatch):
    monkeypatch.setattr(link_module, "KEEPALIVE_INTERVAL", 0.02)
    monkeypatch.setattr(link_module, "LOOK", 0.02)
    async with linked() as ends:
        sent = ends.client.sent
        await until(lambda: ends.client.sent > sent + 10 * 30)
        assert ends.client.end is None
        assert ends.client.rtt is not None
        assert 0 < ends.client.rtt < 1


async def test_one_ping_serves_both_sides(monkeypatch):
    monkeypatch.setattr(link_module, "KEEPALIVE_INTERVAL", 0.02)
    monkeypatch.setattr(link_module, "LOOK", 0.02)
    async with linked() as ends:
        await until(lambda: not ends.client.asking and not ends.server.asking, "the first round trips")
        sent = ends.client.sent
        asked = 0
        while ends.client.sent < sent + 30 * 30:
            asked += ends.server.asking
            await trio.sleep(0.001)
        assert asked == 0


async def test_a_peer_that_takes_nothing_is_given_up(monkeypatch):
    async with lonely(monkeypatch, silence=0.5) as (link, _, ended):
        for stream in [link.open_stream() for _ in range(60)]:
            stream.send(bytes(250_000))
        await until(lambda: ended)
        assert ended[0].code in ("send-timeout", "keepalive-timeout")


async def test_a_peer_that_takes_little_by_little_stays(monkeypatch):
    async with lonely(monkeypatch, silence=0.5) as (link, far, ended):
        for stream in [link.open_stream() for _ in range(60)]:
            stream.send(bytes(250_000))
        began = trio.current_time()
        while trio.current_time() < began + 2.0:  # four times what silence may take
            with contextlib.suppress(BlockingIOError):
                far.recv(4096)
            assert not ended
            await trio.sleep(0.02)


async def test_stream_limits_are_told_apart_from_a_closed_link():
    async with linked(limits=yamux.Limits(unacknowledged=3)) as ends:
        for _ in range(3):
            ends.client.open_stream()
        with pytest.raises(LimitExceededError):
            ends.client.open_stream()


async def test_a_link_closed_from_within_its_own_callbacks():
    async with linked() as ends:
        for callback in ("stream", "data"):
            if callback == "stream":
                ends.on_stream = lambda _: ends.server.close()
        channels = [ends.client.open_stream() for _ in range(5)]
        for channel in channels:
            channel.send(b"x")
        await until(lambda: len(ends.ended) == 2)
        assert all(channel.closed for channel in channels)


async def test_nonsense_on_a_descriptor_resets_its_stream_alone():
    async with linked() as ends:
        near, far = await ends.pair()
        other_near, other_far = await ends.pair()
        await send_message(near, b"X nonsense")
        assert await receive_message(far) == reset_message(ResetCode.PROTOCOL_VIOLATION)
        assert await receive_message(near) == reset_message(ResetCode.PROTOCOL_VIOLATION)
        await send_data(other_near, b"fine")
        assert await receive_message(other_far) == b"Dfine"
        close(near, far, other_near, other_far)


async def test_idle_streams_cost_little_memory():
    import tracemalloc

    async with linked() as ends:
        pairs = [await ends.pair()]
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(50):
            pairs.append(await ends.pair())
            await send_data(pairs[-1][0], b"hello")
            assert await receive_message(pairs[-1][1]) == b"Dhello"
        used = (tracemalloc.get_traced_memory()[0] - before) / 50
        tracemalloc.stop()
        assert used < 16 * 1024  # both ends of the stream, the test's own sockets included
        close(*(stream for pair in pairs for stream in pair))


async def test_a_peer_of_tiny_frames_is_read_in_small_bites_and_loses_nothing():
    async with linked() as ends:
        channel = ends.client.open_stream()
        await until(lambda: ends.opened, "the stream's arrival")
        received = []
        ends.opened[0].on_data = received.append
        server, bites = ends.server, set()
        real = server._wire.recv_into

        class Watched:
            def recv_into(self, buffer):
                bites.add(len(buffer))
                return real(buffer)

            def __getattr__(self, name):
                return getattr(ends.server_wire, name)

        ends.server_wire, server._wire = server._wire, Watched()
        usual = server._receive
        for start in range(0, 60_000, 20_000):
            for number in range(start, start + 20_000):
                channel.send(bytes([number & 255]))
            await until(lambda: not channel._unsent, "sending them")
        await until(lambda: len(received) == 60_000, "all of them")
        assert b"".join(received) == bytes(number & 255 for number in range(60_000))
        assert min(bites) <= 65_537 < usual, "no bite was small"
        # and when the frames are of a usual size again, so are the bites
        for _ in range(200):
            channel.send(bytes(60_000))
            await until(lambda: channel._unsent_bytes < 500_000, "sending them")
        await until(lambda: sum(map(len, received)) == 60_000 + 200 * 60_000, "the rest")
        assert server._receive == usual


async def test_a_defect_that_a_peer_meets_costs_that_peer_its_connection_and_nobody_else(monkeypatch):
    monkeypatch.setattr(link_module, "CONTAIN_DEFECTS", True)
    async with no_leaks(), running() as reactor:
        unlucky, other = Ends(reactor), Ends(reactor)
        near, far = await other.pair()

        def defect(_channel):
            raise ZeroDivisionError("nobody foresaw this")

        unlucky.server._on_stream = defect
        unlucky.client.open_stream().send(b"hello")
        await until(lambda: unlucky.server.end is not None and unlucky.client.end is not None)
        end = unlucky.server.end
        assert end.code == "defect"
        assert isinstance(end.defect.__cause__, ZeroDivisionError)
        assert unlucky.client.end.code == "remote-go-away"
        await send_data(near, b"question")
        await send_message(near, b"F")
        assert await receive_data(far) == (b"question", b"F")
        await unlucky.close()
        await other.close()
        close(near, far)


async def test_a_link_that_runs_out_of_stream_ids_says_so_before_anything_fails():
    told = []
    async with no_leaks(), running() as reactor:
        near, far = tcp_pair()
        options = {"on_stream": lambda _: None, "on_end": told.append, "received": b""}
        client = link_module.Link(
            reactor,
            SocketWire(reactor, near),
            role=Role.CLIENT,
            send_cipher=CipherState(b"1" * 32),
            receive_cipher=CipherState(b"2" * 32),
            next_id=0xFFFF_FFFF - 2 * 1024,
            on_used_up=lambda: told.append("used up"),
            **options,
        )
        server = link_module.Link(
            reactor,
            SocketWire(reactor, far),
            role=Role.SERVER,
            send_cipher=CipherState(b"2" * 32),
            receive_cipher=CipherState(b"1" * 32),
            **options,
        )
        client.open_stream()
        assert told == []
        client.open_stream()
        assert told == ["used up"]
        client.open_stream()
        assert told == ["used up"]
        client.close()
        server.close()
        await until(lambda: len(told) == 3 and client.closed and server.closed, "the end of both links")
