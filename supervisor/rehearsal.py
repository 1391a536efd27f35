"""What every process of the tree does first, done a few times before the first of them is made.

A process of the tree is a fork, and shares its parent's memory until either writes. CPython writes where it runs: after
eight calls it rewrites a function's code, then fills in what each instruction has found; types get version numbers,
instances shared keys, the method cache its entries. What has been through that before the first fork is left alone
after it, and code that has been fitted to its types touches far fewer reference counts.

So here an actor that does nothing lives ten times as a leaf of the tree does, on its own in a run directory of its own,
its own supervisor; and a supervisor that makes no processes starts it, loses it and stops it. Nothing here is secret
or random, and nothing is left behind.
"""

from __future__ import annotations

import contextlib
import os
import random
import tempfile
import time
from pathlib import Path

import trio

from protocol.messages import Data
from protocol.messages.system import (
    ActorDown,
    ActorUp,
    ChildSpec,
    Ping,
    Ready,
    SaveCheckpoint,
    Stop,
    Strategy,
    SupervisorSpec,
)
from supervisor.actor import Actor, Checkpoint, handles
from supervisor.boot import Birth, Boot, LogSettings
from supervisor.control import address_of
from supervisor.exchange import Exchange
from supervisor.logging import LogControl
from supervisor.overseer import Overseer
from supervisor.port import NameState
from supervisor.process import Leaf
from supervisor.registry import Entry, RunDirectory
from supervisor.thespian_base import BOOT, EndpointPreparation, ThespianTransport
from supervisor.thespian_corrections import Manager

ROUNDS = 10
"""Lives: two more than the calls after which CPython fits code to what it sees."""

_NAME = "rehearsal"
_FACTORY = "supervisor.rehearsal:Performer"
_SPEC = SupervisorSpec(Strategy.ONE_FOR_ONE, 5, 60.0, 0.1, 1.0, (ChildSpec("child", _FACTORY, {}),))
_PATIENCE = 5.0
"""Seconds after which a life is broken off; it takes a few milliseconds."""


class Performer(Actor):
    """Does what every actor does at its start, and asks its supervisor, which it is itself, to be stopped."""

    def __init__(self, *, watches: bool) -> None:
        self._watches = watches

    async def start(self, checkpoint: Checkpoint | None) -> dict[str, Data]:
        """Get ready."""
        if self._watches:
            self.context.watch(_NAME)
        self.context.checkpoint({"state": 1})
        self.context.nursery.start_soon(self._perform)
        return {}

    async def _perform(self) -> None:
        await self.context.ask(_NAME, Ping(), timeout=_PATIENCE)
        with trio.move_on_after(0):
            await trio.sleep_forever()
        self.context.tell(_NAME, Stop("the end of the rehearsal"))

    @handles(Ready)
    async def ready(self, message: Ready) -> None:
        """As a supervisor hears of it."""

    @handles(SaveCheckpoint)
    async def keep(self, message: SaveCheckpoint) -> None:
        """As a supervisor gets it."""

    @handles(ActorUp)
    async def up(self, message: ActorUp) -> None:
        """What is watched begins."""

    @handles(ActorDown)
    async def down(self, message: ActorDown) -> None:
        """What is watched ends."""


class _Stage:
    """Implements :class:`supervisor.overseer.Host` without any process."""

    def spawn(self, spec: ChildSpec, incarnation: int, checkpoint: Checkpoint | None) -> int | None:
        return os.getpid()

    def kill(self, name: str, incarnation: int) -> None:
        pass

    freeze = kill

    def publish(self, name: str, state: NameState, incarnation: int) -> None:
        pass

    def ready(self) -> None:
        pass

    def finished(self, reason: str, *, failed: bool) -> None:
        pass


def rehearse() -> None:
    """See the module. It takes some tens of milliseconds; where nothing can be written it does nothing.

    Call it before there is a log: the last life leaves the log without a sink.
    """
    with (
        contextlib.suppress(OSError),
        tempfile.TemporaryDirectory(prefix="peerup-") as path,
        Path(os.devnull).open("w", encoding="ascii") as nowhere,
    ):
        for turn in range(ROUNDS):
            directory = RunDirectory(path)
            log = LogControl(_NAME, sink=nowhere)
            transport = ThespianTransport(EndpointPreparation(0, directory, os.getpid()))
            try:
                _live(directory, transport, log, watches=turn == 0)
                _supervise(transport, log)
            finally:
                transport.close()
                log.close()
                directory.close()


def _live(directory: RunDirectory, transport: ThespianTransport, log: LogControl, *, watches: bool) -> None:
    boot = Boot(directory, _SPEC, log=LogSettings())
    birth = Birth(ChildSpec(_NAME, _FACTORY, {"watches": watches}), 1, _NAME, None, boot)
    capabilities = {BOOT: boot}
    own = address_of(os.getpid())
    manager = Manager(Leaf, None, transport, None, None, own, own, birth, capabilities, None, None)
    directory.write(_NAME, Entry(NameState.READY, 1, os.getpid(), _NAME))
    transport.wire.name = _NAME
    leaf = Leaf(capabilities, birth)
    log.logger.info("{}", "the beginning")
    leaf.act(manager, log)


def _supervise(transport: ThespianTransport, log: LogControl) -> None:
    wire = transport.wire
    exchange = Exchange(
        _NAME,
        1,
        wire,
        supervisor=_NAME,
        now=time.monotonic,
        wall=time.time,
        random=random.Random(0),  # noqa: S311 - used for nothing secret
    )
    wire.receiver = exchange
    overseer = Overseer(_NAME, _SPEC, exchange, _Stage(), random.Random(0), pid=os.getpid(), log=log.logger)  # noqa: S311
    overseer.begin()
    for _ in range(3):
        transport.wait(time.monotonic())
    overseer.close()
    exchange.close()
