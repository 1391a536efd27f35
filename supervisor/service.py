"""The long-running process of a node: starts the tree, watches what nobody above could restart, stops it in order.

Theory of operation. :meth:`Service.run` locks the run directory, imports what the actors will need (children share
those pages), starts Thespian's admin and has it start the root supervisor. It then waits on one epoll descriptor for::

    a signal               SIGTERM, SIGINT: the root stops its children in reverse order; a second one: at once
    the end of the admin   by pidfd: everything left is killed and the tree is built anew
    the end of the root    the same; if it had given up before it was ever ready, the service ends with its reason
    messages to `main`     the root's Ready and LastWords, faults for the root
    the root's heartbeat   one ping at a time; without an answer the root is taken for hung, and its end follows
    the watchdog's rounds  if somebody outside wants to know whether the tree lives (:mod:`supervisor.watchdog`)

All actors are in the admin's process group and die with their parents, and orphans become this process's
children, so at the end it can make sure that nothing is left.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import fcntl
import functools
import importlib
import os
import random
import select
import signal
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any, NoReturn

from thespian.actors import ActorSystem, ActorSystemException
from thespian.system.messages.admin import QueryAck, QueryExists
from thespian.system.transport import TransmitIntent

from protocol.errors import PeerupError
from protocol.messages import Envelope
from protocol.messages.confinement import Confinement
from protocol.messages.system import (
    DropCheckpoint,
    Hang,
    InjectProcessFault,
    KeepCheckpoint,
    LastWords,
    Ok,
    Ping,
    ProcessFault,
    ReadEstate,
    Ready,
    Stop,
    SuccessorMayStart,
    SupervisorSpec,
)
from supervisor import confinement, linux, thespian_base
from supervisor.actor import Checkpoint
from supervisor.authority import Authority
from supervisor.boot import ROOT, SERVICE, Boot, LogSettings
from supervisor.errors import AskError, DeadlineExceededError, RefusedError
from supervisor.estate import Estate
from supervisor.exchange import Exchange
from supervisor.logging import LogControl
from supervisor.overseer import FACTORY, supervisor_spec
from supervisor.port import NameState
from supervisor.process import open_log
from supervisor.registry import Entry, RunDirectory
from supervisor.watchdog import Watchdog

STOP_DEADLINE = 30.0
"""Seconds for an ordered stop of the whole tree unless the service is told otherwise; what is left then is killed."""

ADMIN_DEADLINE = 3.0
"""Seconds for the admin to end once the tree has; it takes milliseconds."""

LOCK_PATIENCE = 2.0
"""Seconds to wait for the processes of a killed predecessor to be gone; they take milliseconds."""

HEARTBEAT = 2.0
"""Seconds between the answer to one ping of the root and the next."""

HEARTBEAT_DEADLINE = 3.0
"""Seconds without an answer after which the root counts as hung: it only ever forks, which takes milliseconds."""

LATENESS = 0.5
"""Seconds by which the end of that deadline may be noticed late before it is this process that did not run."""

FAILED_STARTS = 5
"""So many trees in a row may be lost before they were ready; then the service ends. A tree that was ready is built anew
for ever: whatever keeps killing it, a node that serves between two kills is better than none."""

REBUILD_WINDOW = 60.0
"""Seconds in which lost trees count for the back-off."""

REBUILD_BACKOFF = 0.1
"""Seconds before the third tree within the window, doubling from there; the second follows the first at once."""

REBUILD_BACKOFF_LIMIT = 5.0
"""The longest wait in seconds."""

LAST_PATIENCE = 3.0
"""Seconds after the second signal in which this process may still end in good order; the kill of a tree takes
milliseconds. Then, or with the third signal, it ends whatever it is doing."""

EX_STUCK = 70
"""The exit status then (EX_SOFTWARE)."""

_STOPPING_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class ServiceRunningError(PeerupError):
    """Another service runs in the same run directory."""

    code = "already-running"


class TreeFailedError(PeerupError):
    """The tree could not be started, or could not be kept running."""

    code = "tree-failed"


class _TreeLostError(Exception):
    """The admin or the root supervisor ended without being told to."""


class _StopNowError(Exception):
    """A second signal: do not wait for an ordered stop."""


@dataclasses.dataclass
class _Tree:
    """One life of the actor system."""

    boot: Boot
    system: Any = None
    exchange: Exchange | None = None
    group: int = 0
    root_pidfd: int = -1
    ready: bool = False
    stopping: bool = False
    last_words: str = ""
    watchdog: Watchdog | None = None

    @property
    def base(self) -> thespian_base.ActorSystemBase:
        """Our system base, once the system has been made."""
        base: thespian_base.ActorSystemBase = self.system._systemBase  # noqa: SLF001 - Thespian has no other way
        return base


class Service:
    """See the module.

    Arguments:
        run_directory: an existing directory of this user, mode 0700.
        root: the tree.
        preload: modules to import before any process is made: trio, the actors, what they import.
        allow_faults: whether faults may be injected.
        log: how every process logs.
        operators: names of the actors that may set taps, faults and log levels everywhere.
        factories: prefixes of the modules whose classes may be actors.
        on_ready: called each time the whole tree is ready (again).
        on_stopping: called when an ordered stop begins.
        on_left: called during a stop by SIGTERM as soon as a successor may start in the same run directory, if that is
            long before the end: what is left of the tree has moved out of it.
        predecessors: names of the actors that may say so.
        on_alive: called while the tree answers, and during a stop, at least each `watchdog` seconds.
        watchdog: seconds; None if nobody wants `on_alive`.
        vital: who must answer besides the admin and the root for the tree to count as alive.
        stop_deadline: seconds for an ordered stop of the whole tree; what is left after it is killed.
        confined: whether supervisors give up what none of their children needs.
    """

    def __init__(
        self,
        run_directory: str,
        root: SupervisorSpec,
        *,
        preload: tuple[str, ...] = (),
        allow_faults: bool = False,
        log: LogSettings | None = None,
        operators: Collection[str] = (),
        factories: tuple[str, ...] = ("actors.", "supervisor."),
        on_ready: Callable[[], None] | None = None,
        on_stopping: Callable[[], None] | None = None,
        on_left: Callable[[], None] | None = None,
        predecessors: Collection[str] = (),
        on_alive: Callable[[], None] | None = None,
        watchdog: float | None = None,
        vital: Collection[str] = (),
        stop_deadline: float = STOP_DEADLINE,
        confined: bool = False,
    ) -> None:
        self._path = run_directory
        self._root = root
        self._preload = preload
        self._allow_faults = allow_faults
        self._log_settings = log if log is not None else LogSettings()
        self._operators = tuple(operators)
        self._factories = factories
        self._on_ready = on_ready
        self._on_stopping = on_stopping
        self._on_left = on_left
        self._predecessors = tuple(predecessors)
        self._on_alive = on_alive
        self._watchdog = watchdog
        self._vital = (ROOT, *vital)
        self._stop_deadline = stop_deadline
        self._confined = confined
        self._signals: list[int] = []
        self._wakeup = -1
        self._log: LogControl | None = None
        self._estate = Estate()

    def run(self) -> None:
        """Run until a signal says stop. Call it from the main thread of a process that has no other.

        Raises:
            RunDirectoryError: the run directory cannot be used.
            ServiceRunningError: another service runs there.
            TreeFailedError: the tree does not start, or does not stay up.
        """
        directory = RunDirectory(self._path)
        try:
            _lock(directory)
            try:
                self._run_locked(directory)
            finally:
                directory.remove_tree()
                directory.remove_moved()
        finally:
            directory.close()

    def _run_locked(self, directory: RunDirectory) -> None:
        directory.clear()
        directory.remove_left_behind()
        for module in self._preload:
            importlib.import_module(module)
        confinement.prepare(_confinements(self._root))
        thespian_base.install()
        linux.adopt_orphans()
        linux.raise_descriptor_limit()
        self._log = open_log(SERVICE, self._log_settings)
        try:
            with self._signal_handling():
                self._keep_running(directory)
        finally:
            self._estate.close()
            self._log.close()

    def _keep_running(self, directory: RunDirectory) -> None:
        lost: collections.deque[float] = collections.deque()
        failed_starts = 0
        boot = Boot(
            directory,
            self._root,
            self._allow_faults,
            self._log_settings,
            self._operators,
            self._factories,
            self._confined,
        )
        while True:
            tree = _Tree(boot)
            lost_because = ""
            try:
                self._run_tree(tree)
            except _TreeLostError as error:
                now = time.monotonic()
                lost.append(now)
                while lost[0] < now - REBUILD_WINDOW:
                    lost.popleft()
                if tree.stopping:
                    return
                if not tree.ready and tree.last_words:
                    raise TreeFailedError(tree.last_words) from error
                if tree.last_words:
                    self._estate.close()  # it gave up: what its actors left may be what made them fail
                failed_starts = 0 if tree.ready else failed_starts + 1
                if failed_starts > FAILED_STARTS:
                    raise TreeFailedError(
                        f"the actor system was lost {failed_starts} times in a row before it was ready: {error}"
                    ) from error
                lost_because = str(error)
            except _StopNowError:
                return
            else:
                return
            finally:
                incarnations = self._end(tree)
            # First everything left is killed, then it is told.
            self._warn(f"{lost_because}; everything is started again")
            if not self._pause(len(lost)):
                return
            boot = dataclasses.replace(boot, generation=boot.generation + 1, incarnations=incarnations)

    def _pause(self, lost: int) -> bool:
        """Wait before the next tree, the longer the more were lost of late; False if a signal said stop meanwhile."""
        seconds = 0.0 if lost < 2 else min(REBUILD_BACKOFF_LIMIT, REBUILD_BACKOFF * 2.0 ** (lost - 2))
        select.select([self._wakeup], [], [], seconds)
        _empty(self._wakeup)
        # Other signals, such as the end of a child, end the wait early; that does no harm.
        return not self._signals

    # One tree

    def _run_tree(self, tree: _Tree) -> None:
        try:
            self._start(tree)
        except ActorSystemException as error:
            raise _TreeLostError(f"the actor system did not start: {error}") from error
        transport = tree.base.transport
        while not tree.stopping:
            transport.wait(None)
            if any(isinstance(envelope.message, QueryAck) for envelope in transport.take()) and tree.watchdog:
                tree.watchdog.admin_answered()
            self._check_signals(tree)
        # From here on the end of the root is what we wait for.
        deadline = time.monotonic() + self._stop_deadline
        while not _ended(tree.root_pidfd) and time.monotonic() < deadline:
            transport.wait(deadline)
            self._check_signals(tree)
        transport.wire.remove_reader(tree.root_pidfd)
        if not _ended(tree.root_pidfd):
            self._warn(f"the tree did not stop within {self._stop_deadline:g} s and is killed")
            return
        self._shut_down_admin(tree)

    def _start(self, tree: _Tree) -> None:
        boot = tree.boot
        tree.system = ActorSystem(thespian_base.NAME, capabilities={thespian_base.BOOT: boot}, transientUnique=True)
        base = tree.base
        assert base.admin is not None
        tree.group = base.admin.pid
        transport = base.transport
        wire = transport.wire
        boot.directory.write(SERVICE, Entry(NameState.READY, boot.generation, os.getpid(), SERVICE))
        exchange = tree.exchange = Exchange(
            SERVICE,
            boot.generation,
            wire,
            # It has no supervisor, so nobody speaks as one.
            authority=Authority(
                SERVICE,
                boot.operators,
                predecessors=self._predecessors,
                is_child=lambda name: name == ROOT,
            ),
            now=time.monotonic,
            wall=time.time,
            random=random.Random(os.urandom(16)),  # noqa: S311 - documented as never for keys
        )
        exchange.on(Ready, functools.partial(self._root_ready, tree))
        exchange.on(LastWords, functools.partial(self._root_failed, tree))
        exchange.on(InjectProcessFault, functools.partial(self._inject, tree))
        exchange.on(KeepCheckpoint, self._keep_checkpoint)
        exchange.on(DropCheckpoint, self._drop_checkpoint)
        exchange.on(SuccessorMayStart, functools.partial(self._leave, tree))
        exchange.on(ReadEstate, functools.partial(self._read_estate, exchange))
        wire.name = SERVICE
        wire.receiver = exchange
        transport.timers = exchange
        exchange.refusals = wire.refusals
        if self._log is not None:
            self._log.retry_with(exchange.call_later)
        wire.add_reader(self._wakeup, functools.partial(_empty, self._wakeup))
        wire.add_reader(base.admin.pidfd, functools.partial(_lose, "the admin process ended"))
        root = tree.system.createActor(thespian_base.ALLOWED[0])
        pid = root.addressDetails.pid
        tree.root_pidfd = os.pidfd_open(pid)
        wire.add_reader(tree.root_pidfd, functools.partial(self._root_ended, tree, pid))

    def _root_ready(self, tree: _Tree, message: Ready, envelope: Envelope) -> None:
        if envelope.sender != ROOT or tree.exchange is None:
            return
        directory = tree.boot.directory
        entry = directory.read(ROOT)
        if entry is not None:
            directory.write(ROOT, dataclasses.replace(entry, state=NameState.READY))
        first = not tree.ready
        tree.ready = True
        if first and self._on_ready is not None:
            self._on_ready()
        if first:
            self._ping_root(tree)
            self._start_watchdog(tree)

    def _start_watchdog(self, tree: _Tree) -> None:
        if self._watchdog is None or self._on_alive is None or tree.exchange is None:
            return
        base = tree.base

        def ask_admin() -> None:
            base.transport.scheduleTransmit(None, TransmitIntent(base.adminAddr, QueryExists()))

        tree.watchdog = Watchdog(self._watchdog, self._vital, tree.exchange, ask_admin, self._on_alive)
        tree.watchdog.begin()

    def _ping_root(self, tree: _Tree) -> None:
        if tree.stopping or tree.exchange is None:
            return
        due = time.monotonic() + HEARTBEAT_DEADLINE
        answered = functools.partial(self._root_answered, tree, due)
        try:
            tree.exchange.ask(ROOT, Ping(), timeout=HEARTBEAT_DEADLINE, answer=answered)
        except AskError as error:
            answered(error)

    def _root_answered(self, tree: _Tree, due: float, answer: object) -> None:
        if tree.stopping or tree.exchange is None:
            return
        # Where we ourselves did not run (stopped, or starved) the answer may be there and only not be read yet.
        if isinstance(answer, DeadlineExceededError) and time.monotonic() < due + LATENESS:
            _lose(f"the root supervisor did not answer its heartbeat for {HEARTBEAT_DEADLINE:g} s")
        tree.exchange.call_at(time.monotonic() + HEARTBEAT, functools.partial(self._ping_root, tree))

    def _inject(self, tree: _Tree, message: InjectProcessFault, envelope: Envelope) -> None:
        """A fault for the root, which nobody else supervises."""
        assert tree.exchange is not None
        if not self._allow_faults:
            refusal = RefusedError(
                "faults-not-allowed", "this node does not take faults", "start it with faults allowed"
            )
            tree.exchange.refuse(envelope, refusal)
        elif message.name != ROOT:
            tree.exchange.refuse(envelope, RefusedError("no-such-actor", f"{SERVICE} supervises {ROOT} alone"))
        elif message.fault is ProcessFault.HANG:
            tree.exchange.answer(envelope, Ok())
            tree.exchange.tell(ROOT, Hang())
        else:
            tree.exchange.answer(envelope, Ok())
            number = signal.SIGKILL if message.fault is ProcessFault.KILL else signal.SIGSTOP
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(tree.root_pidfd, number)

    def _keep_checkpoint(self, message: KeepCheckpoint, envelope: Envelope) -> None:
        if envelope.sender == ROOT and message.path[:1] == (ROOT,):
            checkpoint = Checkpoint(message.state, message.descriptors, message.version)
            try:
                self._estate.keep(message.name, message.path, checkpoint, len(envelope.body))
            except RefusedError as refusal:
                self._warn(f"a checkpoint was not kept: {refusal}")

    def _drop_checkpoint(self, message: DropCheckpoint, envelope: Envelope) -> None:
        if envelope.sender == ROOT:
            self._estate.drop(message.name)

    def _read_estate(self, exchange: Exchange, message: ReadEstate, envelope: Envelope) -> None:
        if envelope.sender == ROOT:
            for kept in self._estate.messages_below(ROOT):
                exchange.tell(ROOT, kept, cause=envelope.id)
        exchange.answer(envelope, Ok())

    def _leave(self, tree: _Tree, message: SuccessorMayStart, envelope: Envelope) -> None:
        """What is left takes its time: give the run directory free, lock and all, for a successor.

        Not at Ctrl-C: who types that waits for the end, and may have to type it twice.
        """
        if not tree.stopping or self._on_left is None or self._signals != [signal.SIGTERM]:
            return
        on_left, self._on_left = self._on_left, None
        self._estate.close()  # sockets that listened are in it
        try:
            tree.boot.directory.move_away()
        except OSError as error:
            self._warn(f"the run directory stays in use until the end: {error}")
            return
        on_left()

    def _root_failed(self, tree: _Tree, message: LastWords, envelope: Envelope) -> None:
        if envelope.sender == ROOT:
            tree.last_words = message.reason

    def _root_ended(self, tree: _Tree, pid: int) -> None:
        if tree.stopping:
            return
        tree.base.transport.wire.drain(pid)
        _lose(f"the root supervisor ended{': ' + tree.last_words if tree.last_words else ''}")

    def _check_signals(self, tree: _Tree) -> None:
        _reap(tree.group)
        if len(self._signals) > 1:
            raise _StopNowError
        if self._signals and not tree.stopping:
            tree.stopping = True
            if tree.watchdog is not None:
                tree.watchdog.stopping()
            if self._on_stopping is not None:
                self._on_stopping()
            if tree.exchange is not None:
                tree.exchange.tell(ROOT, Stop(signal.Signals(self._signals[0]).name))

    def _shut_down_admin(self, tree: _Tree) -> None:
        """Thespian's own way to end, bounded by our deadline and not by its ten seconds."""
        base = tree.base
        assert base.admin is not None
        assert tree.exchange is not None
        base.transport.wire.remove_reader(base.admin.pidfd)
        tree.exchange.call_at(time.monotonic() + ADMIN_DEADLINE, functools.partial(_lose, "the admin did not end"))
        tree.system.shutdown()
        tree.system = None
        with contextlib.suppress(ChildProcessError):
            base.admin.reap()

    def _end(self, tree: _Tree) -> tuple[tuple[str, int], ...]:
        """Make sure that no process of the tree is left, and nothing in the run directory.

        The result is what incarnation each name had come to.
        """
        if tree.group:
            _kill_group(tree.group)
        if tree.root_pidfd >= 0:
            os.close(tree.root_pidfd)
        if tree.exchange is not None:
            tree.exchange.close()
        if tree.system is not None:
            base = tree.base
            if base.admin is not None and base.admin.pidfd >= 0:
                os.close(base.admin.pidfd)
            base.transport.close()
        before = dict(tree.boot.incarnations)
        names = {name: entry.incarnation for name, entry in tree.boot.directory.names().items()}
        tree.boot.directory.clear()
        return tuple({**before, **names}.items())

    # Signals

    @contextlib.contextmanager
    def _signal_handling(self) -> Any:
        read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        previous_fd = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        previous = {number: signal.signal(number, self._note) for number in _STOPPING_SIGNALS}
        previous[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._end_at_once)
        previous[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda *_: None)
        previous[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        self._wakeup = read
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.set_wakeup_fd(previous_fd)
            for number, handler in previous.items():
                signal.signal(number, handler)
            os.close(read)
            os.close(write)

    def _note(self, number: int, frame: object) -> None:
        self._signals.append(number)
        if len(self._signals) == 2:
            signal.setitimer(signal.ITIMER_REAL, LAST_PATIENCE)
        elif len(self._signals) > 2:
            self._end_at_once()

    def _end_at_once(self, *_: object) -> NoReturn:
        """End whatever this process is doing. The actors die with their parents."""
        os._exit(EX_STUCK)

    def _warn(self, text: str) -> None:
        if self._log is not None:
            self._log.logger.warning("{}", text)


def _lock(directory: RunDirectory) -> None:
    # Every process of a node holds the lock, by inheritance: it is free when the last one is gone.
    end = time.monotonic() + LOCK_PATIENCE
    while True:
        try:
            fcntl.flock(directory.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                raise ServiceRunningError(
                    f"another service runs in {directory.path}; stop it first, or use another home directory"
                ) from None
            time.sleep(0.02)
        else:
            return


def _lose(reason: str) -> NoReturn:
    raise _TreeLostError(reason)


def _empty(fd: int) -> None:
    with contextlib.suppress(BlockingIOError):
        os.read(fd, 4096)


def _confinements(spec: SupervisorSpec) -> Iterator[Confinement]:
    """How any process of this tree is confined."""
    yield from (rule.confinement for rule in spec.confinements if rule.confinement is not None)
    for child in spec.children:
        if child.confinement is not None:
            yield child.confinement
        if child.factory == FACTORY:
            yield from _confinements(supervisor_spec(child))


def _ended(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def _reap(group: int) -> None:
    """Wait for the orphans that have become our children and ended. The admin itself is left for its owner."""
    while True:
        try:
            ended = os.waitid(os.P_PGID, group, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if ended is None or ended.si_pid == group:
            return
        os.waitpid(ended.si_pid, 0)


def _kill_group(group: int) -> None:
    """Kill the group of all actors and wait until none is left. Descendants of the dying become ours to wait for."""
    while True:
        try:
            os.killpg(group, signal.SIGKILL)
        except ProcessLookupError:
            return
        try:
            os.waitpid(-group, 0)
        except ChildProcessError:
            # None of those left is our child yet: its parent is just ending.
            os.sched_yield()
