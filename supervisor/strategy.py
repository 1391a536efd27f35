"""The supervision state machine: no processes, no sockets, no clock. (Skeleton: bodies follow.)

Events go in as method calls that carry `now`; each returns the list of commands to carry out, in order.
"""

from __future__ import annotations

import dataclasses
import enum
import random

from protocol.messages.system import ChildSpec, ChildStatus, SupervisorSpec


@dataclasses.dataclass(frozen=True)
class Start:
    """Start a process for this child. Report `child_ready`, or `child_exited` when it ends or cannot be made."""

    spec: ChildSpec
    incarnation: int


@dataclasses.dataclass(frozen=True)
class AskToStop:
    """Tell the child to stop, with `Stop(reason)`; `Kill` follows at its stop deadline if it does not end."""

    name: str
    incarnation: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Kill:
    """End the child's process at once (SIGKILL). Its `child_exited` is still awaited."""

    name: str
    incarnation: int
    reason: str


@dataclasses.dataclass(frozen=True)
class PingChild:
    """Send the child a `Ping`; report `heartbeat_answered`."""

    name: str
    incarnation: int


@dataclasses.dataclass(frozen=True)
class Forget:
    """The child is gone for good: its name is free and its checkpoint can be thrown away."""

    name: str


@dataclasses.dataclass(frozen=True)
class StartAnswered:
    """The start request with this token succeeded: the child is ready."""

    token: object
    name: str


@dataclasses.dataclass(frozen=True)
class StopAnswered:
    """The stop request with this token is done: the child has ended and is forgotten."""

    token: object
    name: str


@dataclasses.dataclass(frozen=True)
class RequestRefused:
    """The start or stop request with this token is refused."""

    token: object
    code: str
    reason: str


@dataclasses.dataclass(frozen=True)
class TreeReady:
    """Every static child is ready for the first time: the supervisor itself is ready."""


@dataclasses.dataclass(frozen=True)
class Finished:
    """All children have ended, and so must the supervisor. Comes once, last.

    `failed` is True when it gave up (too many restarts: escalation), False after `shutdown_requested`.
    """

    failed: bool
    reason: str


Command = (
    Start | AskToStop | Kill | PingChild | Forget | StartAnswered | StopAnswered | RequestRefused | TreeReady | Finished
)


class ChildState(enum.Enum):
    """See the table in the module's docstring."""

    WAITING = "waiting"
    BACKING_OFF = "backing-off"
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    KILLING = "killing"
    STOPPED = "stopped"
    FAILED = "failed"


class SupervisorLogic:
    """See the module. `random` is used for jitter alone."""

    def __init__(self, name: str, spec: SupervisorSpec, random: random.Random) -> None:
        raise NotImplementedError

    # Events

    def begin(self, now: float) -> list[Command]:
        """The supervisor runs: start the static children in order."""
        raise NotImplementedError

    def child_ready(self, name: str, incarnation: int, now: float) -> list[Command]:
        """The child's `start` has returned."""
        raise NotImplementedError

    def child_exited(
        self, name: str, incarnation: int, now: float, *, failed: bool, reason: str, code: str = "start-failed"
    ) -> list[Command]:
        """The child's process has ended. `code` is for the answer of a start request that fails by it."""
        raise NotImplementedError

    def heartbeat_answered(
        self, name: str, incarnation: int, now: float, *, mailbox: int, handled: int
    ) -> list[Command]:
        """The child's `Pong` came."""
        raise NotImplementedError

    def start_requested(self, spec: ChildSpec, token: object, now: float) -> list[Command]:
        """Somebody wants a dynamic child."""
        raise NotImplementedError

    def stop_requested(self, name: str, token: object, now: float) -> list[Command]:
        """Somebody wants a child stopped and forgotten."""
        raise NotImplementedError

    def shutdown_requested(self, reason: str, now: float) -> list[Command]:
        """Stop all children in reverse order, then `Finished`."""
        raise NotImplementedError

    def tick(self, now: float) -> list[Command]:
        """Time passed: whatever is due. Call it at `next_wakeup` (earlier or later does no harm)."""
        raise NotImplementedError

    def next_wakeup(self) -> float | None:
        """The moment at which `tick` must be called next, or None."""
        raise NotImplementedError

    # Looking in

    def status(self, now: float) -> tuple[ChildStatus, ...]:
        """The children in order; `pid` is None here (processes are not this module's)."""
        raise NotImplementedError
