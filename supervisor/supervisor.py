"""A supervisor as a process: plain, so that it can fork. No trio, no threads, no keys, no sockets but its transport.

What it decides is in :mod:`supervisor.overseer` and :mod:`supervisor.strategy`; here is what those need from
the world: Thespian's actor system makes the processes and tells of their ends, the registry is kept up to date, signals
are sent. A child is born with its specification, its incarnation and its predecessor's checkpoint, descriptors
included, by way of the fork; nothing has to be sent to it.
"""

from __future__ import annotations

import errno
import functools
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

import thespian.actors

from protocol.messages import Data, Descriptor, Envelope
from protocol.messages.system import ChildSpec, LastWords, Ready, Stop
from supervisor import forking
from supervisor.actor import Checkpoint
from supervisor.boot import ROOT, SERVICE, Birth, Boot
from supervisor.confinement import BASE, Prepared, confine_supervisor
from supervisor.exchange import Exchange
from supervisor.lending import Lender
from supervisor.overseer import FACTORY, GAVE_UP, Overseer, supervisor_spec
from supervisor.port import NameState, NotDeliveredError
from supervisor.process import LAST_FLUSH, Leaf, crash, enter, hang
from supervisor.registry import Entry
from supervisor.thespian_base import boot_of
from supervisor.transport import Transport

GAVE_UP_STATUS = 1
"""The exit status of a supervisor that could not keep its children running."""


class _Process:
    """A child's process, from its fork until its end has been reported."""

    __slots__ = ("incarnation", "lender", "name", "pid", "supervises")

    def __init__(self, name: str, incarnation: int, pid: int, lender: Lender | None, *, supervises: bool) -> None:
        self.name = name
        self.incarnation = incarnation
        self.pid = pid
        self.lender = lender
        self.supervises = supervises


class _Port:
    """The transport of a supervisor. A child that no message can reach yet is asked to stop by SIGTERM."""

    def __init__(self, transport: Transport, terminate: Callable[[str], bool]) -> None:
        self._transport = transport
        self._terminate = terminate
        self.state = transport.state
        self.watch = transport.watch

    def send(self, envelope: Envelope, descriptors: Sequence[Descriptor]) -> None:
        """See :meth:`supervisor.port.Port.send`."""
        try:
            self._transport.send(envelope, descriptors)
        except NotDeliveredError:
            if envelope.kind != Stop.KIND or not self._terminate(envelope.target):
                raise


class Supervisor(thespian.actors.Actor):
    """See the module. Implements :class:`supervisor.overseer.Host`.

    The one that the admin starts has no requirements: it is the root, and its specification is in the boot settings.
    """

    def __init__(self, capabilities: Any, requirements: Birth | None) -> None:
        super().__init__()
        self._boot: Boot = boot_of(capabilities)
        if requirements is None:
            self._name, self._incarnation, self._parent = ROOT, self._boot.generation, SERVICE
            self._spec = self._boot.root
        else:
            self._name, self._incarnation = requirements.spec.name, requirements.incarnation
            self._parent = requirements.supervisor
            self._spec = supervisor_spec(requirements.spec)
        self._own_confinement = requirements.spec.confinement if requirements is not None else None
        self._processes: dict[int, _Process] = {}
        self._by_name: dict[str, _Process] = {}
        self._past: dict[str, int] = {}  # incarnations of children that only a predecessor knew
        self._status = 0
        self._manager: Any = None
        self._overseer: Overseer | None = None
        self._exchange: Exchange | None = None
        self._lender: Lender | None = None

    def live(self, manager: Any) -> int:
        """The life of the process; its exit status."""
        transport = manager.transport.wire
        log = enter(self._name, self._incarnation, self._parent, transport, self._boot)
        if self._own_confinement is not None:
            confine_supervisor(self._own_confinement, self._boot.directory.places())
        exchange = Exchange(
            self._name,
            self._incarnation,
            _Port(transport, self._terminate),
            supervisor=self._parent,
            now=time.monotonic,
            wall=time.time,
            random=random.Random(os.urandom(16)),  # noqa: S311 - documented as never for keys
            describe=self._describe,
            on_stop=self._stop,
            set_log_level=lambda level: log.set_level(level or self._boot.log.level_of(self._name)),
            crash=crash,
            hang=hang,
            allow_faults=self._boot.allow_faults,
        )
        self._manager, self._exchange = manager, exchange
        transport.receiver = exchange
        manager.transport.timers = exchange
        exchange.refusals = transport.refusals
        log.retry_with(exchange.call_later)
        self._take_over()
        self._overseer = Overseer(
            self._name,
            self._spec,
            exchange,
            self,
            random.Random(os.urandom(16)),  # noqa: S311 - jitter
            allow_faults=self._boot.allow_faults,
            pid=os.getpid(),
            log=log.logger,
            last_incarnation=self._last_incarnation,
            operators=self._boot.operators,
            confinement=self._confinement,
        )
        stop_read, stop_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(stop_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, lambda *_: None)
        transport.add_reader(stop_read, functools.partial(self._signalled, stop_read))
        self._overseer.begin()
        manager.transport.run(manager.handleMessages)
        transport.flush(LAST_FLUSH)
        exchange.close()
        log.close()
        return self._status

    @property
    def _confinement(self) -> str:
        return BASE if self._boot.confined else ""

    def _take_over(self) -> None:
        """Free the names of children that only a predecessor of this process knew."""
        static = {child.name for child in self._spec.children}
        directory = self._boot.directory
        for name, entry in directory.names().items():
            if entry.owner == self._name and name not in static and name != self._name:
                self._past[name] = entry.incarnation
                directory.remove(name)

    def _last_incarnation(self, name: str) -> int:
        entry = self._boot.directory.read(name)
        if entry is not None:
            return entry.incarnation
        return max(self._past.get(name, 0), dict(self._boot.incarnations).get(name, 0))

    def _describe(self) -> dict[str, Data]:
        return {"strategy": self._spec.strategy.value, "processes": len(self._processes)}

    def _stop(self, reason: str) -> None:
        if self._overseer is not None:
            self._overseer.shut_down(reason)

    def _signalled(self, fd: int) -> None:
        os.read(fd, 64)
        self._stop("SIGTERM")

    # Thespian

    def receiveMessage(self, message: Any, sender: Any) -> None:  # noqa: N802 - Thespian's name
        """A child has ended, or the actor system ends."""
        if isinstance(message, thespian.actors.ActorExitRequest):
            self._stop("the actor system ends")
        elif isinstance(message, thespian.actors.ChildActorExited):
            self._ended(*self._manager.take_status(message.childAddress))

    def _ended(self, pid: int, status: int) -> None:
        process = self._processes.pop(pid, None)
        if process is None or self._overseer is None:
            return
        self._stop_lending(process)
        if self._by_name.get(process.name) is process:
            del self._by_name[process.name]
        directory = self._boot.directory
        if process.supervises:
            directory.orphan(process.name)
        entry = directory.read(process.name)
        if entry is not None and entry.pid == pid:
            directory.write(process.name, Entry(NameState.STARTING, process.incarnation, 0, self._name))
        self._overseer.child_exited(
            process.name, process.incarnation, failed=status != 0, reason=forking.describe_status(status)
        )

    # Host

    def spawn(self, spec: ChildSpec, incarnation: int, checkpoint: Checkpoint | None) -> int | None:
        """See :meth:`supervisor.overseer.Host.spawn`."""
        supervises = spec.factory == FACTORY
        descriptors = [descriptor.fileno() for descriptor in checkpoint.descriptors] if checkpoint is not None else []
        confinement, lender = None if supervises else spec.confinement, None
        try:
            prepared = Prepared(confinement) if confinement is not None else None
            lender = Lender(confinement.lent) if confinement is not None and confinement.lent else None
        except OSError as error:
            self._later(functools.partial(self._not_made, spec.name, incarnation, f"no process: {error.strerror}"))
            return None
        if lender is not None:
            descriptors.append(lender.other.fileno())
        if prepared is not None:
            descriptors += prepared.descriptors()
        # Kept here while the fork is made, so that the child has it as well and never finalises what it closed.
        self._lender = lender
        borrowing = lender.other if lender is not None else None
        birth = Birth(spec, incarnation, self._name, checkpoint, self._boot, borrowing, prepared)
        self._manager.keep_open = lambda: descriptors
        address = self.createActor(Supervisor if supervises else Leaf, targetActorRequirements=birth)
        pid: int | None = self._manager.pid_of_child(address)
        self._lender = None
        if prepared is not None:
            prepared.close()
        if lender is not None:
            lender.other.close()
        if pid is None:
            if lender is not None:
                lender.close()
            self._later(
                functools.partial(self._not_made, spec.name, incarnation, f"no process: {os.strerror(errno.EAGAIN)}")
            )
            return None
        process = _Process(spec.name, incarnation, pid, lender, supervises=supervises)
        if lender is not None:
            self._wire.add_reader(lender.socket.fileno(), functools.partial(self._lend, process))
        self._processes[pid] = self._by_name[spec.name] = process
        return pid

    @property
    def _wire(self) -> Transport:
        wire: Transport = self._manager.transport.wire
        return wire

    def _lend(self, process: _Process) -> None:
        if process.lender is not None:
            process.lender.serve(functools.partial(self._stop_lending, process))

    def _stop_lending(self, process: _Process) -> None:
        lender, process.lender = process.lender, None
        if lender is not None:
            self._wire.remove_reader(lender.socket.fileno())
            lender.close()

    def _not_made(self, name: str, incarnation: int, reason: str) -> None:
        if self._overseer is not None:
            self._overseer.child_exited(name, incarnation, failed=True, reason=reason)

    def _later(self, function: Any) -> None:
        if self._exchange is not None:
            self._exchange.call_at(self._exchange.now(), function)

    def kill(self, name: str, incarnation: int) -> None:
        """See :meth:`supervisor.overseer.Host.kill`. What is below a supervisor dies with it."""
        self._signal(name, incarnation, signal.SIGKILL)

    def freeze(self, name: str, incarnation: int) -> None:
        """See :meth:`supervisor.overseer.Host.freeze`."""
        self._signal(name, incarnation, signal.SIGSTOP)

    def _signal(self, name: str, incarnation: int, number: signal.Signals) -> None:
        process = self._by_name.get(name)
        if process is None or process.incarnation != incarnation:
            return
        known = self._manager.processes.get(process.pid)
        if known is not None:
            known[0].kill(number)

    def _terminate(self, name: str) -> bool:
        process = self._by_name.get(name)
        if process is None:
            return False
        self._signal(name, process.incarnation, signal.SIGTERM)
        return True

    def publish(self, name: str, state: NameState, incarnation: int) -> None:
        """See :meth:`supervisor.overseer.Host.publish`."""
        directory = self._boot.directory
        if state is NameState.UNKNOWN:
            directory.remove(name)
            return
        process = self._by_name.get(name)
        pid = process.pid if process is not None and process.incarnation == incarnation else 0
        directory.write(name, Entry(state, incarnation, pid, self._name))

    def ready(self) -> None:
        """See :meth:`supervisor.overseer.Host.ready`."""
        if self._exchange is not None:
            self._exchange.tell(self._parent, Ready(self._incarnation, {}, self._confinement))

    def finished(self, reason: str, *, failed: bool) -> None:
        """See :meth:`supervisor.overseer.Host.finished`."""
        if failed:
            self._status = GAVE_UP_STATUS
            if self._exchange is not None:
                self._exchange.tell(self._parent, LastWords(self._incarnation, GAVE_UP, reason))
        self._manager.transport.abort_run()
