"""Circuit ends: links over streams of other links."""

import contextlib
import random

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.reactor import READ, SCRATCH_SIZE, WRITE
from actors.switchboard.circuits import FAREWELL, LEAST_TARGET, QUEUE, SMALL, CircuitEnd
from actors.switchboard.errors import CircuitCutError
from actors.switchboard.link import Link
from protocol import yamux
from protocol.noise import MAX_PLAINTEXT
from protocol.noise_cipher import CipherState
from protocol.stream_descriptor import MAX_DATA, ResetCode
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
    until,
)


def words(code):
    return f"cut with {ResetCode.describe(code)}"


class Through(Ends):
    """Two links over a stream of two other links."""

    def __init__(self, reactor, outer, near, far, limits=yamux.DEFAULT_LIMITS):
        self.reactor, self.outer = reactor, outer
        self.opened, self.ended = [], {}
        self.on_stream = self.opened.append
        self.channels = near, far
        self.wires = CircuitEnd(near, words), CircuitEnd(far, words)
        one, other = (lambda: CipherState(b"1" * 32)), (lambda: CipherState(b"2" * 32))
        self.client = self._over(self.wires[0], Role.CLIENT, (one(), other()), limits)
        self.server = self._over(self.wires[1], Role.SERVER, (other(), one()), limits)

    def _over(self, wire, role, ciphers, limits):
        return Link(
            self.reactor,
            wire,
            role=role,
            send_cipher=ciphers[0],
            receive_cipher=ciphers[1],
            received=b"",
            on_stream=lambda channel: self.on_stream(channel),  # noqa: PLW0108  # which may be replaced later
            on_end=lambda end: self.ended.__setitem__(role, end),
            limits=limits,
        )


@contextlib.asynccontextmanager
async def through(**options):
    async with no_leaks(), running() as reactor:
        outer = Ends(reactor)
        near = outer.client.open_stream()
        await until(lambda: outer.opened, "the stream of the circuit")
        ends = Through(reactor, outer, near, outer.opened.pop(), **options)
        yield ends
        if len(ends.ended) < 2:
            await ends.close()
        await outer.close()


async def test_a_stream_through_both_links():
    async with through() as ends:
        near, far = await ends.pair()
        await send_data(near, b"question")
        await send_message(near, b"F")
        assert await receive_data(far) == (b"question", b"F")
        await send_data(far, b"answer")
        await send_message(far, b"F")
        assert await receive_data(near) == (b"answer", b"F")
        await until(lambda: ends.client.streams == ends.server.streams == 0)
        near.close()
        far.close()


@pytest.mark.parametrize("size", [1, 1000, 40_001, 65_507])
async def test_much_both_ways_at_once(size):
    content = [random.Random(seed).randbytes(min(12_000_000, 1500 * size)) for seed in (1, 2)]
    async with through() as ends:
        near, far = await ends.pair()
        await exchange(near, far, content, size)
        near.close()
        far.close()


async def test_a_reader_that_stops_stops_the_writer_and_nobody_else():
    async with through() as ends:
        near, far = await ends.pair()
        other_near, other_far = await ends.pair()
        sent = 0
        with trio.move_on_after(0.3):
            while True:
                await send_message(near, b"D" + bytes(60_000))
                sent += 60_000
        assert sent < 24_000_000, "windows and kernel buffers, and no more"
        await send_data(other_near, b"still here")
        with trio.fail_after(20):
            assert await receive_message(other_far) == b"Dstill here"
        for sock in (near, far, other_near, other_far):
            sock.close()


async def test_closing_one_link_ends_the_other_and_the_stream():
    async with through() as ends:
        ends.client.close()
        await until(lambda: len(ends.ended) == 2, "the end of both")
        assert ends.ended[Role.SERVER].code == "remote-close"
        await until(lambda: ends.outer.client.streams == ends.outer.server.streams == 0, "the end of the stream")


async def test_a_reset_of_the_stream_is_told_in_words():
    async with through() as ends:
        near, far = await ends.pair()
        ends.channels[0].reset(ResetCode.LIMIT_EXCEEDED)
        await until(lambda: len(ends.ended) == 2, "the end of both")
        assert (ends.ended[Role.SERVER].code, ends.ended[Role.SERVER].reason) == (
            "circuit-cut",
            "cut with limit-exceeded",
        )
        for stream in (near, far):
            message = await receive_message(stream)
            assert message == b"R" + ResetCode.CONNECTION_LOST.to_bytes(4, "big")
            stream.close()


async def test_the_loss_of_the_relay_is_told_in_words():
    async with through() as ends:
        ends.outer.client.abort()
        await until(lambda: len(ends.ended) == 2, "the end of both")
        assert {end.reason for end in ends.ended.values()} == {"cut with connection-lost"}


async def test_nonsense_in_the_circuit_ends_the_inner_link_alone():
    async with no_leaks(), running() as reactor:
        outer = Ends(reactor)
        near = outer.client.open_stream()
        await until(lambda: outer.opened, "the stream of the circuit")
        ended = []
        Link(
            reactor,
            CircuitEnd(outer.opened.pop(), words),
            role=Role.SERVER,
            send_cipher=CipherState(b"1" * 32),
            receive_cipher=CipherState(b"2" * 32),
            received=b"",
            on_stream=lambda _: None,
            on_end=ended.append,
        )
        near.send(b"\x00\x20" + bytes(32))
        await until(lambda: ended, "the end of the inner link")
        assert ended[0].code == "noise"
        assert not outer.ended
        await until(lambda: not outer.client.streams and not outer.server.streams, "the end of the stream")
        await outer.close()


async def test_an_end_that_is_never_answered_becomes_a_reset():
    async with no_leaks(), running() as reactor:
        outer = Ends(reactor)
        near = outer.client.open_stream()
        near.on_finish = lambda: None  # it never finishes
        await until(lambda: outer.opened, "the stream of the circuit")
        codes = []
        near.on_reset = codes.append
        end = CircuitEnd(outer.opened.pop(), words)
        end.push(b"last words")
        heard = []
        near.on_data = heard.append
        end.close()
        with trio.fail_after(FAREWELL + 20):
            while not codes:  # noqa: ASYNC110  # a callback brings it about
                await trio.sleep(0.01)
        assert codes == [ResetCode.SHUTDOWN]
        assert b"".join(heard) == b"last words"
        await outer.close()


class FakeReactor:
    def __init__(self):
        self.soon = []
        self.rooms = [[memoryview(bytearray(SCRATCH_SIZE)) for _ in range(3)] for _ in range(2)]

    def clock(self):
        return 0.0

    def call_soon(self, function):
        self.soon.append(function)

    def call_later(self, _delay, _function):
        class Timer:
            def cancel(self):
                pass

        return Timer()


class FakeChannel:
    """A channel of which the test is the outer link."""

    def __init__(self):
        self.reactor = FakeReactor()
        self.closed = self.asked = self.finished = False
        self.taken = 0
        self.code = None

    def join(self, end):
        self.end = end

    def enqueue(self):
        self.asked = True

    def consumed(self, length, _now, *, behind=False):
        self.taken += length

    def finish_now(self):
        self.finished = True

    def reset(self, code):
        self.closed, self.code = True, code


class FakeLink:
    """A link that keeps what the wire does not take, as a real one does."""

    def __init__(self, wire):
        self.wire, self.unsent, self.received, self.ended, self.failure = wire, b"", b"", False, None
        wire.start(self.ready, self.take, self.failed)

    def take(self, data):
        self.received += data

    def write(self, data):
        assert not self.unsent
        try:
            taken = self.wire.send(memoryview(data))
        except BlockingIOError:
            taken = 0
        self.unsent = data[taken:]
        if self.unsent:
            self.wire.want_write(wanted=True)

    def ready(self, what):
        if what & WRITE and self.unsent:
            self.unsent = self.unsent[self.wire.send(memoryview(self.unsent)) :]
            if not self.unsent:
                self.wire.want_write(wanted=False)
        if what & READ:
            with contextlib.suppress(BlockingIOError):
                self.ended = not self.wire.recv_into(memoryview(bytearray(10)))

    def failed(self, error):
        self.failure = error


def message(length):
    return length.to_bytes(2, "big") + bytes(random.Random(length).randbytes(length))


lengths = st.integers(16, MAX_DATA - 2)
limits = st.integers(0, MAX_DATA)


@settings(max_examples=60, deadline=None)
@given(batches=st.lists(st.lists(lengths, min_size=1, max_size=4), max_size=6), windows=st.lists(limits, max_size=30))
def test_what_the_inner_link_sends_comes_out_in_order_whatever_the_window(batches, windows):
    channel = FakeChannel()
    link = FakeLink(CircuitEnd(channel, words))
    buffer, out, expected = memoryview(bytearray(MAX_DATA + 100)), b"", b""
    waiting = [b"".join(map(message, batch)) for batch in batches]
    rounds = iter(windows)
    while waiting or link.unsent or link.wire._queue:
        if waiting and not link.unsent:
            data = waiting.pop(0)
            expected += data
            link.write(data)
        limit = next(rounds, MAX_DATA)
        length = channel.end.fetch(buffer, 50, limit)
        assert length <= limit
        out += buffer[50 : 50 + length]
    assert out == expected


class SealingLink(FakeLink):
    """One that seals straight into the outer link's frame, where it can."""

    def __init__(self, wire, content):
        super().__init__(wire)
        self.content = content
        self.plan()

    def plan(self):
        if self.content and not self.unsent:
            self.wire.soon(self.flush)

    def flush(self):
        target = self.wire.target()
        if target is None:
            data, self.content = self.content[:5000], self.content[5000:]
            self.write(data)
        else:
            assert len(target) >= LEAST_TARGET
            length = min(len(target), len(self.content), 70_000)
            target[:length] = self.content[:length]
            self.content = self.content[length:]
            self.wire.filled(length)
        self.plan()

    def ready(self, what):
        super().ready(what)
        self.plan()


@settings(max_examples=60, deadline=None)
@given(length=st.integers(0, 300_000), windows=st.lists(limits | st.integers(0, 2 * LEAST_TARGET), max_size=60))
def test_what_is_sealed_straight_into_frames_comes_out_in_order(length, windows):
    channel = FakeChannel()
    content = random.Random(length).randbytes(length)
    link = SealingLink(CircuitEnd(channel, words), content)
    buffer, out = memoryview(bytearray(4 * MAX_DATA + 100)), b""
    rounds = iter(windows)
    for _ in range(len(windows) + length + 3):
        limit = next(rounds, 4 * MAX_DATA)
        got = channel.end.fetch(buffer, 50, limit)
        assert got <= limit
        assert got or not limit or not (link.content or link.unsent)
        out += buffer[50 : 50 + got]
        if len(out) == length:
            break
    assert out == content
    assert channel.end.fetch(buffer, 50, 1000) == 0


class Listening:
    """A wire that the test itself fills."""

    depth = 1

    def start(self, _ready, take, failed):
        self.take, self.failed = take, failed

    def soon(self, _function):
        pass

    def want_write(self, *, wanted):
        pass

    def limit_unsent(self, _length):
        pass

    def unsent(self):
        return 0

    def target(self):
        return None

    def send(self, data):
        return len(data)

    def close(self):
        pass


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40) | st.integers(0, MAX_PLAINTEXT - yamux.HEADER_LENGTH), min_size=1, max_size=5),
    cuts=st.lists(st.integers(1, 5) | st.integers(1, 200_000), max_size=40),
    early=st.integers(0, 300),
)
def test_a_link_reads_what_lies_in_memory_however_it_is_cut(lengths, cuts, early):
    content = [random.Random(n).randbytes(length) for n, length in enumerate(lengths)]
    sender = CipherState(b"k" * 32)
    stream = b""
    for number, data in enumerate(content):
        frame = yamux._HEADER.pack(0, yamux.DATA, 0 if number else yamux.SYN, 1, len(data)) + data
        sealed = sender.encrypt(frame)
        stream += len(sealed).to_bytes(2, "big") + sealed
    heard, reactor, wire = [], FakeReactor(), Listening()

    def on_stream(channel):
        channel.on_data = heard.append

    link = Link(
        reactor,
        wire,
        role=Role.SERVER,
        send_cipher=CipherState(b"s" * 32),
        receive_cipher=CipherState(b"k" * 32),
        received=stream[:early],
        on_stream=on_stream,
        on_end=heard.append,
    )
    position, sizes = early, iter(cuts)
    while position < len(stream):
        size = next(sizes, len(stream))
        wire.take(memoryview(bytearray(stream[position : position + size])))
        position += size
    for function in reactor.soon:
        function()  # what came early is taken by itself, unless more came before that
    assert link.end is None
    assert b"".join(heard) == b"".join(content)
    assert link.received == len(stream)


@given(pieces=st.lists(st.binary(min_size=1, max_size=3000), max_size=20), early=st.integers(0, 20), unread=st.binary())
def test_what_came_before_the_link_comes_first_and_all_is_counted_once(pieces, early, unread):
    channel = FakeChannel()
    end = CircuitEnd(channel, words, unread=unread)
    for piece in pieces[:early]:
        end.deliver(memoryview(bytearray(b"." + piece)), 1, 1 + len(piece), 0.0)
    assert channel.taken == 0, "nobody has taken it"
    link = FakeLink(end)
    for piece in pieces[early:]:
        end.deliver(memoryview(bytearray(b"." + piece)), 1, 1 + len(piece), 0.0)
    end.peer_finished()
    for function in channel.reactor.soon:
        function()
    assert link.received == unread + b"".join(pieces)
    assert channel.taken == len(b"".join(pieces))
    assert link.ended


def test_a_wire_takes_little_and_has_the_rest_offered_again():
    channel = FakeChannel()
    end = CircuitEnd(channel, words)
    for _ in range(QUEUE // SMALL):
        assert end.send(memoryview(bytes(SMALL))) == SMALL
    with pytest.raises(BlockingIOError):
        end.send(memoryview(b"x"))
    with pytest.raises(BlockingIOError):
        CircuitEnd(FakeChannel(), words).send(memoryview(bytes(SMALL + 1)))


async def test_a_task_waits_for_bytes_and_learns_of_the_end():
    channel = FakeChannel()
    end = CircuitEnd(channel, words)
    got = []

    async def read():
        while data := await end.receive():
            got.append(data)

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await trio.testing.wait_all_tasks_blocked()
            end.deliver(memoryview(bytearray(b".abc")), 1, 4, 0.0)
            await trio.testing.wait_all_tasks_blocked()
            assert (got, channel.taken) == ([b"abc"], 3)
            end.peer_finished()


async def test_a_task_that_waits_learns_of_a_cut():
    end = CircuitEnd(FakeChannel(), words)

    async def read():
        with pytest.raises(CircuitCutError, match="cut with gated"):
            await end.receive()

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await trio.testing.wait_all_tasks_blocked()
            end.over(ResetCode.GATED)
    with pytest.raises(CircuitCutError, match="cut with gated"):
        end.push(b"more")


def test_bytes_after_our_end_reset_the_stream():
    channel = FakeChannel()
    end = CircuitEnd(channel, words)
    end.close()
    assert channel.end.fetch(memoryview(bytearray(10)), 0, 10) == 0
    assert channel.finished
    end.deliver(memoryview(b".x"), 1, 2, 0.0)
    assert channel.code == ResetCode.SHUTDOWN
