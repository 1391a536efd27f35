"""How much is granted to the sender of a bulk stream."""

from actors.switchboard.inflow import LEAST, PAUSE, QUEUE, SAMPLES, Inflow

RTT = 0.04


def came(inflow, rate, seconds, *, start=0.0, step=0.01):
    for number in range(round(seconds / step)):
        inflow.came(round(rate * step), start + number * step)


def test_a_sender_is_granted_what_is_under_way_twice_and_a_short_queue():
    inflow = Inflow()
    came(inflow, 1_250_000, 1.0)
    wanted = 1_250_000 * (2 * RTT + QUEUE)
    assert 0.9 * wanted < inflow.window(RTT) < 1.1 * wanted


def test_nothing_is_withheld_before_rate_and_round_trip_are_known():
    inflow = Inflow()
    assert inflow.window(RTT) is None
    came(inflow, 1_250_000, 1.0)
    assert inflow.window(0.0) is None


def test_a_sender_that_was_held_up_for_a_while_is_granted_as_much_as_before():
    inflow = Inflow()
    came(inflow, 1_250_000, 1.0)
    before = inflow.window(RTT)
    came(inflow, 50_000, 5.0, start=1.0)
    assert inflow.window(RTT) == before
    came(inflow, 50_000, 0.2 * SAMPLES, start=6.0)
    assert inflow.window(RTT) == LEAST


def test_a_pause_is_not_taken_for_a_slow_path():
    inflow = Inflow()
    came(inflow, 1_250_000, 1.0)
    before = inflow.window(RTT)
    for number in range(2 * SAMPLES):
        inflow.came(100, 10 + number * (PAUSE + 0.1))
    assert inflow.window(RTT) == before
