"""A control API on a real socket, in front of actors that answer from a table."""

from __future__ import annotations

import functools
import itertools
import random
import threading
import time
from collections.abc import Callable

import loguru
import pytest
import trio

import actors.api.actor as api
from peerup.client import Client
from protocol.messages import Message, Request
from protocol.messages.config import ConfigSnapshot, SubscribeConfig
from protocol.messages.system import ChildStatus, FaultsInForce, ReadFaults, ReadTree, SetFaults, SetTaps, Tree
from supervisor.errors import NoSuchActorError


def child(name: str, pid: int | None = 100, supervisor: str = "root", state: str = "running", **values) -> ChildStatus:
    return ChildStatus(name, "actors.x:X", supervisor, pid, state, 12.5, 0, 0, 0, 7, "", **values)


class FakeContext:
    """The world of one API actor: answers come from `answers`, what it sends is in `told`."""

    name = "api"
    incarnation = 1
    supervisor = "root"
    current_message = None
    current_sender = ""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery = nursery
        self.random = random.Random(5)
        self.log = loguru.logger
        self.told: list[tuple[str, Message]] = []
        self.watched: list[str] = []
        self.checkpoints: list[tuple[dict, tuple[int, ...]]] = []
        self.tree = [child("root", 100, supervisor="main"), child("gate", 101), child("api", 102)]
        self.answers: dict[type, Callable] = {
            ReadTree: lambda _target, _request: Tree(tuple(self.tree)),
            SubscribeConfig: lambda _target, _request: ConfigSnapshot(1, True, (), (), ()),
        }
        self.answers[ReadFaults] = lambda target, _: FaultsInForce(
            tuple(
                rule
                for message in self.told_to(target, SetFaults)[-1:]
                for rule in message.faults
                if rule.until > self.now()
            )
        )
        self.asked: list[tuple[str, Request]] = []
        self.told_event = trio.Event()

    def now(self) -> float:
        return trio.current_time()

    def wall(self) -> float:
        return time.time()

    def tell(self, target: str, message: Message) -> None:
        self.told.append((target, message))
        self.told_event.set()
        self.told_event = trio.Event()

    async def ask(self, target: str, request: Request, *, timeout: float) -> Message:  # noqa: ASYNC109 - the context's signature
        await trio.lowlevel.checkpoint()
        self.asked.append((target, request))
        answer = self.answers.get(type(request))
        if answer is None:
            raise NoSuchActorError(f"there is no actor {target!r}")
        result = answer(target, request)
        return await result if hasattr(result, "__await__") else result

    def watch(self, name: str) -> None:
        self.watched.append(name)

    def checkpoint(self, state, descriptors=()) -> None:
        self.checkpoints.append((state, tuple(descriptors)))

    def told_to(self, name: str, kind: type) -> list:
        return [message for target, message in self.told if target == name and isinstance(message, kind)]

    async def until(self, condition: Callable[[], bool], seconds: float = 5.0) -> None:
        with trio.fail_after(seconds):
            while not condition():
                event = self.told_event
                with trio.move_on_after(0.05):
                    await event.wait()


class FakeNode:
    """A served API actor. `call` runs a blocking client call beside it."""

    def __init__(self, context: FakeContext, actor: api.ApiActor, path) -> None:
        self.context = context
        self.actor = actor
        self.path = path
        self.client = Client(path, timeout=10)

    async def call(self, function, *args, **kwargs):
        return await trio.to_thread.run_sync(functools.partial(function, *args, **kwargs), abandon_on_cancel=False)

    def taps(self, name: str) -> tuple:
        sent = self.context.told_to(name, SetTaps)
        return sent[-1].taps if sent else ()

    def faults(self, name: str) -> tuple:
        sent = self.context.told_to(name, SetFaults)
        return sent[-1].faults if sent else ()


@pytest.fixture
def serve(tmp_path):
    """`async with serve(allow_faults=...) as node`."""
    import contextlib

    counter = itertools.count()

    @contextlib.asynccontextmanager
    async def run(*, allow_faults: bool = True, checkpoint=None, context=None, path=None):
        path = path or tmp_path / f"{next(counter)}.sock"
        async with trio.open_nursery() as nursery:
            context = context or FakeContext(nursery)
            context.nursery = nursery
            actor = api.ApiActor(
                socket_path=str(path),
                home=str(tmp_path),
                version="0.1.0",
                service_pid=1,
                main_pid=1,
                started_at=time.time() - 5,
                allow_faults=allow_faults,
            )
            actor.context = context
            await actor.start(checkpoint)
            yield FakeNode(context, actor, path)
            await actor.stop("test ends")
            nursery.cancel_scope.cancel()
        assert threading.active_count() < 50

    return run
