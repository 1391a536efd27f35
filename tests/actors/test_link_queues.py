"""What waits before what: links over a slow path, whose queue the test can see."""

import contextlib

import pytest

from actors.reactor import WRITE
from actors.switchboard.batch import AHEAD, START
from actors.switchboard.channel import CHANNEL_QUEUE
from actors.switchboard.link import Link
from actors.switchboard.splice import Growth, Splice
from actors.switchboard.wire import SocketWire
from protocol.errors import LimitExceededError
from protocol.yamux import INITIAL_WINDOW, Role
from tests.actors.dataplane import Ends, no_leaks, running, until

RATE = 1_000_000
"""Bytes a second of a slow path."""

KERNEL = 300_000
"""Bytes that it takes before it says that it is full, as a kernel's send buffer does."""

TICK = 0.002


class SlowWire(SocketWire):
    """A TCP wire before which a kernel keeps what a slow path has not carried yet.

    Attributes:
        waiting: bytes that wait.
        carried: bytes that have gone.
    """

    __slots__ = ("carried", "limit", "loop", "rate", "ready", "room", "send", "sock", "waiting", "wanted")

    def __init__(self, reactor, sock, rate=RATE):
        super().__init__(reactor, sock)
        self.loop = reactor
        self.room = bytearray()
        self.wanted = False
        self.ready = lambda _: None
        self.sock = sock
        self.waiting = self.carried = 0
        self.limit = KERNEL
        self.rate = rate
        self.send = self._take
        reactor.call_later(TICK, self._carry)

    def start(self, ready, take, failed):
        self.ready = ready
        super().start(lambda events: ready(events & ~WRITE), take, failed)

    def _take(self, data):
        if self.waiting >= self.limit:
            raise BlockingIOError
        self.room += data
        self.waiting = len(self.room)
        return len(data)

    def want_write(self, *, wanted):
        self.wanted = wanted

    def limit_unsent(self, length, /):
        self.limit = length

    def unsent(self):
        return self.waiting

    def _carry(self):
        if self.loop is None:
            return
        length = round(self.rate * TICK)
        with contextlib.suppress(BlockingIOError):
            sent = self.sock.send(self.room[:length]) if self.room else 0
            del self.room[:sent]
            self.carried += sent
        self.waiting = len(self.room)
        if self.wanted and self.waiting * 2 < self.limit:
            self.ready(WRITE)
        if self.loop is not None:
            self.loop.call_later(TICK, self._carry)

    def close(self):
        self.loop = None
        super().close()


class CountingWire(SocketWire):
    """A TCP wire that remembers how many bytes it was offered at once, at most."""

    __slots__ = ("most", "pass_on", "send")

    def __init__(self, reactor, sock):
        super().__init__(reactor, sock)
        self.most = 0
        self.pass_on, self.send = self.send, self.count

    def count(self, data):
        self.most = max(self.most, len(data))
        return self.pass_on(data)


class Slow(Ends):
    """Two links back to back, of which the client's wire is slow. What the server gets is in `heard`."""

    def __init__(self, reactor, rate=RATE):
        self.rate = rate
        self.wire = None
        self.heard = {}
        super().__init__(reactor)

        def opened(channel):
            self.heard[channel.id] = 0
            channel.on_data = lambda data: self.heard.__setitem__(channel.id, self.heard[channel.id] + len(data))
            self.opened.append(channel)

        self.on_stream = opened

    def _link(self, reactor, sock, role, ciphers, **options):
        wire = SocketWire(reactor, sock)
        if role is Role.CLIENT:
            wire = self.wire = self.make_wire(reactor, sock)
        return Link(
            reactor,
            wire,
            role=role,
            send_cipher=ciphers[0],
            receive_cipher=ciphers[1],
            received=b"",
            on_stream=lambda channel: self.on_stream(channel),  # noqa: PLW0108  # which is replaced later
            on_end=lambda end: self.ended.__setitem__(role, end),
            **options,
        )

    def make_wire(self, reactor, sock):
        return SlowWire(reactor, sock, self.rate)


class Counted(Slow):
    """The same over a wire that counts."""

    def make_wire(self, reactor, sock):
        return CountingWire(reactor, sock)


def pour(channel, reactor):
    """Keep the channel's queue full for ever."""

    def more():
        if not channel.closed:
            with contextlib.suppress(LimitExceededError):
                channel.send(bytes(60_000))
            reactor.call_later(TICK, more)

    more()


@contextlib.asynccontextmanager
async def slow(**options):
    async with no_leaks(), running() as reactor:
        ends = Slow(reactor, **options)
        yield ends
        await ends.close()


@pytest.mark.parametrize("bulks", [1, 5])
async def test_a_keystroke_does_not_wait_behind_bulk(bulks):
    async with slow() as ends:
        for _ in range(bulks):
            pour(ends.client.open_stream(), ends.client.reactor)
        terminal = ends.client.open_stream()
        terminal.send(b"login")
        await until(lambda: ends.wire.carried > 300_000, "bulk that is under way")
        waits = []
        for number in range(10):
            carried, before = ends.wire.carried, ends.heard[terminal.id]
            terminal.send(b"%d" % number)
            await until(lambda before=before: ends.heard[terminal.id] > before, "the keystroke")
            waits.append(ends.wire.carried - carried)
        # 10 ms that are sealed, as much that the wire holds, and what a busy machine adds; it was 300 to 600 KB
        assert sorted(waits)[5] < 80_000
        assert min(length for stream, length in ends.heard.items() if stream != terminal.id) > 0


async def test_those_who_send_little_do_not_starve_bulk():
    async with slow() as ends:
        bulk = ends.client.open_stream()
        pour(bulk, ends.client.reactor)
        for _ in range(100):  # together they want far more than the path carries
            pour(ends.client.open_stream(), ends.client.reactor)
        await until(lambda: ends.wire.carried > 1_000_000, "a second of it")
        assert min(ends.heard[channel.id] for channel in ends.opened) > 0


async def test_a_fast_wire_gets_large_batches():
    async with no_leaks(), running() as reactor:
        ends = Counted(reactor)
        received = [0]

        def opened(channel):
            channel.on_data = lambda data: received.__setitem__(0, received[0] + len(data))

        ends.on_stream = opened
        channel = ends.client.open_stream()
        total, began = 0, reactor.clock()
        while total < 40_000_000:
            with contextlib.suppress(LimitExceededError):
                while True:
                    channel.send(bytes(60_000))
                    total += 60_000
            # Far enough below the channel's queue that a piece more has room: else nothing would be awaited here.
            sent = total
            await until(lambda sent=sent: received[0] > sent - CHANNEL_QUEUE / 2, "most of it")
        rate = total / (reactor.clock() - began)
        assert ends.wire.most > max(START, min(200_000, rate * AHEAD / 2))
        await ends.close()


class Free:
    """A meter that counts nothing."""

    def take(self, _half, wanted):
        return wanted

    def passed(self, _half, length):
        pass


class Circuit:
    buckets = ()
    limit = None


@pytest.mark.parametrize("rate", [RATE, RATE // 8])
async def test_a_relay_keeps_little_of_a_circuit_to_a_slow_peer(rate):
    async with no_leaks(), running() as reactor:
        source, destination = Ends(reactor), Slow(reactor, rate)
        out = source.client.open_stream()
        await until(lambda: source.opened, "the stream to the relay")
        on = destination.client.open_stream()
        over = []
        splice = Splice(Circuit(), source.opened[0], on, meter=Free(), growth=Growth(1 << 26), on_over=over.append)
        pour(out, reactor)
        await until(lambda: destination.wire.carried > INITIAL_WINDOW + rate / 2, "more than the first window")
        lengths = []
        carried = destination.wire.carried
        while destination.wire.carried < carried + rate:
            target = destination.wire.carried + rate // 20
            await until(lambda target=target: destination.wire.carried >= target, "a moment of it")
            lengths.append(splice.destination.length)
        # half of it was always there: the path was never without work; it was a whole window, for ever
        assert sorted(lengths)[len(lengths) // 2] < max(rate * 0.1, 2 * 8192)
        assert destination.wire.waiting or splice.destination.length
        splice.reset(0)
        await until(lambda: over, "the end of the circuit")
        await source.close()
        await destination.close()
