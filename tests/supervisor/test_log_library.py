"""loguru without asyncio: nothing loads it, and whoever needs it still gets it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def said_by(program: str) -> str:
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.strip()


def test_a_node_does_not_load_asyncio() -> None:
    program = "import peerup.preload, sys; peerup.preload.preload(metrics=True); print('asyncio' in sys.modules)"
    assert said_by(program) == "False"


def test_asyncio_is_itself_for_everybody_else() -> None:
    program = "import supervisor.log_library, asyncio; asyncio.run(asyncio.sleep(0)); print(asyncio.__file__)"
    assert said_by(program).endswith("asyncio/__init__.py")


LOG_TO_A_COROUTINE = """
{first}
from supervisor.log_library import logger

async def sink(message):
    print(message.record["message"])

async def main():
    logger.remove()
    logger.add(sink)
    logger.info("hello")
    await logger.complete()

import asyncio
asyncio.run(main())
"""


@pytest.mark.parametrize("first", ["", "import asyncio", "import loguru"])
def test_sinks_that_are_coroutines_work_all_the_same(first: str) -> None:
    assert said_by(LOG_TO_A_COROUTINE.format(first=first)) == "hello"
