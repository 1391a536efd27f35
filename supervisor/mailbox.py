"""The bounded queue of messages that an actor has received and not yet handled."""

from __future__ import annotations

import collections
import dataclasses
from typing import Generic, TypeVar

from protocol.messages import Envelope, Message
from protocol.messages.system import Overflow


@dataclasses.dataclass(slots=True)
class Incoming:
    """One received message: what was said, and the envelope that it came in."""

    message: Message
    envelope: Envelope


T = TypeVar("T")


class Mailbox(Generic[T]):
    """A first-in first-out queue of at most `limit` items, with a policy for one more.

    Attributes:
        limit: items that may wait; those put with `force` do not count against anybody else but themselves.
        overflow: what happens to one more.
        dropped: items that were refused or dropped since the mailbox was made.
    """

    __slots__ = ("_items", "dropped", "limit", "overflow")

    def __init__(self, limit: int, overflow: Overflow) -> None:
        if limit < 1:
            raise ValueError("a mailbox holds at least one message")
        self.limit = limit
        self.overflow = overflow
        self.dropped = 0
        self._items: collections.deque[T] = collections.deque()

    def put(self, item: T) -> T | None:
        """Add an item; the item that had to go is returned: the new one, the oldest one, or None if there was room.

        Under `REFUSE` and `DROP_NEWEST` it is the new one, under `DROP_OLDEST` the oldest.
        """
        if len(self._items) < self.limit:
            self._items.append(item)
            return None
        self.dropped += 1
        if self.overflow is Overflow.DROP_OLDEST:
            oldest = self._items.popleft()
            self._items.append(item)
            return oldest
        return item

    def force(self, item: T) -> None:
        """Add an item whatever the limit says: for the few notices that the runtime itself makes."""
        self._items.append(item)

    def take(self) -> T | None:
        """Remove and return the oldest item, or None when there is none."""
        return self._items.popleft() if self._items else None

    def clear(self) -> list[T]:
        """Remove and return everything."""
        items = list(self._items)
        self._items.clear()
        return items

    def __len__(self) -> int:
        return len(self._items)
