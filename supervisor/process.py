"""A leaf of the tree as a process: one actor under trio, alone with its transport.

Theory of operation. trio owns the process. One task waits for the transport's epoll descriptor and pumps it; what
arrives goes through the exchange of the actor's :class:`supervisor.cell.Cell` straight to the task that handles it, so
there is one thread and one wake-up for each message. Thespian's own messages (there is one: to exit) come the same way.

A leaf never makes processes, so nothing is ever forked out of a process that runs trio or holds a key.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import random
import signal
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import thespian.actors
import trio

from protocol.errors import InvalidValueError
from protocol.messages.system import LastWords
from supervisor import confinement, forking, linux
from supervisor.actor import Actor
from supervisor.boot import Birth, Boot, LogSettings
from supervisor.cell import UNFORESEEN, Cell, failure_text
from supervisor.exchange import Exchange
from supervisor.lending import Borrower, borrow_from
from supervisor.logging import LogControl
from supervisor.port import NameState
from supervisor.registry import Entry
from supervisor.transport import Transport

LAST_FLUSH = 1.0
"""Seconds that an ending process gives slow readers to take what it had still queued for them."""


def load_factory(factory: str, allowed: tuple[str, ...]) -> type:
    """The class that `module:Class` names.

    Raises:
        InvalidValueError: the module may not be used, or there is no such class.
    """
    module_name, colon, class_name = factory.partition(":")
    if not colon or not module_name.startswith(allowed):
        raise InvalidValueError(f"{factory!r} is not `module:Class` below {', '.join(allowed)}")
    try:
        found = getattr(importlib.import_module(module_name), class_name, None)
    except ModuleNotFoundError as error:
        raise InvalidValueError(f"{factory!r} cannot be imported: {error}") from error
    if not isinstance(found, type):
        raise InvalidValueError(f"there is no class {class_name} in {module_name}")
    return found


def open_log(name: str, settings: LogSettings) -> LogControl:
    """The log of a process that hosts the actor of this name."""
    return LogControl(name, level=settings.level_of(name), json=settings.json, colour=settings.colour)


def enter(name: str, incarnation: int, supervisor: str, transport: Transport, boot: Boot) -> LogControl:
    """The first steps of every actor's process: be known, be named, log."""
    boot.directory.write(name, Entry(NameState.STARTING, incarnation, os.getpid(), supervisor))
    transport.name = name
    linux.set_process_name(name)
    return open_log(name, boot.log)


class Leaf(thespian.actors.Actor):
    """What Thespian starts; the project's own actor lives in it."""

    def __init__(self, _: Any, birth: Birth) -> None:
        super().__init__()
        self._birth = birth
        self._cell: Cell | None = None
        self._confinement = ""

    def receiveMessage(self, message: Any, sender: Any) -> None:  # noqa: N802 - Thespian's name
        """Thespian's only message to a leaf: end."""
        if isinstance(message, thespian.actors.ActorExitRequest) and self._cell is not None:
            self._cell.request_stop("the actor system ends")

    def live(self, manager: Any) -> int:
        """The life of the process; its exit status."""
        birth = self._birth
        log = enter(birth.spec.name, birth.incarnation, birth.supervisor, manager.transport.wire, birth.boot)
        linux.forbid_inspection()
        linux.forbid_new_privileges()
        return self.act(manager, log)

    def act(self, manager: Any, log: LogControl) -> int:
        """The life of the actor; the exit status of its process."""
        birth = self._birth
        spec, boot = birth.spec, birth.boot
        transport: Transport = manager.transport.wire
        try:
            actor = self._make_actor()
        except Exception as error:  # noqa: BLE001 - whatever it is, the supervisor is told and the process ends
            log.logger.opt(exception=error).critical("{} could not be made", spec.factory)
            self._report(transport, error)
            transport.flush(LAST_FLUSH)
            return forking.CRASHED
        cell = self._cell = Cell(
            actor,
            spec.name,
            birth.incarnation,
            transport,
            supervisor=birth.supervisor,
            now=time.monotonic,
            wall=time.time,
            random=random.Random(os.urandom(16)),  # noqa: S311 - documented as never for keys
            log=log.logger,
            set_log_level=lambda level: log.set_level(level or boot.log.level_of(spec.name)),
            crash=crash,
            hang=hang,
            allow_faults=boot.allow_faults,
            operators=boot.operators,
            confinement=self._confinement,
        )
        transport.receiver = cell.exchange
        cell.exchange.refusals = transport.refusals
        log.retry_with(cell.exchange.call_later)
        status = 0
        try:
            trio.run(self._main, manager, cell)
        except Exception as error:  # noqa: BLE001 - let it crash: logged here, and the process ends
            code, reason = failure_text(error)
            if code == UNFORESEEN:
                log.logger.opt(exception=error).critical("ended by an unhandled error: {}", reason)
            else:  # it says all there is to say; where it was raised interests nobody but us
                log.logger.log("ERROR", "ended: {}", reason)
                log.logger.opt(exception=error).debug("ended from here")
            status = forking.CRASHED
        transport.flush(LAST_FLUSH)
        log.close()
        return status

    def _make_actor(self) -> Actor:
        spec = self._birth.spec
        factory = load_factory(spec.factory, self._birth.boot.factories)
        # Everything is imported, and the actor does not exist yet.
        self._confine()
        actor = factory(**spec.arguments)
        if not isinstance(actor, Actor):
            raise InvalidValueError(f"{spec.factory} is not an actor")
        return actor

    def _confine(self) -> None:
        prepared, sock = self._birth.prepared, self._birth.borrowing
        if prepared is None:
            return
        if sock is not None:
            borrow_from(Borrower(sock, prepared.spec.lent))
        self._confinement = confinement.confine(prepared)

    def _report(self, transport: Transport, error: Exception) -> None:
        birth = self._birth
        exchange = Exchange(
            birth.spec.name,
            birth.incarnation,
            transport,
            now=time.monotonic,
            wall=time.time,
            random=random.Random(0),  # noqa: S311 - not used by a lone message
        )
        exchange.tell(birth.supervisor, LastWords(birth.incarnation, *failure_text(error)))

    async def _main(self, manager: Any, cell: Cell) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._pump_or_report, manager)
            with _obeying(cell):
                await cell.run(self._birth.checkpoint)
            nursery.cancel_scope.cancel()

    async def _pump_or_report(self, manager: Any) -> None:
        try:
            await self._pump(manager)
        except Exception as error:
            self._report(manager.transport.wire, error)  # the cell only reports what the actor did
            raise

    @staticmethod
    async def _pump(manager: Any) -> None:
        system = manager.transport
        transport: Transport = system.wire
        fd = transport.fileno()
        while True:
            await trio.lowlevel.wait_readable(fd)
            transport.pump()
            for envelope in system.take():
                manager.handleMessages(envelope)


@contextlib.contextmanager
def _obeying(cell: Cell) -> Iterator[None]:
    """Stop the actor on SIGTERM. trio's own receiver would do, with a task and a good deal of code in each process."""
    token = trio.lowlevel.current_trio_token()

    def obey(*_: object) -> None:
        with contextlib.suppress(trio.RunFinishedError):
            token.run_sync_soon(cell.request_stop, "SIGTERM")

    before = signal.signal(signal.SIGTERM, obey)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def crash() -> None:
    """End this process as a crash fault wants it: at once, with no chance to clean up."""
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> NoReturn:
    """Do nothing for ever, as an actor does that waits for the wrong thing: the heartbeat must find it."""
    while True:
        time.sleep(3600)
