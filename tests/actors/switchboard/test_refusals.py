"""Peers that do not let us in are not asked again for every client."""

import itertools

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from actors.switchboard.errors import HandshakeError, NotAuthorisedError
from actors.switchboard.refusals import LINE_INTERVAL, LONGEST, REMEMBERED, Rare, Refusals
from protocol.messages.switchboard import Connect, NeedPeer, OpenStream
from protocol.peer_id import PeerId
from supervisor.errors import RefusedError
from tests.actors.local_node import two_nodes, until

from .support import peer_of

PEER, OTHER = peer_of("one"), peer_of("other")


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def is_asked(refusals, peer=PEER):
    try:
        refusals.check(peer)
    except NotAuthorisedError:
        return False
    return True


def test_the_first_refusal_is_not_held_against_the_peer():
    refusals = Refusals(Clock())
    refusals.note(PEER)
    assert is_asked(refusals)
    assert PEER in refusals


def test_the_wait_grows_up_to_its_limit():
    clock = Clock()
    refusals = Refusals(clock)
    waits = []
    for _ in range(12):
        refusals.note(PEER)
        began = clock.now
        while not is_asked(refusals):
            clock.now += 0.25
        waits.append(clock.now - began)
    assert waits == [0, 1, 2, 4, 8, 16] + [LONGEST] * 6
    assert is_asked(refusals, OTHER)


@pytest.mark.parametrize("news", [lambda refusals: refusals.forget(PEER), lambda refusals: refusals.clear()])
def test_what_may_have_changed_its_mind_ends_the_wait(news):
    clock = Clock()
    refusals = Refusals(clock)
    for _ in range(5):
        refusals.note(PEER)
    assert not is_asked(refusals)
    news(refusals)
    assert is_asked(refusals)
    refusals.note(PEER)
    assert is_asked(refusals), "it begins anew"


def test_only_so_many_are_remembered():
    refusals = Refusals(Clock())
    peers = [PeerId(b"\x12\x20" + number.to_bytes(32, "big")) for number in range(REMEMBERED + 5)]
    for peer in peers:
        refusals.note(peer)
    assert [peer in refusals for peer in peers] == [False] * 5 + [True] * REMEMBERED


@given(st.lists(st.floats(0.001, 100), min_size=1, max_size=200))
def test_lines_are_rare_and_count_what_they_leave_out(gaps):
    clock = Clock()
    rare = Rare(clock)
    said, unsaid = [], 0
    for gap in gaps:
        more = rare.note("x")
        if more is None:
            unsaid += 1
        else:
            assert more == "" or more.startswith(f" (and {unsaid} times more in ")
            assert (more == "") == (unsaid == 0)
            said.append(clock.now)
            unsaid = 0
        clock.now += gap
    assert said[0] == 100.0, "the first is always said"
    assert all(later - earlier >= LINE_INTERVAL for earlier, later in itertools.pairwise(said))


# ---- in a switchboard


async def refused(node, peer):
    with pytest.raises(RefusedError) as caught:
        await node.ask("switchboard", OpenStream(peer, ("/peerup/echo/1.0.0",)))
    return caught.value.code


def dials(node):
    return sum(
        sample.value for sample in node.switchboard.context.metrics.samples() if sample.name == "peerup_dials_total"
    )


async def test_a_client_that_tries_without_end_does_not_have_the_peer_dialled_each_time():
    async with two_nodes() as (alice, bob):
        bob.gate.publish(peers=[])
        before = dials(alice)
        codes = set()
        with trio.move_on_after(2.5):
            while True:
                codes.add(await refused(alice, bob.peer))
        assert codes == {"not-authorised"}
        assert 2 <= dials(alice) - before <= 5, "at once, once more, and then after one and two seconds"
        # A person who asks is not put off, and when the answer is another one everybody profits.
        with pytest.raises(RefusedError):
            await alice.ask("switchboard", Connect(bob.peer))
        bob.gate.publish(peers=["alice"])
        await alice.ask("switchboard", Connect(bob.peer))
        assert bob.peer not in alice.switchboard._reach.refusals


async def test_the_peers_own_coming_ends_the_wait():
    async with two_nodes() as (alice, bob):
        bob.gate.publish(peers=[])
        for _ in range(3):
            await refused(alice, bob.peer)
        assert bob.peer in alice.switchboard._reach.refusals
        bob.gate.publish(peers=["alice"])
        bob.config.say_where("alice", alice.address)
        await until(lambda: bob.switchboard._reach.book.addresses(alice.peer))
        await bob.ask("switchboard", Connect(alice.peer))
        await until(lambda: bob.peer not in alice.switchboard._reach.refusals)


@pytest.mark.parametrize("what", ["policy", "configuration"])
async def test_a_change_here_ends_all_waits(what):
    async with two_nodes() as (alice, bob):
        bob.gate.publish(peers=[])
        await refused(alice, bob.peer)
        assert bob.peer in alice.switchboard._reach.refusals
        if what == "policy":
            alice.gate.publish(peers=["bob", "carol"])
        else:
            alice.config.say_where("bob", bob.address)
        await until(lambda: bob.peer not in alice.switchboard._reach.refusals)


async def test_a_needed_peer_that_refuses_us_fills_no_log():
    import loguru

    lines = []
    sink = loguru.logger.add(lambda line: lines.append(line.record["message"]), level="INFO")
    try:
        async with two_nodes() as (alice, bob):
            bob.gate.publish(peers=[])
            keeper = alice.switchboard._reach.keeper
            alice.tell("switchboard", NeedPeer(bob.peer))
            await until(lambda: keeper.last_failure(bob.peer))
            for _ in range(6):
                keeper.retry(bob.peer)
                await trio.sleep(0.1)
            about = [line for line in lines if str(bob.peer) in line]
            told = [line for line in about if "not connected to" in line]
            ends = [line for line in about if "connection to" in line and "ended" in line]
            assert len(told) == 1, about
            assert len(ends) <= 1, about
    finally:
        loguru.logger.remove(sink)


@pytest.mark.parametrize(
    ("stage", "said"),
    [("judgement", "it hung up"), ("muxer", "agreeing on multiplexing: it hung up"), ("new", "new: it hung up")],
)
def test_people_are_not_told_our_names_for_stages(stage, said):
    error = HandshakeError(stage, "it hung up")
    assert (str(error), error.stage) == (said, stage)
