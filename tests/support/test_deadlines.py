"""A test that hangs fails by itself, says where it hung, and harms no other."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def run_tests(directory: Path, content: str) -> dict[str, str]:
    """Run these tests with two seconds for each; how each ended, by name, and everything that was printed as `""`."""
    (directory / "test_sample.py").write_text("import pytest, socket, trio\n" + textwrap.dedent(content))
    options = ["-p", "tests.support.deadlines", "-p", "no:cacheprovider", "-c", "/dev/null", f"--rootdir={directory}"]
    settings = ["-o", "trio_mode=true", "-o", "filterwarnings=error", "-o", "timeout=2", "-v", "--color=no"]
    # Where CI is set pytest's summary is longer than elsewhere.
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "CI", "BUILD_NUMBER"))
    }
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *settings, str(directory / "test_sample.py")],
        cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    ended = re.findall(r"^\S+::(\w+) (\w+) +\[", done.stdout, re.MULTILINE)
    return {"": done.stdout + done.stderr, **dict(ended)}


def test_a_test_that_hangs_fails_with_its_place_and_the_next_ones_pass(tmp_path):
    ended = run_tests(
        tmp_path,
        """
        async def deep():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.sleep_forever)
                await trio.Event().wait()

        @pytest.fixture
        async def busy_fixture():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.sleep_forever)
                yield
                nursery.cancel_scope.cancel()

        async def test_hangs(): await deep()
        async def test_after_1(): await trio.sleep(0.01)
        async def test_hangs_with_a_fixture(busy_fixture): await deep()
        async def test_after_2(busy_fixture): await trio.sleep(0.01)
        async def test_hangs_in_virtual_time(autojump_clock): await deep()
        async def test_hours_of_virtual_time(autojump_clock): await trio.sleep(36_000)
        async def test_runs_in_circles():
            while True:
                await trio.lowlevel.checkpoint()
        async def test_after_3(): await trio.sleep(0.01)
        """,
    )
    said = ended.pop("")
    assert {name for name, how in ended.items() if how != "FAILED"} == {
        "test_after_1", "test_after_2", "test_after_3", "test_hours_of_virtual_time"
    }, said  # fmt: skip
    assert set(ended.values()) == {"FAILED", "PASSED"}, said
    assert said.count("TestHungError: not finished after 1.5 s") == 4, said
    assert said.count("in deep") >= 3, said
    assert "pytest-timeout" not in said, said


def test_a_test_that_cannot_be_cancelled_is_ended_by_force_and_the_next_ones_pass(tmp_path):
    ended = run_tests(
        tmp_path,
        """
        async def test_shielded():
            with trio.CancelScope(shield=True):
                await trio.sleep_forever()
        async def test_after_1(): await trio.sleep(0.01)
        async def test_blocks_the_loop():
            near, far = socket.socketpair()
            with near, far:
                near.recv(1)
        async def test_after_2(): await trio.sleep(0.01)
        def test_without_trio():
            near, far = socket.socketpair()
            with near, far:
                near.recv(1)
        async def test_after_3(): await trio.sleep(0.01)
        """,
    )
    said = ended.pop("")
    assert ended == {
        "test_shielded": "FAILED", "test_after_1": "PASSED", "test_blocks_the_loop": "FAILED",
        "test_after_2": "PASSED", "test_without_trio": "FAILED", "test_after_3": "PASSED",
    }, said  # fmt: skip
    assert "in test_shielded" in said, said
    assert said.count("from pytest-timeout") >= 3, said
