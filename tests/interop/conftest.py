"""Fixtures of the interop tests: peers on foreign libp2p implementations, built when first needed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

import pytest

from tests.interop.peers import ForeignPeer, foreign_peer
from tests.interop.toolchains import BUILDERS, MissingToolError

Start = Callable[..., AbstractAsyncContextManager[ForeignPeer]]


@pytest.fixture(scope="session")
def start_foreign(request: pytest.FixtureRequest) -> Start:
    """Starts a foreign peer: `start_foreign("go", "--key", "rsa")`. Skips the test where its tools are missing."""
    required = request.config.getoption("interop") == "require"

    def start(name: str, *options: str) -> AbstractAsyncContextManager[ForeignPeer]:
        try:
            command = BUILDERS[name]()
        except MissingToolError as error:
            if required:
                pytest.fail(f"--interop=require, but {error}")
            pytest.skip(str(error))
        return foreign_peer(name, command, *options)

    return start
