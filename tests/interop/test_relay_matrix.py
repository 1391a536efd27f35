"""Every implementation as the client, the relay and the listener of a circuit (libp2p specs, relay/circuit-v2.md).

The chains of foreign implementations are there to trust the peers and these tests themselves.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import AsyncIterator
from typing import NamedTuple

import pytest
import trio

from protocol.circuit.messages import Status
from tests.interop import raw_circuit
from tests.interop.conftest import StartForeign
from tests.interop.content import sha256
from tests.interop.ours import OurPeer
from tests.interop.peers import Answer, ForeignPeer, Peer, do, finished, head, waiting_for

pytestmark = [pytest.mark.interop, pytest.mark.timeout(600)]  # the first test may have to build the peers

MB = 1_000_000
PROTOCOL = "/peerup/test/1.0.0"
FOREIGN = ("go", "js")
FOREIGN_CHAINS = [(client, relay, listener) for client in FOREIGN for relay in FOREIGN for listener in FOREIGN]
LONG_FOREIGN_CHAINS = [("go", "go", "go"), ("go", "js", "go"), ("js", "go", "js")]


class Chain(NamedTuple):
    """A client, a relay, and a listener that has a reservation there; `address` is the listener's behind the relay."""

    client: Peer
    relay: Peer
    listener: Peer
    address: str


@contextlib.asynccontextmanager
async def foreign_relay(start: StartForeign, name: str, **limits: int) -> AsyncIterator[ForeignPeer]:
    async with start(name) as relay:
        await do(relay, "relay-serve", **limits)
        yield relay


@contextlib.asynccontextmanager
async def foreign_chain(start: StartForeign, names: tuple[str, str, str], **limits: int) -> AsyncIterator[Chain]:
    client_name, relay_name, listener_name = names
    async with (
        foreign_relay(start, relay_name, **limits) as relay,
        start(listener_name) as listener,
        start(client_name) as client,
    ):
        await do(listener, "reserve", address=relay.address)
        yield Chain(client, relay, listener, circuit(relay, listener))


def circuit(relay: Peer, listener: Peer) -> str:
    """The address of the listener behind the relay."""
    return f"{relay.address}/p2p-circuit/p2p/{listener.peer_id}"


async def exchange(chain: Chain, **options: object) -> Answer:
    return await chain.client.ask("exchange", peer=chain.listener.peer_id, protocol=PROTOCOL, timeout=90, **options)


async def relayed_connection(peer: Peer, other: Peer) -> Answer:
    """The connection through a relay; the side that was dialled knows of it last."""
    with waiting_for(f"a relayed connection to {other.name}", peer, 20):
        while True:
            for each in (await do(peer, "connections"))["connections"]:
                if each["peer"] == other.peer_id and each["relayed"]:
                    found: Answer = each
                    return found
            await trio.sleep(0.01)
    raise AssertionError("unreachable")


@pytest.mark.parametrize("names", FOREIGN_CHAINS, ids="-".join)
async def test_foreign_peers_reach_each_other_through_a_foreign_relay(start_foreign, names):
    async with foreign_chain(start_foreign, names) as chain:
        await do(chain.listener, "serve", protocol=PROTOCOL, behaviour="echo")
        await do(chain.client, "dial", address=chain.address)
        outbound = await relayed_connection(chain.client, chain.listener)
        inbound = await relayed_connection(chain.listener, chain.client)
        assert (outbound["direction"], inbound["direction"]) == ("outbound", "inbound")
        assert not outbound["limited"]
        assert f"/p2p/{chain.relay.peer_id}/p2p-circuit" in outbound["remote"]
        assert (await do(chain.client, "identify", peer=chain.listener.peer_id))["record"] == "verified"
        assert len((await do(chain.client, "ping", peer=chain.listener.peer_id, count=2))["seconds"]) == 2
        answer = await exchange(chain, send=3 * MB, seed=7)
        assert answer["received_sha256"] == sha256(3 * MB, 7), answer
        (seen,) = await finished(chain.listener, PROTOCOL)
        assert (seen["received"], seen["sha256"], seen["reset"]) == (3 * MB, sha256(3 * MB, 7), False)


@pytest.mark.slow
@pytest.mark.parametrize("names", LONG_FOREIGN_CHAINS, ids="-".join)
async def test_a_hundred_megabytes_between_foreign_peers(start_foreign, names):
    async with foreign_chain(start_foreign, names) as chain:
        await do(chain.listener, "serve", protocol=PROTOCOL, behaviour="sink")
        await do(chain.client, "dial", address=chain.address)
        answer = await exchange(chain, send=100 * MB, seed=1)
        assert answer["ok"], answer
        assert json.loads(head(answer)) == {"received": 100 * MB, "sha256": sha256(100 * MB, 1)}


@pytest.mark.parametrize("relay_name", FOREIGN)
@pytest.mark.parametrize("client_name", FOREIGN)
async def test_a_foreign_relay_refuses_a_circuit_to_a_peer_without_a_reservation(
    start_foreign, relay_name, client_name
):
    async with (
        foreign_relay(start_foreign, relay_name) as relay,
        start_foreign(client_name) as client,
        start_foreign("go") as listener,
    ):
        await do(listener, "dial", address=relay.address)  # being connected is not enough
        refused = await client.ask("dial", address=circuit(relay, listener))
        assert not refused["ok"]
        assert "NO_RESERVATION" in refused["error"]


@pytest.mark.parametrize("relay_name", FOREIGN)
async def test_a_foreign_relay_that_is_full_refuses_a_reservation(start_foreign, relay_name):
    async with (
        foreign_relay(start_foreign, relay_name, reservations=1) as relay,
        start_foreign("go") as first,
        start_foreign("go") as second,
    ):
        await do(first, "reserve", address=relay.address)
        refused = await second.ask("reserve", address=relay.address)
        assert (refused["ok"], refused["status"]) == (False, "RESERVATION_REFUSED")


@pytest.mark.parametrize("relay_name", FOREIGN)
async def test_a_foreign_relay_tells_its_limits_and_keeps_to_them(start_foreign, relay_name):
    limits = {"data": 1_000_000, "seconds": 600}
    async with (
        foreign_relay(start_foreign, relay_name, ttl=1800, **limits) as relay,
        start_foreign("go") as listener,
        start_foreign("go") as client,
    ):
        # js-libp2p tells the duration in its own unit, milliseconds, where the specification has seconds.
        told = limits | ({"seconds": 600_000} if relay_name == "js" else {})
        granted = await do(listener, "reserve", address=relay.address)
        assert granted["voucher"]
        assert 1750 < granted["expire"] - time.time() < 1850
        assert {name: granted[name] for name in told} == told
        await do(listener, "serve", protocol=PROTOCOL, behaviour="sink")
        await do(client, "dial", address=circuit(relay, listener))
        chain = Chain(client, relay, listener, "")
        for one, other in ((client, listener), (listener, client)):
            connection = await relayed_connection(one, other)
            assert connection["limited"]
            assert {name: connection[name] for name in told} == told
        assert (await exchange(chain, send=500_000))["ok"]
        beyond = await exchange(chain, send=2 * MB)
        assert not beyond["ok"], beyond


@pytest.mark.parametrize("relay_name", FOREIGN)
async def test_our_reading_of_a_reservation_at_a_foreign_relay(start, start_foreign, relay_name):
    """Its voucher verifies, and others reach us where it says; where it names no address, at the one we know."""
    async with (
        foreign_relay(start_foreign, relay_name, ttl=1800, data=MB, seconds=600) as relay,
        start("peerup") as ours,
    ):
        assert isinstance(ours, OurPeer)
        await do(ours, "dial", address=relay.address)
        with waiting_for("a reservation", relay, 20):
            grant = await raw_circuit.reserve(ours, relay.address)
        assert grant.voucher is not None
        assert (str(grant.voucher.relay), str(grant.voucher.peer)) == (relay.peer_id, ours.peer_id)
        assert 1750 < grant.expire - time.time() < 1850
        assert circuit(relay, ours) in [str(address) for address in grant.addresses]
        assert grant.limit is not None
        assert grant.limit.data == MB


@pytest.mark.parametrize("timing", ["late", "behind", "together"])
@pytest.mark.parametrize("listener_name", FOREIGN)
@pytest.mark.parametrize("relay_name", FOREIGN)
async def test_a_foreign_relay_keeps_bytes_that_come_before_its_answer(
    start, start_foreign, relay_name, listener_name, timing
):
    """Our client sends the opening of the inner connection straight behind CONNECT, which saves a round trip."""
    async with (
        foreign_relay(start_foreign, relay_name) as relay,
        start_foreign(listener_name) as listener,
        start("peerup") as ours,
    ):
        assert isinstance(ours, OurPeer)
        await do(listener, "reserve", address=relay.address)
        await do(ours, "dial", address=relay.address)
        with waiting_for("a circuit", listener, 20):
            async with raw_circuit.connect(ours, relay.peer_id, listener.peer_id, timing) as (client, result):
                assert (str(result.peer_id), result.muxer) == (listener.peer_id, "/yamux/1.0.0")
                assert client.limit is None
                await relayed_connection(listener, ours)


@pytest.mark.parametrize("relay_name", FOREIGN)
async def test_a_foreign_relay_that_refuses_says_why_to_a_client_that_has_sent_more(start, start_foreign, relay_name):
    async with (
        foreign_relay(start_foreign, relay_name) as relay,
        start_foreign("go") as listener,
        start("peerup") as ours,
    ):
        assert isinstance(ours, OurPeer)
        await do(ours, "dial", address=relay.address)
        with waiting_for("a refusal", relay, 20), pytest.raises(raw_circuit.RefusedError) as refused:
            async with raw_circuit.connect(ours, relay.peer_id, listener.peer_id, "together"):
                pass
        assert refused.value.refusal.status == Status.NO_RESERVATION
