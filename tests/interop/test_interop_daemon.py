"""A whole node, set up by commands and run as a person runs it, with peers on other implementations."""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import struct
from collections.abc import AsyncIterator

import pytest
import trio

from tests.interop import nodes
from tests.interop.content import sha256
from tests.interop.peers import ForeignPeer, do, finished, opened
from tests.support.listeners import listeners
from tests.support.nodes import Node

pytestmark = [pytest.mark.interop, pytest.mark.slow, pytest.mark.timeout(600)]

MB = 1_000_000
SERVICE = "web"
PROTOCOL = f"/peerup/{SERVICE}/1.0.0"


@pytest.fixture
async def node(tmp_path) -> AsyncIterator[Node]:
    """A running node that exposes a TCP echo as the service `web`."""
    async with (
        nodes.tcp_service(nodes.echo) as port,
        nodes.running(Node("ours", tmp_path), ("service", "add", SERVICE, f"127.0.0.1:{port}")) as node,
    ):
        yield node


@pytest.fixture(params=["go", "js"])
async def friend(request, start_foreign, node) -> AsyncIterator[ForeignPeer]:
    """A foreign peer that the node authorises, and knows where to find as `friend`."""
    async with start_foreign(request.param) as peer:
        await nodes.run(node, "auth", "add", peer.peer_id, "--comment", "friend")
        await nodes.run(node, "names", "add", "friend", peer.peer_id, "--address", peer.address.split("/p2p/")[0])
        yield peer


async def proxy_port(node: Node) -> int:
    return await nodes.proxy_port(node, "friend", SERVICE)


@contextlib.asynccontextmanager
async def tunnel(node: Node) -> AsyncIterator[trio.SocketStream]:
    """A TCP connection to the friend's service; it must be done with soon."""
    port = await proxy_port(node)
    with trio.fail_after(nodes.TRANSFER):
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            yield stream


async def dial(peer: ForeignPeer, node: Node) -> None:
    await do(peer, "dial", address=nodes.whole_address(node))


async def test_they_reach_our_service(node, friend):
    """A hundred megabytes to a TCP service behind our node, and back, with the half-close between them."""
    await dial(friend, node)
    answer = await do(friend, "exchange", peer=node.peer_id, protocol=PROTOCOL, send=100 * MB, seed=1, timeout=90)
    assert (answer["received"], answer["received_sha256"]) == (100 * MB, sha256(100 * MB, 1))


async def test_we_reach_their_service(node, friend):
    await do(friend, "serve", protocol=PROTOCOL, behaviour="sink")
    answer = await nodes.upload(await proxy_port(node), 100 * MB, 2)
    assert answer == {"received": 100 * MB, "sha256": sha256(100 * MB, 2)}


async def test_their_service_may_end_first(node, friend):
    await do(friend, "serve", protocol=PROTOCOL, behaviour="source")
    async with tunnel(node) as stream:
        await stream.send_all(b"20000000 3\n")
        assert (await nodes.receive_all(stream))[:2] == (20 * MB, sha256(20 * MB, 3))
        await stream.send_all(b"still there")  # our direction is open until we end it
        await stream.send_eof()
    (seen,) = await finished(friend, PROTOCOL)
    assert (seen["received"], seen["reset"]) == (len(b"still there"), False)


async def test_a_reset_stays_a_reset_through_the_node(node, friend):
    """From their stream to our TCP client: never a clean end."""
    await do(friend, "serve", protocol=PROTOCOL, behaviour="reset", bytes=1000, code=5)
    async with tunnel(node) as stream:
        await stream.send_all(b"x" * 1000)
        with pytest.raises(trio.BrokenResourceError):
            await nodes.receive_all(stream)


async def test_a_tcp_reset_of_our_client_reaches_their_stream_as_a_reset(node, friend):
    await do(friend, "serve", protocol=PROTOCOL, behaviour="sink")
    async with tunnel(node) as stream:
        await stream.send_all(b"x" * 1000)
        await opened(friend, PROTOCOL)
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    (seen,) = await finished(friend, PROTOCOL)
    assert seen["reset"]


async def test_forty_tunnelled_connections_at_once(node, friend):
    await do(friend, "serve", protocol=PROTOCOL, behaviour="echo")
    port = await proxy_port(node)

    async def one(seed: int) -> None:
        assert await nodes.round_trip(port, MB, seed) == (MB, sha256(MB, seed))

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for seed in range(40):
                nursery.start_soon(one, seed)


async def test_pings_both_ways(node, friend):
    lines = [
        json.loads(line)
        for line in (await nodes.run(node, "ping", "friend", "-c", "2", "--interval", "10ms", "--json")).splitlines()
    ]
    assert lines[-1]["stats"]["received"] == 2
    assert len((await do(friend, "ping", peer=node.peer_id, count=2))["seconds"]) == 2


async def test_a_stranger_is_refused_and_only_what_is_configured_listens(node, friend, start_foreign):
    await do(friend, "serve", protocol=PROTOCOL, behaviour="echo")
    port = await proxy_port(node)
    async with start_foreign("go") as stranger:
        await stranger.ask("dial", address=nodes.whole_address(node))
        await do(stranger, "wait-closed", peer=node.peer_id)
        answer = await stranger.ask("exchange", peer=node.peer_id, protocol=PROTOCOL, send=10)
        assert not answer["ok"]
        assert base64.b64decode(answer.get("head", "")) == b""
    open_ports = {(each.kind, each.address, each.port) for each in listeners(node.daemon_pid) if each.kind != "unix"}
    configured = int(node.address.rpartition("/")[2])
    assert open_ports == {("tcp", "127.0.0.1", configured), ("tcp", "127.0.0.1", port)}
