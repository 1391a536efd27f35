"""One peer's share of the audit log: lines up to a rate, then sums that lose nothing but the single lines."""

from actors.gate.shares import LINES, LINES_PER_SECOND, MAX_SUMS, SUM_SECONDS, AuditShares


def tunnel(peer="P", service="web", **changes):
    return {"peer": peer, "service": service, "sent": 10, "received": 20, "duration": 0.5, "outcome": "ok"} | changes


def take(shares, fields, now, event="tunnel"):
    return shares.take(fields["peer"], event, fields, now=now, wall=1000 + now)


def test_what_comes_slowly_is_written_line_by_line():
    shares = AuditShares()
    assert all(take(shares, tunnel(), number / LINES_PER_SECOND) for number in range(2000))
    assert list(shares.due(1e9, everything=True)) == []


def test_a_flood_becomes_sums_that_add_up():
    shares = AuditShares()
    written = sum(take(shares, tunnel(), number * 0.001) for number in range(5000))
    assert LINES <= written <= LINES + 5
    assert list(shares.due(SUM_SECONDS - 1)) == []
    ((event, fields),) = shares.due(SUM_SECONDS + 6)
    left = 5000 - written
    assert event == "tunnel"
    assert fields["count"] == left
    assert (fields["sent"], fields["received"], fields["duration"]) == (10 * left, 20 * left, 0.5 * left)
    assert fields["outcome"] == "ok"
    assert 4 < fields["within"] < 5
    assert list(shares.due(1e9)) == []


def test_a_flood_of_one_peer_folds_nobody_elses_lines():
    shares = AuditShares()
    for number in range(5000):
        take(shares, tunnel(), number * 0.001)
    assert all(take(shares, tunnel("Q"), 5.0) for _ in range(100))


def test_kinds_are_told_apart_up_to_a_number():
    shares = AuditShares()
    for _ in range(int(LINES)):
        assert take(shares, tunnel(), 0.0)
    for number in range(1000):
        assert not take(shares, tunnel(outcome=f"outcome {number}"), 0.0)
    sums = [fields for _, fields in shares.due(0.0, everything=True)]
    assert len(sums) == MAX_SUMS + 1
    assert sum(fields["count"] for fields in sums) == 1000
    assert sums[-1]["mixed"]


def test_what_stands_for_several_counts_as_several():
    shares = AuditShares()
    for _ in range(int(LINES)):
        take(shares, tunnel(), 0.0)
    for _ in range(3):
        take(shares, {"peer": "P", "subject": "s", "allowed": True, "count": 7}, 0.0, "decision")
    assert [(event, fields["count"]) for event, fields in shares.due(0.0, everything=True)] == [("decision", 21)]
