"""`python -m tests.fuzz SECONDS [TARGET…]`: run each target for so many seconds; the first finding ends it."""

from __future__ import annotations

import random
import sys
import time

from tests.fuzz.mutate import mutations
from tests.fuzz.targets import SEEDS, TARGETS


def main(arguments: list[str]) -> int:
    seconds, names = float(arguments[0]), arguments[1:] or list(TARGETS)
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    for name in names:
        randomness = random.Random(f"{seed} {name}")
        count, slowest, end = 0, 0.0, time.process_time() + seconds
        for data in mutations(randomness, SEEDS[name]):
            began = time.process_time()
            try:
                TARGETS[name](data)
            except Exception:
                print(f"{name}: input {data.hex()}")
                raise
            now = time.process_time()
            count, slowest = count + 1, max(slowest, now - began)
            if now > end:
                break
        print(f"{name}: {count} inputs, the slowest took {slowest * 1000:.1f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
