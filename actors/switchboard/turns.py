"""Whose handshake computes next: one step of one handshake in each turn of the event loop, known callers first.

A step of a handshake (a key agreement, a signature, a certificate) takes up to some milliseconds in which nothing else
happens. A crowd of strangers thus delays a tunnelled byte by one step and not by a thousand; the handshake of a known
caller waits for one step of a stranger at most; and each step is charged to whoever caused it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Protocol

import trio


class Account(Protocol):
    """Who pays for the steps of one handshake."""

    @property
    def known(self) -> bool:
        """Whether it goes first."""
        ...

    def waits(self) -> None:
        """A step is to be computed: from now on the caller waits for us."""

    def worked(self, seconds: float) -> None:
        """The step took so many seconds of processor time; it is the caller's turn again."""

    def progress(self) -> None:
        """A message of the handshake was complete and right."""


class Nobody:
    """An account of somebody who need not pay: our own dials."""

    known = True

    def waits(self) -> None:
        """See `Account`."""

    def worked(self, seconds: float) -> None:
        """See `Account`."""

    def progress(self) -> None:
        """See `Account`."""


class Turns:
    """Lets handshakes compute one after another.

    `cpu` gives the processor time that this thread has used, in seconds.
    """

    def __init__(self, cpu: Callable[[], float] = time.thread_time) -> None:
        self._cpu = cpu
        self._taken = False
        self._known = trio.lowlevel.ParkingLot()
        self._others = trio.lowlevel.ParkingLot()

    @contextlib.asynccontextmanager
    async def turn(self, account: Account) -> AsyncIterator[None]:
        """Wait for a turn, which lasts as long as the block; nothing within may wait."""
        account.waits()
        spent = 0.0
        try:
            await self._acquire(known=account.known)
            began = self._cpu()
            try:
                yield
            finally:
                spent = self._cpu() - began
                self._release()
        finally:
            account.worked(spent)

    async def _acquire(self, *, known: bool) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._taken:
            await (self._known if known else self._others).park()  # and then it is taken for this one
        else:
            self._taken = True
            await trio.lowlevel.cancel_shielded_checkpoint()  # so that each turn is in another round of the event loop

    def _release(self) -> None:
        if self._known:
            self._known.unpark()
        elif self._others:
            self._others.unpark()
        else:
            self._taken = False
