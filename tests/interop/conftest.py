"""Fixtures of the interop tests: peers on foreign libp2p implementations, built when first needed."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

import pytest

from protocol.keys import PrivateKey
from tests.interop.ours import our_peer
from tests.interop.peers import ForeignPeer, Peer, foreign_peer
from tests.interop.toolchains import BUILDERS, OPTIONAL, BuildError, MissingToolError

StartForeign = Callable[..., AbstractAsyncContextManager[ForeignPeer]]
Start = Callable[[str], AbstractAsyncContextManager[Peer]]


@pytest.fixture(scope="session")
def start_foreign(request: pytest.FixtureRequest) -> StartForeign:
    """Starts a foreign peer: `start_foreign("go", "--key", "rsa")`. Skips the test where its tools are missing."""
    required = request.config.getoption("interop") == "require"

    def start(name: str, *options: str) -> AbstractAsyncContextManager[ForeignPeer]:
        try:
            command = BUILDERS[name]()
        except MissingToolError as error:
            if required and name not in OPTIONAL:
                pytest.fail(f"--interop=require, but {error}")
            pytest.skip(str(error))
        except BuildError as error:
            pytest.fail(f"the {name} peer: {error}", pytrace=False)
        return foreign_peer(name, command, *options)

    return start


@pytest.fixture
def start(start_foreign: StartForeign) -> Start:
    """Starts any peer by the name of its implementation: `peerup`, `go`, `js`, `rust`."""

    numbers = itertools.count()

    def start_any(name: str) -> AbstractAsyncContextManager[Peer]:
        if name == "peerup":
            return our_peer(PrivateKey.from_seed(hashlib.sha256(b"interop %d" % next(numbers)).digest()))
        return start_foreign(name)

    return start_any
