"""What one authorised peer can take of what all share: kernel memory, a service's connections, the audit log.

`python -m tests.abuse.measure_shares [memory|connections|audit]` prints a line for each. It works in a checkout of any
age.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import trio

from protocol.multistream import HEADER, encode_message
from protocol.yamux import INITIAL_WINDOW
from tests.abuse.attacker import RST, SYN, WINDOW_UPDATE, Attacker, ClosedError, data, frame
from tests.abuse.world import World
from tests.chaos.load import echo_works

MEBIBYTE = 1024 * 1024
STREAMS = 150
"""Streams to a service that does not read."""
EACH = 8 * MEBIBYTE
"""Bytes that are offered on each of them."""
SECONDS = 20.0
"""Of short tunnels."""


def kernel_memory() -> int:
    """Bytes that TCP sockets of this machine hold in the kernel."""
    for line in Path("/proc/net/sockstat").read_text().splitlines():
        if line.startswith("TCP:"):
            words = line.split()
            return int(words[words.index("mem") + 1]) * os.sysconf("SC_PAGE_SIZE")
    raise LookupError("no TCP in /proc/net/sockstat")


class Stubborn:
    """A service that accepts and never reads; or reads when `reads` is set."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.port: int = self._listener.getsockname()[1]
        self.connections: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                self.connections.append(self._listener.accept()[0])
            except OSError:
                return

    def stop(self) -> None:
        """Close everything."""
        self._listener.close()
        for connection in self.connections:
            connection.close()


class Insider:
    """A connection of the insider's that opens streams and answers keepalives in the background."""

    def __init__(self, attacker: Attacker) -> None:
        self._attacker = attacker
        self.windows: dict[int, int] = {}
        self.reset: set[int] = set()
        self.gone = False

    async def listen(self) -> None:
        """Hear what the node says, for ever."""
        with contextlib.suppress(ClosedError):
            while True:
                heard = await self._attacker.hear()
                await self._attacker.answer_keepalive(heard)
                if heard.kind == WINDOW_UPDATE and heard.stream:
                    self.windows[heard.stream] = self.windows.get(heard.stream, 0) + heard.length
                    if heard.flags & RST:
                        self.reset.add(heard.stream)
        self.gone = True

    async def open(self, stream: int, protocol: str) -> None:
        """Open a stream and propose its protocol, without waiting for the answer."""
        proposal = HEADER + encode_message(protocol)
        self.windows[stream] = self.windows.get(stream, 0) + INITIAL_WINDOW - len(proposal)
        await self._attacker.say(data(stream, proposal, SYN))

    async def fill(self, stream: int, most: int) -> int:
        """Send what the window admits. How much that was."""
        length = min(self.windows.get(stream, 0), most)
        sent = 0
        while sent < length and stream not in self.reset:
            part = min(65_000, length - sent)
            await self._attacker.say(data(stream, bytes(part)))
            sent += part
        self.windows[stream] -= sent
        return sent

    async def give_up(self, stream: int) -> None:
        """Reset a stream."""
        await self._attacker.say(frame(WINDOW_UPDATE, RST, stream))


async def take_memory(world: World, *, streams: int = STREAMS, each: int = EACH) -> tuple[int, int]:
    """Bytes of kernel memory that so many streams to the service `stubborn` take, and how many were left open."""
    before = kernel_memory()
    async with (
        Attacker.connect(world.port, world.insider, source="127.0.0.3") as attacker,
        trio.open_nursery() as nursery,
    ):
        await attacker.secure()
        insider = Insider(attacker)
        nursery.start_soon(insider.listen)
        numbers = [1 + 2 * index for index in range(streams)]
        for number in numbers:
            await insider.open(number, "/peerup/stubborn/1.0.0")
            await trio.sleep(0.002)
        left = dict.fromkeys(numbers, each)
        quiet_since = trio.current_time()
        with trio.move_on_after(120):
            while trio.current_time() - quiet_since < 2 and not insider.gone:
                moved = 0
                for number in numbers:
                    with contextlib.suppress(ClosedError):
                        sent = await insider.fill(number, left[number])
                        left[number] -= sent
                        moved += sent
                if moved:
                    quiet_since = trio.current_time()
                await trio.sleep(0.01)
        taken = kernel_memory() - before
        nursery.cancel_scope.cancel()
    return taken, 0 if insider.gone else streams - len(insider.reset)


async def take_connections(world: World, *, connections: int = 4, streams: int = 1024) -> int:
    """Idle streams to `stubborn` on several connections: how many of ten clients of another peer are served."""
    async with contextlib.AsyncExitStack() as stack:
        insiders: list[Insider] = []
        nursery = await stack.enter_async_context(trio.open_nursery())
        for index in range(connections):
            attacker = await stack.enter_async_context(
                Attacker.connect(world.port, world.insider, source=f"127.0.0.{3 + index}")
            )
            await attacker.secure()
            insider = Insider(attacker)
            insiders.append(insider)
            nursery.start_soon(insider.listen)
        for number in range(streams):
            for insider in insiders:
                if not insider.gone:
                    with contextlib.suppress(ClosedError):
                        await insider.open(1 + 2 * number, "/peerup/stubborn/1.0.0")
            await trio.sleep(0.005)
        await trio.sleep(2)
        port = int(world.laptop.run_json("proxy", "home", "stubborn", "0")["listen"].rpartition(":")[2])
        served = 0
        for _ in range(10):
            served += await trio.to_thread.run_sync(stays_open, port)
        nursery.cancel_scope.cancel()
    return served


def stays_open(port: int) -> bool:
    """Whether a new connection is not reset within a second."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as client:
            client.sendall(b"x")
            return bool(client.recv(1))
    except TimeoutError:
        return True
    except OSError:
        return False


async def short_tunnels(world: World, seconds: float = SECONDS) -> tuple[int, int]:
    """How many tunnels were opened and reset at once, and the bits that this took."""
    opened = bits = 0
    async with (
        Attacker.connect(world.port, world.insider, source="127.0.0.3") as attacker,
        trio.open_nursery() as nursery,
    ):
        await attacker.secure()
        insider = Insider(attacker)
        nursery.start_soon(insider.listen)
        until = trio.current_time() + seconds
        with contextlib.suppress(ClosedError):
            while trio.current_time() < until and not insider.gone:
                number = 1 + 2 * opened
                await insider.open(number, "/peerup/stubborn/1.0.0")
                await trio.sleep(0.002)
                await insider.give_up(number)
                opened += 1
                bits += 8 * 200
        await trio.sleep(1)
        nursery.cancel_scope.cancel()
    return opened, bits


def audit_bytes(world: World) -> tuple[int, int]:
    """Lines and bytes of `home`'s audit log."""
    files = list((world.home.home / "log").glob("audit.jsonl*"))
    return sum(file.read_bytes().count(b"\n") for file in files), sum(file.stat().st_size for file in files)


def memory(world: World, _: Stubborn) -> str:
    taken, left = trio.run(take_memory, world)
    return (
        f"kernel memory: {taken / MEBIBYTE:.0f} MiB by {STREAMS} streams to a service that does not read ({left} left)"
    )


def connections(world: World, service: Stubborn) -> str:
    served = trio.run(take_connections, world)
    held = len(service.connections) - served
    return f"connections: {served} of 10 clients of another peer are served, when one peer has had {held}"


def audit(world: World, _: Stubborn) -> str:
    lines, size = audit_bytes(world)
    opened, bits = trio.run(short_tunnels, world)
    time.sleep(2)
    more, larger = audit_bytes(world)
    return (
        f"audit log: {more - lines} lines, {(larger - size) / 1024:.0f} KiB, of {opened} tunnels in {SECONDS:g} s"
        f" ({bits / SECONDS / 1e6:.2f} Mbit/s): {(more - lines) / (bits / 1e6):.0f} lines a Mbit"
    )


WHAT: dict[str, Callable[[World, Stubborn], str]] = {"memory": memory, "connections": connections, "audit": audit}


def main(wanted: list[str]) -> None:
    """Print a line for each thing that is measured, each in a world of its own."""
    for name in wanted or list(WHAT):
        with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory() as directory:
            service = Stubborn()
            stack.callback(service.stop)
            world = World(Path(directory), stack)
            world.home.run("service", "add", "stubborn", f"127.0.0.1:{service.port}")
            print(WHAT[name](world, service), flush=True)
            assert echo_works(world.tunnel, timeout=10), "the other peer's tunnel is dead"


if __name__ == "__main__":
    main(sys.argv[1:])
