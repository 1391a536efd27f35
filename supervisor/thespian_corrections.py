"""Every correction of Thespian 4.0.1 that the runtime needs, as subclasses of its classes; nothing is patched in place.

Each says the file, lines and function that it corrects (paths below `thespian/`; a test compares them with the
installed files) and why. They rest on internal names of
exactly this version, so another version is refused when this module is imported.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import thespian
from thespian.actors import ActorExitRequest, ActorSystemFailure, ChildActorExited, InvalidActorSpecification
from thespian.system import utilis
from thespian.system.actorManager import ActorManager
from thespian.system.addressManager import CannotPickleAddress
from thespian.system.messages.admin import PendingActorResponse
from thespian.system.messages.multiproc import EndpointConnected
from thespian.system.multiprocCommon import MultiProcReplicator
from thespian.system.systemAdmin import ThespianAdmin
from thespian.system.transport import ReceiveEnvelope, SendStatus, TransmitIntent

from protocol.errors import PeerupError
from supervisor import forking
from supervisor.control import address_of, pid_of


class ThespianVersionError(PeerupError):
    """The installed Thespian is not the one that the corrections were made for."""

    code = "thespian-version"


VERSION = "4.0.1"


def check_version(installed: str) -> None:
    """Refuse any Thespian but the one that was read line by line for these corrections."""
    if installed != VERSION:
        raise ThespianVersionError(f"Thespian {installed} is installed, and the runtime is made for {VERSION} alone")


def _installed_version() -> str:
    # Where pip has put it, the name of a directory tells; the library that knows all other ways takes 5 ms to import.
    if (Path(thespian.__file__).parents[1] / f"thespian-{VERSION}.dist-info").is_dir():
        return VERSION
    from importlib import metadata

    return metadata.version("thespian")


check_version(_installed_version())

# system/utilis.py:98-147 (`thesplog`) appends the repr of messages to /tmp/thespian.log, a fixed name for everybody.
utilis.thesplog_control(logging.CRITICAL + 1, useLogging=False, tmpFileMaxSize=0)

# system/admin/adminCore.py:40-72 (`__init__`) calls logging.info, which gives the root logger a handler if it has none.
logging.getLogger().addHandler(logging.NullHandler())


class Replicator(MultiProcReplicator):
    """Makes child processes and notices their ends. Common to the admin and to supervisors."""

    transport: Any
    capabilities: Any
    _addrManager: Any  # noqa: N815 - Thespian's names
    _adminAddr: Any  # noqa: N815
    _pendingActorReady: Any  # noqa: N815

    def init_replicator(self, transport: Any, concurrency_context: Any) -> None:
        """Corrects system/multiprocCommon.py:279-280 (`init_replicator`): children are kept by pid, not in a list."""
        super().init_replicator(transport, concurrency_context)
        self.processes: dict[int, tuple[forking.Child, int]] = {}
        self.ended: dict[int, int] = {}
        transport.is_child = self.processes.__contains__

    def keep_open(self) -> Collection[int]:
        """The descriptors that the next child inherits."""
        return ()

    def _startChildActor(  # noqa: N802, PLR0917 - Thespian's name and signature
        self,
        childAddr: Any,  # noqa: N803 - Thespian's names
        childClass: Any,  # noqa: N803
        globalName: str | None,  # noqa: N803
        parentAddr: Any,  # noqa: N803
        notifyAddr: Any,  # noqa: N803
        childRequirements: Any = None,  # noqa: N803
        sourceHash: str | None = None,  # noqa: N803
        sourceToLoad: Any = None,  # noqa: N803
    ) -> None:
        """Corrects how a child is made.

        In system/multiprocCommon.py:283-371 (`_startChildActor`) and system/multiprocCommon.py:615-696
        (`startChild`) it is a `multiprocessing.Process` whose death is told by SIGCHLD and polling, it keeps
        its parent's sockets, outlives its parent, catches every signal, also SIGSEGV (it then spins for ever),
        and any class of any module can be named. Here it is a plain fork with a pidfd, see
        :func:`supervisor.forking.fork`.
        """
        if sourceHash or globalName:
            raise ActorSystemFailure("actors come from the installed program and are named by their supervisors")
        from supervisor.thespian_base import EndpointPreparation, ThespianTransport

        instance: int = childAddr.addressDetails.addressInstanceNum
        preparation = EndpointPreparation(instance, self.transport.directory, os.getpid())
        keep = {*self.transport.directory.descriptors(), *self.keep_open()}

        def live() -> int:
            transport = ThespianTransport(preparation)
            manager = Manager(
                childClass,
                globalName,
                transport,
                None,
                None,
                parentAddr,
                self._adminAddr,
                childRequirements,
                self.capabilities,
                None,
                None,
            )
            transport.scheduleTransmit(None, TransmitIntent(notifyAddr, EndpointConnected(instance)))
            return manager.run()

        child = forking.fork(live, keep=keep, inherited=self)
        self.processes[child.pid] = (child, instance)
        # The address is the pid, so it is known now; Thespian would learn it from EndpointConnected, and a child
        # that ends before could not be told from others.
        self._addrManager.associateUseableAddress(self.transport.myAddress, instance, address_of(child.pid))
        self.transport.wire.add_reader(child.pidfd, lambda: self._child_ended(child.pid))

    def pid_of_child(self, address: Any) -> int | None:
        """The process of a child by the address that `createActor` returned; None if it could not be made."""
        exported = self._addrManager.exportAddr(address)
        return None if exported is None else pid_of(exported)

    def _child_ended(self, pid: int) -> None:
        """Corrects system/multiprocCommon.py:398-415 (`childDied`) and system/actorManager.py:244-252 (`_sayGoodbye`).

        There one SIGCHLD drops all children that are dead by then and reports one (5 to 24 of 100 are never reported
        when siblings die together), and an actor that says good-bye is reported twice. Here each process is reported
        once: when it has ended, after all that it had sent.
        """
        child, instance = self.processes.pop(pid)
        self.transport.wire.remove_reader(child.pidfd)
        self.transport.wire.drain(pid)
        self.transport.directory.remove_socket(pid)
        self.ended[pid] = child.reap()
        # system/addressManager.py:85-89 (`createLocalAddress`) keeps the address of every child ever made.
        self._addrManager._managed[instance] = None  # noqa: SLF001 - Thespian has no other way
        self.transport.deliver(ReceiveEnvelope(self.transport.myAddress, ChildActorExited(address_of(pid))))

    def take_status(self, address: Any) -> tuple[int, int]:
        """(pid, wait status) of the child that a ChildActorExited tells of."""
        pid = pid_of(address)
        if pid is None:
            raise ActorSystemFailure("a child without a process has ended")
        return pid, self.ended.pop(pid, 0)

    def childDied(self) -> bool:  # noqa: N802 - Thespian's name
        """Corrects system/multiprocCommon.py:398-415 (`childDied`), see `_child_ended`: SIGCHLD means nothing now."""
        return True

    def h_EndpointConnected(self, envelope: Any) -> bool:  # noqa: N802 - Thespian's name
        """Corrects system/multiprocCommon.py:417-425 (`h_EndpointConnected`): anybody could name any child."""
        pid = pid_of(envelope.sender)
        known = self.processes.get(pid) if pid is not None else None
        if known is not None and known[1] == envelope.message.childInstance:
            self._pendingActorReady(known[1], envelope.sender)
        return True

    def _send_intent(self, intent: Any, curtime: Any = None) -> None:
        """Corrects how a message is sent.

        In system/systemCommon.py:131-137 (`_send_intent`) and system/systemCommon.py:163-196
        (`_send_intent_to_transport`) it goes through a throttle that sleeps, is made a string for a debug line,
        and one that cannot be serialised comes back as a poison message. Here that is a defect and raises.
        """
        try:
            self.transport.scheduleTransmit(self._addrManager, intent)
        except CannotPickleAddress:
            intent.tx_done(SendStatus.DeadTarget)


class Admin(Replicator, ThespianAdmin):
    """The admin process: starts the root supervisor and nothing else."""

    def __init__(self, transport: Any, address: Any, capabilities: Any, allowed: Collection[str]) -> None:
        """`allowed` are the class names that may be started."""
        self._allowed = frozenset(allowed)
        super().__init__(transport, address, capabilities, None, None)
        # system/multiprocCommon.py:211-234 (`_startLogger`) starts a logger process, whose death ends the admin (line
        # 403 asks for self.logDefs, and the attribute is logdefs). There is none here; this says that there is.
        self.asLogger = address

    def h_PendingActor(self, envelope: Any) -> Any:  # noqa: N802 - Thespian's name
        """Corrects system/admin/adminCore.py:275-362 (`h_PendingActor`): it started any importable class."""
        if envelope.message.actorClassName not in self._allowed:
            self._sendPendingActorResponse(
                envelope,
                None,
                errorCode=PendingActorResponse.ERROR_Invalid_ActorClass,
                errorStr=f"{envelope.message.actorClassName} may not be started by the admin",
            )
            return True
        return super().h_PendingActor(envelope)

    def _child_ended(self, pid: int) -> None:
        """Corrects system/admin/adminCore.py:262-272 (`_handleChildExited`): who waited for it was never answered."""
        _, instance = self.processes[pid]
        waiting = self._pendingChildren.pop(instance, None) if isinstance(self._pendingChildren, dict) else None
        super()._child_ended(pid)
        _, status = self.take_status(address_of(pid))
        for request in waiting or ():
            self._sendPendingActorResponse(
                request,
                None,
                errorCode=PendingActorResponse.ERROR_Invalid_ActorClass,
                errorStr=f"it ended while it started: {forking.describe_status(status)}",
            )

    def _cleanupAdmin(self, finish_cleanup: Callable[[], None]) -> None:  # noqa: N802 - Thespian's name
        """Corrects system/multiprocCommon.py:477-491 (`_cleanupAdmin`): there is no logger to wait for."""
        finish_cleanup()

    def run(self) -> None:
        """Corrects system/admin/convention.py:740-770 (`run`): an exception was swallowed and the status was 0."""
        while not getattr(self, "shutdown_completed", False):
            self.transport.run(self.handleIncoming, None)


class Manager(Replicator, ActorManager):
    """What stands between Thespian and one actor: a supervisor or a leaf."""

    def __init__(self, childClass: Any, *arguments: Any) -> None:  # noqa: N803 - Thespian's name
        super().__init__(childClass, *arguments)
        self.asLogger = self._adminAddr

    def run(self) -> int:
        """Corrects system/actorManager.py:53-80 (`_createInstance`) and system/actorManager.py:83-116 (`run`).

        There exceptions were swallowed, and the status was always 0; and system/utilis.py:346-367
        (`create`) inspects the class to see what arguments it takes, which costs each process time and memory.

        The actor lives in its own way (see `live` of the supervisor and of the leaf); its result is the exit status.
        """
        self.actorInst = utilis.actualActorClass(self._actorClass)(self.capabilities, self._childReqs)
        self.actorInst._myRef = self  # noqa: SLF001 - as `_createInstance` does
        live = getattr(self.actorInst, "live", None)
        if live is None:
            raise InvalidActorSpecification(self._actorClass, "only supervisors and leaves can be started")
        status: int = live(self)
        return status

    def _handleOneMessage(self, envelope: Any) -> Any:  # noqa: N802 - Thespian's name
        """Corrects system/actorManager.py:128-212 (`_handleOneMessage`).

        There an exception in a handler ran the handler a second time and then went to the sender, and the actor lived
        on with whatever state it was in. Here it ends the process: let it crash.
        """
        message = envelope.message
        handled, result = self._handleReplicatorMessages(envelope)
        if handled:
            return result
        if isinstance(message, PendingActorResponse):
            return self._pendingActorResponse(envelope)
        if isinstance(message, ChildActorExited):
            self._children = [child for child in self._children if child != message.childAddress]
        elif not isinstance(message, ActorExitRequest):
            return True
        assert self.actorInst is not None
        self.actorInst.receiveMessage(message, envelope.sender)
        return True

    def _sayGoodbye(self) -> None:  # noqa: N802 - Thespian's name
        """Corrects system/actorManager.py:244-252 (`_sayGoodbye`): the kernel alone tells of an end, once."""
