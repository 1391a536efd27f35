"""What a broken file leaves in force: exactly what both the policy before and its readable lines allow."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.narrowing import WITHDRAWN, held_back, narrowed_peers
from protocol.peer_id import PeerId
from protocol.policy import PeerRule, Policy, PolicyIndex

PEERS = [PeerId.from_public_key(bytes((number,)) * 43) for number in range(5)]
STRANGER = PeerId.from_public_key(bytes((9,)) * 43)
A, B = PEERS[:2]

times = st.sampled_from([None, 0.0, 100.0, 200.0, 300.0, WITHDRAWN, math.inf, math.nan])
rules = st.lists(
    st.builds(PeerRule, st.sampled_from(PEERS), st.integers(1, 99), times, st.sampled_from(["", "laptop"])), max_size=8
).map(tuple)
MOMENTS = (-1.0, 0.0, 50.0, 150.0, 250.0, 1e12)


def index(peers, *, gating=True):
    return PolicyIndex(Policy(1, gating, tuple(peers), ()))


def allowed(peers, *, gating=True):
    decided = index(peers, gating=gating)
    return {
        (peer, moment)
        for peer in (*PEERS, STRANGER)
        for moment in MOMENTS
        if decided.decide_connection(peer, moment).allowed
    }


def listed(peers):
    """Who is let in by a line of their own, with gating off: more than a guest."""
    decided = index(peers, gating=False)
    return {
        (peer, moment)
        for peer in PEERS
        for moment in MOMENTS
        if decided.decide_connection(peer, moment).rule.startswith("authorized_keys:")
    }


@settings(deadline=None)
@given(rules, rules)
def test_it_is_the_intersection(before, readable):
    assert allowed(narrowed_peers(before, readable)) == allowed(before) & allowed(readable)


@settings(deadline=None)
@given(rules, rules)
def test_with_gating_off_it_allows_nothing_that_either_refuses(before, readable):
    after = narrowed_peers(before, readable)
    assert allowed(after, gating=False) <= allowed(before, gating=False) & allowed(readable, gating=False)
    assert listed(after) <= listed(before) & listed(readable)
    assert {(STRANGER, moment) for moment in MOMENTS} <= allowed(after, gating=False)


@settings(deadline=None)
@given(rules, st.lists(rules, max_size=4))
def test_one_broken_file_after_another_only_narrows(before, readings):
    for gating in (True, False):
        now = before
        for readable in readings:
            after = narrowed_peers(now, readable)
            assert allowed(after, gating=gating) <= allowed(now, gating=gating)
            assert narrowed_peers(after, readable) == after
            now = after


@settings(deadline=None)
@given(rules, rules)
def test_what_waits_is_what_the_lines_would_allow_more(before, readable):
    after = narrowed_peers(before, readable)
    waiting = {rule.peer for rule in held_back(after, readable)}
    missing = {peer for peer, _ in allowed(readable) - allowed(after)}
    assert missing <= waiting


@pytest.mark.parametrize(
    ("before", "readable", "after"),
    [
        ((PeerRule(A, 1, None, "a"),), (), ()),
        ((PeerRule(A, 1, None, "a"),), (PeerRule(A, 7, None, "b"),), (PeerRule(A, 7, None, "b"),)),
        ((), (PeerRule(A, 1, None, ""),), ()),
        ((PeerRule(A, 1, 50.0, ""),), (PeerRule(A, 1, None, ""),), (PeerRule(A, 1, 50.0, ""),)),
        ((PeerRule(A, 1, None, ""),), (PeerRule(A, 1, 50.0, ""),), (PeerRule(A, 1, 50.0, ""),)),
        ((PeerRule(A, 1, 50.0, ""),), (PeerRule(B, 1, None, ""),), (PeerRule(A, 1, WITHDRAWN, ""),)),
    ],
)
def test_single_cases(before, readable, after):
    assert narrowed_peers(before, readable) == after


def test_a_withdrawn_line_is_told_as_such():
    (rule,) = narrowed_peers((PeerRule(A, 4, 50.0, ""),), ())
    assert index([rule]).decide_connection(A, 0.0).rule == "withdrawn:4"
