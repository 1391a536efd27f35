"""The content that interop streams carry: the same pseudo-random bytes in Python, Go and JavaScript.

The period is prime, so that bytes lost, repeated or swapped by whole blocks change the hash.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator

PERIOD = 524287
BLOCK = 64 * 1024


@functools.cache
def _pattern() -> memoryview:
    content = bytearray(PERIOD)
    state = 2463534242
    for at in range(PERIOD):
        state ^= (state << 13) & 0xFFFFFFFF
        state ^= state >> 17
        state ^= (state << 5) & 0xFFFFFFFF
        content[at] = state >> 24
    return memoryview(bytes(content + content[:BLOCK]))


def blocks(size: int, seed: int = 0) -> Iterator[memoryview]:
    """`size` bytes of the content with this seed, in blocks of at most 64 KiB."""
    start = (seed * 7919) % PERIOD
    at = 0
    while at < size:
        begin = (start + at) % PERIOD
        block = _pattern()[begin : begin + min(BLOCK, size - at)]
        yield block
        at += len(block)


@functools.cache
def sha256(size: int, seed: int = 0) -> str:
    """The hash of `size` bytes of the content with this seed, in hexadecimal."""
    digest = hashlib.sha256()
    for block in blocks(size, seed):
        digest.update(block)
    return digest.hexdigest()
