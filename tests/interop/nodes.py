"""Whole nodes and relays of ours, set up by commands and run as a person runs them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import trio

from peerup.client import Client, ClientError
from tests.interop.content import blocks
from tests.support.nodes import Node

READY = 60.0
"""Seconds until a node must have its reservation, or have taken over a configuration, also where all cores are busy."""

TRANSFER = 120.0
"""Seconds that 100 MB may take where every core is busy; alone they take one or two."""

LAST_LINES = 60
"""How much of a node's log is shown with a failure."""


class RelayNode(Node):
    """A relay of ours in one directory.

    Attributes:
        limits: settings of `relay_service`, each as `key=value`.
    """

    def __init__(self, name: str, directory: Path, *limits: str) -> None:
        super().__init__(name, directory)
        self.limits = limits

    def command(self, *arguments: str) -> list[str]:
        """As of any node; the daemon is another."""
        return super().command(*(("relay", "serve", *arguments[1:]) if arguments[0] == "daemon" else arguments))

    def initialise(self) -> None:
        """Make the home directory, the key and the configuration."""
        limits = [word for limit in self.limits for word in ("--limit", limit)]
        self.run("relay", "setup", "--yes", "--listen", self.address, *limits)
        self.peer_id = self.run_json("relay", "info")["peer_id"]


async def run(node: Node, *arguments: str) -> str:
    """What the command printed."""
    return await trio.to_thread.run_sync(node.run, *arguments)


async def run_json(node: Node, *arguments: str) -> Any:
    """What the command printed as JSON."""
    return json.loads(await run(node, *arguments, "--json"))


@contextlib.asynccontextmanager
async def running(node: Node, *commands: tuple[str, ...], initialised: bool = False) -> AsyncIterator[Node]:
    """The node while the context lasts, after these commands on its home, which is made if it is not there yet."""
    if not initialised:
        await trio.to_thread.run_sync(node.initialise)
    for command in commands:
        await run(node, *command)
    try:
        await trio.to_thread.run_sync(node.start)
        yield node
    except BaseException:
        log = node.home.parent / f"{node.name}.log"
        print(f"the last of {log}:", *log.read_text().splitlines()[-LAST_LINES:], sep="\n", file=sys.stderr)
        raise
    finally:
        with trio.CancelScope(shield=True):
            left = await trio.to_thread.run_sync(node.stop)
        assert not left, "processes were left behind"


def whole_address(node: Node) -> str:
    """Where the node listens, with its peer id."""
    return f"{node.address}/p2p/{node.peer_id}"


async def proxy_port(node: Node, peer: str, service: str) -> int:
    """The port of a new local proxy to a peer's service."""
    return int((await run_json(node, "proxy", peer, service, "0"))["listen"].rpartition(":")[2])


async def reservation_held(node: Node, relay: str) -> dict[str, Any]:
    """What the node tells of its reservation at this relay, once it has one.

    Raises:
        AssertionError: it does not get one in time.
    """
    client = Client(node.home / "run" / "control.sock", timeout=READY)
    told: Any = None
    with trio.move_on_after(READY):
        while True:
            try:
                told = await trio.to_thread.run_sync(client.get, "/v1/relays", abandon_on_cancel=True)
            except ClientError as error:  # the keeper may be on its way
                told = error
            else:
                for each in told:
                    if each["peer_id"] == relay and each["state"] == "held":
                        found: dict[str, Any] = each
                        return found
            await trio.sleep(0.05)
    raise AssertionError(f"{node.name} got no reservation at {relay} within {READY:g} s; it tells: {told}")


@contextlib.asynccontextmanager
async def tcp_service(serve: Callable[[trio.SocketStream], Awaitable[None]]) -> AsyncIterator[int]:
    """The port of a TCP service while the context lasts."""

    async def serve_one(stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            await serve(stream)

    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, serve_one, [listener])
        yield listener.socket.getsockname()[1]
        nursery.cancel_scope.cancel()


async def echo(stream: trio.SocketStream) -> None:
    """Return what comes, and half-close when the client has."""
    async for part in stream:
        await stream.send_all(part)
    await stream.send_eof()
    await stream.receive_some()


async def sink(stream: trio.SocketStream) -> None:
    """Read to the end and answer with count and hash."""
    count, digest, _ = await receive_all(stream)
    await stream.send_all(json.dumps({"received": count, "sha256": digest}).encode())
    await stream.send_eof()
    await stream.receive_some()


async def receive_all(stream: trio.SocketStream) -> tuple[int, str, bytes]:
    """How much came until the end, its hash, and the last of it."""
    digest, count, last = hashlib.sha256(), 0, b""
    async for part in stream:
        digest.update(part)
        count += len(part)
        last = (last + part)[-1024:]
    return count, digest.hexdigest(), last


async def upload(port: int, size: int, seed: int) -> dict[str, Any]:
    """Send content to a sink behind this port; its answer."""
    with trio.fail_after(TRANSFER):
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            for block in blocks(size, seed):
                await stream.send_all(block)
            await stream.send_eof()
            _, _, last = await receive_all(stream)
    answer: dict[str, Any] = json.loads(last)
    return answer


async def round_trip(port: int, size: int, seed: int) -> tuple[int, str]:
    """Send content to an echo behind this port; how much came back, and its hash."""
    with trio.fail_after(TRANSFER):
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream, trio.open_nursery() as nursery:

            async def send() -> None:
                for block in blocks(size, seed):
                    await stream.send_all(block)
                await stream.send_eof()

            nursery.start_soon(send)
            count, digest, _ = await receive_all(stream)
    return count, digest
