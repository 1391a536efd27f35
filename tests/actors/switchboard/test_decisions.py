from actors.switchboard.decisions import NAMED, NAMED_PER_SECOND, SINGLES, DecisionLog
from protocol.peer_id import PeerId
from protocol.policy import Decision

DENIED = Decision(allowed=False, rule="not-listed")


def peer(number):
    return PeerId(b"\x12\x20" + number.to_bytes(32, "big"))


def test_few_decisions_are_told_at_once_and_name_their_peer():
    told = []
    log = DecisionLog(told.append)
    log.note(peer(1), "connection", DENIED, "direct tcp /ip4/192.0.2.1/tcp/1", 0.0)
    log.note(peer(1), "/x", Decision(allowed=True, rule="service:x"), "direct", 0.1)
    assert [(one.peer, one.subject, one.allowed, one.rule, one.count) for one in told] == [
        (peer(1), "connection", False, "not-listed", 1),
        (peer(1), "/x", True, "service:x", 1),
    ]
    assert not log.pending


def test_a_flood_of_strangers_becomes_a_count():
    told = []
    log = DecisionLog(told.append)
    for number in range(10_000):
        log.note(peer(number), "connection", DENIED, f"direct tcp /ip4/192.0.2.1/tcp/{number % 60000}", 0.5)
    log.flush()
    assert len(told) <= 2 * SINGLES + 1
    assert sum(one.count for one in told) == 10_000
    assert told[-1].peer is None


def test_a_flood_of_strangers_does_not_hide_who_was_let_in():
    told = []
    log = DecisionLog(told.append)
    for number in range(1000):
        log.note(peer(number), "connection", DENIED, "direct", 0.0)
    for number in range(2 * SINGLES):
        log.note(peer(number), "connection", Decision(allowed=True, rule="authorized_keys:1"), "direct", 0.1)
    log.flush()
    allowed = [one for one in told if one.allowed]
    assert {one.peer for one in allowed} == {peer(number) for number in range(2 * SINGLES)}


def test_strange_protocol_names_do_not_multiply_messages():
    told = []
    log = DecisionLog(told.append)
    for number in range(1000):
        log.note(peer(1), f"/made-up/{number}", DENIED, "direct", 0.5)
    log.flush()
    assert len(told) <= 2 * SINGLES + 1
    assert sum(one.count for one in told) == 1000


def test_the_next_window_starts_afresh():
    told = []
    log = DecisionLog(told.append)
    for _ in range(SINGLES + 5):
        log.note(peer(1), "connection", DENIED, "direct", 0.0)
    assert len(told) == SINGLES
    assert log.pending
    log.note(peer(1), "connection", DENIED, "direct", 1.0)
    assert told[SINGLES].count == 5
    assert told[SINGLES + 1].count == 1


def test_strangers_who_come_all_day_are_named_in_the_end_by_their_number_alone():
    told = []
    log = DecisionLog(told.append)
    day, allowed = 86_400, Decision(allowed=True, rule="authorized_keys:1")
    for second in range(day):
        for number in range(3):
            log.note(peer(3 * second + number), "connection", DENIED, f"direct {second}", float(second))
        if second % 60 == 0:
            log.note(peer(7), "connection", allowed, "direct", float(second))
    log.flush()
    refused = [one for one in told if not one.allowed]
    assert sum(one.count for one in refused) == 3 * day
    assert sum(one.peer is not None for one in refused) <= NAMED + NAMED_PER_SECOND * day + 1
    assert len(told) < 1.4 * day, "one line a second, and those that name a peer"
    assert sum(one.count for one in told if one.peer == peer(7) and one.allowed) == day / 60
