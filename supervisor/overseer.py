"""A supervisor, but for its processes: the logic, its messages, its checkpoints. (Skeleton: bodies follow.)

The real supervisor process and the simulated one both run this: they differ in their :class:`Host`. It sets `on`
handlers at the exchange for Ready, LastWords, SaveCheckpoint, StartChild, StopChild, ReadTree, InjectProcessFault, and
drives :class:`supervisor.strategy.SupervisorLogic` by the exchange's timers. The host reports the end of processes
with :meth:`Overseer.child_exited`, after it has delivered all messages that the process had still sent.
"""

from __future__ import annotations

import random
from typing import Protocol

from protocol.messages.system import ChildSpec, SupervisorSpec
from supervisor.actor import Checkpoint
from supervisor.exchange import Exchange
from supervisor.port import NameState


class Host(Protocol):
    """What carries out a supervisor's commands. All calls return at once and never raise for a foreseeable failure."""

    def spawn(self, spec: ChildSpec, incarnation: int, checkpoint: Checkpoint | None) -> int | None:
        """Make the process; its pid, or None (then report `child_exited` later, not from inside this call).

        The checkpoint and its descriptors stay with the overseer: pass them on as copies.
        """
        ...

    def kill(self, name: str, incarnation: int) -> None:
        """SIGKILL the child's process (and what is below it, if it is a supervisor)."""
        ...

    def freeze(self, name: str, incarnation: int) -> None:
        """SIGSTOP the child's process."""
        ...

    def publish(self, name: str, state: NameState, incarnation: int) -> None:
        """Tell the registry what this name is from now on. UNKNOWN frees it."""
        ...

    def ready(self) -> None:
        """Every static child is ready for the first time: report to the supervisor's own supervisor."""
        ...

    def finished(self, reason: str, *, failed: bool) -> None:
        """All children have ended; end this process (with a failure if `failed`)."""
        ...


class Overseer:
    """See the module.

    Arguments:
        name: the supervisor's own name.
        spec: its strategy and static children.
        exchange: its own exchange (made without mailbox); `Stop` must be wired to :meth:`shut_down`.
        allow_faults: whether InjectProcessFault is obeyed.
    """

    def __init__(
        self,
        name: str,
        spec: SupervisorSpec,
        exchange: Exchange,
        host: Host,
        random: random.Random,
        *,
        allow_faults: bool = False,
    ) -> None:
        raise NotImplementedError

    def begin(self) -> None:
        """Start the static children."""
        raise NotImplementedError

    def child_exited(self, name: str, incarnation: int, *, failed: bool, reason: str) -> None:
        """A child's process has ended; `reason` in words ("killed by SIGKILL", "exit status 1").

        What the child itself said in `LastWords` is preferred to `reason`.
        """
        raise NotImplementedError

    def shut_down(self, reason: str) -> None:
        """Stop all children in reverse order, then `host.finished`."""
        raise NotImplementedError
