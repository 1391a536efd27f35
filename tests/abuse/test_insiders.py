"""A peer that is authorised and means harm: it may use what it may use, and nobody else notices what it does beyond.

The insider's key is in `home`'s authorized_keys; it speaks Noise properly and then yamux by hand.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest
import trio

from protocol.keys import PrivateKey
from protocol.multistream import HEADER, encode_message
from protocol.noise import MAX_PLAINTEXT
from protocol.peer_id import PeerId
from protocol.protocol_ids import IDENTIFY, IDENTIFY_PUSH
from protocol.protocol_ids import PING as PING_PROTOCOL
from protocol.varint import encode_varint
from protocol.yamux import INITIAL_WINDOW
from tests.abuse.attacker import (
    ACK,
    DATA,
    FIN,
    GO_AWAY,
    PING,
    RST,
    SYN,
    WINDOW_UPDATE,
    Attacker,
    ClosedError,
    data,
    frame,
)
from tests.abuse.world import Vitals, World
from tests.chaos.load import echo_works
from tests.support.processes import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

MEBIBYTE = 1024 * 1024
GROWTH = 24 * MEBIBYTE
"""Bytes that the switchboard may keep after an attack: buffers it uses again, never what the attacker sent."""
ENDS_WITHIN = 20.0
FLOOD = 10_000
ECHO = "/peerup/echo/1.0.0"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with contextlib.ExitStack() as stack:
        yield World(tmp_path_factory.mktemp("i"), stack)


@contextlib.asynccontextmanager
async def inside(world: World, source: str = "127.0.0.3", key: PrivateKey | None = None) -> AsyncIterator[Attacker]:
    """A connection of the insider's, or of another one's, authorised and ready for frames."""
    async with Attacker.connect(world.port, key or world.insider, source=source) as insider:
        await insider.secure()
        yield insider


async def still_alive(insider: Attacker, stream: int) -> None:
    """The connection goes on: a ping on a new stream is answered."""
    with trio.fail_after(ENDS_WITHIN):
        assert await insider.negotiate(stream, PING_PROTOCOL) == encode_message(PING_PROTOCOL)
        sent = os.urandom(32)
        await insider.say(data(stream, sent))
        assert (await insider.hear_on(stream)).body == sent


async def flood(insider: Attacker, frames: bytes, *, reads: bool) -> None:
    """Send these frames until all are sent or the node hangs up."""
    with contextlib.suppress(ClosedError):
        for start in range(0, len(frames), MAX_PLAINTEXT):
            await insider.say(frames[start : start + MAX_PLAINTEXT])
            if not reads:
                await trio.lowlevel.checkpoint()


# ---- attacks that end the connection, each with the reason that the node must give


def syns(first: int, count: int) -> bytes:
    return b"".join(frame(WINDOW_UPDATE, SYN, first + 2 * number) for number in range(count))


async def syn_flood(insider: Attacker) -> None:
    await flood(insider, syns(1, FLOOD), reads=False)


async def syn_and_reset_flood(insider: Attacker) -> None:
    frames = b"".join(
        frame(WINDOW_UPDATE, SYN, 1 + 2 * number) + frame(WINDOW_UPDATE, RST, 1 + 2 * number) for number in range(FLOOD)
    )
    await flood(insider, frames, reads=False)


async def ping_flood(insider: Attacker) -> None:
    await flood(insider, b"".join(frame(PING, SYN, 0, number) for number in range(FLOOD)), reads=False)


async def pong_flood(insider: Attacker) -> None:
    await flood(insider, frame(PING, ACK, 0, 7) * FLOOD, reads=False)


async def empty_data_flood(insider: Attacker) -> None:
    await insider.say(frame(WINDOW_UPDATE, SYN, 1))
    await flood(insider, frame(DATA, 0, 1) * FLOOD, reads=False)


async def empty_window_flood(insider: Attacker) -> None:
    await insider.say(frame(WINDOW_UPDATE, SYN, 1))
    await flood(insider, frame(WINDOW_UPDATE, 0, 1) * FLOOD, reads=False)


async def resets_of_streams_long_gone(insider: Attacker) -> None:
    await insider.say(frame(WINDOW_UPDATE, SYN, 1), frame(WINDOW_UPDATE, RST, 1))
    await flood(insider, frame(WINDOW_UPDATE, RST, 1) * FLOOD, reads=False)


async def window_overrun(insider: Attacker) -> None:
    """More than the window on a stream whose reader does not read: the service's own buffers fill first."""
    assert await insider.negotiate(1, "/peerup/stuck/1.0.0") == encode_message("/peerup/stuck/1.0.0")
    with contextlib.suppress(ClosedError):
        for _ in range(64 * MEBIBYTE // 32_768):
            await insider.say(data(1, bytes(32_768)))


async def frame_larger_than_its_window(insider: Attacker) -> None:
    await insider.say(frame(DATA, SYN, 1, INITIAL_WINDOW + 1))


async def frame_of_four_gibibytes(insider: Attacker) -> None:
    await insider.say(frame(DATA, SYN, 1, 0xFFFF_FFFF, b"and so on"))


async def window_overflow(insider: Attacker) -> None:
    await insider.say(frame(WINDOW_UPDATE, SYN, 1, 0xFFFF_FFFF), frame(WINDOW_UPDATE, 0, 1, 0xFFFF_FFFF))


async def unknown_version(insider: Attacker) -> None:
    await insider.say(frame(DATA, SYN, 1, version=1))


async def unknown_type(insider: Attacker) -> None:
    await insider.say(frame(4, 0, 1))


async def stream_of_the_other_side(insider: Attacker) -> None:
    await insider.say(frame(WINDOW_UPDATE, SYN, 1002))


async def data_on_streams_that_never_were(insider: Attacker) -> None:
    await flood(insider, data(9, b"hello?") * FLOOD, reads=False)


async def resets_of_streams_that_never_were(insider: Attacker) -> None:
    await flood(insider, b"".join(frame(DATA, RST, 1 + 2 * number) for number in range(FLOOD)), reads=False)


async def unknown_flags(insider: Attacker) -> None:
    await insider.say(frame(WINDOW_UPDATE, SYN, 1))
    await flood(insider, frame(WINDOW_UPDATE, 0x8000, 1, 1000) * FLOOD, reads=False)


async def data_after_the_end(insider: Attacker) -> None:
    stuck = "/peerup/stuck/1.0.0"  # which does not finish its direction, so that the stream is still there
    assert await insider.negotiate(1, stuck) == encode_message(stuck)
    await insider.say(data(1, b"the end", FIN))
    await flood(insider, data(1, b"more") * FLOOD, reads=False)


async def syn_twice(insider: Attacker) -> None:
    await insider.say(frame(WINDOW_UPDATE, SYN, 1), frame(WINDOW_UPDATE, SYN, 1))


async def altered_ciphertext(insider: Attacker) -> None:
    sealed = bytearray(insider.seal(frame(PING, SYN, 0, 1)))
    sealed[-1] ^= 1
    await insider.send(bytes(sealed))


async def replayed_ciphertext(insider: Attacker) -> None:
    sealed = insider.seal(frame(PING, SYN, 0, 1))
    await insider.send(sealed + sealed)


async def empty_ciphertext(insider: Attacker) -> None:
    await insider.send(b"\0\0")


async def pings_that_are_never_read(insider: Attacker) -> None:
    """The answers to the pings of a stream wait for a window that never opens."""
    assert await insider.negotiate(1, PING_PROTOCOL) == encode_message(PING_PROTOCOL)
    with contextlib.suppress(ClosedError):
        for _ in range(16 * MEBIBYTE // 32_768):
            await insider.say(data(1, bytes(32_768)))


ENDED: dict[Callable[[Attacker], Awaitable[None]], str] = {
    syn_flood: "yamux-flood",
    syn_and_reset_flood: "yamux-flood",
    ping_flood: "yamux-flood",
    pong_flood: "yamux-flood",
    empty_data_flood: "yamux-flood",
    empty_window_flood: "yamux-flood",
    resets_of_streams_long_gone: "yamux-flood",
    data_on_streams_that_never_were: "yamux-flood",
    resets_of_streams_that_never_were: "yamux-flood",
    unknown_flags: "yamux-flood",
    data_after_the_end: "yamux-flood",
    window_overrun: "yamux-window",
    frame_larger_than_its_window: "yamux-window",
    frame_of_four_gibibytes: "yamux-window",
    window_overflow: "yamux",
    unknown_version: "yamux",
    unknown_type: "yamux",
    stream_of_the_other_side: "yamux",
    syn_twice: "yamux",
    altered_ciphertext: "noise",
    replayed_ciphertext: "noise",
    empty_ciphertext: "noise",
}


@pytest.fixture(scope="module", autouse=True)
def stuck(world: World) -> Iterator[None]:
    """A service that takes connections and reads nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        world.home.run("service", "add", "stuck", f"127.0.0.1:{listener.getsockname()[1]}")
        yield


@pytest.mark.parametrize("attack", ENDED, ids=lambda attack: attack.__name__)
async def test_a_broken_rule_ends_the_connection_with_a_reason(
    world: World, attack: Callable[[Attacker], Awaitable[None]]
) -> None:
    reason = ENDED[attack]
    vitals = Vitals(world)
    before = world.total("peerup_connections_closed_total", reason=reason)
    async with inside(world, key=world.another_insider()) as insider:
        await attack(insider)
        with trio.fail_after(ENDS_WITHIN):
            while await insider.receive():
                assert vitals.growth() < 2 * GROWTH
        wait_until(
            lambda: world.total("peerup_connections_closed_total", reason=reason) == before + 1,
            within=10,
            what=f"the end of the connection counted as {reason}",
        )
    vitals.check(growth=GROWTH, what=attack.__name__)


async def test_the_peer_is_told_that_it_broke_the_protocol(world: World) -> None:
    async with inside(world) as insider:
        await insider.say(frame(WINDOW_UPDATE, SYN, 1), frame(WINDOW_UPDATE, SYN, 1))
        assert await insider.until_gone_away(ENDS_WITHIN) == 1  # yamux: protocol error


async def test_a_node_in_the_middle_of_ten_thousand_syns_serves_others(world: World) -> None:
    """The tunnel is tried while the flood is on its way, not only afterwards."""
    keys = {number: [world.another_insider() for _ in range(4)] for number in range(1, 5)}
    vitals = Vitals(world)
    outcomes: list[bool] = []

    async def attack(number: int) -> None:
        for key in keys[number]:
            async with inside(world, f"127.0.3.{number}", key) as insider:
                await flood(insider, syns(1, FLOOD), reads=False)

    async with trio.open_nursery() as nursery:
        async with trio.open_nursery() as attackers:

            async def use() -> None:
                while True:
                    outcomes.append(await trio.to_thread.run_sync(functools.partial(echo_works, world.tunnel, 10.0)))

            nursery.start_soon(use)
            for number in range(1, 5):
                attackers.start_soon(attack, number)
        nursery.cancel_scope.cancel()
    assert outcomes
    assert all(outcomes), f"{outcomes.count(False)} of {len(outcomes)} connections failed"
    vitals.check(growth=GROWTH, what="sixteen floods")


ODD = [
    frame(DATA, RST, 9),
    frame(WINDOW_UPDATE, RST, 9, 0x1000),
    frame(DATA, FIN, 9),
    frame(WINDOW_UPDATE, FIN | ACK, 10),
    frame(WINDOW_UPDATE, 0, 10, 5000),
    data(9, bytes(70_000)),
    data(0, b"no stream at all"),
    frame(WINDOW_UPDATE, 0x8000, 9, 1000),
    frame(PING, 0, 0, 1),
]


@pytest.mark.parametrize("odd", ODD, ids=[f"type{odd[1]}-flags{odd[3]:x}-stream{odd[7]}" for odd in ODD])
async def test_frames_of_streams_that_never_were_leave_the_connection_as_it_is(world: World, odd: bytes) -> None:
    """rust-libp2p resets a stream that it has never announced when nobody wants its lazy negotiation any more."""
    async with inside(world) as insider:
        await insider.say(odd)
        await still_alive(insider, 1)
        await insider.say(odd)
        await still_alive(insider, 3)


# ---- what is refused on a stream, and leaves the connection as it is


async def test_unknown_protocols_get_na_and_nothing_else(world: World) -> None:
    vitals = Vitals(world)
    denied = world.total("peerup_auth_decisions_total", decision="deny", rule="unknown-protocol")
    async with inside(world) as insider:
        for number in range(100):
            assert await insider.negotiate(1 + 2 * number, f"/unheard-of/{number}") == encode_message("na")
        for number in range(100):
            await insider.say(frame(WINDOW_UPDATE, RST, 1 + 2 * number))
        await still_alive(insider, 1001)
    wait_until(
        lambda: world.total("peerup_auth_decisions_total", decision="deny", rule="unknown-protocol") == denied + 100,
        within=10,
        what="each refusal counted",
    )
    series = [name for name in world.metrics() if "unheard-of" in name]
    assert series == [], "a peer made up time series"
    vitals.check(growth=GROWTH, what="unknown protocols")


@pytest.mark.parametrize("flags", [0, FIN], ids=["goes-on", "finishes"])
async def test_a_refusal_reaches_a_peer_that_sent_data_with_its_proposal(world: World, flags: int) -> None:
    """As go-libp2p and rust-libp2p do with a protocol that they believe to be spoken."""
    async with inside(world) as insider:
        content = HEADER + encode_message("/peerup/gone/1.0.0") + os.urandom(20_000)
        await insider.say(data(1, content, SYN | flags))
        said = b""
        with trio.fail_after(ENDS_WITHIN):
            while True:
                heard = await insider.hear_on(1)
                said += heard.body
                assert not heard.flags & RST, f"reset behind {said!r}"
                if heard.flags & FIN:
                    break
        assert said == HEADER + encode_message("na")
        if not flags:
            await insider.say(data(1, bytes(50_000), FIN))
        await still_alive(insider, 3)
        assert world.describe("switchboard")["description"]["streams_negotiating"] == 0


async def test_a_negotiation_that_does_not_end_is_ended(world: World) -> None:
    async with inside(world) as insider:
        await insider.say(data(1, HEADER, SYN))
        for number in range(100):
            await insider.say(data(1, encode_message(f"/never/{number}")))
        with trio.fail_after(ENDS_WITHIN):
            while not (heard := await insider.hear_on(1)).flags & RST:
                assert len(heard.body) < 2048
        await still_alive(insider, 3)


async def test_garbage_instead_of_a_negotiation_resets_the_stream_alone(world: World) -> None:
    async with inside(world) as insider:
        for number, content in enumerate(
            [b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 20, bytes(1000), b"\xff" * 1000, os.urandom(60_000)]
        ):
            stream = 1 + 2 * number
            await insider.say(data(stream, content, SYN))
            with trio.fail_after(ENDS_WITHIN):
                assert (await insider.hear_on(stream)).flags & RST
        await still_alive(insider, 101)


async def test_streams_that_are_never_negotiated_are_reset_in_time(world: World) -> None:
    vitals = Vitals(world)
    async with inside(world) as insider:
        await insider.say(syns(1, 200))
        await trio.to_thread.run_sync(
            functools.partial(
                wait_until,
                lambda: world.describe("switchboard")["description"]["streams_negotiating"] == 200,
                within=10,
                what="200 streams that say nothing",
            )
        )
        reset = set[int]()
        with trio.fail_after(ENDS_WITHIN):
            while len(reset) < 200:
                heard = await insider.hear()
                await insider.answer_keepalive(heard)
                if heard.flags & RST:
                    reset.add(heard.stream)
        await still_alive(insider, 1001)
        assert world.describe("switchboard")["description"]["streams_negotiating"] == 0
    vitals.check(growth=GROWTH, what="streams that say nothing")


async def test_an_endless_push_of_identify_resets_its_stream_alone(world: World) -> None:
    vitals = Vitals(world)
    message = b"\x32" + encode_varint(4000) + b"a" * 4000  # field 6, the agent's name
    async with inside(world) as insider:
        assert await insider.negotiate(1, IDENTIFY_PUSH) == encode_message(IDENTIFY_PUSH)
        for _ in range(1024):  # four MiB
            await insider.say(data(1, encode_varint(len(message)) + message))
            if vitals.growth() > GROWTH:
                break
        with trio.fail_after(ENDS_WITHIN):
            assert (await insider.hear_on(1)).flags & RST
        assert await insider.negotiate(3, IDENTIFY_PUSH) == encode_message(IDENTIFY_PUSH)
        await insider.say(data(3, encode_varint(2**31)))
        with trio.fail_after(ENDS_WITHIN):
            assert (await insider.hear_on(3)).flags & RST
        await still_alive(insider, 5)
    vitals.check(growth=GROWTH, what="an endless push")


async def test_an_endless_answer_to_identify_ends_in_a_reset(world: World) -> None:
    """The node asks who we are on the first stream that it opens, number 2."""
    vitals = Vitals(world)
    async with inside(world) as insider:
        asked = b""
        with trio.fail_after(ENDS_WITHIN):
            while len(asked) < len(HEADER + encode_message(IDENTIFY)):
                asked += (await insider.hear_on(2)).body
        assert asked == HEADER + encode_message(IDENTIFY)
        message = b"\x32" + encode_varint(8000) + b"a" * 8000
        await insider.say(data(2, asked, ACK))
        for _ in range(20):
            await insider.say(data(2, encode_varint(len(message)) + message))
        with trio.fail_after(ENDS_WITHIN):
            while not (await insider.hear_on(2)).flags & RST:
                pass
        (told,) = (
            connection
            for connection in world.describe("switchboard")["description"]["connections"]
            if connection["peer"] == str(world.insider.peer_id)
        )
        assert told["identify_failure"]
        await still_alive(insider, 1)
    vitals.check(growth=GROWTH, what="an endless answer")


async def test_lies_in_identify_are_not_believed(world: World) -> None:
    """Somebody else's public key in the answer: the whole answer is thrown away."""
    async with inside(world) as insider:
        with trio.fail_after(ENDS_WITHIN):
            asked = (await insider.hear_on(2)).body
            while len(asked) < len(HEADER + encode_message(IDENTIFY)):
                asked += (await insider.hear_on(2)).body
        key = PeerId.from_text(world.laptop.peer_id).public_key
        assert key is not None
        message = b"\x0a" + encode_varint(len(key)) + key + b"\x32\x05liar!"
        await insider.say(data(2, asked + encode_varint(len(message)) + message, ACK), frame(DATA, FIN, 2))

        def told() -> bool:
            return any(
                connection["peer"] == str(world.insider.peer_id) and connection["identify_failure"]
                for connection in world.describe("switchboard")["description"]["connections"]
            )

        await trio.to_thread.run_sync(functools.partial(wait_until, told, within=10, what="the lie is noticed"))
        assert "liar!" not in str(world.describe("switchboard"))


async def test_pings_that_are_never_read_cost_bounded_memory(world: World) -> None:
    vitals = Vitals(world)
    async with inside(world) as insider:
        await pings_that_are_never_read(insider)
        assert vitals.growth() < GROWTH
    vitals.check(growth=GROWTH, what="pings that are never read")


async def test_a_reader_that_never_reads_costs_bounded_memory(world: World) -> None:
    """It sends what it may to the echo service, on many streams, and grants no window for the answers."""
    vitals = Vitals(world)
    async with inside(world) as insider:
        for number in range(20):
            stream = 1 + 2 * number
            assert await insider.negotiate(stream, ECHO) == encode_message(ECHO)
            with contextlib.suppress(ClosedError):
                await insider.say(*(data(stream, bytes(16_384)) for _ in range(INITIAL_WINDOW // 16_384 - 1)))
        assert vitals.growth() < 2 * GROWTH
        assert await trio.to_thread.run_sync(functools.partial(echo_works, world.tunnel, 10.0))
    vitals.check(growth=GROWTH, what="a reader that never reads")


async def test_go_away_lets_what_runs_end(world: World) -> None:
    async with inside(world) as insider:
        assert await insider.negotiate(1, ECHO) == encode_message(ECHO)
        await insider.say(frame(GO_AWAY, 0, 0, 0), data(1, b"still here"))
        with trio.fail_after(ENDS_WITHIN):
            assert (await insider.hear_on(1)).body == b"still here"


async def test_one_peer_has_a_bounded_number_of_connections(world: World) -> None:
    """The ninth is refused; the first eight and everybody else go on."""
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(8):
            await stack.enter_async_context(inside(world))
        before = world.total("peerup_handshakes_refused_total", reason="limit-exceeded")
        async with Attacker.connect(world.port, world.insider) as ninth:
            await ninth.secure()
            assert await ninth.until_closed(ENDS_WITHIN) == b""
        assert world.total("peerup_handshakes_refused_total", reason="limit-exceeded") == before + 1
        assert echo_works(world.tunnel, 10)


def test_no_series_of_the_node_is_left_out(world: World) -> None:
    """Each name has one meaning: two kinds under one name would hide the second from whoever watches the node."""
    assert world.total("peerup_stream_openings_total", direction="inbound", outcome="opened") > 0
    assert any(series.startswith("peerup_streams{") for series in world.metrics())
    assert "metrics left out" not in world.log()
