"""One version, wherever it is written."""

from __future__ import annotations

import tomllib
from pathlib import Path

import peerup
from actors.switchboard.version import AGENT


def test_the_program_says_the_version_of_the_package() -> None:
    pyproject = Path(__file__).parents[2] / "pyproject.toml"
    packaged = tomllib.loads(pyproject.read_text())["project"]["version"]
    assert peerup.__version__ == packaged
    assert f"peerup/{packaged}" == AGENT  # what identify tells the peers
