"""WebSocket and TLS as wires, upon one that takes and gives as it likes: nothing is lost, doubled or left lying."""

import contextlib
import ssl
from collections import deque

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.reactor import READ, WRITE
from actors.switchboard.tls import TlsPipe
from actors.switchboard.websocket import WebSocketWire
from protocol.websocket import Frames, WebSocketError
from tests.support.certificates import Authority

ROOM = 4096


class Loop:
    """Stands in for the reactor: what is planned is run by the test."""

    def __init__(self):
        self.planned = deque()

    def call_soon(self, function):
        self.planned.append(function)


class Ground:
    """One end of a connection in memory. `limits` say how much each call of `send` and `recv_into` moves at most."""

    depth = 0

    def __init__(self, loop, limits):
        self.soon = loop.call_soon
        self.limits = limits
        self.inbox = bytearray()
        self.other = None
        self.wanted = False
        self.closed = False
        self.ended = False

    def start(self, ready, _take, failed):
        self.ready, self.failed = ready, failed

    def want_write(self, *, wanted):
        self.wanted = wanted

    def recv_into(self, buffer):
        limit = next(self.limits)
        if not self.inbox:
            if self.ended:
                return 0
            raise BlockingIOError
        length = min(len(buffer), len(self.inbox), max(1, limit))
        buffer[:length] = self.inbox[:length]
        del self.inbox[:length]
        return length

    def send(self, data):
        length = min(len(data), next(self.limits))
        if not length or len(self.other.inbox) > 3 * ROOM:
            raise BlockingIOError
        self.other.inbox += data[:length]
        return length

    def close(self):
        self.closed = True
        self.other.ended = True

    def turn(self):
        """What epoll would tell, level-triggered."""
        events = (READ if self.inbox or self.ended else 0) | (WRITE if self.wanted else 0)
        if events and not self.closed:
            self.ready(events)
            return True
        return False


class User:
    """What a link does with its wire."""

    def __init__(self, wire, content):
        self.wire = wire
        self.left = memoryview(content)
        self.received = bytearray()
        self.over = False
        self.error = None
        self.room = memoryview(bytearray(ROOM))
        wire.start(self.ready, self.take, self.fail)

    def take(self, _data):
        raise AssertionError("nothing lies in memory here")

    def fail(self, error):
        self.error = error
        self.over = True

    def ready(self, events):
        if events & WRITE:
            self.send()
        if events & READ and not self.over:
            buffer = self.room[: ROOM - 7]
            for _ in range(2):
                try:
                    length = self.wire.recv_into(buffer)
                except BlockingIOError:
                    return
                if not length:
                    self.over = True
                    return
                self.received += buffer[:length]
                if length < len(buffer):
                    return

    def send(self):
        while self.left:
            try:
                taken = self.wire.send(self.left[:1500])
            except BlockingIOError:
                self.wire.want_write(wanted=True)
                return
            self.left = self.left[taken:]
        self.wire.want_write(wanted=False)


def endless(limits):
    while True:
        yield from limits


def grounds(loop, limits):
    left, right = Ground(loop, endless(limits)), Ground(loop, endless(limits[::-1]))
    left.other, right.other = right, left
    return left, right


def run(loop, ends, until):
    """Serve until the condition holds; fail if everything has come to rest before."""
    for _ in range(200_000):
        moved = False
        while loop.planned:
            loop.planned.popleft()()
            moved = True
        for end in ends:
            try:
                moved |= end.turn()
            except (OSError, WebSocketError) as error:
                end.failed(error)
        if until():
            return
        assert moved or any(end.wanted for end in ends), "it has come to rest too early"
    raise AssertionError("it does not come to an end")


def masks():
    return b"mask"


LIMITS = st.lists(st.one_of(st.integers(0, 20), st.integers(500, 9000)), min_size=1, max_size=8).filter(any)


@given(sizes=st.tuples(st.integers(0, 30_000), st.integers(0, 30_000)), limits=LIMITS, early=st.integers(0, 300))
@settings(deadline=None)
def test_websocket_both_ways_at_once(sizes, limits, early):
    loop = Loop()
    left, right = grounds(loop, limits)
    contents = [bytes(index * 31 % 256 for index in range(size)) for size in sizes]
    client, server = Frames(client=True, random_key=masks), Frames(client=False)
    # Some of it has come behind the opening handshake.
    head, contents[0] = contents[0][:early], contents[0][early:]
    received = client.encode(head) if head else b""
    users = [
        User(WebSocketWire(loop, left, client, b""), contents[0]),
        User(WebSocketWire(loop, right, server, received), contents[1]),
    ]
    for user in users:
        user.send()
    run(
        loop,
        (left, right),
        lambda: len(users[1].received) == sizes[0] and len(users[0].received) == sizes[1],
    )
    assert bytes(users[1].received) == head + contents[0]
    assert bytes(users[0].received) == contents[1]
    users[0].wire.close()
    left.closed = True
    run(loop, (right,), lambda: users[1].over)
    assert users[1].error is None


def test_pings_are_answered_between_frames_however_little_is_taken():
    loop = Loop()
    left, right = grounds(loop, [3, 0, 1])
    client, server = Frames(client=True, random_key=masks), Frames(client=False)
    user = User(WebSocketWire(loop, right, server, b""), b"")
    left.start(lambda _: None, lambda _: None, lambda _: None)
    for number in range(3):
        right.inbox += client._frame(9, b"%d" % number) + client.encode(b"content")
    run(loop, (right,), lambda: user.received == b"content" * 3 and not right.wanted)
    buffer = memoryview(bytearray(left.inbox))
    assert buffer[0] == 0x8A
    assert client.decode(buffer, len(buffer)) == 0, "only answers"


def test_broken_frames_end_the_wire_with_the_reason():
    loop = Loop()
    left, right = grounds(loop, [9000])
    user = User(WebSocketWire(loop, right, Frames(client=False), b""), b"")
    right.inbox += b"\x81\x80\0\0\0\0"
    run(loop, (right,), lambda: user.over)
    assert isinstance(user.error, WebSocketError)
    user.wire.close()
    assert bytes(left.inbox) == bytes.fromhex("880203eb"), "1003: a text message"
    assert right.closed


class MemoryPipe:
    """One end of a pipe in memory, for a handshake."""

    def __init__(self):
        self.send_channel, self.receive_channel = trio.open_memory_channel(100)

    async def receive(self):
        return await self.receive_channel.receive()

    async def send(self, data):
        await self.other.send_channel.send(data)

    def detach(self, reactor):
        with contextlib.suppress(trio.WouldBlock):
            while True:
                self.ground.inbox += self.receive_channel.receive_nowait()
        return self.ground


@pytest.fixture(scope="module")
def contexts(tmp_path_factory):
    authority = Authority(tmp_path_factory.mktemp("authority"))
    certificate, key = authority.issue("localhost")
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate, key)
    return ssl.create_default_context(cafile=authority.file), server


@pytest.mark.parametrize("limits", [[9000], [1], [0, 5, 700], [16_500, 0], [4089, 4096]])
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_websocket_in_tls_both_ways_at_once(contexts, limits, version):
    for context in contexts:
        context.minimum_version = context.maximum_version = version
    loop = Loop()
    pipes = MemoryPipe(), MemoryPipe()
    pipes[0].other, pipes[1].other = pipes[1], pipes[0]
    pipes[0].ground, pipes[1].ground = grounds(loop, limits)
    client = TlsPipe(pipes[0], contexts[0], server_name="localhost")
    server = TlsPipe(pipes[1], contexts[1], server_name=None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.handshake)
        await client.handshake()
    await server.send(Frames(client=False).encode(b"early"))
    contents = [bytes(index * 31 % 251 for index in range(size)) for size in (50_000, 70_000)]
    frames = Frames(client=True, random_key=masks), Frames(client=False)
    users = [
        User(WebSocketWire(loop, pipe.detach(loop), each, b""), content)
        for pipe, each, content in zip((client, server), frames, contents, strict=True)
    ]
    for user in users:
        user.send()
    grounded = [pipe.ground for pipe in pipes]
    run(
        loop,
        grounded,
        lambda: len(users[1].received) == 50_000 and len(users[0].received) == 70_005,
    )
    assert bytes(users[1].received) == contents[0]
    assert bytes(users[0].received) == b"early" + contents[1]
    users[1].wire.close()
    run(loop, grounded[:1], lambda: users[0].over)
    assert users[0].error is None
    users[0].wire.close()
    assert all(ground.closed for ground in grounded)
