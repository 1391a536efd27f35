"""Drives a foreign libp2p peer: a program that takes commands as lines of JSON (see README.md beside this file)."""

from __future__ import annotations

import base64
import collections
import contextlib
import functools
import itertools
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any, NamedTuple, Protocol

import trio

Answer = dict[str, Any]

START = 30.0
"""Seconds until a peer must be ready; node takes 0.5 s alone, more when every core is busy."""
COMMAND_TIMEOUT = 30.0
"""Seconds that a peer gives a command which names no `timeout`; every implementation has the same."""
GRACE = 15.0
"""Seconds beyond its timeout in which a command must have been answered, by "it took too long" at the latest."""
SERVED = 30.0
"""Seconds until a service must have got the streams that were opened, or be through with those that ended."""
TAKE = 30.0
"""Seconds until a peer must have read a command."""
LAST_LINES = 20
"""How much of what a peer said on standard error goes into the message of a failure."""


class CommandError(AssertionError):
    """A peer could not do what it was told; `answer` is what it said."""

    def __init__(self, peer: Peer, command: Answer, answer: Answer) -> None:
        super().__init__(f"{peer.name} could not {command}: {answer.get('error', 'no reason given')}{peer.last_words}")
        self.answer = answer


class Pending(NamedTuple):
    """A command that was given and not answered yet.

    Attributes:
        number: its id.
        what: the command, for messages.
        deadline: the time of trio's clock at which there must be an answer.
        answer: where it comes.
    """

    number: int
    what: str
    deadline: float
    answer: trio.MemoryReceiveChannel[Answer]

    @classmethod
    def to(cls, number: int, do: str, arguments: dict[str, Any], answer: trio.MemoryReceiveChannel[Answer]) -> Pending:
        """The command `do`, given now."""
        seconds = float(arguments.get("timeout", COMMAND_TIMEOUT)) + GRACE
        return cls(number, f"{do} {arguments}", trio.current_time() + seconds, answer)


@contextlib.contextmanager
def waiting_for(what: str, peer: Peer, seconds: float) -> Iterator[None]:
    """Fail with a message about `what` if the body takes longer than this."""
    with trio.move_on_after(seconds) as scope:
        yield
    if scope.cancelled_caught:
        raise AssertionError(f"waited {seconds:.0f} s in vain for {what} ({peer.name}){peer.last_words}")


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

    @property
    def last_words(self) -> str:
        """What it said last on its standard error, after a line break, for messages of failures; may be empty."""
        ...

    async def ask(self, do: str, **arguments: Any) -> Answer:
        """Carry out a command and give its answer, also where it says that it failed."""
        ...

    async def send(self, do: str, **arguments: Any) -> Pending:
        """Give a command without waiting for its end."""
        ...

    async def answer_to(self, pending: Pending) -> Answer:
        """The answer to a command given with `send`."""
        ...


async def answered(pending: Pending, peer: Peer) -> Answer:
    """The answer that comes to a command; fails at its deadline, and if the peer ends before."""
    with waiting_for(f"the answer to {pending.what}", peer, max(pending.deadline - trio.current_time(), 0)):
        try:
            answer = await pending.answer.receive()
        except trio.EndOfChannel:
            raise AssertionError(f"the {peer.name} peer ended during {pending.what}{peer.last_words}") from None
    return answer


async def do(peer: Peer, command: str, /, **arguments: Any) -> Answer:
    """Carry out a command that must succeed.

    Raises:
        CommandError: it did not.
    """
    answer = await peer.ask(command, **arguments)
    if not answer["ok"]:
        raise CommandError(peer, {"do": command, **arguments}, answer)
    return answer


def head(answer: Answer) -> bytes:
    """The first bytes that an exchange received."""
    return base64.b64decode(answer["head"])


async def finished(peer: Peer, protocol: str, *, count: int = 1) -> list[Answer]:
    """What the serving side saw of its streams, once it is through with `count` of them."""
    return list((await _served(peer, protocol, "finished", count))["finished"])


async def opened(peer: Peer, protocol: str, *, count: int = 1) -> None:
    """Wait for `count` streams to have reached the service."""
    await _served(peer, protocol, "opened", count)


async def _served(peer: Peer, protocol: str, what: str, count: int) -> Answer:
    with waiting_for(f"{count} streams of {protocol} to have {what}", peer, SERVED):
        while True:
            report = await do(peer, "served", protocol=protocol)
            reached = report[what] if what == "opened" else len(report[what])
            if reached >= count:
                break
            await trio.sleep(0.01)
    return report


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
        self._writing = trio.Lock()
        self._complaints: collections.deque[str] = collections.deque(maxlen=LAST_LINES)
        self._ended = False

    @property
    def address(self) -> str:
        return self.addresses[0]

    @property
    def last_words(self) -> str:
        return "".join(f"\n  {self.name} said: {line}" for line in self._complaints)

    async def ask(self, do: str, **arguments: Any) -> Answer:
        """Carry out a command and give its answer."""
        return await self.answer_to(await self.send(do, **arguments))

    async def send(self, do: str, **arguments: Any) -> Pending:
        """Give a command without waiting for its end."""
        if self._ended:
            raise AssertionError(f"the {self.name} peer ended before {do}{self.last_words}")
        number = next(self._ids)
        sender, receiver = trio.open_memory_channel[Answer](1)
        self._waiting[number] = sender
        assert self._process.stdin is not None
        line = json.dumps({"id": number, "do": do, **arguments}).encode() + b"\n"
        with waiting_for(f"it to read the command {do}", self, TAKE):
            async with self._writing:  # a line at a time, also where tests give commands side by side
                try:
                    await self._process.stdin.send_all(line)
                except trio.BrokenResourceError:
                    raise AssertionError(f"the {self.name} peer ended before {do}{self.last_words}") from None
        return Pending.to(number, do, arguments, receiver)

    async def answer_to(self, pending: Pending) -> Answer:
        """The answer to a command given with `send`."""
        return await answered(pending, self)

    async def run(self) -> None:
        """Take in what the peer says until it ends."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._take_complaints)
            await self._take_answers()

    async def _take_complaints(self) -> None:
        """Keep the last lines of its standard error, and pass all of it on."""
        assert self._process.stderr is not None
        rest = b""
        async for part in self._process.stderr:
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                text = line.decode(errors="backslashreplace")
                self._complaints.append(text)
                print(f"{self.name}: {text}", file=sys.stderr)

    async def _take_answers(self) -> None:
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
        with waiting_for("the peer to be ready", self, START):
            await self._ready.wait()
        if self._ended:
            raise AssertionError(f"the {self.name} peer ended before it was ready{self.last_words}")


@contextlib.asynccontextmanager
async def foreign_peer(name: str, command: list[str], *options: str) -> AsyncIterator[ForeignPeer]:
    """A foreign peer while the context lasts."""
    start = functools.partial(
        trio.lowlevel.open_process,
        [*command, *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
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
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe is not None:
                    await pipe.aclose()
