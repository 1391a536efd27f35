"""Every fuzz target for a few thousand inputs, the same ones each time, with a bound on the time of each."""

from __future__ import annotations

import itertools
import random
import time
import tracemalloc

import pytest

from tests.fuzz.mutate import mutations
from tests.fuzz.targets import SEEDS, TARGETS

INPUTS = 1500
SLOWEST = 1.0  # seconds of processor time for one input; the slowest takes some milliseconds


def test_every_target_has_seeds():
    assert set(SEEDS) == set(TARGETS)


@pytest.mark.parametrize("name", TARGETS)
def test_only_foreseen_errors_come_out(name):
    randomness = random.Random(name)
    for data in itertools.islice(mutations(randomness, SEEDS[name]), INPUTS):
        began = time.process_time()
        try:
            TARGETS[name](data)
        except Exception as error:
            error.add_note(f"input: {data.hex()}")
            raise
        assert time.process_time() - began < SLOWEST, data.hex()


@pytest.mark.parametrize("name", [name for name in TARGETS if name != "authorized_keys"])
def test_much_from_the_wire_costs_little_time_and_memory(name):
    for filler in (b"\xff", b"\x00", b"1", b"/", b"\n", b"\x01\n", b"/p2p-circuit", b"/tcp/1"):
        spent, peak = _cost(name, (SEEDS[name][0] + filler * (1 << 18))[: 1 << 18])
        assert spent < 5  # tracing memory makes everything several times slower
        assert peak < 6 << 20  # the quarter of a megabyte itself, its text, and copies of both


def test_a_long_file_costs_time_and_memory_by_its_lines():
    for filler in (b"\xff", b"# a comment of sixteen\n", b"a b=c d=e f=g h=i\n"):
        spent, peak = _cost("authorized_keys", (SEEDS["authorized_keys"][0] + filler * (1 << 17))[: 1 << 17])
        assert spent < 10
        assert peak < 16 << 20


def _cost(name, data):
    tracemalloc.start()
    began = time.process_time()
    try:
        TARGETS[name](data)
        return time.process_time() - began, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
