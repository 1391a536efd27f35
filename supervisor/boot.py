"""What every process of one running node shares: handed down by the forks, never sent."""

from __future__ import annotations

import dataclasses
import socket

from protocol.messages.system import ChildSpec, SupervisorSpec
from supervisor.actor import Checkpoint
from supervisor.confinement import Prepared
from supervisor.registry import RunDirectory

SERVICE = "main"
"""The name of the long-running process that starts and watches the rest; it is the root supervisor's supervisor."""

ROOT = "root"
"""The name of the root supervisor."""


@dataclasses.dataclass(frozen=True)
class LogSettings:
    """How each process logs, see :class:`supervisor.logging.LogControl`. `levels` overrides `level` by actor name."""

    level: str = "info"
    json: bool = False
    colour: bool | None = None
    levels: tuple[tuple[str, str], ...] = ()

    def level_of(self, name: str) -> str:
        """The level that this actor starts with."""
        return dict(self.levels).get(name, self.level)


@dataclasses.dataclass(frozen=True)
class Boot:
    """The settings of one node's runtime.

    Attributes:
        directory: the run directory, open.
        root: the tree.
        allow_faults: whether faults may be injected.
        log: how to log.
        operators: names of the actors that may set taps, faults and log levels everywhere.
        factories: prefixes of the modules whose classes may be children.
        incarnations: what each name had come to when the last tree was lost: numbers go on, so ids stay unique.
        confined: whether the processes of supervisors give up what none of their children needs.
        generation: 1 for the first tree of a service, one more for each that is built after the loss of one.
    """

    directory: RunDirectory
    root: SupervisorSpec
    allow_faults: bool = False
    log: LogSettings = dataclasses.field(default_factory=LogSettings)
    operators: tuple[str, ...] = ()
    factories: tuple[str, ...] = ("actors.", "supervisor.")
    confined: bool = False
    generation: int = 1
    incarnations: tuple[tuple[str, int], ...] = ()


@dataclasses.dataclass(frozen=True)
class Birth:
    """What one child is born with; its parent's memory at the fork is how it gets there.

    `borrowing` is the child's end of what its supervisor lends it files through (:mod:`supervisor.lending`), `prepared`
    what is to be enforced on its process.
    """

    spec: ChildSpec
    incarnation: int
    supervisor: str
    checkpoint: Checkpoint | None
    boot: Boot
    borrowing: socket.socket | None = None
    prepared: Prepared | None = None
