"""The seam between an actor's message logic and whatever carries its envelopes.

Below it: `SOCK_SEQPACKET` sockets between processes (:mod:`supervisor.transport`) or a seeded in-memory queue
(:mod:`supervisor.simulation`). Above it: the synchronous :class:`supervisor.exchange.Exchange`, which every
process has, supervisors included, and on top of that the trio-hosted :class:`supervisor.cell.Cell` of an actor.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Protocol

from protocol.errors import PeerupError
from protocol.messages import Descriptor, Envelope


class NotDeliveredError(PeerupError):
    """An envelope could not be handed to its target; it becomes a dead letter with this reason."""

    code = "not-delivered"


class NameState(enum.Enum):
    """What the registry knows of a name."""

    UNKNOWN = "unknown"
    STARTING = "starting"  # the supervisor is (re)starting it, or waits to do so
    READY = "ready"


class Port(Protocol):
    """Carries envelopes of one actor to others by name. All calls return at once."""

    def send(self, envelope: Envelope, descriptors: Sequence[Descriptor]) -> None:
        """Hand the envelope over, or queue it within the bound for this target.

        The descriptors are duplicated; the caller still owns its own.
        A process that is still starting can already ask others: answers (`reply_to` is set) and what its own
        supervisor or its own children say reach it; everything else is refused until its name is READY.

        Raises:
            NotDeliveredError: unknown or restarting target, or its queue is full.
        """
        ...

    def state(self, name: str) -> NameState:
        """What the registry says of this name now."""
        ...

    def watch(self, name: str) -> None:
        """Call the receiver's `name_down` and `name_up` for this name from now on."""
        ...


class Receiver(Protocol):
    """What a port calls on its owner, always from the owner's own thread."""

    def deliver(self, envelope: Envelope, descriptors: list[Descriptor]) -> None:
        """An envelope arrived. `envelope.sender` was verified by the transport."""
        ...

    def name_down(self, name: str, reason: str) -> None:
        """The process behind a watched name, or one that was sent a message lately, has ended."""
        ...

    def name_up(self, name: str, incarnation: int) -> None:
        """A watched name is ready (again)."""
        ...

    def link_lost(self, name: str, reason: str) -> None:
        """What was on its way to this name and back may be lost, but its process goes on."""
        ...

    def descriptors_lost(self, envelope: Envelope) -> None:
        """An envelope arrived, and some of its descriptors did not: this process can have no more of them now."""
        ...

    def undelivered(self, envelope: Envelope, reason: str) -> None:
        """An envelope that `send` had queued could not be delivered after all."""
        ...
