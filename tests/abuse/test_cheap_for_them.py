"""What costs a peer little and this node much is charged, ends the connection, and leaves a debt; honest use is not."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import trio

from protocol.keys import PrivateKey
from protocol.multistream import HEADER, encode_message
from protocol.protocol_ids import IDENTIFY, IDENTIFY_PUSH
from protocol.protocol_ids import PING as PING_PROTOCOL
from protocol.stream_descriptor import ResetCode
from protocol.varint import encode_varint
from tests.abuse.attacker import DATA, FIN, RST, SYN, WINDOW_UPDATE, Attacker, ClosedError, data, frame
from tests.abuse.world import Witness, World
from tests.support.processes import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

ECHO = "/peerup/echo/1.0.0"
DOWN = "/peerup/down/1.0.0"
SINK = "/peerup/sink/1.0.0"
MOST = 60.0
"""Seconds in which an attack must have been ended on the slowest machine."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with contextlib.ExitStack() as stack:
        world = World(tmp_path_factory.mktemp("c"), stack)
        with socket.create_server(("127.0.0.1", 0)) as nobody:
            world.home.run("service", "add", "down", f"127.0.0.1:{nobody.getsockname()[1]}")
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=64))
        world.home.run("service", "add", "sink", f"127.0.0.1:{listener.getsockname()[1]}")

        def read(connection: socket.socket) -> None:
            with connection, contextlib.suppress(OSError):
                while connection.recv(65536):
                    pass

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=read, args=(listener.accept()[0],), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield world


@pytest.fixture
def insider(world: World) -> PrivateKey:
    """A peer that nobody has charged yet."""
    return world.another_insider()


def proposals(stream: int) -> bytes:
    """32 unknown protocols in 160 bytes."""
    return data(stream, HEADER + b"".join(encode_message(f"/{number % 10}") for number in range(32)), SYN | FIN)


def push(stream: int) -> bytes:
    message = b"\x32\x01a"
    return data(stream, HEADER + encode_message(IDENTIFY_PUSH) + encode_varint(len(message)) + message, SYN | FIN)


def opening(protocol: str, flags: int = 0) -> Callable[[int], bytes]:
    return lambda stream: data(stream, HEADER + encode_message(protocol), SYN | flags)


def taken_back(protocol: str) -> Callable[[int], bytes]:
    return lambda stream: opening(protocol)(stream) + frame(WINDOW_UPDATE, RST, stream)


def on_one_stream(portion: bytes) -> Callable[[int], bytes]:
    """On a stream of a service, the same again and again."""
    return lambda stream: opening(SINK)(1) if stream == 1 else portion


ATTACKS: dict[str, Callable[[int], bytes]] = {
    "proposals": proposals,
    "ls": lambda stream: data(stream, HEADER + encode_message("ls") * 32, SYN | FIN),
    "garbage": lambda stream: data(stream, b"GET / HTTP/1.1\r\n\r\n", SYN),
    "one unknown protocol": opening("/unknown", FIN),
    "streams taken back": lambda stream: frame(WINDOW_UPDATE, SYN, stream) + frame(DATA, RST, stream),
    "services taken back": taken_back(ECHO),
    "services not used": opening(SINK, FIN),
    "services that are down": opening(DOWN),
    "identify": opening(IDENTIFY, FIN),
    "pushes": push,
    "ping streams": taken_back(PING_PROTOCOL),
    "large window updates": on_one_stream(frame(WINDOW_UPDATE, 0, 1, 512)),
    "frames of one byte": on_one_stream(data(1, b"x") * 50),
}


@pytest.mark.parametrize("attack", ATTACKS)
async def test_it_ends_the_connection_with_a_reason_and_others_go_on(
    world: World, insider: PrivateKey, attack: str
) -> None:
    before = world.total("peerup_connections_closed_total", reason="yamux-flood")
    with Witness(world.tunnel) as witness:
        async with Attacker.connect(world.port, insider) as attacker:
            await attacker.secure()
            code = await attacker.flood(map(ATTACKS[attack], itertools.count(1, 2)), MOST)
        assert code == ResetCode.RATE_LIMITED, "the peer was not told why"
        wait_until(lambda: len(witness.times) > 3, within=20, what="others to be served")
    wait_until(
        lambda: world.total("peerup_connections_closed_total", reason="yamux-flood") == before + 1,
        within=20,
        what="the end of the connection in the counters",
    )
    assert f"connection to {insider.peer_id} ended: the peer makes this node work for nothing" in world.log()
    assert witness.failed == 0


async def test_messages_with_nothing_in_them_end_the_connection(world: World, insider: PrivateKey) -> None:
    """Though there is never a frame with which what they cost could be charged."""
    async with Attacker.connect(world.port, insider) as attacker:
        await attacker.secure()
        assert await attacker.flood(itertools.repeat(b""), MOST) == ResetCode.RATE_LIMITED, "the peer was not told why"


async def test_whoever_was_ended_and_comes_back_at_once_still_owes(world: World, insider: PrivateKey) -> None:
    async with Attacker.connect(world.port, insider, source="127.0.0.20") as attacker:
        await attacker.secure()
        with contextlib.suppress(ClosedError):
            for stream in range(1, 1 << 20, 2):
                await attacker.say(proposals(stream))
        await attacker.until_closed(MOST)
    for number in range(3):
        async with Attacker.connect(world.port, insider, source=f"127.0.0.{21 + number}") as attacker:
            await attacker.secure()
            assert await attacker.until_gone_away(5) == ResetCode.RATE_LIMITED

    async def is_served() -> bool:
        with contextlib.suppress(ClosedError):
            async with Attacker.connect(world.port, insider, source="127.0.0.30") as attacker:
                await attacker.secure()
                with trio.move_on_after(5):
                    return await attacker.negotiate(1, PING_PROTOCOL) == encode_message(PING_PROTOCOL)
        return False

    with trio.fail_after(30):
        served = False
        while not served:
            await trio.sleep(0.5)
            served = await is_served()


# ---- honest use, as much of it as can be had


def burst(port: int, count: int, content: bytes, answer: int) -> int:
    """So many short connections, one after another. How many were answered in full."""
    good = 0
    for _ in range(count):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 20) as client:
            client.sendall(content)
            client.shutdown(socket.SHUT_WR)
            received = 0
            while part := client.recv(65536):
                received += len(part)
            good += received == answer
    return good


def in_threads(count: int, work: Callable[[], int]) -> int:
    results = [0] * count

    def run(index: int) -> None:
        results[index] = work()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return sum(results)


def ping_pong(port: int, seconds: float, pipelined: int) -> int:
    """Requests of 30 bytes, some of them at once, as a client of redis makes them. How many were answered."""
    request, answered = b"x" * 30, 0
    with socket.create_connection(("127.0.0.1", port), 20) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for _ in range(pipelined):
                client.sendall(request)
            missing = pipelined * len(request)
            while missing:
                part = client.recv(65536)
                if not part:
                    return answered
                missing -= len(part)
            answered += pipelined
    return answered


async def test_heavy_honest_use_is_not_ended(world: World) -> None:
    """Short connections as fast as they come, tiny requests one by one and many at once, from one peer for a while."""
    before = world.total("peerup_connections_closed_total", reason="yamux-flood")
    content = os.urandom(600)
    good = await trio.to_thread.run_sync(
        functools.partial(in_threads, 8, functools.partial(burst, world.tunnel, 400, content, len(content)))
    )
    assert good == 3200
    for pipelined in (1, 50):
        work = functools.partial(ping_pong, world.tunnel, 4.0, pipelined)
        assert await trio.to_thread.run_sync(functools.partial(in_threads, 8, work)) > 1000
    assert world.total("peerup_connections_closed_total", reason="yamux-flood") == before


def ship(port: int, seconds: float, length: int, pause: float) -> int:
    """Lines that nobody answers, as a shipper of logs or a copy of small files sends them. How many arrived."""
    line, sent = b"x" * length, 0
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 20) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            client.sendall(line)
            sent += 1
            if pause:
                time.sleep(pause)
        client.shutdown(socket.SHUT_WR)
        if client.recv(1) == b"":  # the service has read all of it, and hangs up
            return sent
    return 0


@pytest.mark.parametrize(("length", "pause"), [(1, 0.001), (100, 0.0), (100, 0.0005), (700, 0.0)])
async def test_what_is_sent_in_small_pieces_without_an_answer_is_not_ended(
    world: World, length: int, pause: float
) -> None:
    before = world.total("peerup_connections_closed_total", reason="yamux-flood")
    sink = int(world.laptop.run_json("proxy", "home", "sink", "0")["listen"].rpartition(":")[2])
    work = functools.partial(ship, sink, 8.0, length, pause)
    results: list[int] = []

    def each() -> int:
        results.append(work())
        return results[-1]

    await trio.to_thread.run_sync(functools.partial(in_threads, 8, each))
    assert len(results) == 8
    assert min(results) > 100, "a stream was reset"
    assert world.total("peerup_connections_closed_total", reason="yamux-flood") == before


async def test_clients_that_retry_a_service_that_is_down_do_not_end_the_tunnels_of_another(world: World) -> None:
    before = world.total("peerup_connections_closed_total", reason="yamux-flood")
    down = int(world.laptop.run_json("proxy", "home", "down", "0")["listen"].rpartition(":")[2])
    stopping = threading.Event()

    def retry() -> int:
        count = 0
        while not stopping.is_set():
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", down), 5) as client:
                client.sendall(b"?")
                client.recv(1)
            count += 1
        return count

    with socket.create_connection(("127.0.0.1", world.tunnel), 20) as good, trio.fail_after(120):
        async with trio.open_nursery() as nursery:
            tried: list[int] = []

            async def retry_for_ever() -> None:
                tried.append(await trio.to_thread.run_sync(functools.partial(in_threads, 16, retry)))

            nursery.start_soon(retry_for_ever)
            for _ in range(15):
                good.sendall(b"!")
                assert await trio.to_thread.run_sync(good.recv, 1) == b"!"
                await trio.sleep(1)
            stopping.set()
    assert tried[0] > 1000
    assert world.total("peerup_connections_closed_total", reason="yamux-flood") == before
