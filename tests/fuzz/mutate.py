"""Inputs for fuzz targets: an endless stream of mutated and random bytes, the same for the same seed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

INTERESTING = (b"\x00", b"\xff", b"\x80", b"\x7f", b"\n", b"\r\n", b"#", b"/", b"=", b" ", b"\x80" * 9, b"\xff" * 9)


def mutations(randomness: random.Random, seeds: Sequence[bytes]) -> Iterator[bytes]:
    """The seeds themselves, each cut short at each of its places, and then mutations without end."""
    for seed in seeds:
        yield seed
        yield from (seed[:cut] for cut in range(min(len(seed), 300)))
    while True:
        if randomness.random() < 0.1:
            yield randomness.randbytes(randomness.randrange(200))
            continue
        data = bytearray(randomness.choice(seeds))
        for _ in range(randomness.randrange(1, 6)):
            _mutate(randomness, data, seeds)
        yield bytes(data)


def _mutate(randomness: random.Random, data: bytearray, seeds: Sequence[bytes]) -> None:
    start = randomness.randrange(len(data) + 1)
    end = min(len(data), start + randomness.randrange(1, 20))
    match randomness.randrange(7):
        case 0:
            data[start:start] = randomness.choice(INTERESTING)
        case 1:
            data[start:end] = b""
        case 2:
            data[start:start] = data[start:end] * randomness.randrange(1, 30)
        case 3:
            data[start:] = randomness.choice(seeds)[start:]
        case 4:
            data[start:end] = randomness.randbytes(end - start)
        case 5 if start < len(data):
            data[start] ^= 1 << randomness.randrange(8)
        case _ if start < len(data):
            data[start] = (data[start] + randomness.choice((-1, 1))) % 256
