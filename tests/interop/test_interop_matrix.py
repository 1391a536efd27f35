"""Every implementation dials every other and does with it what a tunnel needs.

The pairs of foreign implementations are there to trust the peers and these tests themselves: what go-libp2p and
js-libp2p do with each other is what they must do with us.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import pytest
import trio

from tests.interop.conftest import Start
from tests.interop.content import sha256
from tests.interop.ours import OurPeer
from tests.interop.peers import Answer, Peer, do, finished, head, opened, waiting_for

pytestmark = [pytest.mark.interop, pytest.mark.timeout(600)]  # the first test may have to build the peers

MB = 1_000_000
PROTOCOL = "/peerup/test/1.0.0"
EMPTY = sha256(0)


class Pair(NamedTuple):
    """Two connected peers: the dialler holds an outbound connection to the listener."""

    dialler: Peer
    listener: Peer


OUR_PAIRS = [
    ("peerup", "go"),
    ("go", "peerup"),
    ("peerup", "js"),
    ("js", "peerup"),
    ("peerup", "rust"),
    ("rust", "peerup"),
]
FOREIGN_PAIRS = [("go", "js"), ("js", "go")]
TELLS_CODES = {"go", "peerup"}  # js-libp2p and rust-libp2p neither send nor report the code of a reset


@pytest.fixture(params=OUR_PAIRS + FOREIGN_PAIRS, ids="-dials-".join)
async def pair(request: pytest.FixtureRequest, start: Start) -> AsyncIterator[Pair]:
    one, other = request.param
    async with start(one) as dialler, start(other) as listener:
        if isinstance(listener, OurPeer):
            await listener.authorise(dialler.peer_id)
        await do(dialler, "dial", address=listener.address)
        await connected(listener, dialler)
        yield Pair(dialler, listener)


async def connected(peer: Peer, other: Peer) -> None:
    """Wait for a connection to be there on the side that was dialled, too: it knows last."""
    with waiting_for(f"a connection to {other.name}", peer, 20):
        while True:
            connections = (await do(peer, "connections"))["connections"]
            if any(connection["peer"] == other.peer_id for connection in connections):
                return
            await trio.sleep(0.01)


async def exchange(pair: Pair, protocol: str = PROTOCOL, **options: Any) -> Answer:
    return await pair.dialler.ask("exchange", peer=pair.listener.peer_id, protocol=protocol, timeout=90, **options)


async def test_the_connection_is_noise_and_yamux_and_both_sides_know_the_other(pair):
    (outbound,) = [
        each for each in (await do(pair.dialler, "connections"))["connections"] if each["peer"] == pair.listener.peer_id
    ]
    (inbound,) = [
        each for each in (await do(pair.listener, "connections"))["connections"] if each["peer"] == pair.dialler.peer_id
    ]
    assert (outbound["direction"], inbound["direction"]) == ("outbound", "inbound")
    for connection in (outbound, inbound):
        # Our own side has nothing else to offer, and does not say.
        assert "noise" in connection.get("security", "noise")
        assert "yamux" in connection.get("muxer", "yamux")


@pytest.mark.parametrize("asks", ["dialler", "listener"])
async def test_identify_tells_the_truth_and_signs_it(pair, asks):
    asking, asked = (pair.dialler, pair.listener) if asks == "dialler" else (pair.listener, pair.dialler)
    said = await do(asking, "identify", peer=asked.peer_id)
    assert said["agent"]
    assert {"/ipfs/id/1.0.0", "/ipfs/id/push/1.0.0", "/ipfs/ping/1.0.0"} - set(said["protocols"]) <= (
        set() if asked.name != "js" else {"/ipfs/id/push/1.0.0"}  # a service of its own in js-libp2p, not switched on
    )
    assert said["observed"].startswith("/ip4/127.0.0.1/tcp/")
    listens = asked.address.split("/p2p/")[0]
    assert listens in [address.split("/p2p/")[0] for address in said["addresses"]]
    if asked.name == "rust":  # its records are of an older kind, which no other implementation knows
        assert said["record"] == "absent"
        return
    assert said["record"] == "verified"
    assert listens in said["record_addresses"]
    assert said["record_seq"] > 0


@pytest.mark.parametrize("asks", ["dialler", "listener"])
async def test_ping(pair, asks):
    asking, asked = (pair.dialler, pair.listener) if asks == "dialler" else (pair.listener, pair.dialler)
    seconds = (await do(asking, "ping", peer=asked.peer_id, count=3))["seconds"]
    assert len(seconds) == 3
    assert all(0 <= each < 5 for each in seconds)


@pytest.mark.parametrize("size", [0, 1, 65_519, 65_536, 262_145, 3 * MB])
async def test_an_echo_brings_every_byte_back(pair, size):
    await do(pair.listener, "serve", protocol=PROTOCOL, behaviour="echo")
    answer = await exchange(pair, send=size, seed=5)
    assert answer["ok"], answer
    assert (answer["sent_sha256"], answer["received_sha256"]) == (sha256(size, 5), sha256(size, 5))
    (seen,) = await finished(pair.listener, PROTOCOL)
    assert (seen["received"], seen["sha256"], seen["reset"]) == (size, sha256(size, 5), False)


@pytest.mark.slow
async def test_a_hundred_megabytes_up(pair):
    await do(pair.listener, "serve", protocol=PROTOCOL, behaviour="sink")
    answer = await exchange(pair, send=100 * MB, seed=1)
    assert answer["ok"], answer
    # The answer comes after our half-close: half-closing works in the direction of the dialler.
    assert json.loads(head(answer)) == {"received": 100 * MB, "sha256": sha256(100 * MB, 1)}


@pytest.mark.slow
async def test_a_hundred_megabytes_down(pair):
    await do(pair.listener, "serve", protocol=PROTOCOL, behaviour="source")
    answer = await exchange(pair, text=f"{100 * MB} 2\n", keep_open=True)
    assert answer["ok"], answer
    assert (answer["received"], answer["received_sha256"]) == (100 * MB, sha256(100 * MB, 2))


async def test_the_listener_may_half_close_first(pair):
    """The serving side finishes; the dialler reads the end and can still send all that it has."""
    await do(pair.listener, "serve", protocol=PROTOCOL, behaviour="source")
    answer = await exchange(pair, text="70000 3\n", after=MB, seed=4)
    assert answer["ok"], answer
    assert answer["received_sha256"] == sha256(70_000, 3)
    (seen,) = await finished(pair.listener, PROTOCOL)
    assert not seen["reset"]
    assert seen["received"] == MB


async def test_a_reset_by_the_dialler_is_not_an_end(pair):
    await do(pair.listener, "serve", protocol=PROTOCOL, behaviour="sink")
    await exchange(pair, send=MB, reset_after=True, reset_code=77)
    (seen,) = await finished(pair.listener, PROTOCOL)
    assert seen["reset"], seen
    assert "code" not in seen or seen["code"] == (77 if pair.dialler.name in TELLS_CODES else 0)


async def test_a_reset_by_the_listener_is_not_an_end(pair):
    await do(pair.listener, "serve", protocol=PROTOCOL, behaviour="reset", bytes=100_000, code=78)
    answer = await exchange(pair, send=100_000, keep_open=True)
    assert not answer["ok"]
    assert answer["reset"], answer
    assert "code" not in answer or answer["code"] == (78 if pair.listener.name in TELLS_CODES else 0)


async def test_a_reader_that_waits_stops_the_writer_and_loses_nothing(pair):
    size = 64 * MB
    await do(pair.listener, "serve", protocol=PROTOCOL, behaviour="hold")
    await do(pair.listener, "serve", protocol="/peerup/other/1.0.0", behaviour="echo")
    pending = await pair.dialler.send(
        "exchange", peer=pair.listener.peer_id, protocol=PROTOCOL, send=size, seed=6, timeout=90
    )
    stalled_at = await stalls(pair.dialler, pending.number)
    assert 0 < stalled_at < 40 * MB  # windows (16 MiB at most in go) and socket buffers, not the memory of the reader
    other = await exchange(pair, "/peerup/other/1.0.0", send=MB)  # another stream of the connection is not held up
    assert other["received_sha256"] == sha256(MB)
    await do(pair.listener, "release", protocol=PROTOCOL)
    answer = await pair.dialler.answer_to(pending)
    assert answer["ok"], answer
    assert json.loads(head(answer)) == {"received": size, "sha256": sha256(size, 6)}


async def stalls(peer: Peer, exchange_id: int) -> int:
    """How many bytes an exchange had sent when it made no progress for half a second."""
    last, quiet_since = -1, trio.current_time()
    with waiting_for(f"exchange {exchange_id} to stall", peer, 60):
        while last <= 0 or trio.current_time() - quiet_since <= 0.5:
            answer = await peer.ask("progress", of=exchange_id)
            sent = int(answer["sent"]) if answer["ok"] else 0  # the command may not have begun yet
            if sent != last:
                last, quiet_since = sent, trio.current_time()
            await trio.sleep(0.02)
    return last


async def test_forty_streams_side_by_side(pair):
    if pair.listener.name == "rust":
        pytest.skip("rust-libp2p keeps one inbound stream of a protocol waiting, and drops what else comes")
    await do(pair.listener, "serve", protocol=PROTOCOL, behaviour="echo")
    answer = await exchange(pair, send=2 * MB, seed=100, count=40)
    assert answer["ok"], answer
    assert [each["received_sha256"] for each in answer["exchanges"]] == [sha256(2 * MB, 100 + i) for i in range(40)]
    assert all(not seen["reset"] for seen in await finished(pair.listener, PROTOCOL, count=40))


async def test_a_protocol_that_is_not_served_is_refused_and_the_connection_lives(pair):
    refused = await exchange(pair, "/peerup/nothing/1.0.0", send=10)
    assert not refused["ok"]
    await do(pair.listener, "serve", protocol=PROTOCOL, behaviour="echo")
    assert (await exchange(pair, send=10))["received_sha256"] == sha256(10)
    assert len((await do(pair.dialler, "connections"))["connections"]) == 1


@pytest.mark.parametrize("size", [10, 200_000])
@pytest.mark.parametrize("keep_open", [False, True], ids=["finishes", "waits"])
@pytest.mark.parametrize("implementation", ["go", "rust"])
async def test_a_refusal_reaches_a_peer_that_did_not_wait_for_it(start_foreign, start, implementation, size, keep_open):
    """Data travels with the proposal of a protocol that is not spoken (any more): the answer is a refusal, not a reset.

    rust-libp2p also resets streams that it has never announced; the connection must outlive all of it.
    """
    options = ["--lazy"] if implementation == "rust" else []
    async with start("peerup") as ours, start_foreign(implementation, *options) as theirs:
        assert isinstance(ours, OurPeer)
        await ours.authorise(theirs.peer_id)
        await do(theirs, "dial", address=ours.address)
        await connected(ours, theirs)
        pair = Pair(theirs, ours)
        for _ in range(3):
            refused = await exchange(pair, "/peerup/nothing/1.0.0", send=size, keep_open=keep_open, lazy=True)
            assert not refused["ok"]
            assert refused["opened"], "the proposal was not lazy"
            assert not refused["reset"], refused
            assert {"go": "protocols not supported", "rust": "negotiation failed"}[implementation] in refused["error"]
        await do(ours, "serve", protocol=PROTOCOL, behaviour="echo")
        answer = await exchange(pair, send=size, seed=5, lazy=True)
        assert answer["received_sha256"] == sha256(size, 5), answer
        assert len((await do(theirs, "connections"))["connections"]) == 1


@pytest.mark.parametrize("implementation", ["go", "js", "rust"])
async def test_we_hear_a_refusal_though_we_did_not_wait_for_it(start, implementation):
    async with start("peerup") as ours, start(implementation) as theirs:
        assert isinstance(ours, OurPeer)
        await ours.authorise(theirs.peer_id)
        await do(ours, "dial", address=theirs.address)
        for _ in range(3):
            refused = await ours.attach(theirs.peer_id, "/peerup/nothing/1.0.0", sent=b"early" * 1000)
            assert refused == "protocol-not-supported"
        await do(theirs, "serve", protocol=PROTOCOL, behaviour="echo")
        assert (await exchange(Pair(ours, theirs), send=10))["received_sha256"] == sha256(10)
        assert len((await do(ours, "connections"))["connections"]) == 1


async def test_a_silent_service_does_not_hold_up_others_and_ends_with_the_connection(pair):
    await do(pair.listener, "serve", protocol=PROTOCOL, behaviour="silent")
    await do(pair.listener, "serve", protocol="/peerup/other/1.0.0", behaviour="echo")
    async with trio.open_nursery() as nursery:
        answers: list[Answer] = []

        async def wait_for_silence() -> None:
            answers.append(await exchange(pair, send=1000))

        nursery.start_soon(wait_for_silence)
        await opened(pair.listener, PROTOCOL)
        assert (await exchange(pair, "/peerup/other/1.0.0", send=MB))["received_sha256"] == sha256(MB)
        await do(pair.listener, "disconnect", peer=pair.dialler.peer_id)
        await do(pair.dialler, "wait-closed", peer=pair.listener.peer_id)
    # js-libp2p finishes its streams when it hangs up; others reset. rust-libp2p takes either for an end.
    assert answers[0]["ok"] == (pair.listener.name == "js" or pair.dialler.name == "rust")
    assert (answers[0]["received"], answers[0]["received_sha256"]) == (0, EMPTY)


@pytest.mark.parametrize("implementation", ["peerup", "go", "js", "rust"])
async def test_a_peer_that_is_somebody_else_is_refused(start, start_foreign, implementation):
    """The dialler names the peer that it wants; whoever answers with another identity is not talked to."""
    async with start(implementation) as dialler, start_foreign("js") as listener, start_foreign("go") as third:
        address = listener.address.replace(listener.peer_id, third.peer_id)
        refused = await dialler.ask("dial", address=address)
        assert not refused["ok"]
        assert (await do(dialler, "connections"))["connections"] == []


@pytest.mark.parametrize("implementation", ["go", "js", "rust"])
async def test_we_refuse_a_caller_that_is_not_authorised(start, implementation):
    """It is hung up on once its identity is proved; it gets nothing, and others still get in."""
    async with start("peerup") as ours, start(implementation) as stranger, start("go") as friend:
        assert isinstance(ours, OurPeer)
        await ours.authorise(friend.peer_id)
        await do(ours, "serve", protocol=PROTOCOL, behaviour="echo")
        # A dialler may believe for a moment that it is connected: its handshake is over before the verdict.
        await stranger.ask("dial", address=ours.address)
        await do(stranger, "wait-closed", peer=ours.peer_id)
        assert not (await exchange(Pair(stranger, ours), send=10))["ok"]
        await do(friend, "dial", address=ours.address)
        assert (await exchange(Pair(friend, ours), send=10))["received_sha256"] == sha256(10)
        assert (await do(ours, "served", protocol=PROTOCOL))["opened"] == 1


@pytest.mark.parametrize("implementation", ["go", "js", "rust"])
async def test_a_peer_that_is_no_longer_authorised_is_cut_off_at_once(start, implementation):
    async with start("peerup") as ours, start(implementation) as guest:
        assert isinstance(ours, OurPeer)
        await ours.authorise(guest.peer_id)
        await do(ours, "serve", protocol=PROTOCOL, behaviour="silent")
        await do(guest, "dial", address=ours.address)
        pending = await guest.send("exchange", peer=ours.peer_id, protocol=PROTOCOL, send=1000, keep_open=True)
        await opened(ours, PROTOCOL)
        await ours.revoke(guest.peer_id)
        cut = await guest.answer_to(pending)
        assert not cut["ok"]
        await do(guest, "wait-closed", peer=ours.peer_id)


@pytest.mark.parametrize("implementation", ["go", "js"])
async def test_a_stream_that_is_cut_off_together_with_the_answer_to_its_negotiation(start, implementation):
    """Whatever is read at once: the peer that opened the stream learns of both, and waits for neither."""
    async with start("peerup") as ours, start(implementation) as guest:
        assert isinstance(ours, OurPeer)
        await ours.authorise(guest.peer_id)
        await do(ours, "serve", protocol=PROTOCOL, behaviour="silent")
        await do(guest, "dial", address=ours.address)
        ours.on_stream = lambda: os.kill(guest.pid, signal.SIGSTOP)
        pending = await guest.send("exchange", peer=ours.peer_id, protocol=PROTOCOL, send=1000)
        await opened(ours, PROTOCOL)
        await ours.revoke(guest.peer_id)
        await do(ours, "wait-closed", peer=guest.peer_id)
        os.kill(guest.pid, signal.SIGCONT)
        cut = await guest.answer_to(pending)
        assert not cut["ok"]
        assert cut["received"] == 0
        await do(guest, "wait-closed", peer=ours.peer_id)


KINDS = {"go": ["rsa", "ecdsa", "secp256k1"], "js": ["rsa", "secp256k1"]}  # js-libp2p has no peer ids of ECDSA keys


@pytest.mark.parametrize(("implementation", "kind"), [(name, kind) for name, kinds in KINDS.items() for kind in kinds])
@pytest.mark.parametrize("dials", ["they", "we"])
async def test_other_kinds_of_keys(start, start_foreign, implementation, kind, dials):
    async with start("peerup") as ours, start_foreign(implementation, "--key", kind) as theirs:
        assert isinstance(ours, OurPeer)
        await ours.authorise(theirs.peer_id)
        dialler, listener = (theirs, ours) if dials == "they" else (ours, theirs)
        await do(dialler, "dial", address=listener.address)
        await connected(listener, dialler)
        assert (await do(ours, "identify", peer=theirs.peer_id))["record"] == "verified"
        await do(theirs, "ping", peer=ours.peer_id)


@pytest.mark.parametrize("implementation", ["js", "rust"])
async def test_a_seed_gives_the_same_peer_id_in_every_implementation(start_foreign, implementation):
    async with start_foreign("go", "--seed", "alpha") as one, start_foreign(implementation, "--seed", "alpha") as other:
        assert one.peer_id == other.peer_id
