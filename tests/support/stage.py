"""Real actors in real cells over an in-memory port, in the test's own trio run: for tests of single actors.

The test itself is an actor named `test` (or another name, see :meth:`Stage.visitor`); the supervisor of everything
is a visitor too, which keeps checkpoints and hands them to successors::

    async with Stage() as stage:
        await stage.start("keyring", Keyring(path))
        identity = await stage.visitor("switchboard").ask("keyring", ReadIdentity())
"""

import contextlib
import dataclasses
import math
import os
import random

import trio
import trio.testing

from protocol.messages import Descriptor, Request
from protocol.messages.system import LastWords, Ok, Overflow, Ready, SaveCheckpoint
from supervisor.actor import Checkpoint
from supervisor.cell import Cell
from supervisor.errors import AskError, RefusedError
from supervisor.exchange import Exchange
from supervisor.mailbox import Mailbox
from supervisor.port import NameState, NotDeliveredError

SUPERVISOR = "root"


class StartFailedError(Exception):
    def __init__(self, code, reason):
        super().__init__(f"{code}: {reason}")
        self.code = code
        self.reason = reason


class _Port:
    def __init__(self, stage):
        self._stage = stage

    def send(self, envelope, descriptors):
        if envelope.target not in self._stage.receivers:
            raise NotDeliveredError(f"{envelope.target} is unknown")
        self._stage.posted.append((envelope, [Descriptor(os.dup(one.fileno())) for one in descriptors]))
        self._stage.wake.set()

    def state(self, name):
        return NameState.READY if name in self._stage.ready else NameState.UNKNOWN

    def watch(self, name):
        self._stage.watching.add((self, name))

    receiver = None


class Visitor:
    """Somebody outside of every cell: it can ask, tell, and sees what it is told in `inbox`.

    `answer(request)` is awaited for the answer of each request; `audience(message)` takes what is told, if it says so.
    One that `acknowledges` answers each request with `Ok`, and keeps it in its inbox like what it is told.
    """

    def __init__(self, stage, name, *, answer=None, audience=None, acknowledges=False):
        self.name = name
        self._acknowledges = acknowledges
        self.inbox = []
        self._answer = answer
        self._audience = audience
        self._stage = stage
        self._arrived = trio.Event()
        port = _Port(stage)
        self.exchange = port.receiver = Exchange(
            name,
            1,
            port,
            now=trio.current_time,
            wall=stage.wall,
            random=random.Random(0),
            mailbox=Mailbox(10_000, Overflow.REFUSE),
            wake=self._took,
        )

    def _took(self):
        while (item := self.exchange.take()) is not None:
            if self._answer is not None and isinstance(item.message, Request):
                self._stage.start_soon(self._answer_request, item)
            elif self._audience is None or not self._audience(item.message):
                self.inbox.append(item.message)
                if self._acknowledges and isinstance(item.message, Request):
                    self.exchange.answer(item.envelope, Ok())
        self._arrived.set()
        self._arrived = trio.Event()

    async def _answer_request(self, item):
        try:
            answer = await self._answer(item.message)
        except RefusedError as refusal:
            self.exchange.refuse(item.envelope, refusal)
        else:
            self.exchange.answer(item.envelope, answer)

    async def ask(self, target, request, *, seconds=5.0):
        done, outcome = trio.Event(), []

        def answered(result):
            outcome.append(result)
            done.set()

        self.exchange.ask(target, request, timeout=seconds, answer=answered)
        with trio.fail_after(seconds + 1):
            while not done.is_set():
                self.exchange.handle_timers(self.exchange.now())
                when = self.exchange.next_timer()
                with trio.move_on_at(math.inf if when is None else when):
                    await done.wait()
        if isinstance(outcome[0], AskError):
            raise outcome[0]
        return outcome[0]

    def tell(self, target, message):
        self.exchange.tell(target, message)

    async def wait_until(self, condition, *, seconds=10.0):
        """Wait until `condition(inbox)` is true of what has been told; its value."""
        with trio.fail_after(seconds):
            while not (value := condition(self.inbox)):
                await self._arrived.wait()
        return value


@dataclasses.dataclass
class _Running:
    cell: Cell
    scope: trio.CancelScope
    ended: trio.Event


class Stage:
    def __init__(self, *, start_wall=1_800_000_000.0):
        self.receivers = {}
        self.ready = {}
        self.watching = set()
        self.posted = []
        self.wake = trio.Event()
        self.checkpoints = {}
        self.start_wall = start_wall
        self.log = []
        self._running = {}
        self._incarnations = {}
        self._visitors = {}
        self._failures = {}

    def wall(self):
        return self.start_wall + trio.current_time()

    async def __aenter__(self):
        self.start_wall -= trio.current_time()
        self._stack = contextlib.AsyncExitStack()
        self._nursery = await self._stack.enter_async_context(trio.open_nursery())
        self._nursery.start_soon(self._pump)
        root = self.visitor(SUPERVISOR)
        root.exchange.on(SaveCheckpoint, self._save_checkpoint)
        root.exchange.on(LastWords, lambda words, envelope: self._failures.__setitem__(envelope.sender, words))
        root.exchange.on(Ready, lambda *_: None)
        return self

    async def __aexit__(self, *exc):
        if exc[0] is None:
            for name in reversed(list(self._running)):
                await self.stop(name)
        self._nursery.cancel_scope.cancel()
        await self._stack.aclose()
        for checkpoint in self.checkpoints.values():
            for descriptor in checkpoint.descriptors:
                descriptor.close()

    def start_soon(self, function, *arguments):
        """Run this beside everything else; its failure is the test's."""
        self._nursery.start_soon(function, *arguments)

    def visitor(self, name="test", **behaviour):
        """Somebody of this name, who is ready from now on; `behaviour` as for `Visitor`, when it is a new one."""
        if name not in self._visitors:
            made = self._visitors[name] = Visitor(self, name, **behaviour)
            self.receivers[name] = made.exchange
            self._up(name)
        return self._visitors[name]

    def dismiss(self, name):
        """This visitor ends."""
        del self._visitors[name]
        self._down(name)

    async def ask(self, target, request, *, seconds=5.0):
        return await self.visitor().ask(target, request, seconds=seconds)

    async def start(self, name, actor, *, seconds=10.0):
        """Start an actor, with the checkpoint that a predecessor left; what its `start` returned."""
        incarnation = self._incarnations[name] = self._incarnations.get(name, 0) + 1
        port = _Port(self)
        is_ready, answer = trio.Event(), {}

        def on_ready(state):
            answer.update(state)
            self._up(name)
            is_ready.set()

        cell = Cell(
            actor,
            name,
            incarnation,
            port,
            supervisor=SUPERVISOR,
            now=trio.current_time,
            wall=self.wall,
            random=random.Random(incarnation),
            on_ready=on_ready,
        )
        port.receiver = cell.exchange
        self.receivers[name] = cell.exchange
        running = self._running[name] = _Running(cell, trio.CancelScope(), trio.Event())
        kept = self.checkpoints.get(name)
        checkpoint = None
        if kept is not None:
            copies = tuple(Descriptor(os.dup(one.fileno())) for one in kept.descriptors)
            checkpoint = Checkpoint(kept.state, copies)
        self._nursery.start_soon(self._run, name, running, checkpoint)
        with trio.fail_after(seconds):
            async with trio.open_nursery() as nursery:

                async def watch_end():
                    await running.ended.wait()
                    nursery.cancel_scope.cancel()

                nursery.start_soon(watch_end)
                await is_ready.wait()
                nursery.cancel_scope.cancel()
        if not is_ready.is_set():
            await trio.testing.wait_all_tasks_blocked()
            words = self._failures.pop(name)
            raise StartFailedError(words.code, words.reason)
        return answer

    async def _run(self, name, running, checkpoint):
        try:
            with running.scope:
                try:
                    await running.cell.run(checkpoint)
                except Exception:
                    if name in self.ready:
                        raise
        finally:
            self._running.pop(name, None)
            self._down(name)
            running.ended.set()

    async def kill(self, name):
        """End it without `stop`, as SIGKILL does."""
        running = self._running[name]
        running.scope.cancel()
        await running.ended.wait()

    async def stop(self, name):
        running = self._running[name]
        running.cell.request_stop("the test is over")
        with trio.fail_after(10):
            await running.ended.wait()

    def metrics(self, name):
        """The series of an actor: value by (name, labels)."""
        samples = self._running[name].cell.exchange.metrics.samples()
        return {(sample.name, *sorted(sample.labels.items())): sample.value for sample in samples}

    def describe(self, name):
        return self._running[name].cell.actor.describe()

    def _up(self, name):
        self.ready[name] = self._incarnations.setdefault(name, 1)
        for port, watched in list(self.watching):
            if watched == name:
                port.receiver.name_up(name, self.ready[name])

    def _down(self, name):
        self.ready.pop(name, None)
        self.receivers.pop(name, None)
        for port in [one for one, _ in self.watching]:
            if port.receiver is not None and port.receiver.name == name:
                self.watching = {pair for pair in self.watching if pair[0] is not port}
        for receiver in list(self.receivers.values()):
            receiver.name_down(name, "ended")

    def _save_checkpoint(self, message, envelope):
        old = self.checkpoints.get(envelope.sender)
        for descriptor in old.descriptors if old is not None else ():
            descriptor.close()
        self.checkpoints[envelope.sender] = Checkpoint(message.state, message.descriptors)

    async def _pump(self):
        while True:
            while self.posted:
                envelope, descriptors = self.posted.pop(0)
                receiver = self.receivers.get(envelope.target)
                if receiver is not None:
                    receiver.deliver(envelope, descriptors)
            self.wake = trio.Event()
            await self.wake.wait()


def refused(code):
    """`with refused("code"):` the block must end with a RefusedError of this code."""
    return _Refused(code)


class _Refused:
    def __init__(self, code):
        self.code = code
        self.error = None

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        assert isinstance(error, AskError), f"not refused: {error!r}"
        assert error.code == self.code, f"refused with {error.code}: {error}"
        self.error = error
        return True
