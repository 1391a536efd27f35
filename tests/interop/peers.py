"""Drives a foreign libp2p peer: a program that takes commands as lines of JSON (see README.md beside this file)."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import subprocess
from collections.abc import AsyncIterator
from typing import Any, Protocol

import trio

Answer = dict[str, Any]
Pending = tuple[int, trio.MemoryReceiveChannel[Answer]]

START = 30.0
"""Seconds until a peer must be ready; node takes 0.5 s alone, more when every core is busy."""


class CommandError(AssertionError):
    """A peer could not do what it was told; `answer` is what it said."""

    def __init__(self, peer: str, command: Answer, answer: Answer) -> None:
        super().__init__(f"{peer} could not {command}: {answer.get('error', 'no reason given')}")
        self.answer = answer


class Peer(Protocol):
    """One side of an interop test, whatever it is made of."""

    @property
    def name(self) -> str:
        """Which implementation it is, for messages."""
        ...

    @property
    def peer_id(self) -> str:
        """Its peer id in text form."""
        ...

    @property
    def address(self) -> str:
        """A multiaddr on loopback under which it can be dialled, with its peer id."""
        ...

    async def ask(self, do: str, **arguments: Any) -> Answer:
        """Carry out a command and give its answer, also where it says that it failed."""
        ...

    async def send(self, do: str, **arguments: Any) -> Pending:
        """Give a command without waiting for its end; the first part of the result is its id."""
        ...

    async def answer_to(self, pending: Pending) -> Answer:
        """The answer to a command given with `send`."""
        ...


async def do(peer: Peer, command: str, /, **arguments: Any) -> Answer:
    """Carry out a command that must succeed.

    Raises:
        CommandError: it did not.
    """
    answer = await peer.ask(command, **arguments)
    if not answer["ok"]:
        raise CommandError(peer.name, {"do": command, **arguments}, answer)
    return answer


async def finished(peer: Peer, protocol: str, *, count: int = 1) -> list[Answer]:
    """What the serving side saw of its streams, once it is through with `count` of them."""
    return list((await _served(peer, protocol, "finished", count))["finished"])


async def opened(peer: Peer, protocol: str, *, count: int = 1) -> None:
    """Wait for `count` streams to have reached the service."""
    await _served(peer, protocol, "opened", count)


async def _served(peer: Peer, protocol: str, what: str, count: int) -> Answer:
    with trio.fail_after(20):
        while True:
            report = await do(peer, "served", protocol=protocol)
            reached = report[what] if what == "opened" else len(report[what])
            if reached >= count:
                return report
            await trio.sleep(0.01)


class ForeignPeer:
    """A running foreign peer.

    Attributes:
        library: name and version of the libp2p implementation inside.
        addresses: where it listens.
        pid: its process.
    """

    def __init__(self, name: str, process: trio.Process) -> None:
        self.name = name
        self.library = ""
        self.peer_id = ""
        self.addresses: list[str] = []
        self.pid = process.pid
        self._process = process
        self._ids = itertools.count(1)
        self._waiting: dict[int, trio.MemorySendChannel[Answer]] = {}
        self._ready = trio.Event()
        self._ended = False

    @property
    def address(self) -> str:
        return self.addresses[0]

    async def ask(self, do: str, **arguments: Any) -> Answer:
        """Carry out a command and give its answer."""
        return await self.answer_to(await self.send(do, **arguments))

    async def send(self, do: str, **arguments: Any) -> Pending:
        """Give a command without waiting for its end; the first part of the result is its id."""
        number = next(self._ids)
        sender, receiver = trio.open_memory_channel[Answer](1)
        self._waiting[number] = sender
        assert self._process.stdin is not None
        await self._process.stdin.send_all(json.dumps({"id": number, "do": do, **arguments}).encode() + b"\n")
        return number, receiver

    async def answer_to(self, pending: Pending) -> Answer:
        """The answer to a command given with `send`."""
        try:
            return await pending[1].receive()
        except trio.EndOfChannel:
            raise AssertionError(f"the {self.name} peer ended") from None

    async def run(self) -> None:
        """Take in what the peer says until it ends."""
        assert self._process.stdout is not None
        rest = b""
        try:
            async for part in self._process.stdout:
                *lines, rest = (rest + part).split(b"\n")
                for line in lines:
                    self._take(json.loads(line))
        finally:
            self._ended = True
            self._ready.set()
            for sender in self._waiting.values():
                sender.close()

    def _take(self, message: Answer) -> None:
        if message.get("event") == "ready":
            self.library, self.peer_id = message["library"], message["peer"]
            self.addresses = message["addresses"]
            self._ready.set()
        else:
            sender = self._waiting.pop(message["id"])
            sender.send_nowait(message)

    async def wait_ready(self) -> None:
        """Return when it listens."""
        with trio.move_on_after(START) as scope:
            await self._ready.wait()
        if scope.cancelled_caught:
            raise AssertionError(f"the {self.name} peer was not ready within {START:g} s")
        if self._ended:
            raise AssertionError(
                f"the {self.name} peer ended before it was ready; what it said is in the captured output"
            )


@contextlib.asynccontextmanager
async def foreign_peer(name: str, command: list[str], *options: str) -> AsyncIterator[ForeignPeer]:
    """A foreign peer while the context lasts."""
    start = functools.partial(
        trio.lowlevel.open_process, [*command, *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    process = await start()
    try:
        async with trio.open_nursery() as nursery:
            peer = ForeignPeer(name, process)
            nursery.start_soon(peer.run)
            await peer.wait_ready()
            yield peer
            nursery.cancel_scope.cancel()
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    await pipe.aclose()
