"""Dials under a virtual clock; the transport is pretended, the racing is real."""

import pytest
import trio

from actors.switchboard.dialer import HEAD_START, Dialer, rank
from actors.switchboard.errors import AddressError, NoAddressesError, UnreachableError, WrongPeerError
from protocol.multiaddr import Multiaddr
from protocol.peer_id import PeerId

PEER = PeerId(b"\x12\x20" + b"\x01" * 32)
FAST, SLOW, DEAD = (Multiaddr(f"/ip4/192.0.2.{n}/tcp/4001") for n in (1, 2, 3))


class Transport:
    """Answers after so many seconds, or fails."""

    def __init__(self, answers):
        self.answers = answers
        self.attempts = []
        self.discarded = []

    async def attempt(self, peer, address):
        self.attempts.append((trio.current_time(), address))
        delay, error = self.answers[address]
        await trio.sleep(delay)
        if error is not None:
            raise error
        return address


async def no_names(address):
    return [address]


def dialer(nursery, transport, resolve=no_names, **options):
    return Dialer(
        nursery,
        resolve=resolve,
        attempt=transport.attempt,
        establish=lambda won: won,
        discard=transport.discarded.append,
        now=trio.current_time,
        **options,
    )


async def test_the_first_answer_wins_and_the_rest_is_cancelled(autojump_clock):
    transport = Transport({SLOW: (60, None), FAST: (0.1, None)})
    async with trio.open_nursery() as nursery:
        result = await dialer(nursery, transport).dial(PEER, [SLOW, FAST])
    assert result.connection == FAST
    assert result.elapsed == pytest.approx(HEAD_START + 0.1)
    assert result.tried == (f"{SLOW}: no answer", f"{FAST}: connected in 100 ms")
    assert trio.current_time() < 2, "nobody waited for the slow one"


async def test_a_success_costs_no_head_start(autojump_clock):
    transport = Transport({FAST: (0.01, None), SLOW: (1, None)})
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        await dialer(nursery, transport).dial(PEER, [FAST, SLOW])
        assert trio.current_time() - began == pytest.approx(0.01)
    assert [address for _, address in transport.attempts] == [FAST]


async def test_a_failure_starts_the_next_attempt_at_once(autojump_clock):
    transport = Transport({DEAD: (0.02, AddressError("connection refused")), FAST: (0.01, None)})
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        result = await dialer(nursery, transport).dial(PEER, [DEAD, FAST])
    assert trio.current_time() - began == pytest.approx(0.03)
    assert result.tried == (f"{DEAD}: connection refused", f"{FAST}: connected in 10 ms")


async def test_all_failures_are_told_in_words(autojump_clock):
    transport = Transport({DEAD: (0.1, AddressError("connection refused")), SLOW: (60, None)})
    async with trio.open_nursery() as nursery:
        with pytest.raises(UnreachableError) as caught:
            await dialer(nursery, transport, deadline=5).dial(PEER, [DEAD, SLOW])
    assert caught.value.code == "unreachable"
    assert caught.value.tried == (f"{DEAD}: connection refused", f"{SLOW}: no answer")
    assert "no answer within 5 s" in str(caught.value)


async def test_somebody_else_at_every_address_is_wrong_peer(autojump_clock):
    transport = Transport({FAST: (0.1, WrongPeerError("noise", "somebody else"))})
    async with trio.open_nursery() as nursery:
        with pytest.raises(WrongPeerError):
            await dialer(nursery, transport).dial(PEER, [FAST])


async def test_a_name_is_tried_at_all_its_addresses_beside_the_others(autojump_clock):
    name = Multiaddr("/dns4/home.example/tcp/4001")

    async def resolve(address):
        await trio.sleep(0.05)
        return [DEAD, FAST] if address == name else [address]

    transport = Transport({DEAD: (0.02, AddressError("connection refused")), FAST: (0.01, None), SLOW: (60, None)})
    async with trio.open_nursery() as nursery:
        result = await dialer(nursery, transport, resolve).dial(PEER, [name, SLOW])
    assert result.connection == FAST
    assert result.tried[0] == f"{SLOW}: no answer"
    assert result.tried[1].startswith(f"{name}: ")
    assert result.tried[2] == f"{DEAD}: connection refused"


async def test_a_name_that_does_not_resolve_is_one_failed_attempt(autojump_clock):
    name = Multiaddr("/dns4/home.example/tcp/4001")

    async def resolve(address):
        raise AddressError("the name home.example cannot be resolved")

    async with trio.open_nursery() as nursery:
        with pytest.raises(UnreachableError, match="cannot be resolved"):
            await dialer(nursery, Transport({}), resolve).dial(PEER, [name])


async def test_no_address_is_said_at_once():
    async with trio.open_nursery() as nursery:
        with pytest.raises(NoAddressesError):
            await dialer(nursery, Transport({})).dial(PEER, [])


async def test_askers_share_a_dial_and_one_that_leaves_does_not_end_it(autojump_clock):
    transport = Transport({FAST: (1, None)})
    results = []

    async def ask(shared):
        results.append(await shared.dial(PEER, [FAST]))

    async with trio.open_nursery() as nursery:
        shared = dialer(nursery, transport)
        async with trio.open_nursery() as askers:
            askers.start_soon(ask, shared)
            askers.start_soon(ask, shared)
            with trio.move_on_after(0.1) as gone:
                await shared.dial(PEER, [FAST])
    assert gone.cancelled_caught
    assert len(transport.attempts) == 1
    assert [result.connection for result in results] == [FAST, FAST]
    assert not shared.dialing


async def test_a_defect_in_the_transport_is_not_swallowed(autojump_clock):
    class Broken(Transport):
        async def attempt(self, peer, address):
            raise RuntimeError("defect")

    with pytest.RaisesGroup(
        pytest.RaisesExc(RuntimeError, match="defect"), flatten_subgroups=True, allow_unwrapped=True
    ):
        async with trio.open_nursery() as nursery:
            broken_dialer = dialer(nursery, Broken({}))
            with pytest.raises(UnreachableError):
                await broken_dialer.dial(PEER, [FAST])
            await trio.sleep_forever()


def test_the_order_of_attempts():
    addresses = [
        "/dns4/example.org/tcp/1",
        "/ip4/203.0.113.1/tcp/1".replace("203.0.113.1", "8.8.8.8"),
        "/ip6/2001:4860:4860::8888/tcp/1",
        "/ip4/192.168.1.5/tcp/1",
        "/ip4/127.0.0.1/tcp/1",
    ]
    ranked = sorted((Multiaddr(text) for text in addresses), key=rank)
    assert [str(address) for address in ranked] == list(reversed(addresses))
    ways = [f"/ip4/192.0.2.1/tcp/443{way}" for way in ("", "/ws", "/tls/ws", "/tls/sni/a.example/ws")]
    ranked = sorted((Multiaddr(text) for text in reversed(ways)), key=rank)
    assert [str(address) for address in ranked] == ways


async def test_a_dial_over_a_network_that_is_gone_begins_anew(autojump_clock):
    transport = Transport({SLOW: (60, None), DEAD: (60, None), FAST: (60, None)})
    async with trio.open_nursery() as nursery:
        shared = dialer(nursery, transport)
        results = []

        async def ask(*addresses):
            results.append(await shared.dial(PEER, addresses))

        nursery.start_soon(ask, SLOW)
        await trio.sleep(5)
        nursery.start_soon(ask, FAST)
        await trio.sleep(5)
        transport.answers[FAST] = (0.1, None)
        began = trio.current_time()
        shared.begin_anew()
    assert [result.connection for result in results] == [FAST, FAST]
    assert trio.current_time() - began < 1
    assert not shared.dialing


async def test_a_dial_that_begins_anew_has_its_whole_time_again(autojump_clock):
    transport = Transport({DEAD: (60, None)})
    async with trio.open_nursery() as nursery:
        shared = dialer(nursery, transport)

        async def ask():
            began = trio.current_time()
            with pytest.raises(UnreachableError, match="no answer within 15 s"):
                await shared.dial(PEER, [DEAD])
            assert trio.current_time() - began == pytest.approx(25)

        nursery.start_soon(ask)
        await trio.sleep(10)
        shared.begin_anew()


async def test_an_address_that_is_learned_meanwhile_joins_the_race(autojump_clock):
    transport = Transport({SLOW: (60, None), FAST: (0.1, None)})
    results = []

    async with trio.open_nursery() as nursery:
        shared = dialer(nursery, transport)

        async def ask(*addresses):
            results.append((await shared.dial(PEER, addresses)).connection)

        nursery.start_soon(ask, SLOW)
        await trio.sleep(2)
        nursery.start_soon(ask, SLOW, FAST)
    assert results == [FAST, FAST]
    assert [address for _, address in transport.attempts] == [SLOW, FAST]
