"""The kernel as the monitor of networks sees it."""

from __future__ import annotations

import time

import trio

from actors.nat.rtnetlink import RECEIVE, Networks, open_events


class RealKernel:
    """Implements :class:`actors.nat.monitor.Kernel`.

    Raises:
        NetlinkError: it does not let us.
    """

    def __init__(self) -> None:
        self._networks = Networks()
        self._events = open_events()

    @property
    def facts(self) -> frozenset[str]:
        """See :class:`actors.nat.monitor.Kernel`."""
        return self._networks.facts

    async def news(self) -> frozenset[str]:
        """See :class:`actors.nat.monitor.Kernel`."""
        await trio.lowlevel.wait_readable(self._events)
        lost: set[str] = set()
        while True:
            try:
                lost.update(self._networks.lost(self._events.recv(RECEIVE)))
            except BlockingIOError:
                return frozenset(lost)
            except OSError:  # ENOBUFS: there was more than the socket holds
                return frozenset(lost)

    def read(self) -> frozenset[str]:
        """See :class:`actors.nat.monitor.Kernel`."""
        return self._networks.read()

    def slept(self) -> float:
        """See :class:`actors.nat.monitor.Kernel`."""
        awake = time.clock_gettime(time.CLOCK_MONOTONIC)  # first: time passes between the two looks
        return time.clock_gettime(time.CLOCK_BOOTTIME) - awake
