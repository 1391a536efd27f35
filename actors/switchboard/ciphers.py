"""Which ciphers this machine would rather use than ChaChaPoly for what follows the Noise handshake.

Where the processor has instructions for AES, AESGCM takes a half to a quarter of the time; where it has none, several
times as much, and only then could its timing tell something of the key. So the two are timed, which answers for any
processor, and also where the kernel hides what it is (systemd's `ProcSubset=pid`).
"""

from __future__ import annotations

import functools
import time
from typing import Final

from protocol.noise_cipher import TAG_LENGTH, Cipher, CipherState

_SIZE: Final = 16 * 1024
_TIMES: Final = 5  # of which the fastest counts
_FASTER: Final = 0.8  # of ChaChaPoly's time: what is worth it


@functools.cache
def better_ciphers() -> tuple[Cipher, ...]:
    """Those that are clearly faster here, the best first. Measured once, in less than a millisecond."""
    limit = _FASTER * _seconds(Cipher.CHACHA_POLY)
    return (Cipher.AES_GCM,) if _seconds(Cipher.AES_GCM) < limit else ()


def _seconds(cipher: Cipher) -> float:
    state = CipherState(bytes(32), cipher)
    plain, sealed = memoryview(bytes(_SIZE)), memoryview(bytearray(_SIZE + TAG_LENGTH))
    best = float("inf")
    for _ in range(_TIMES):
        start = time.perf_counter()
        state.seal_into(plain, sealed)
        best = min(best, time.perf_counter() - start)
    return best
