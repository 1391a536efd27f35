"""Strangers and their bytes in front of a real node: they get nothing, cost little, and nobody else notices.

`home` is attacked over loopback; `laptop` is authorised and uses its tunnel meanwhile. Each test calls from a loopback
address of its own, because the node keeps its accounts by source address.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections.abc import AsyncIterator, Iterator

import pytest
import trio
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from protocol.multistream import HEADER, encode_message
from protocol.noise import SIGNATURE_PREFIX, Identity, NoiseHandshake
from tests.abuse.attacker import NOISE, Attacker, ClosedError, new_key
from tests.abuse.world import Vitals, Witness, World, fails
from tests.support.processes import descriptors, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

MEBIBYTE = 1024 * 1024
STRANGERS = 1000
AT_ONCE = 50
OPENING = len(HEADER + NOISE)
CLOSES_WITHIN = 12.0
"""Seconds: the whole upgrade's deadline is 10."""

_SOURCES = (f"127.0.{1 + number // 250}.{1 + number % 250}" for number in itertools.count())


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with contextlib.ExitStack() as stack:
        yield World(tmp_path_factory.mktemp("s"), stack)


@pytest.fixture
def source() -> str:
    """A loopback address that no other test calls from."""
    return next(_SOURCES)


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


async def gets_in(world: World, source: str, seconds: float) -> float:
    """An authorised peer with a fresh connection from `source` is served in time; the seconds that it took."""
    began = trio.current_time()
    with trio.fail_after(seconds):
        async with Attacker.connect(world.port, world.insider, source=source) as friend:
            await friend.secure()
            assert await friend.negotiate(1, "/ipfs/ping/1.0.0") == encode_message("/ipfs/ping/1.0.0")
    return trio.current_time() - began


async def test_a_thousand_strangers_get_nothing_and_slow_nobody_down(world: World, source: str, capsys) -> None:
    vitals = Vitals(world)
    refused = world.total("peerup_handshakes_refused_total", reason="not-authorised")
    denied = world.total("peerup_auth_decisions_total", decision="deny", rule="not-listed")
    audited = len((world.home.home / "log/audit.jsonl").read_bytes())
    said: list[bytes] = []
    left = iter(range(STRANGERS))

    async def strangers() -> None:
        for number in left:
            async with Attacker.connect(world.port, source=source) as stranger:
                # Who completes the handshake early is followed by a request, as an honest peer would send it.
                await stranger.secure(early_muxer=number % 2 == 0)
                with contextlib.suppress(ClosedError):
                    await stranger.send(stranger.seal(HEADER + encode_message("/ipfs/id/1.0.0")))
                said.append(await stranger.until_closed(CLOSES_WITHIN))

    began = trio.current_time()
    async with witnessed(world) as witness:
        async with trio.open_nursery() as nursery:
            for _ in range(AT_ONCE):
                nursery.start_soon(strangers)
            fresh = await gets_in(world, next(_SOURCES), 10)
        elapsed = trio.current_time() - began
    with capsys.disabled():
        print(f"\n{STRANGERS} strangers in {elapsed:.1f} s; meanwhile {witness.summary()}; a fresh one {fresh:.3f} s")
    assert len(said) == STRANGERS
    assert set(said) == {b""}, "a stranger was told something after the handshake"
    assert elapsed < 60
    wait_until(
        lambda: world.total("peerup_auth_decisions_total", decision="deny", rule="not-listed") - denied == STRANGERS,
        within=10,
        what="each refusal counted by the gate",
    )
    assert world.total("peerup_handshakes_refused_total", reason="not-authorised") - refused == STRANGERS
    # Folded: the audit log names the first few of each second, and counts the rest.
    lines = (world.home.home / "log/audit.jsonl").read_bytes()[audited:].splitlines()
    assert sum(b'"not-listed"' in line for line in lines) < STRANGERS / 2
    vitals.check(growth=24 * MEBIBYTE, what=f"{STRANGERS} strangers")


async def test_five_hundred_silent_or_dripping_callers_are_dropped(world: World, capsys) -> None:
    vitals = Vitals(world)
    sources = list(itertools.islice(_SOURCES, 8))
    dropped: list[float] = []
    opening = HEADER + NOISE + os.urandom(64)

    async def loris(source: str, *, drips: bool) -> None:
        async with Attacker.connect(world.port, source=source) as caller, trio.open_nursery() as nursery:

            async def drip() -> None:
                with contextlib.suppress(ClosedError):
                    for byte in opening:
                        await caller.send(bytes([byte]))
                        await trio.sleep(0.5)

            if drips:
                nursery.start_soon(drip)
            while await caller.receive():
                pass
            dropped.append(trio.current_time())
            nursery.cancel_scope.cancel()

    async with witnessed(world) as witness:
        began = trio.current_time()
        with trio.fail_after(40):
            async with trio.open_nursery() as nursery:
                for number in range(500):
                    nursery.start_soon(functools.partial(loris, sources[number % 8], drips=number % 2 == 0))
                wait = functools.partial(wait_until, within=10, what="five hundred callers that the node has accepted")
                await trio.to_thread.run_sync(
                    functools.partial(wait, lambda: len(descriptors(vitals.pid)) > vitals.descriptors + 100)
                )
                fresh = await gets_in(world, next(_SOURCES), 10)
    with capsys.disabled():
        print(
            f"\n500 slow callers gone after {max(dropped) - began:.1f} s; meanwhile {witness.summary()}; "
            f"a fresh one {fresh:.3f} s"
        )
    assert len(dropped) == 500
    vitals.check(growth=24 * MEBIBYTE, what="500 slow callers")


async def test_one_silent_caller_alone_is_dropped_within_the_deadline(world: World, source: str) -> None:
    """Nobody waits for its place, so only the deadline drops it."""
    before = world.total("peerup_handshakes_refused_total", reason="security")
    async with Attacker.connect(world.port, source=source) as caller:
        assert await caller.until_closed(CLOSES_WITHIN) == b""
    assert world.total("peerup_handshakes_refused_total", reason="security") == before + 1


async def test_a_crowd_from_the_peers_own_address_delays_it_and_does_not_lock_it_out(world: World, source: str) -> None:
    """Behind one NAT an authorised peer and its enemies have one address: it still gets in."""
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(100):
            await stack.enter_async_context(Attacker.connect(world.port, source=source))
        await gets_in(world, source, 12)


GARBAGE = {
    "HTTP": b"GET / HTTP/1.1\r\nHost: home\r\n\r\n",
    "TLS": bytes.fromhex("16030100f1010000ed0303") + bytes(200),
    "SSH": b"SSH-2.0-OpenSSH_9.6\r\n",
    "zeros": bytes(4096),
    "ones": b"\xff" * 4096,
    "a huge length": b"\xff\xff\xff\xff\xff\xff\xff\xff\x7f" + bytes(100),
    "a length that is not minimal": b"\x93\x00/multistream/1.0.0\n",
    "another version": encode_message("/multistream/2.0.0"),
    "a message of 60 KiB": HEADER + b"\xe0\xd4\x03" + b"/" * 60_000,
    "no end of proposals": HEADER + b"".join(encode_message(f"/never/{number}") for number in range(2000)),
    "no end of ls": HEADER + encode_message("ls") * 2000,
}


@pytest.mark.parametrize("name", GARBAGE)
async def test_garbage_is_answered_by_a_close(world: World, source: str, name: str) -> None:
    vitals = Vitals(world)
    async with Attacker.connect(world.port, source=source) as caller:
        with contextlib.suppress(ClosedError):
            await caller.send(GARBAGE[name])
        said = await caller.until_closed(CLOSES_WITHIN)
    # multistream-select answers what it is asked, in a bounded number of words, until it has had enough.
    assert len(said) < 2048
    assert b"noise" not in said or name == "no end of ls"
    vitals.check(growth=8 * MEBIBYTE, what=name)


async def test_plaintext_is_neither_offered_nor_accepted(world: World, source: str) -> None:
    async with Attacker.connect(world.port, source=source) as caller:
        await caller.send(HEADER + encode_message("ls"))
        listed = b""
        while b"\n\n" not in listed:
            listed += await caller.more()
        assert b"/noise" in listed
        assert b"plaintext" not in listed
        for protocol in ("/plaintext/2.0.0", "/plaintext/1.0.0", "/secio/1.0.0", "/tls/1.0.0"):
            await caller.send(encode_message(protocol))
            assert await caller.receive() == encode_message("na")


def opening(stranger: Attacker) -> tuple[NoiseHandshake, bytes]:
    handshake = stranger.handshake()
    return handshake, HEADER + NOISE + handshake.data_to_send()


@pytest.mark.parametrize("cut", [0, 1, 19, 20, 27, 28, 29, 30, 40, 61, 62])
async def test_a_handshake_cut_short_anywhere_leaves_nothing(world: World, source: str, cut: int) -> None:
    vitals = Vitals(world)
    for abrupt in (False, True):
        async with Attacker.connect(world.port, source=source) as stranger:
            _, said = opening(stranger)
            assert len(said) == 62, "header, proposal, 34 bytes of Noise"
            await stranger.send(said[:cut])
            if not abrupt:
                stranger.socket.shutdown(trio.socket.SHUT_WR)
                await stranger.until_closed(CLOSES_WITHIN)
    vitals.check(growth=8 * MEBIBYTE, what=f"a handshake cut after {cut} bytes")


@pytest.mark.parametrize("part", [0, 1, 2, 50, -1])
async def test_a_handshake_cut_short_in_its_last_message_leaves_nothing(world: World, source: str, part: int) -> None:
    before = world.total("peerup_handshakes_refused_total", reason="handshake")
    async with Attacker.connect(world.port, world.insider, source=source) as stranger:
        last = await _until_last_message(stranger)
        await stranger.send(last[:part])
        stranger.socket.shutdown(trio.socket.SHUT_WR)
        assert await stranger.until_closed(CLOSES_WITHIN) == b""
    assert world.total("peerup_handshakes_refused_total", reason="handshake") == before + 1


async def _until_last_message(stranger: Attacker, identity: Identity | None = None) -> bytes:
    """Go through the handshake, up to the message that proves who calls; that message."""
    handshake = stranger.handshake(identity=identity)
    await stranger.send(HEADER + NOISE + handshake.data_to_send())
    received = b""
    while handshake.result is None:
        received += await stranger.more()
        if len(received) >= OPENING:
            handshake.receive_data(received[OPENING:])
            received = received[:OPENING]
    return handshake.data_to_send()


def forgeries(world: World, stranger: Attacker) -> dict[str, Identity]:
    """How somebody who does not have the insider's key may claim to be the insider."""
    static = stranger.static.public_key().public_bytes_raw()
    other = X25519PrivateKey.generate().public_key().public_bytes_raw()
    insider, sign, signed = world.insider.public_key.to_protobuf(), world.insider.sign, SIGNATURE_PREFIX + static
    return {
        "signed by another key": Identity(insider, new_key().sign(signed)),
        "signature of another Noise key": Identity(insider, sign(SIGNATURE_PREFIX + other)),
        "signature without the prefix": Identity(insider, sign(static)),
        "no signature": Identity(insider, b""),
        "no key": Identity(b"", sign(signed)),
        "a key that is none": Identity(b"\x08\x01\x12\x20" + bytes(31), sign(signed)),
        "a key that claims to be long": Identity(b"\x08\x01\x12\x80\x80\x40" + bytes(32), bytes(64)),
    }


@pytest.mark.parametrize(
    "name",
    [
        "signed by another key",
        "signature of another Noise key",
        "signature without the prefix",
        "no signature",
        "no key",
        "a key that is none",
        "a key that claims to be long",
    ],
)
async def test_nobody_passes_for_an_authorised_peer(world: World, source: str, name: str) -> None:
    before = world.total("peerup_handshakes_refused_total", reason="handshake")
    allowed = world.total("peerup_auth_decisions_total", decision="allow", subject="connection")
    async with Attacker.connect(world.port, world.insider, source=source) as forger:
        await forger.send(await _until_last_message(forger, forgeries(world, forger)[name]))
        assert await forger.until_closed(CLOSES_WITHIN) == b""
    assert world.total("peerup_handshakes_refused_total", reason="handshake") == before + 1
    assert world.total("peerup_auth_decisions_total", decision="allow", subject="connection") == allowed


async def test_an_altered_or_oversized_noise_message_ends_the_handshake(world: World, source: str) -> None:
    before = world.total("peerup_handshakes_refused_total", reason="handshake")
    for number in range(3):
        async with Attacker.connect(world.port, world.insider, source=source) as stranger:
            last = bytearray(await _until_last_message(stranger))
            if number == 0:
                last[20] ^= 1
            elif number == 1:
                last[-1] ^= 1
            else:
                last[:2] = b"\xff\xff"
            with contextlib.suppress(ClosedError):
                await stranger.send(bytes(last))
            assert await stranger.until_closed(CLOSES_WITHIN) == b""
    assert world.total("peerup_handshakes_refused_total", reason="handshake") == before + 3


def test_somebody_else_at_a_peers_address_is_noticed_and_told_nothing(world: World) -> None:
    """`laptop` looks for a peer at `home`'s address: the wrong one answers."""
    wanted = new_key().peer_id
    world.laptop.run("names", "add", "elsewhere", str(wanted), "--address", world.home.address)
    said = fails(world.laptop, "ping", "elsewhere", "-c", "1", "--json")
    assert "wrong-peer" in said
    assert world.home.peer_id in said
    assert world.home.peer_id in fails(world.laptop, "ping", "elsewhere", "-c", "1")
