"""Our system base for Thespian: `multiprocSeqBase`. Its stock bases and transports, and pickle, never run.

What Thespian does here: the admin, making processes, who is whose parent, notices of their ends, shutting down.
Its messages are few and travel as control frames (:mod:`supervisor.control`) of the same transport that carries the
envelopes between actors, which Thespian never sees.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import sys
import time
import types
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol

from thespian.actors import InvalidActorAddress
from thespian.system.addressManager import CannotPickleAddress
from thespian.system.messages.multiproc import EndpointConnected
from thespian.system.systemBase import systemBase
from thespian.system.transport import (
    ExternalInterfaceTransportInit,
    ReceiveEnvelope,
    SendStatus,
    Thespian__Run_Expired,
    Thespian__Run_HandlerResult,
    Thespian__Run_Terminated,
    Thespian__UpdateWork,
    TransmitIntent,
    TransmitOnly,
)

from protocol.messages import MessageError
from supervisor import confinement, control, forking, linux
from supervisor.boot import Boot
from supervisor.control import address_of, pid_of
from supervisor.port import NotDeliveredError
from supervisor.registry import RunDirectory
from supervisor.thespian_corrections import Admin
from supervisor.transport import Transport

NAME = "multiprocSeqBase"
BOOT = "peerup boot"
"""The capability under which each process of the system finds its :class:`supervisor.boot.Boot`."""

ADMIN_START = timedelta(seconds=5)
"""How long the admin may take to answer for the first time; it takes about 20 ms."""

ALLOWED = ("supervisor.supervisor.Supervisor",)
"""All that the admin may be asked to start."""


class Timers(Protocol):
    """Whatever has something to do later: an exchange."""

    def next_timer(self) -> float | None:
        """The moment (CLOCK_MONOTONIC seconds) at which `handle_timers` must be called next, or None."""
        ...

    def handle_timers(self, now: float) -> None:
        """Run everything that is due."""
        ...


@dataclasses.dataclass(frozen=True)
class EndpointPreparation:
    """What a child needs for its own end of the transport."""

    addrInst: int  # noqa: N815 - Thespian's name
    directory: RunDirectory
    parent: int


class ThespianTransport:
    """Thespian's view of one process's :class:`supervisor.transport.Transport` (attribute `wire`)."""

    def __init__(self, preparation: Any, capabilities: Any = None, *_: Any) -> None:
        if isinstance(preparation, ExternalInterfaceTransportInit):
            self.directory: RunDirectory = capabilities[BOOT].directory
            self._parent = 0
        else:
            self.directory = preparation.directory
            self._parent = preparation.parent
        self.wire = Transport(self.directory)
        self.wire.control = self._received
        self.myAddress = address_of(os.getpid())
        self.children: set[int] = set()
        self.timers: Timers | None = None
        self._incoming: collections.deque[Any] = collections.deque()
        self._aborted = False

    # What Thespian calls

    def setAddressManager(self, manager: Any) -> None:  # noqa: N802 - Thespian's name
        """The manager comes with each message to send."""

    def getAdminAddr(self, capabilities: Any) -> Any:  # noqa: N802 - Thespian's name
        """No process: the admin's address is its pid, known once it is forked."""
        return address_of(0)

    def probeAdmin(self, address: Any) -> bool:  # noqa: N802 - Thespian's name
        """There is never an admin of somebody else that could be joined."""
        return False

    def external_transport_clone(self) -> _Clone:
        """For one exchange of the starting process; it has only one thread, so its own transport will do."""
        return _Clone(self)

    def scheduleTransmit(self, manager: Any, intent: Any, has_exclusive_flag: bool = False) -> None:  # noqa: N802, FBT001, FBT002 - Thespian's signature
        """Send one message of the actor system; it never waits."""
        target, message = intent.targetAddr, intent.message
        if manager is not None:
            target, message = manager.prepMessageSend(target, message)
            if message is SendStatus.DeadTarget or isinstance(message, Thespian__UpdateWork):
                intent.tx_done(SendStatus.Sent)
                return
            if target is None:
                raise CannotPickleAddress(intent.targetAddr)
        pid = pid_of(target)
        if pid == os.getpid():
            self._incoming.append(ReceiveEnvelope(self.myAddress, message))
            intent.tx_done(SendStatus.Sent)
            return
        try:
            self.wire.send_control(pid or 0, control.encode(message))
        except NotDeliveredError:
            intent.tx_done(SendStatus.DeadTarget)
        else:
            intent.tx_done(SendStatus.Sent)

    def run(self, handler: Any, maximumDuration: timedelta | None = None) -> Any:  # noqa: N803 - Thespian's name
        """Wait for messages and hand them to `handler` until it returns something false, time is up, or `abort_run`."""
        end = None if maximumDuration is None else time.monotonic() + maximumDuration.total_seconds()
        if handler is TransmitOnly:
            return 0
        while True:
            while self._incoming and not self._aborted:
                envelope = self._incoming.popleft()
                if handler is None:
                    return envelope
                if not handler(envelope):
                    return Thespian__Run_HandlerResult(0)
            if self._aborted:
                self._aborted = False
                return Thespian__Run_Terminated()
            now = time.monotonic()
            if end is not None and now >= end:
                return Thespian__Run_Expired()
            self.wait(end)

    def abort_run(self, drain: bool = False) -> None:  # noqa: FBT001, FBT002 - Thespian's signature
        """Let :meth:`run` return."""
        self._aborted = True

    def enableRXPauseFlowControl(self, enable: bool = True) -> None:  # noqa: N802, FBT001, FBT002 - Thespian's signature
        """Receiving never pauses here."""

    def deadAddress(self, manager: Any, address: Any) -> None:  # noqa: N802 - Thespian's name
        """Nothing is remembered of the dead: their pids come back."""

    def close(self) -> None:
        """Close the transport."""
        self.wire.close()

    # What we call

    def wait(self, end: float | None) -> None:
        """Wait until `end` (CLOCK_MONOTONIC), a timer, or traffic, and handle what is due of the last two."""
        timers = self.timers
        due = timers.next_timer() if timers is not None else None
        moments = [moment for moment in (end, due) if moment is not None]
        self.wire.wait(max(0.0, min(moments) - time.monotonic()) if moments else None)
        if timers is not None:
            timers.handle_timers(time.monotonic())

    def deliver(self, envelope: Any) -> None:
        """Put a message of this process's own making among those that arrived."""
        self._incoming.append(envelope)

    def take(self) -> list[Any]:
        """Messages of the actor system that arrived, for one who does not call :meth:`run`."""
        taken = list(self._incoming)
        self._incoming.clear()
        return taken

    def _received(self, pid: int, body: bytes) -> None:
        try:
            message = control.decode(body, from_parent=pid == self._parent, from_child=self._is_child(pid))
        except MessageError:
            self.wire.refusals["control"] += 1
            return
        self._incoming.append(ReceiveEnvelope(address_of(pid), message))

    is_child: Callable[[int], bool] | None = None

    def _is_child(self, pid: int) -> bool:
        return self.is_child is not None and self.is_child(pid)


class _Clone:
    """The starting process's transport again; closing it does nothing."""

    def __init__(self, transport: ThespianTransport) -> None:
        self._transport = transport
        self.myAddress = transport.myAddress
        self.scheduleTransmit = transport.scheduleTransmit
        self.run = transport.run
        self.abort_run = transport.abort_run

    def close(self) -> None:
        """See the class."""


class ActorSystemBase(systemBase):
    """What `ActorSystem(NAME, capabilities)` makes in the starting process."""

    def __init__(self, system: Any, logDefs: Any = None) -> None:  # noqa: N803 - Thespian's name
        # Not through system/multiprocCommon.py:73-83 (`__init__`), which makes a multiprocessing context.
        system.capabilities["Thespian ActorSystem Name"] = NAME
        system.capabilities["Thespian ActorSystem Version"] = 1
        self.transport = ThespianTransport(ExternalInterfaceTransportInit(), system.capabilities)
        self.admin: forking.Child | None = None
        self.transport.is_child = self._is_admin
        try:
            super().__init__(system, logDefs)
        except BaseException:
            self._give_up()
            raise

    def _give_up(self) -> None:
        if self.admin is not None:
            self.admin.kill()
            self.admin.reap()
        self.transport.close()

    def _is_admin(self, pid: int) -> bool:
        return self.admin is not None and self.admin.pid == pid

    def _startAdmin(self, adminAddr: Any, addrOfStarter: Any, capabilities: Any, logDefs: Any) -> None:  # noqa: N802, N803 - Thespian's names
        """Corrects how an admin is made.

        In system/multiprocCommon.py:86-116 (`_startAdmin`) and system/multiprocCommon.py:150-208 (`startAdmin`)
        the admin is forked twice, so that it outlives whoever started it and nobody can wait for it, and it
        catches signals that should end it. Here it is our child, leads the process group of all actors, and
        dies with us.
        """
        starter = os.getpid()
        directory = self.transport.directory

        def live() -> int:
            os.setsid()
            linux.set_process_name("admin")
            if boot_of(capabilities).confined:
                confinement.confine_base()  # and so all that it makes
            transport = ThespianTransport(EndpointPreparation(0, directory, starter))
            admin = Admin(transport, transport.myAddress, capabilities, ALLOWED)
            transport.scheduleTransmit(None, TransmitIntent(address_of(starter), EndpointConnected(0)))
            admin._activate()  # noqa: SLF001 - as `h_LoggerConnected` does
            admin.run()
            return 0

        self.admin = forking.fork(live, keep=directory.descriptors(), inherited=self)
        self.adminAddr = address_of(self.admin.pid)
        response = self.transport.run(None, ADMIN_START)
        if not isinstance(response, ReceiveEnvelope) or not isinstance(response.message, EndpointConnected):
            raise InvalidActorAddress(self.adminAddr, "the admin did not start")


def install() -> None:
    """Make the base known to Thespian.

    It imports `thespian.system.<name>`: actors.py:647-684 (`_startupActorSys`).
    """
    module = types.ModuleType(f"thespian.system.{NAME}")
    module.__dict__["ActorSystemBase"] = ActorSystemBase
    sys.modules[module.__name__] = module


def boot_of(capabilities: Any) -> Boot:
    """The settings that came down with the forks."""
    boot: Boot = capabilities[BOOT]
    return boot
