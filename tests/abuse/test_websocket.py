"""Strangers at a port where a real node takes TCP, WebSocket and TLS: they get an answer or none, and cost little.

`home` is attacked over loopback; `laptop` is authorised and uses its tunnel meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import select
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import trio

from demo.node import Node
from protocol.websocket import Frames
from protocol.websocket_opening import ClientOpening
from tests.abuse.world import Vitals, Witness, World, fails
from tests.support.certificates import Authority

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

MEBIBYTE = 1024 * 1024
CALLERS = 240
REQUEST = ClientOpening("home.example", bytes(16)).request
ALL_STAGES = 30.0
"""Seconds: a caller may use up the deadlines of the first byte, of TLS, of HTTP, and of the upgrade's first stage."""


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, authority: Authority) -> Iterator[World]:
    def share_the_port(node: Node) -> None:
        certificate, key = authority.issue("127.0.0.1")
        (node.home / "tls").mkdir()
        certificate.rename(node.home / "tls/fullchain.pem")
        key.rename(node.home / "tls/privkey.pem")
        config = node.home / "config.yaml"
        line = f'    - "{node.address}"\n'
        text = config.read_text()
        assert line in text
        text = text.replace(line, line + line.replace('"\n', '/ws"\n') + line.replace('"\n', '/tls/ws"\n'))
        text = text.replace("  # tls:\n  #   certificate_file", "  tls:\n    certificate_file")
        text = text.replace("  # tls:\n  #  ", "  tls:\n   ").replace("\n  #   key_file", "\n    key_file")
        config.write_text(text)

    with contextlib.ExitStack() as stack:
        yield World(tmp_path_factory.mktemp("w"), stack, prepare=share_the_port)


@pytest.fixture
def context(authority: Authority) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(authority.file))


@contextlib.asynccontextmanager
async def witnessed(world: World) -> AsyncIterator[Witness]:
    """The authorised peer makes connections while the block runs, and none may fail."""
    witness = Witness(world.tunnel)
    witness.__enter__()
    try:
        yield witness
    finally:
        await trio.to_thread.run_sync(witness.__exit__)
    assert witness.failed == 0, witness.summary()
    assert witness.times, "nobody watched"


async def until_closed(stream: trio.abc.ReceiveStream) -> bytes:
    said = b""
    with contextlib.suppress(trio.BrokenResourceError):
        while data := await stream.receive_some(65536):
            said += data
    return said


async def until_gone(stream: trio.SocketStream) -> None:
    """Return when the other side has closed; takes nothing from those who read meanwhile."""
    poll = select.poll()
    poll.register(stream.socket.fileno(), select.POLLRDHUP)
    while not poll.poll(0):  # noqa: ASYNC110  # trio does not wait for this one
        await trio.sleep(0.1)


async def silent(stream: trio.SocketStream, _: ssl.SSLContext) -> None:
    """Says nothing at all."""


async def drips_a_request(stream: trio.SocketStream, _: ssl.SSLContext) -> None:
    for byte in REQUEST:
        await stream.send_all(bytes((byte,)))
        await trio.sleep(0.5)


async def drips_tls(stream: trio.SocketStream, context: ssl.SSLContext) -> None:
    outgoing = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="127.0.0.1")
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    for byte in outgoing.read():
        await stream.send_all(bytes((byte,)))
        await trio.sleep(0.5)


async def silent_within_tls(stream: trio.SocketStream, context: ssl.SSLContext) -> None:
    secured = trio.SSLStream(stream, context, server_hostname="127.0.0.1")
    await secured.do_handshake()


async def silent_within_websocket(stream: trio.SocketStream, _: ssl.SSLContext) -> None:
    await stream.send_all(REQUEST)
    await stream.receive_some(4096)


async def pings_within_websocket(stream: trio.SocketStream, _: ssl.SSLContext) -> None:
    await stream.send_all(REQUEST)
    await stream.receive_some(4096)
    while True:
        await stream.send_all(bytes.fromhex("898000000000"))
        await trio.sleep(0.5)


SLOW: list[Callable[..., object]] = [
    silent,
    drips_a_request,
    drips_tls,
    silent_within_tls,
    silent_within_websocket,
    pings_within_websocket,
]


async def test_slow_callers_of_every_kind_are_dropped_and_slow_nobody_down(world, context, capsys) -> None:
    vitals = Vitals(world)
    dropped: list[float] = []
    grown = 0

    async def caller(behave) -> None:
        began = trio.current_time()
        stream = await trio.open_tcp_stream("127.0.0.1", world.port)
        async with trio.open_nursery() as nursery:

            async def behaving() -> None:
                with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError, ssl.SSLError):
                    await behave(stream, context)

            nursery.start_soon(behaving)
            await until_gone(stream)
            nursery.cancel_scope.cancel()
        dropped.append(trio.current_time() - began)
        await trio.aclose_forcefully(stream)

    async with witnessed(world) as witness:
        with trio.fail_after(ALL_STAGES * 3):
            async with trio.open_nursery() as nursery:
                for number in range(CALLERS):
                    nursery.start_soon(caller, SLOW[number % len(SLOW)])
                    await trio.sleep(0.002)
                grown = vitals.growth()
    assert len(dropped) == CALLERS
    assert max(dropped) < ALL_STAGES
    vitals.check(growth=48 * MEBIBYTE, what=f"{CALLERS} slow callers")
    assert grown < 48 * MEBIBYTE
    with capsys.disabled():
        print(f"\n{CALLERS} slow callers: the last one dropped after {max(dropped):.1f} s; {witness.summary()}")


GARBAGE = {
    "oversized headers": b"GET / HTTP/1.1\r\n" + b"Cookie: aaaaaaaaaaaaaaaaaaa\r\n" * 40_000,
    "one endless line": b"GET /" + b"a" * MEBIBYTE,
    "an endless body": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9999999\r\n\r\n" + bytes(MEBIBYTE),
    "garbage behind the upgrade": REQUEST + b"\xff" * MEBIBYTE,
    "an endless frame": REQUEST + bytes.fromhex("82ff7fffffffffffffff00000000") + bytes(MEBIBYTE),
    "empty frames": REQUEST + Frames(client=True, random_key=lambda: bytes(4)).encode(b"") * 100_000,
    "a text message": REQUEST + b"\x81\x85\0\0\0\0hello",
    "TLS garbage": b"\x16\x03\x01\x40\x00" + os.urandom(MEBIBYTE),
    "a first byte of nobody": b"\x00" + bytes(MEBIBYTE),
}


@pytest.mark.parametrize("within", ["tcp", "tls"])
@pytest.mark.parametrize("kind", GARBAGE)
async def test_garbage_is_hung_up_on_and_costs_nothing(world: World, context, kind: str, within: str) -> None:
    vitals = Vitals(world)
    for _ in range(3):
        stream: trio.abc.Stream = await trio.open_tcp_stream("127.0.0.1", world.port)
        if within == "tls":
            stream = trio.SSLStream(stream, context, server_hostname="127.0.0.1", https_compatible=True)
        with trio.fail_after(ALL_STAGES), contextlib.suppress(trio.BrokenResourceError, ssl.SSLError):
            async with trio.open_nursery() as nursery:

                async def send(stream: trio.abc.Stream = stream) -> None:
                    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError, ssl.SSLError):
                        await stream.send_all(GARBAGE[kind])

                nursery.start_soon(send)
                said = await until_closed(stream)
                assert len(said) < 1000
                nursery.cancel_scope.cancel()
        await trio.aclose_forcefully(stream)
    vitals.check(growth=16 * MEBIBYTE, what=kind)


async def test_nobody_is_let_in_over_websocket_who_is_not_authorised(world: World, tmp_path: Path) -> None:
    stranger = Node("stranger", tmp_path)
    stranger.initialise()
    stranger.run("auth", "add", world.home.peer_id)
    stranger.run("names", "add", "home", world.home.peer_id, "--address", f"{world.home.address}/ws")
    refused = world.total("peerup_handshakes_refused_total", reason="not-authorised")
    try:
        stranger.start()
        said = await trio.to_thread.run_sync(
            lambda: fails(stranger, "ping", "home", "-c", "1"),
        )
    finally:
        stranger.stop()
    assert "authorise" in said
    assert world.total("peerup_handshakes_refused_total", reason="not-authorised") > refused
    assert "websocket" in (world.home.home / "log/audit.jsonl").read_text()
