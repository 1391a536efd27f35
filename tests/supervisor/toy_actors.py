"""Small actors with which the process runtime is tried: they do what their messages say."""

from __future__ import annotations

import os
import socket
import time
from typing import NoReturn

import trio

from protocol.messages import Data, Descriptor, Message, Request, message
from protocol.messages.system import ActorDown, ActorUp, Ok
from supervisor.actor import Actor, Checkpoint, handles
from supervisor.errors import AskError, RefusedError


@message("toy.echoed")
class Echoed(Message):
    text: bytes
    pid: int
    incarnation: int


@message("toy.echo")
class Echo(Request[Echoed]):
    text: bytes


@message("toy.relay")
class Relay(Request[Echoed]):
    """Ask `target` to echo and answer what it answered."""

    target: str
    text: bytes
    timeout: float


@message("toy.crash")
class Crash(Message):
    text: str


@message("toy.sleep")
class Sleep(Request[Ok]):
    seconds: float


@message("toy.block")
class Block(Message):
    """Stop the event loop for so long."""

    seconds: float


@message("toy.watch")
class Watch(Request[Ok]):
    name: str


@message("toy.seen")
class Seen(Message):
    """What the watcher was told: `up NAME INCARNATION`, `down NAME`."""

    events: tuple[str, ...]


@message("toy.read-seen")
class ReadSeen(Request[Seen]):
    pass


@message("toy.take-descriptor")
class TakeDescriptor(Request[Ok]):
    """Write `text` to the descriptor and close it."""

    descriptor: Descriptor
    text: bytes


@message("toy.numbered")
class Numbered(Message):
    number: int


@message("toy.counted")
class Counted(Message):
    count: int
    in_order: bool


@message("toy.read-count")
class ReadCount(Request[Counted]):
    pass


@message("toy.keep")
class Keep(Message):
    """Leave a checkpoint of so many bytes, all of them this one."""

    size: int
    byte: int


@message("toy.kept")
class Kept(Message):
    """What the predecessor has left, and which byte that was."""

    size: int
    byte: int


@message("toy.read-kept")
class ReadKept(Request[Kept]):
    pass


@message("toy.measured")
class Measured(Message):
    seconds: tuple[float, ...]


@message("toy.measure")
class Measure(Request[Measured]):
    """Make `rounds` echo round trips to the target, one after the other, and answer how long each took."""

    target: str
    rounds: int
    size: int


@message("toy.burst")
class Burst(Request[Measured]):
    """Tell the target `count` numbered messages, in portions that its mailbox holds; answer the whole time."""

    target: str
    count: int


class Toy(Actor):
    """Understands all of the above."""

    mailbox_limit = 5000

    def __init__(self, fail_start: str = "", start_delay: float = 0.0, port: int | None = None) -> None:
        self._fail_start = fail_start
        self._start_delay = start_delay
        self._port = port
        self._events: list[str] = []
        self._count = 0
        self._in_order = True
        self._listener: trio.SocketListener | None = None
        self._kept = b""

    async def start(self, checkpoint: Checkpoint | None) -> dict[str, Data]:
        if self._fail_start:
            raise RuntimeError(self._fail_start)
        if self._start_delay:
            await trio.sleep(self._start_delay)
        state: dict[str, Data] = {"pid": os.getpid(), "incarnation": self.context.incarnation}
        if checkpoint is not None and isinstance(kept := checkpoint.state.get("kept"), bytes):
            self._kept = kept
        if self._port is not None:
            sock = self._listening_socket(checkpoint)
            self.context.checkpoint({"port": sock.getsockname()[1]}, [sock.fileno()])
            state["port"] = sock.getsockname()[1]
            self.context.nursery.start_soon(self._serve, trio.socket.from_stdlib_socket(sock))
        return state

    def _listening_socket(self, checkpoint: Checkpoint | None) -> socket.socket:
        if checkpoint is not None:
            return socket.socket(fileno=checkpoint.descriptors[0].detach())
        sock = socket.socket()
        sock.bind(("127.0.0.1", self._port or 0))
        sock.listen(64)
        return sock

    async def _serve(self, sock: trio.socket.SocketType) -> None:
        while True:
            stream, _ = await sock.accept()
            with stream:
                await stream.send(str(os.getpid()).encode())

    def describe(self) -> dict[str, Data]:
        return {"count": self._count}

    @handles(Echo)
    async def echo(self, request: Echo) -> Echoed:
        return Echoed(request.text, os.getpid(), self.context.incarnation)

    @handles(Relay, concurrent=True)
    async def relay(self, request: Relay) -> Echoed:
        try:
            return await self.context.ask(request.target, Echo(request.text), timeout=request.timeout)
        except AskError as error:
            raise RefusedError(error.code, str(error)) from error

    @handles(Crash)
    async def crash(self, request: Crash) -> NoReturn:
        raise RuntimeError(request.text)

    @handles(Sleep, concurrent=True)
    async def sleep(self, request: Sleep) -> None:
        await trio.sleep(request.seconds)

    @handles(Block)
    async def block(self, request: Block) -> None:
        time.sleep(request.seconds)  # noqa: ASYNC251 - standing still is what is wanted

    @handles(Watch)
    async def watch(self, request: Watch) -> None:
        self.context.watch(request.name)

    @handles(ActorUp)
    async def up(self, notice: ActorUp) -> None:
        self._events.append(f"up {notice.name} {notice.incarnation}")

    @handles(ActorDown)
    async def down(self, notice: ActorDown) -> None:
        self._events.append(f"down {notice.name}")

    @handles(ReadSeen)
    async def seen(self, request: ReadSeen) -> Seen:
        return Seen(tuple(self._events))

    @handles(TakeDescriptor)
    async def take_descriptor(self, request: TakeDescriptor) -> None:
        fd = request.descriptor.detach()
        os.write(fd, request.text)
        os.close(fd)

    @handles(Numbered)
    async def numbered(self, notice: Numbered) -> None:
        self._in_order = self._in_order and notice.number == self._count
        self._count += 1

    @handles(ReadCount)
    async def read_count(self, request: ReadCount) -> Counted:
        return Counted(self._count, self._in_order)

    @handles(Keep)
    async def keep(self, notice: Keep) -> None:
        self.context.checkpoint({"kept": bytes([notice.byte]) * notice.size})

    @handles(ReadKept)
    async def read_kept(self, request: ReadKept) -> Kept:
        return Kept(len(self._kept), self._kept[0] if self._kept else 0)

    @handles(Measure, concurrent=True)
    async def measure(self, request: Measure) -> Measured:
        text = bytes(request.size)
        seconds = []
        for _ in range(request.rounds):
            before = time.perf_counter()
            await self.context.ask(request.target, Echo(text), timeout=10)
            seconds.append(time.perf_counter() - before)
        return Measured(tuple(seconds))

    @handles(Burst, concurrent=True)
    async def burst(self, request: Burst) -> Measured:
        before = time.perf_counter()
        for number in range(request.count):
            self.context.tell(request.target, Numbered(number))
            if number % 1000 == 999:
                await self.context.ask(request.target, ReadCount(), timeout=30)
        counted = await self.context.ask(request.target, ReadCount(), timeout=30)
        if counted.count != request.count or not counted.in_order:
            raise RefusedError("lost", f"{counted.count} of {request.count} arrived, in order: {counted.in_order}")
        return Measured((time.perf_counter() - before,))
