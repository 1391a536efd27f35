"""Every implementation as the client, the relay and the listener of a circuit (libp2p specs, relay/circuit-v2.md).

The chains of foreign implementations are there to trust the peers and these tests themselves.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from pathlib import Path

import pytest
import trio

from protocol.circuit.messages import Status
from tests.interop import nodes, raw_circuit
from tests.interop.chains import (
    BEHIND,
    OURS,
    SERVICE,
    Cells,
    Chain,
    circuit,
    foreign_chain,
    foreign_relay,
    only_relayed,
    relayed_connection,
)
from tests.interop.content import sha256
from tests.interop.ours import OurPeer
from tests.interop.peers import Answer, do, finished, head, opened, waiting_for

pytestmark = [pytest.mark.interop, pytest.mark.timeout(600)]  # the first test may have to build the peers

MB = 1_000_000
PROTOCOL = "/peerup/test/1.0.0"
FOREIGN = ("go", "js")
FOREIGN_CHAINS = [
    *((client, relay, listener) for client in FOREIGN for relay in FOREIGN for listener in FOREIGN),
    *(("rust", "go", "go"), ("go", "rust", "go"), ("go", "go", "rust"), ("rust", "rust", "rust")),
]
LONG_FOREIGN_CHAINS = [("go", "go", "go"), ("go", "js", "go"), ("js", "go", "js"), ("rust", "rust", "rust")]


async def exchange(chain: Chain, **options: object) -> Answer:
    return await chain.client.ask(
        "exchange", peer=chain.listener.peer_id, protocol=PROTOCOL, timeout=nodes.TRANSFER, **options
    )


@pytest.mark.parametrize("names", FOREIGN_CHAINS, ids="-".join)
async def test_foreign_peers_reach_each_other_through_a_foreign_relay(start_foreign, names):
    _, relay_name, listener_name = names
    async with foreign_chain(start_foreign, names) as chain:
        await do(chain.listener, "serve", protocol=PROTOCOL, behaviour="echo")
        await do(chain.client, "dial", address=chain.address)
        outbound = await relayed_connection(chain.client, chain.listener)
        inbound = await relayed_connection(chain.listener, chain.client)
        assert (outbound["direction"], inbound["direction"]) == ("outbound", "inbound")
        assert not outbound.get("limited") or relay_name == "rust"  # which limits each circuit's duration
        assert f"/p2p/{chain.relay.peer_id}/p2p-circuit" in outbound["remote"]
        if listener_name != "rust":  # whose peer records nobody else understands
            assert (await do(chain.client, "identify", peer=chain.listener.peer_id))["agent"]
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
        start_foreign(client_name, BEHIND) as client,
        start_foreign("go", BEHIND) as listener,
    ):
        await do(listener, "dial", address=relay.address)  # being connected is not enough
        refused = await client.ask("dial", address=circuit(relay, listener))
        assert not refused["ok"]
        assert "NO_RESERVATION" in refused["error"]


@pytest.mark.parametrize("relay_name", FOREIGN)
async def test_a_foreign_relay_that_is_full_refuses_a_reservation(start_foreign, relay_name):
    async with (
        foreign_relay(start_foreign, relay_name, reservations=1) as relay,
        start_foreign("go", BEHIND) as first,
        start_foreign("go", BEHIND) as second,
    ):
        await do(first, "reserve", address=relay.address)
        refused = await second.ask("reserve", address=relay.address)
        assert (refused["ok"], refused["status"]) == (False, "RESERVATION_REFUSED")


@pytest.mark.parametrize("relay_name", FOREIGN)
async def test_a_foreign_relay_tells_its_limits_and_keeps_to_them(start_foreign, relay_name):
    limits = {"data": 1_000_000, "seconds": 600}
    async with (
        foreign_relay(start_foreign, relay_name, ttl=1800, **limits) as relay,
        start_foreign("go", BEHIND) as listener,
        start_foreign("go", BEHIND) as client,
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


@pytest.mark.parametrize("timing", raw_circuit.TIMINGS)
@pytest.mark.parametrize(("relay_name", "listener_name"), [*itertools.product(FOREIGN, FOREIGN), ("rust", "go")])
async def test_a_foreign_relay_keeps_bytes_that_come_before_its_answer(
    start, start_foreign, relay_name, listener_name, timing
):
    """Our client sends the opening of the inner connection straight behind CONNECT, which saves a round trip."""
    async with (
        foreign_relay(start_foreign, relay_name) as relay,
        start_foreign(listener_name, BEHIND) as listener,
        start("peerup") as ours,
    ):
        assert isinstance(ours, OurPeer)
        await do(listener, "reserve", address=relay.address)
        await do(ours, "dial", address=relay.address)
        with waiting_for("a circuit", listener, 20):
            async with raw_circuit.connect(ours, relay.peer_id, listener.peer_id, timing) as (client, result):
                assert (str(result.peer_id), result.muxer) == (listener.peer_id, "/yamux/1.0.0")
                assert client.limit is None or relay_name == "rust"
                await relayed_connection(listener, ours)


@pytest.mark.parametrize("relay_name", [*FOREIGN, "rust"])
async def test_a_foreign_relay_that_refuses_says_why_to_a_client_that_has_sent_more(start, start_foreign, relay_name):
    async with (
        foreign_relay(start_foreign, relay_name) as relay,
        start_foreign("go", BEHIND) as listener,
        start("peerup") as ours,
    ):
        assert isinstance(ours, OurPeer)
        await do(ours, "dial", address=relay.address)
        with waiting_for("a refusal", relay, 20), pytest.raises(raw_circuit.RefusedError) as refused:
            async with raw_circuit.connect(ours, relay.peer_id, listener.peer_id, "together"):
                pass
        assert refused.value.refusal.status == Status.NO_RESERVATION


# ---- our node in each place of a chain; never two of ours that reach each other, which other tests have

RELAYS = (*FOREIGN, OURS)
WEB = f"/peerup/{SERVICE}/1.0.0"


@pytest.fixture
def cells(start_foreign, tmp_path) -> Cells:
    return Cells(start_foreign, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("relay_name", "foreign"), [*itertools.product(RELAYS, FOREIGN), ("rust", "go"), ("peerup", "rust")]
)
async def test_both_ways_between_us_and_a_foreign_peer(cells, relay_name, foreign):
    """Dialled by the other and dialling it: identify, pings, and a hundred megabytes each way."""
    async with cells.ours_and_theirs(relay_name, foreign) as (ours, friend, relay):
        await do(friend, "dial", address=relay.circuit_to(ours.peer_id))
        assert (await relayed_connection(friend, ours))["direction"] == "outbound"
        assert (await do(friend, "identify", peer=ours.peer_id))["record"] == "verified"
        assert len((await do(friend, "ping", peer=ours.peer_id, count=2))["seconds"]) == 2
        answer = await do(
            friend, "exchange", peer=ours.peer_id, protocol=WEB, send=100 * MB, seed=3, timeout=nodes.TRANSFER
        )
        assert json.loads(head(answer)) == {"received": 100 * MB, "sha256": sha256(100 * MB, 3)}
        await only_relayed(ours, friend.peer_id)

        await do(friend, "disconnect", peer=ours.peer_id)
        await do(friend, "wait-closed", peer=ours.peer_id)
        await do(friend, "serve", protocol=WEB, behaviour="sink")
        with waiting_for("100 MB to go through", friend, nodes.TRANSFER):
            sunk = await nodes.upload(await nodes.proxy_port(ours, "friend", SERVICE), 100 * MB, 2)
        assert sunk == {"received": 100 * MB, "sha256": sha256(100 * MB, 2)}
        assert (await relayed_connection(friend, ours))["direction"] == "inbound"
        await only_relayed(ours, friend.peer_id)


@pytest.mark.slow
@pytest.mark.parametrize(("client_name", "listener_name"), list(itertools.product(FOREIGN, FOREIGN)))
async def test_foreign_peers_reach_each_other_through_our_relay(cells, start_foreign, client_name, listener_name):
    async with (
        cells.relay(OURS) as relay,
        start_foreign(client_name, BEHIND) as client,
        start_foreign(listener_name, BEHIND) as listener,
    ):
        await relay.authorize(client.peer_id, listener.peer_id)
        granted = await do(listener, "reserve", address=relay.address)
        behind = relay.circuit_to(listener.peer_id)
        assert behind in granted["addresses"]
        assert granted["expire"] > time.time() + 60
        if listener_name == "go":  # which verifies it; js-libp2p does not look at it
            assert granted["voucher"]
        await do(listener, "serve", protocol=PROTOCOL, behaviour="sink")
        await do(client, "dial", address=behind)
        for one, other in ((client, listener), (listener, client)):
            assert (await relayed_connection(one, other))["direction"]
        assert (await do(client, "identify", peer=listener.peer_id))["agent"]
        assert len((await do(client, "ping", peer=listener.peer_id, count=2))["seconds"]) == 2
        answer = await do(
            client, "exchange", peer=listener.peer_id, protocol=PROTOCOL, send=100 * MB, seed=1, timeout=nodes.TRANSFER
        )
        assert json.loads(head(answer)) == {"received": 100 * MB, "sha256": sha256(100 * MB, 1)}


@pytest.mark.slow
@pytest.mark.parametrize("foreign", FOREIGN)
async def test_our_relay_refuses_strangers_on_either_side(cells, start_foreign, foreign):
    """A listed peer can neither be reached by a stranger nor reach one; a stranger gets no reservation."""
    async with (
        cells.relay(OURS) as relay,
        start_foreign(foreign) as listed,
        start_foreign(foreign) as stranger,
    ):
        await relay.authorize(listed.peer_id)
        assert not (await stranger.ask("reserve", address=relay.address))["ok"]
        await do(listed, "reserve", address=relay.address)
        reached = await stranger.ask("dial", address=relay.circuit_to(listed.peer_id))
        assert not reached["ok"]
        nobody = await listed.ask("dial", address=relay.circuit_to(stranger.peer_id))
        assert not nobody["ok"]
        assert (await do(listed, "connections"))["connections"]  # it is still connected to the relay


@pytest.mark.slow
async def test_our_relay_tells_its_limits_and_keeps_to_them(cells, start_foreign):
    limits = ("circuit.data=1MB", "circuit.duration=10m", "reservation_ttl=30m", "reservations.total=1")
    async with (
        cells.relay(OURS, *limits) as relay,
        start_foreign("go", BEHIND) as listener,
        start_foreign("js", BEHIND) as client,
        start_foreign("go", BEHIND) as late,
    ):
        await relay.authorize(listener.peer_id, client.peer_id, late.peer_id)
        granted = await do(listener, "reserve", address=relay.address)
        assert (granted["data"], granted["seconds"], granted["voucher"]) == (MB, 600, True)
        assert 1750 < granted["expire"] - time.time() < 1850
        refused = await late.ask("reserve", address=relay.address)
        assert (refused["ok"], refused["status"]) == (False, "RESERVATION_REFUSED")
        await do(listener, "serve", protocol=PROTOCOL, behaviour="sink")
        await do(client, "dial", address=relay.circuit_to(listener.peer_id))
        seen = await relayed_connection(client, listener)
        assert seen["limited"]
        assert (0 < seen["data"] <= MB, 540 < seen["seconds"] <= 600) == (True, True)
        seen = await relayed_connection(listener, client)
        assert (seen["limited"], seen["data"], seen["seconds"]) == (True, MB, 600)
        chain = Chain(client, listener, listener, "")
        assert (await exchange(chain, send=500_000))["ok"]
        beyond = await exchange(chain, send=2 * MB)
        assert not beyond["ok"], beyond
        (first, second) = await finished(listener, PROTOCOL, count=2)
        assert (first["received"], second["reset"]) == (500_000, True)
        assert second["received"] < 500_000


@pytest.mark.slow
@pytest.mark.parametrize("listener_name", [*FOREIGN, "rust"])
async def test_our_relay_keeps_bytes_that_come_before_its_answer(cells, start, start_foreign, listener_name):
    async with (
        cells.relay(OURS) as relay,
        start_foreign(listener_name, BEHIND) as listener,
        start("peerup") as ours,
    ):
        assert isinstance(ours, OurPeer)
        await relay.authorize(listener.peer_id, ours.peer_id)
        await do(listener, "reserve", address=relay.address)
        await do(ours, "dial", address=relay.address)
        for timing in raw_circuit.TIMINGS:
            with waiting_for(f"a circuit with its first bytes {timing}", listener, 20):
                async with raw_circuit.connect(ours, relay.peer_id, listener.peer_id, timing) as (client, result):
                    assert (str(result.peer_id), client.limit) == (listener.peer_id, None)
                    if result.muxer is not None:  # or else the connection is not there before one is agreed on
                        await relayed_connection(listener, ours)
            await do(listener, "wait-closed", peer=ours.peer_id)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FOREIGN, "rust"])
async def test_a_stop_of_our_relay_cuts_nothing_that_runs_between_foreign_peers(cells, start_foreign, name):
    """Each of them would end all that runs if it were told to go away; so they are told when nothing runs any more."""
    size = (6 if name == "js" else 24) * MB  # of a transfer that takes longer than 10 s js-libp2p despairs
    async with (
        cells.relay(OURS, "drain_time=10m", "bytes_per_second.total=2MB") as relay,
        start_foreign(name, BEHIND) as client,
        start_foreign(name, BEHIND) as listener,
    ):
        await relay.authorize(client.peer_id, listener.peer_id)
        await do(listener, "reserve", address=relay.address)
        await do(listener, "serve", protocol=PROTOCOL, behaviour="sink")
        await do(client, "dial", address=relay.circuit_to(listener.peer_id))
        answers: list[Answer] = []
        async with trio.open_nursery() as nursery:

            async def transfer() -> None:
                chain = Chain(client, listener, listener, "")
                answers.append(await exchange(chain, send=size, seed=4))

            nursery.start_soon(transfer)
            await opened(listener, PROTOCOL)
            assert relay.node is not None
            os.kill(relay.node.daemon_pid, signal.SIGTERM)
            log = relay.node.home.parent / "relay.log"
            with waiting_for("the drain to begin", listener, 30):
                await written(log, "nothing new is granted")
            if name == "go":  # which asks again though it has one
                again = await listener.ask("reserve", address=relay.address)
                assert (again["ok"], again["status"]) == (False, "RESERVATION_REFUSED")
        (answer,) = answers
        assert json.loads(head(answer)) == {"received": size, "sha256": sha256(size, 4)}
        await do(client, "wait-closed", peer=relay.peer_id, timeout=60)
        with waiting_for("the relay to end, long before its time is up", client, 60):
            await written(log, "no circuit is left")


async def written(log: Path, words: str) -> None:
    while words not in await trio.Path(log).read_text():  # noqa: ASYNC110  # a file tells nobody
        await trio.sleep(0.05)
