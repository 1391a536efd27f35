"""What the tests of the data plane share: a running reactor, sockets, links back to back."""

import contextlib
import socket
import time
from pathlib import Path

import trio

from actors.reactor import Reactor
from actors.switchboard.link import Channel, Link, LinkEnd
from actors.switchboard.wire import SocketWire
from protocol import yamux
from protocol.noise_cipher import CipherState
from protocol.yamux import Role

DEADLINE = 20.0
"""Seconds that anything here may take; far more than it needs."""


@contextlib.asynccontextmanager
async def running(*, direct=True):
    """A reactor that runs. All descriptors made inside must be closed by the end."""
    with contextlib.closing(Reactor(time.monotonic, direct=direct)) as reactor:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reactor.run)
            await trio.testing.wait_all_tasks_blocked()
            yield reactor
            nursery.cancel_scope.cancel()


async def until(condition, what="it"):
    """Wait for a condition that callbacks of the reactor bring about."""
    with trio.move_on_after(DEADLINE):
        while not condition():  # noqa: ASYNC110  # any condition, whoever brings it about
            await trio.sleep(0.001)
        return
    raise AssertionError(f"{what} did not happen within {DEADLINE} s")


def open_descriptors():
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@contextlib.asynccontextmanager
async def no_leaks():
    """Every descriptor opened inside is closed again."""
    before = open_descriptors()
    yield
    await until(lambda: open_descriptors() <= before, "closing all descriptors")


def tcp_pair():
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far = server.accept()[0]
    near.setblocking(False)
    far.setblocking(False)
    return near, far


class Ends:
    """Two links back to back over TCP, as after a handshake. `budget` is the server's."""

    def __init__(self, reactor, sockets=None, limits=yamux.DEFAULT_LIMITS, budget=None):
        near, far = sockets or tcp_pair()
        self.opened: list[Channel] = []
        self.ended: dict[Role, LinkEnd] = {}
        self.on_stream = self.opened.append
        one, other = (lambda: CipherState(b"1" * 32)), (lambda: CipherState(b"2" * 32))
        self.client = self._link(reactor, near, Role.CLIENT, (one(), other()), limits=limits)
        self.server = self._link(reactor, far, Role.SERVER, (other(), one()), limits=limits, budget=budget)

    def _link(self, reactor, sock, role, ciphers, **options):
        return Link(
            reactor,
            SocketWire(reactor, sock),
            role=role,
            send_cipher=ciphers[0],
            receive_cipher=ciphers[1],
            received=b"",
            on_stream=lambda channel: self.on_stream(channel),  # noqa: PLW0108  # which may be replaced later
            on_end=lambda end: self.ended.__setitem__(role, end),
            **options,
        )

    async def pair(self):
        """A stream handed over on both sides: (client's descriptor, server's descriptor)."""
        count = len(self.opened)
        channel = self.client.open_stream()
        near = channel.hand_over()
        await until(lambda: len(self.opened) > count, "the stream's arrival")
        return near, self.opened[-1].hand_over()

    async def close(self):
        self.client.close()
        self.server.close()
        await until(lambda: len(self.ended) == 2, "the end of both links")
        await until(lambda: self.client.closed and self.server.closed, "the end of both wires")


async def send_message(stream, message):
    while True:
        try:
            stream.send(message)
        except BlockingIOError:
            with trio.fail_after(DEADLINE):
                await trio.lowlevel.wait_writable(stream)
        else:
            return


async def send_data(stream, data, size=65_507):
    for start in range(0, len(data), size):
        await send_message(stream, b"D" + data[start : start + size])


async def exchange(near, far, content, size):
    """Send `content[0]` one way and `content[1]` the other at once, in messages of `size`; all of it must arrive."""
    got = {}

    async def write(stream, data):
        await send_data(stream, data, size)
        await send_message(stream, b"F")

    async def read(name, stream):
        got[name] = await receive_data(stream)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write, near, content[0])
        nursery.start_soon(write, far, content[1])
        nursery.start_soon(read, "far", far)
        nursery.start_soon(read, "near", near)
    assert got["far"] == (content[0], b"F")
    assert got["near"] == (content[1], b"F")


async def receive_message(stream):
    while True:
        with contextlib.suppress(BlockingIOError, ConnectionResetError):
            return stream.recv(70_000)
        with trio.fail_after(DEADLINE):
            await trio.lowlevel.wait_readable(stream)


async def receive_data(stream):
    """All data up to F, R or the end; and that last message."""
    data = bytearray()
    while (message := await receive_message(stream))[:1] == b"D":
        data += message[1:]
    return bytes(data), message


async def receive_tcp(sock):
    data = bytearray()
    while True:
        try:
            part = sock.recv(1 << 18)
        except BlockingIOError:
            with trio.fail_after(DEADLINE):
                await trio.lowlevel.wait_readable(sock)
            continue
        if not part:
            return bytes(data)
        data += part


async def send_tcp(sock, data):
    view = memoryview(data)
    while view:
        try:
            view = view[sock.send(view) :]
        except BlockingIOError:
            with trio.fail_after(DEADLINE):
                await trio.lowlevel.wait_writable(sock)
