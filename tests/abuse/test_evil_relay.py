"""What a relay can do to those who use it: cut them off, and nothing else.

Whole nodes in one process; the relay is `tests.abuse.evil_relay`, over real sockets.
"""

from __future__ import annotations

import contextlib
import random

import pytest
import trio

import actors.switchboard.closing
import actors.switchboard.upgrade
from actors.switchboard.circuits import FAREWELL
from actors.switchboard.stops import HANDSHAKES_PER_RELAY
from protocol.circuit.messages import HopMessage, HopType, Limit, Status, StopMessage, encode_message
from protocol.messages.switchboard import Connect, Disconnect, PingPeer
from protocol.varint import encode_varint
from supervisor.errors import RefusedError
from tests.abuse.evil_relay import OK, EvilRelay, Malice
from tests.actors.local_node import LocalNode, echo, key_of, peer_of, tcp_server, until
from tests.actors.switchboard.test_through_relays import node

CONTENT = random.Random(5).randbytes(120_000)
"""What is sent through a tunnel and back: less than a window."""


@contextlib.asynccontextmanager
async def world(*, services=None, listen=()):
    """Alice and Bob, who can reach each other only through the evil relay."""
    async with (
        EvilRelay.open(key_of("relay")) as relay,
        node("alice", relay, peers=["bob"]) as alice,
        node("bob", relay, peers=["alice"], services=services, listen=listen) as bob,
    ):
        await bob.ask("switchboard", Connect(relay.peer))
        await until(lambda: bob.peer in relay.clients)
        with trio.fail_after(60):
            yield alice, relay, bob
            for one in (alice, bob):
                assert one.failures == []
                assert one.incarnations["switchboard"] == 1


async def refused(alice, bob):
    """Why there is no connection."""
    with trio.fail_after(30), pytest.raises(RefusedError) as caught:
        await alice.ask("switchboard", Connect(bob.peer))
    return caught.value.reason


async def works(alice, relay, bob):
    """Alice reaches Bob when the relay is honest again."""
    relay.malice = Malice()
    with trio.fail_after(30):
        while True:
            with contextlib.suppress(RefusedError):
                await alice.ask("switchboard", Connect(bob.peer))
                await alice.ask("switchboard", PingPeer(bob.peer))
                return


class Damage:
    """Does this to the first piece after `armed` is set, and leaves the others alone."""

    def __init__(self, change, *, armed=True):
        self.change = change
        self.armed = armed
        self.done = False

    def __call__(self, piece):
        if not self.armed or self.done:
            return [piece]
        changed = self.change(piece)
        self.done = changed is not None
        return changed or []


def flipped(piece):
    at = len(piece) // 2
    return [piece[:at] + bytes((piece[at] ^ 1,)) + piece[at + 1 :]]


def swapped():
    """The next piece before this one."""
    held = []

    def take(piece):
        held.append(piece)
        return held[::-1] if len(held) == 2 else None

    return take


DAMAGE = {
    "altered": flipped,
    "repeated": lambda piece: [piece, piece],
    "dropped": lambda _: [],
    "cut short": lambda piece: [piece[: len(piece) // 2]],
    "extended": lambda piece: [piece + bytes(40)],
    "invented": lambda piece: [bytes(2) + b"\x00\x10" + bytes(16) + piece],
}


@pytest.mark.parametrize("direction", ["to_target", "to_source"])
@pytest.mark.parametrize("damage", DAMAGE)
async def test_a_handshake_that_a_relay_damages_comes_to_nothing(monkeypatch, damage, direction):
    monkeypatch.setattr(actors.switchboard.upgrade, "STAGE_DEADLINE", 0.5)
    async with world() as (alice, relay, bob):
        relay.malice = Malice(**{direction: Damage(DAMAGE[damage])})
        # It may be tried again, without early bytes, and then be left alone.
        with contextlib.suppress(RefusedError):
            await alice.ask("switchboard", Connect(bob.peer))
            assert len(relay.asked) > 1
        await works(alice, relay, bob)
        await until(lambda: bob.switchboard._stops.handshakes == 0)


@pytest.mark.parametrize("direction", ["to_target", "to_source"])
@pytest.mark.parametrize("damage", [*DAMAGE, "swapped"])
async def test_a_tunnel_that_a_relay_damages_is_broken_and_never_wrong(damage, direction):
    async with world(services={"echo": None}) as (alice, relay, bob), tcp_server(echo) as port:
        await bob.serve("echo", port)
        address = await alice.proxy("bob", "echo")
        malice = Damage(swapped() if damage == "swapped" else DAMAGE[damage], armed=False)
        relay.malice = Malice(**{direction: malice})
        await alice.ask("switchboard", PingPeer(bob.peer))
        ((near,), (far,)) = alice.connections("bob"), bob.connections("alice")
        stream = await trio.open_tcp_stream(*address)
        received = bytearray()

        async def send():
            with contextlib.suppress(trio.BrokenResourceError):
                await stream.send_all(CONTENT)

        async def receive():
            with contextlib.suppress(trio.BrokenResourceError):
                async for piece in stream:
                    received.extend(piece)
                    malice.armed = True
                raise AssertionError("it ended as if all were well")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            nursery.start_soon(receive)
            # What is missing shows when something else comes, such as an answer to a ping.
            while near.end is None and far.end is None:
                with trio.move_on_after(0.2), contextlib.suppress(RefusedError):
                    await alice.ask("switchboard", PingPeer(bob.peer))
        await stream.aclose()
        assert malice.done
        assert CONTENT.startswith(received), "not a byte that the other side has not sent"
        await works(alice, relay, bob)


async def test_a_relay_that_leads_to_somebody_else_is_found_out_and_says_nothing_of_us():
    async with world() as (alice, relay, bob), node("mallory", relay, peers=["alice", "bob"]) as mallory:
        await mallory.ask("switchboard", Connect(relay.peer))
        await until(lambda: mallory.peer in relay.clients)
        relay.malice = Malice(target=mallory.peer)
        reason = await refused(alice, bob)
        assert str(mallory.peer) in reason
        assert not mallory.connections("alice")
        assert not [one for one in mallory.gate.decided if one.peer == alice.peer], "who calls was not even told"
        await works(alice, relay, bob)


async def test_a_relay_that_mirrors_us_is_not_the_peer():
    async with world() as (alice, relay, bob):
        relay.malice = Malice(mirror=True)
        await refused(alice, bob)
        await works(alice, relay, bob)


@pytest.mark.parametrize("source", ["bob", "relay", "carol"])
async def test_a_relay_that_lies_about_who_comes_is_found_out(source):
    async with world() as (alice, relay, bob):
        relay.malice = Malice(source=peer_of(source))
        await refused(alice, bob)
        assert not bob.connections("alice")
        assert not [one for one in bob.gate.decided if one.peer == alice.peer]
        await works(alice, relay, bob)


ANSWERS = {
    "nothing": b"",
    "half a message": OK[:2],
    "a message without end": encode_varint(4096) + b"x" * 100,
    "too long": encode_varint(5000) + b"x" * 5000,
    "no varint": b"\xff" * 20,
    "an empty message": b"\x00",
    "another type": encode_message(HopMessage(HopType.RESERVE)),
    "an unknown status": encode_message(HopMessage(HopType.STATUS, status=4_294_967_295, reason="\u202e" * 200)),
    "OK twice": OK + OK,
    "OK and garbage": OK + b"\x13/multistream/1.0.0\n\x07/noise\n" + b"\x00\x20" + bytes(32),
    "OK and plaintext": OK + b"\x13/multistream/1.0.0\n\x11/plaintext/2.0.0\n",
    "OK with an odd limit": encode_message(
        HopMessage(HopType.STATUS, status=Status.OK, limit=Limit((1 << 32) - 1, (1 << 64) - 1))
    ),
}


@pytest.mark.parametrize("answer", ANSWERS)
async def test_whatever_a_relay_answers_there_is_a_reason_and_an_end(monkeypatch, answer):
    monkeypatch.setattr(actors.switchboard.upgrade, "STAGE_DEADLINE", 0.5)
    monkeypatch.setattr(actors.switchboard.upgrade, "FIRST_ANSWER_DEADLINE", 0.5)
    monkeypatch.setattr(actors.switchboard.circuit_pipes, "CONNECT_DEADLINE", 0.4)
    async with world() as (alice, relay, bob):
        relay.malice = Malice(answer=ANSWERS[answer])
        reason = await refused(alice, bob)
        assert reason.isprintable()
        assert len(reason) < 2000
        await works(alice, relay, bob)


async def test_a_relay_that_does_not_let_a_circuit_end_is_given_some_seconds(monkeypatch):
    # Bytes of a stream that has ended may depend on it, so a peer may be silent for a while; but not for ever.
    monkeypatch.setattr(actors.switchboard.closing, "SILENCE", 3.0)
    monkeypatch.setattr(actors.switchboard.closing, "RETRY", 0.5)
    async with world() as (alice, relay, bob):
        relay.malice = Malice(deaf=True)
        await alice.ask("switchboard", PingPeer(bob.peer))
        ((near, far),) = relay.circuits
        await alice.ask("switchboard", Disconnect(bob.peer))
        assert not alice.connections("bob")
        await until(lambda: near.resets, FAREWELL + 10)
        await until(lambda: far.resets or far.finished, 3 + FAREWELL + 10)
        await works(alice, relay, bob)


async def test_a_flood_of_announced_circuits_is_bounded_and_others_get_in():
    async with world(listen=("/ip4/127.0.0.1/tcp/0",)) as (alice, relay, bob):
        async with LocalNode.open("carol") as carol:
            bob.gate.publish(peers=["alice", "carol"])
            carol.gate.publish(peers=["bob"])
            carol.config.say_where("bob", bob.address)
            offered = [relay.clients[bob.peer].offer(peer_of(f"stranger {number}")) for number in range(200)]
            await until(lambda: sum(bool(one.heard or one.resets) for one in offered) == len(offered), 20)
            statuses = [StopMessage.from_bytes(one.heard).status if one.heard else None for one in offered]
            assert statuses.count(Status.OK) == HANDSHAKES_PER_RELAY
            assert bob.switchboard._stops.handshakes <= HANDSHAKES_PER_RELAY
            with trio.fail_after(10):
                connected = await carol.ask("switchboard", Connect(bob.peer))
            assert connected.connection.path == "direct"
            assert not bob.connections("stranger 1")
        # Those who wait for nothing are displaced by the first who does more than that.
        await works(alice, relay, bob)
