"""Checkpoints that a supervisor, or the service above the root, keeps for others.

Theory of operation. A child's checkpoint is kept by its supervisor, and by every supervisor above that one as well,
up to the service's main process: so it outlives the death of the supervisor. A supervisor that starts asks the one
above it for what it keeps on its behalf (:class:`protocol.messages.system.ReadEstate`), before it starts a child.
Descriptors in checkpoints, listening sockets above all, thereby stay open whichever process below the main one is
killed.

What is kept is bounded, for each checkpoint and for all that come by way of one child, so that an actor gone wrong
fills nobody's memory. A checkpoint beyond a bound is refused, and the one before it stays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from protocol.messages import Descriptor
from protocol.messages.system import KeepCheckpoint
from supervisor.actor import Checkpoint
from supervisor.errors import RefusedError

CHECKPOINT_BYTES = 1024 * 1024
"""The longest checkpoint. Actors keep theirs below 16 KiB; a list that a person has written may come on top of that."""

PATH_BYTES = 2048
"""What each supervisor on its way may add to that: names."""

CHECKPOINT_DESCRIPTORS = 16
"""Descriptors in one checkpoint, which are as many as one message carries."""

BRANCH_BYTES = 32 * 1024 * 1024
"""Bytes of all checkpoints that come by way of one child: some thousands of proxies, if that is their supervisor."""

BRANCH_DESCRIPTORS = 8192
"""Likewise their descriptors, an eighth of what the processes of a node may have open."""

BRANCH_NAMES = 16384
"""Likewise the actors that left them."""

TOO_LARGE = "checkpoint-too-large"
"""The code of the refusals for a bound."""


@dataclasses.dataclass(frozen=True)
class _Kept:
    path: tuple[str, ...]
    checkpoint: Checkpoint
    size: int


@dataclasses.dataclass(frozen=True)
class _Total:
    """What is kept by way of one child, in all."""

    names: int = 0
    size: int = 0
    descriptors: int = 0

    def changed(self, kept: _Kept | None, sign: int) -> _Total:
        """With this added or taken away."""
        if kept is None:
            return self
        descriptors = len(kept.checkpoint.descriptors)
        return _Total(self.names + sign, self.size + sign * kept.size, self.descriptors + sign * descriptors)


class Estate:
    """The checkpoints, by the name of the actor that left them. It owns their descriptors."""

    def __init__(self) -> None:
        self._kept: dict[str, _Kept] = {}
        self._branches: dict[str, _Total] = {}

    def keep(
        self,
        name: str,
        path: tuple[str, ...],
        checkpoint: Checkpoint,
        size: int,
        *,
        own: bool = False,
        handed_down: bool = False,
    ) -> None:
        """Keep this, in place of what was kept for the name.

        `path` names the supervisors from the child that leads to the actor down to the actor's own; empty for a child.
        `size` is that of the message that brought it, in bytes; `own` says that the name is a child's, so that nobody
        else may bring it, `handed_down` that the supervisor above has kept it, which added to it on its way.

        Raises:
            RefusedError: it is beyond a bound, or the name came by another way before; what was kept stays.
        """
        before = self._kept.get(name)
        try:
            self._check_way(name, path, before, own=own)
            self._check_size(path, checkpoint, size, before, steps=len(path) + handed_down)
        except RefusedError:
            _close(checkpoint)
            raise
        self.drop(name)
        self._kept[name] = kept = _Kept(path, checkpoint, size)
        self._count(kept, 1)

    @staticmethod
    def _check_way(name: str, path: tuple[str, ...], before: _Kept | None, *, own: bool) -> None:
        if (own and path) or (before is not None and before.path[:1] != path[:1]):
            raise RefusedError("not-its-own", f"{name} leaves its checkpoints by another way")

    def _check_size(
        self, path: tuple[str, ...], checkpoint: Checkpoint, size: int, before: _Kept | None, *, steps: int
    ) -> None:
        if size > CHECKPOINT_BYTES + steps * PATH_BYTES or len(checkpoint.descriptors) > CHECKPOINT_DESCRIPTORS:
            reason = f"a checkpoint has at most {CHECKPOINT_BYTES} bytes and {CHECKPOINT_DESCRIPTORS} descriptors"
            raise RefusedError(TOO_LARGE, reason)
        if not path:
            return
        now = self._branches.get(path[0], _Total())
        after = now.changed(before, -1).changed(_Kept(path, checkpoint, size), 1)
        if after.names > BRANCH_NAMES or after.size > BRANCH_BYTES or after.descriptors > BRANCH_DESCRIPTORS:
            raise RefusedError(TOO_LARGE, f"what comes by way of {path[0]} is over its bounds in all")

    def get(self, name: str) -> Checkpoint | None:
        """What is kept for this name; its descriptors stay with the estate."""
        kept = self._kept.get(name)
        return None if kept is None else kept.checkpoint

    def names(self) -> list[str]:
        """Whose checkpoints there are."""
        return list(self._kept)

    def names_of_children(self) -> list[str]:
        """Whose checkpoints are those of children, not of actors further down."""
        return [name for name, kept in self._kept.items() if not kept.path]

    def names_below(self, child: str) -> list[str]:
        """Whose checkpoints came by way of this child, its own not among them."""
        return [name for name, kept in self._kept.items() if kept.path[:1] == (child,)]

    def messages_below(self, child: str) -> Iterator[KeepCheckpoint]:
        """What this child's successor must be told, with copies of the descriptors."""
        for name in self.names_below(child):
            kept = self._kept[name]
            yield keep_message(name, kept.path, kept.checkpoint)

    def drop(self, name: str) -> bool:
        """Close and forget what is kept for this name; whether there was anything."""
        kept = self._kept.pop(name, None)
        if kept is None:
            return False
        _close(kept.checkpoint)
        self._count(kept, -1)
        return True

    def _count(self, kept: _Kept, sign: int) -> None:
        for branch in kept.path[:1]:
            total = self._branches.get(branch, _Total()).changed(kept, sign)
            if total.names:
                self._branches[branch] = total
            else:
                self._branches.pop(branch, None)

    def close(self) -> None:
        """Close and forget everything."""
        for name in self.names():
            self.drop(name)


def _close(checkpoint: Checkpoint) -> None:
    for descriptor in checkpoint.descriptors:
        descriptor.close()


def keep_message(name: str, path: tuple[str, ...], checkpoint: Checkpoint) -> KeepCheckpoint:
    """The checkpoint as a message, with copies of its descriptors."""
    copies: list[Descriptor] = [descriptor.duplicate() for descriptor in checkpoint.descriptors]
    return KeepCheckpoint(name, path, checkpoint.state, tuple(copies), checkpoint.version)
