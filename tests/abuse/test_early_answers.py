"""A service that refuses an upload answers and closes with the upload unread; the answer reaches the client."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator

import pytest

from tests.abuse.early_answers import ANSWER, REQUEST, UPLOAD, EarlyAnswers, unanswered
from tests.abuse.world import World

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with contextlib.ExitStack() as stack:
        world = World(tmp_path_factory.mktemp("e"), stack)
        service = EarlyAnswers()
        stack.callback(service.stop)
        world.home.run("service", "add", "upload", f"127.0.0.1:{service.port}")
        yield world


def test_every_client_gets_the_answer(world: World) -> None:
    port = int(world.laptop.run_json("proxy", "home", "upload", "0")["listen"].rpartition(":")[2])
    assert unanswered(port, 60) == 0


def test_so_does_one_on_standard_input(world: World) -> None:
    for _ in range(5):
        done = subprocess.run(
            world.laptop.command("proxy", "home", "upload", "--stdio"),
            input=REQUEST + bytes(UPLOAD),
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert done.stdout == ANSWER
        assert done.returncode == 1
        assert b"broke the connection off" in done.stderr
