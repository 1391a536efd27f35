from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.peer_id import PeerId
from protocol.policy import (
    BASIC_PROTOCOLS,
    DENY_ALL,
    Decision,
    PeerRule,
    Policy,
    PolicyIndex,
    ServiceRule,
    decide_connection,
    decide_stream,
)

ANNA, BORIS, CARLA, STRANGER = (PeerId.from_public_key(bytes((number,)) * 43) for number in range(4))
PEERS = (PeerRule(ANNA, 3, None, "laptop"), PeerRule(BORIS, 5, 1000.0, ""), PeerRule(CARLA, 7, None, ""))
SERVICES = (ServiceRule("ssh", None), ServiceRule("web", (ANNA, STRANGER)), ServiceRule("none", ()))
POLICY = Policy(version=1, gating=True, peers=PEERS, services=SERVICES)
OPEN = Policy(version=1, gating=False, peers=PEERS, services=SERVICES)
SSH, WEB, NONE = "/peerup/ssh/1.0.0", "/peerup/web/1.0.0", "/peerup/none/1.0.0"


def yes(rule):
    return Decision(allowed=True, rule=rule)


def no(rule):
    return Decision(allowed=False, rule=rule)


@pytest.mark.parametrize(
    ("policy", "peer", "now", "decision"),
    [
        (POLICY, ANNA, 0.0, yes("authorized_keys:3")),
        (POLICY, BORIS, 999.9, yes("authorized_keys:5")),
        (POLICY, BORIS, 1000.0, no("expired:5")),
        (POLICY, BORIS, 1e12, no("expired:5")),
        (POLICY, BORIS, math.nan, no("expired:5")),
        (POLICY, STRANGER, 0.0, no("not-listed")),
        (OPEN, STRANGER, 0.0, yes("gating-off")),
        (OPEN, ANNA, 0.0, yes("authorized_keys:3")),
        (OPEN, BORIS, 1000.0, no("expired:5")),
        (None, ANNA, 0.0, no("no-policy")),
    ],
)
def test_connections(policy, peer, now, decision):
    assert decide_connection(policy, peer, now) == decision
    assert PolicyIndex(policy).decide_connection(peer, now) == decision
    assert decide_connection(PolicyIndex(policy), peer, now) == decision


@pytest.mark.parametrize(
    ("policy", "peer", "protocol", "decision"),
    [
        (POLICY, ANNA, SSH, yes("authorized_keys:3")),
        (POLICY, ANNA, WEB, yes("service:web")),
        (POLICY, CARLA, WEB, no("service:web")),
        (POLICY, ANNA, NONE, no("service:none")),
        (POLICY, ANNA, "/peerup/other/1.0.0", no("unknown-service")),
        (POLICY, ANNA, "/peerup/ssh/1.0.1", no("unknown-protocol")),
        (POLICY, ANNA, "/peerup/ssh/1.0.0/", no("unknown-protocol")),
        (POLICY, ANNA, "/peerup/SSH/1.0.0", no("unknown-protocol")),
        (POLICY, ANNA, "/peerup/kad/1.0.0", no("unknown-protocol")),
        (POLICY, ANNA, "", no("unknown-protocol")),
        (POLICY, ANNA, "/ipfs/kad/1.0.0", no("unknown-protocol")),
        (POLICY, STRANGER, SSH, no("not-listed")),
        (POLICY, STRANGER, WEB, no("not-listed")),  # being in allowed_peers alone is not enough
        (POLICY, BORIS, SSH, no("expired:5")),
        (OPEN, STRANGER, SSH, yes("gating-off")),
        (OPEN, STRANGER, WEB, yes("service:web")),
        (OPEN, STRANGER, NONE, no("service:none")),
        (OPEN, BORIS, SSH, no("expired:5")),
        (None, ANNA, SSH, no("no-policy")),
    ],
)
def test_streams(policy, peer, protocol, decision):
    assert decide_stream(policy, peer, protocol, 2000.0) == decision


@pytest.mark.parametrize("protocol", sorted(BASIC_PROTOCOLS))
def test_basic_protocols_need_the_connection_alone(protocol):
    assert decide_stream(POLICY, ANNA, protocol, 0.0) == yes("authorized_keys:3")
    assert decide_stream(POLICY, STRANGER, protocol, 0.0) == no("not-listed")
    assert decide_stream(POLICY, BORIS, protocol, 1000.0) == no("expired:5")
    assert not DENY_ALL.decide_stream(ANNA, protocol, 0.0).allowed


def test_basic_protocols_are_these():
    assert {
        "/ipfs/ping/1.0.0",
        "/peerup/stream/delivery/1.0.0",
        "/peerup/stream/recall/1.0.0",
        "/ipfs/id/1.0.0",
        "/ipfs/id/push/1.0.0",
        "/pingpong/1.0.0",
        "/libp2p/circuit/relay/0.2.0/hop",
    } == BASIC_PROTOCOLS


def test_of_two_lines_the_stricter_counts():
    for lines in ((None, 500.0), (500.0, None), (900.0, 500.0), (500.0, 900.0)):
        peers = tuple(PeerRule(ANNA, number, expires, "") for number, expires in enumerate(lines, 1))
        index = PolicyIndex(Policy(version=1, gating=True, peers=peers, services=()))
        assert index.decide_connection(ANNA, 499.0).allowed
        assert index.decide_connection(ANNA, 500.0) == no(f"expired:{lines.index(500.0) + 1}")
    for lists in (((ANNA, BORIS), (BORIS,)), ((BORIS,), None), (None, (BORIS,))):
        services = tuple(ServiceRule("ssh", allowed) for allowed in lists)
        policy = Policy(version=1, gating=True, peers=PEERS, services=services)
        assert not decide_stream(policy, ANNA, SSH, 0.0).allowed
        assert decide_stream(policy, BORIS, SSH, 0.0) == yes("service:ssh")


def test_an_expiry_that_is_no_number_admits_nobody():
    policy = Policy(version=1, gating=True, peers=(PeerRule(ANNA, 1, math.nan, ""),), services=())
    assert decide_connection(policy, ANNA, 0.0) == no("expired:1")


@pytest.mark.parametrize("name", ["kad", "invite", "ping", "", "SSH", "a/b", "../x"])
def test_a_service_with_a_reserved_or_impossible_name_stays_refused(name):
    policy = Policy(version=1, gating=True, peers=PEERS, services=(ServiceRule(name, None),))
    assert not decide_stream(policy, ANNA, f"/peerup/{name}/1.0.0", 0.0).allowed


def test_what_a_peer_may_be_told_of():
    index = PolicyIndex(POLICY)
    assert set(index.protocols_for(ANNA, 0.0)) == BASIC_PROTOCOLS | {SSH, WEB}
    assert set(index.protocols_for(CARLA, 0.0)) == BASIC_PROTOCOLS | {SSH}
    assert index.protocols_for(STRANGER, 0.0) == ()
    assert index.protocols_for(BORIS, 1000.0) == ()


def test_next_expiry():
    assert PolicyIndex(POLICY).next_expiry(0.0) == 1000.0
    assert PolicyIndex(POLICY).next_expiry(1000.0) is None
    assert DENY_ALL.next_expiry(0.0) is None


some_peers = st.sampled_from([ANNA, BORIS, CARLA, STRANGER])
times = st.one_of(st.none(), st.floats(-10, 10), st.just(math.nan))
policies = st.builds(
    Policy,
    version=st.just(1),
    gating=st.booleans(),
    peers=st.lists(st.builds(PeerRule, some_peers, st.integers(1, 9), times, st.just("")), max_size=5).map(tuple),
    services=st.lists(
        st.builds(
            ServiceRule, st.sampled_from(["ssh", "web", "kad"]), st.none() | st.lists(some_peers, max_size=3).map(tuple)
        ),
        max_size=4,
    ).map(tuple),
)


@given(
    policies, some_peers, st.sampled_from([SSH, WEB, "/peerup/kad/1.0.0", "/x", *BASIC_PROTOCOLS]), st.floats(-11, 11)
)
def test_decisions_agree_with_the_rules_read_one_by_one(policy, peer, protocol, now):
    lines = [rule for rule in policy.peers if rule.peer == peer]
    fresh = all(rule.expires is None or now < rule.expires for rule in lines)
    connected = fresh if lines else not policy.gating
    assert decide_connection(policy, peer, now).allowed == connected
    rules = [rule for rule in policy.services if protocol == f"/peerup/{rule.service}/1.0.0" and rule.service != "kad"]
    by_service = bool(rules) and all(rule.allowed_peers is None or peer in rule.allowed_peers for rule in rules)
    expected = connected and (protocol in BASIC_PROTOCOLS or by_service)
    assert decide_stream(policy, peer, protocol, now).allowed == expected
    assert (protocol in PolicyIndex(policy).protocols_for(peer, now)) == expected
