"""A crowd of strangers at the door of a real node, from hundreds of addresses: who is authorised gets in.

The crowd and the times are those of `tests.abuse.measure_silent_callers`; here only that every attempt succeeds.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.abuse.measure_silent_callers import measure
from tests.natlab.namespaces import LabError, Namespace
from tests.natlab.plugin import unavailable

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

RSA_BITS = 4096
"""Of a certificate with which 250 ClientHellos a second ask for more than a processor has."""


@pytest.mark.parametrize("kind", ["silent", "byte", "dawdle", "drip", "tls-hold"])
def test_an_authorised_peer_gets_in_from_where_it_was_before_and_from_anywhere_else(kind: str) -> None:
    everybody_got_in(measure([kind], count=500, seconds=3.0, rsa_bits=0)[kind])


@pytest.mark.parametrize("kind", ["tls", "tls-hold"])
def test_an_authorised_peer_gets_in_where_a_handshake_of_tls_is_dear(kind: str) -> None:
    everybody_got_in(measure([kind], count=500, seconds=4.0, rsa_bits=RSA_BITS)[kind])


@pytest.mark.parametrize("kind", ["silent", "byte", "dawdle"])
def test_an_authorised_peer_gets_in_beside_callers_from_many_ipv6_networks(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str
) -> None:
    try:
        space = Namespace("crowd")
    except OSError as error:
        unavailable(request.config, f"network namespaces may not be made ({error})")
    try:
        space.run(["ip", "-6", "route", "add", "local", "2000::/3", "dev", "lo"])
        options = ["--ipv6", "--kinds", kind, "--seconds", "3", "--json", str(tmp_path / "found.json")]
        command = [sys.executable, "-m", "tests.abuse.measure_silent_callers", *options]
        with space.popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as running:
            said, _ = running.communicate(timeout=90)
            assert running.returncode == 0, said
    except LabError as error:
        unavailable(request.config, str(error))
    finally:
        space.close()
    everybody_got_in(json.loads((tmp_path / "found.json").read_text())[kind])


def everybody_got_in(found: dict[str, list[float | None]]) -> None:
    assert all(found.values()), "no attempt was made"
    assert None not in found["known"], found
    assert None not in found["new"], found
