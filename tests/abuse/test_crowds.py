"""A crowd of strangers at the door of a real node, from hundreds of addresses: who is authorised gets in.

The crowd and the times are those of `tests.abuse.measure_silent_callers`; here only that every attempt succeeds.
"""

from __future__ import annotations

import pytest

from tests.abuse.measure_silent_callers import measure

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]


@pytest.mark.parametrize("kind", ["silent", "byte", "dawdle", "drip", "tls-hold"])
def test_an_authorised_peer_gets_in_from_where_it_was_before_and_from_anywhere_else(kind: str) -> None:
    found = measure([kind], count=500, seconds=3.0, rsa_bits=0)[kind]
    assert all(found.values()), "no attempt was made"
    assert None not in found["known"], found
    assert None not in found["new"], found
