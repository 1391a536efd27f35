"""Where no laboratory can be built, tests say so: skipped, or failed if one is required; and whom it works for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.natlab import plugin
from tests.natlab.lab import Lab

ROOT = Path(__file__).resolve().parents[2]
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
ONE_TEST = "tests/natlab/test_kinds.py::test_hosts_behind_one_nat_reach_each_other_directly"
WITHOUT_RIGHTS = ["setpriv", "--inh-caps=-sys_admin", "--bounding-set=-sys_admin"]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100, check=False)


def test_skipped_with_a_reason_by_default(natlab: Lab) -> None:
    done = run(*WITHOUT_RIGHTS, *PYTEST, ONE_TEST)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 skipped" in done.stdout
    assert "no NAT laboratory here: network namespaces may not be made" in done.stdout
    assert "unshare -Urn" in done.stdout


def test_failed_if_required(natlab: Lab) -> None:
    done = run(*WITHOUT_RIGHTS, *PYTEST, "--natlab=require", ONE_TEST)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 error" in done.stdout
    assert "--natlab=require, but network namespaces may not be made" in done.stdout


@pytest.mark.slow
def test_in_a_user_namespace_without_any_network(natlab: Lab) -> None:
    """`unshare -Urn` is what somebody without root runs all tests in; also a second belt against leaks."""
    done = run(
        "unshare", "-Urn", *PYTEST, "--natlab=require", "tests/natlab/test_kinds.py", "tests/natlab/test_links.py",
        "-k", "each_mapping or checksums",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout.splitlines()[-1]


def test_in_a_user_namespace_with_the_old_network_it_says_what_to_do(natlab: Lab) -> None:
    """There one may make namespaces but not come back from them; the tests' own thread must not get lost."""
    done = run("unshare", "-Ur", *PYTEST, ONE_TEST)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 skipped" in done.stdout
    assert "unshare -Urn" in done.stdout


def test_missing_programs_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "PROGRAMS", ("ip", "no-such-program"))
    reason = plugin.why_not.__wrapped__()
    assert "the programs no-such-program are missing" in reason
    assert "apt install" in reason
