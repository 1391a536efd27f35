"""WebSocket, with and without TLS, between us and go-libp2p and js-libp2p, in both roles.

The certificate is for 127.0.0.1, and its authority is made for the test: all sides verify it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import NamedTuple

import pytest

from protocol.keys import PrivateKey
from tests.interop.conftest import StartForeign
from tests.interop.content import sha256
from tests.interop.ours import OurPeer, our_peer
from tests.interop.peers import Peer, do, finished, head
from tests.interop.test_interop_matrix import connected
from tests.support.certificates import Authority

pytestmark = [pytest.mark.interop, pytest.mark.timeout(600)]  # the first test may have to build the peers

MB = 1_000_000
PROTOCOL = "/peerup/test/1.0.0"
PAIRS = [("peerup", "go"), ("go", "peerup"), ("peerup", "js"), ("js", "peerup"), ("peerup", "peerup"), ("go", "js")]
LISTEN = {"ws": "/ip4/127.0.0.1/tcp/0/ws", "wss": "/ip4/127.0.0.1/tcp/0/tls/ws"}
StartAt = Callable[[str, str], AbstractAsyncContextManager[Peer]]


class Pair(NamedTuple):
    dialler: Peer
    listener: Peer
    scheme: str


@pytest.fixture
def start_at(start_foreign: StartForeign, tmp_path: Path) -> StartAt:
    """Starts a peer of this implementation that listens for `ws` or `wss`."""
    authority = Authority(tmp_path)
    certificate, key = authority.issue("127.0.0.1")
    numbers = itertools.count()

    def start(name: str, scheme: str) -> AbstractAsyncContextManager[Peer]:
        if name == "peerup":
            tls = {"certificate": str(certificate), "key": str(key), "trusted": str(authority.file)}
            seed = hashlib.sha256(b"websocket %d" % next(numbers)).digest()
            return our_peer(PrivateKey.from_seed(seed), listen=LISTEN[scheme], tls=tls)
        files = ("--certificate", str(certificate), "--certificate-key", str(key), "--trust", str(authority.file))
        return start_foreign(name, "--listen", LISTEN[scheme], *files)

    return start


@pytest.fixture(
    params=list(itertools.product(PAIRS, LISTEN)), ids=lambda value: f"{'-dials-'.join(value[0])}-{value[1]}"
)
async def pair(request: pytest.FixtureRequest, start_at: StartAt) -> AsyncIterator[Pair]:
    (one, other), scheme = request.param
    async with start_at(one, scheme) as dialler, start_at(other, scheme) as listener:
        if isinstance(listener, OurPeer):
            await listener.authorise(dialler.peer_id)
        assert listener.address.split("/p2p/")[0].endswith("/tls/ws" if scheme == "wss" else "/ws"), listener.address
        await do(dialler, "dial", address=listener.address)
        await connected(listener, dialler)
        yield Pair(dialler, listener, scheme)


async def test_the_connection_is_a_websocket_and_carries_streams(pair: Pair) -> None:
    for peer, other in ((pair.dialler, pair.listener), (pair.listener, pair.dialler)):
        connections = (await do(peer, "connections"))["connections"]
        (remote,) = [each["remote"] for each in connections if each["peer"] == other.peer_id]
        assert "/ws" in remote, remote  # the listener of js-libp2p knows of /ws alone
        said = await do(peer, "identify", peer=other.peer_id)
        assert said["record"] == "verified"
        if peer is pair.dialler:
            assert other.address.split("/p2p/")[0] in said["record_addresses"]
    await do(pair.listener, "serve", protocol=PROTOCOL, behaviour="echo")
    for number, size in enumerate((0, 1, 125, 65_519, 3 * MB)):
        answer = await pair.dialler.ask(
            "exchange", peer=pair.listener.peer_id, protocol=PROTOCOL, timeout=90, send=size, seed=number
        )
        assert answer["ok"], answer
        assert answer["received_sha256"] == sha256(size, number)
    assert len(await finished(pair.listener, PROTOCOL, count=5)) == 5


@pytest.mark.slow
async def test_bulk_both_ways(pair: Pair) -> None:
    await do(pair.listener, "serve", protocol=PROTOCOL, behaviour="sink")
    ask = {"peer": pair.listener.peer_id, "protocol": PROTOCOL, "timeout": 90}
    answer = await pair.dialler.ask("exchange", send=100 * MB, seed=1, **ask)
    assert answer["ok"], answer
    assert json.loads(head(answer)) == {"received": 100 * MB, "sha256": sha256(100 * MB, 1)}
    await do(pair.listener, "serve", protocol="/peerup/down/1.0.0", behaviour="source")
    ask["protocol"] = "/peerup/down/1.0.0"
    answer = await pair.dialler.ask("exchange", text=f"{100 * MB} 2\n", keep_open=True, **ask)
    assert answer["ok"], answer
    assert (answer["received"], answer["received_sha256"]) == (100 * MB, sha256(100 * MB, 2))
