"""How far a link seals ahead of its wire."""

from hypothesis import given
from hypothesis import strategies as st

from actors.switchboard.batch import AHEAD, LEAST, MOST, SAMPLE, START, Ahead


def filled(ahead, rate, seconds, step=0.005):
    """A wire that is full all the time and passes on so many bytes a second."""
    ahead.refused(0.0)
    for number in range(1, round(seconds / step)):
        ahead.taken(round(rate * step))
        ahead.refused(number * step)


def test_a_full_wire_is_given_what_it_takes_in_a_moment():
    for rate in (1_250_000, 12_500_000):
        ahead = Ahead()
        filled(ahead, rate, 1.0)
        assert 0.9 * rate * AHEAD <= ahead.size <= 1.1 * rate * AHEAD
        assert ahead.base == ahead.size


def test_a_slow_wire_gets_segments_and_a_fast_one_all_it_takes():
    slow, fast = Ahead(), Ahead()
    filled(slow, 10_000, 2.0)
    assert slow.size == LEAST
    filled(fast, 2_000_000_000, 0.1)
    assert fast.size == MOST


def test_a_fast_wire_is_known_before_a_sample_is_over():
    ahead = Ahead()
    ahead.refused(0.0)
    ahead.taken(1_000_000)
    ahead.refused(SAMPLE / 50)
    assert ahead.size > 1_000_000


def test_what_a_wire_takes_at_once_makes_the_next_batch_larger_until_it_is_full():
    ahead = Ahead()
    for _ in range(4):
        ahead.taken(ahead.size)
        ahead.in_a_row()
    assert ahead.size == 16 * START
    assert ahead.base == START, "what it may hold unsent is not raised by what it has swallowed"
    ahead.refused(0.001)
    assert ahead.size == START


def test_a_pause_with_nothing_to_send_is_not_taken_for_a_slow_wire():
    ahead = Ahead()
    filled(ahead, 12_500_000, 0.2)
    size = ahead.size
    ahead.nothing_left()
    ahead.taken(100)
    ahead.refused(60.0)
    assert ahead.size == size


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(0, 1 << 30), st.booleans(), st.booleans())))
def test_it_stays_within_its_bounds(events):
    ahead, now = Ahead(), 0.0
    for pause, length, full, idle in events:
        now += pause
        ahead.taken(length)
        if full:
            ahead.refused(now)
        else:
            ahead.in_a_row()
        if idle:
            ahead.nothing_left()
        assert LEAST <= ahead.size <= MOST
        assert LEAST <= ahead.base <= MOST
