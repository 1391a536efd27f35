"""Checkpoints that a supervisor, or the service above the root, keeps for others.

Theory of operation. A child's checkpoint is kept by its supervisor, and by every supervisor above that one as well,
up to the service's main process: so it outlives the death of the supervisor. A supervisor that starts asks the one
above it for what it keeps on its behalf (:class:`protocol.messages.system.ReadEstate`), before it starts a child.
Descriptors in checkpoints, listening sockets above all, thereby stay open whichever process below the main one is
killed.
"""

from __future__ import annotations

from collections.abc import Iterator

from protocol.messages import Descriptor
from protocol.messages.system import KeepCheckpoint
from supervisor.actor import Checkpoint


class Estate:
    """The checkpoints, by the name of the actor that left them. It owns their descriptors."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[tuple[str, ...], Checkpoint]] = {}

    def keep(self, name: str, path: tuple[str, ...], checkpoint: Checkpoint) -> None:
        """Keep this, in place of what was kept for the name.

        `path` names the supervisors from the child that leads to the actor down to the actor's own; empty for a child.
        """
        self.drop(name)
        self._kept[name] = (path, checkpoint)

    def get(self, name: str) -> Checkpoint | None:
        """What is kept for this name; its descriptors stay with the estate."""
        kept = self._kept.get(name)
        return None if kept is None else kept[1]

    def names(self) -> list[str]:
        """Whose checkpoints there are."""
        return list(self._kept)

    def names_of_children(self) -> list[str]:
        """Whose checkpoints are those of children, not of actors further down."""
        return [name for name, (path, _) in self._kept.items() if not path]

    def names_below(self, child: str) -> list[str]:
        """Whose checkpoints came by way of this child, its own not among them."""
        return [name for name, (path, _) in self._kept.items() if path[:1] == (child,)]

    def messages_below(self, child: str) -> Iterator[KeepCheckpoint]:
        """What this child's successor must be told, with copies of the descriptors."""
        for name in self.names_below(child):
            yield keep_message(name, *self._kept[name])

    def drop(self, name: str) -> bool:
        """Close and forget what is kept for this name; whether there was anything."""
        kept = self._kept.pop(name, None)
        if kept is None:
            return False
        for descriptor in kept[1].descriptors:
            descriptor.close()
        return True

    def close(self) -> None:
        """Close and forget everything."""
        for name in self.names():
            self.drop(name)


def keep_message(name: str, path: tuple[str, ...], checkpoint: Checkpoint) -> KeepCheckpoint:
    """The checkpoint as a message, with copies of its descriptors."""
    copies: list[Descriptor] = [descriptor.duplicate() for descriptor in checkpoint.descriptors]
    return KeepCheckpoint(name, path, checkpoint.state, tuple(copies))
