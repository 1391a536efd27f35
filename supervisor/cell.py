"""Hosts one actor under trio: its context, its dispatch loop, its life. (Skeleton: bodies follow.)"""

from __future__ import annotations

import random
from collections.abc import Callable

import trio

from protocol.messages import Data
from supervisor.actor import Actor, Checkpoint
from supervisor.exchange import Exchange
from supervisor.port import Port


class Cell:
    """Runs one actor over one port.

    It makes the exchange (attribute `exchange`; attach it to the port as receiver before `run`). `run` is the
    actor's whole life: `start`, then `on_ready` with what it returned, then dispatch until `request_stop` or `Stop`,
    then `stop`, then it cancels what is left and returns. An unhandled exception of the actor leaves `run` as it is (in
    an ExceptionGroup when trio made one; :func:`failure_text` makes one line of it).

    Whoever runs it keeps calling the port in the same trio run; timers of the exchange are driven by the cell itself.
    """

    exchange: Exchange

    def __init__(
        self,
        actor: Actor,
        name: str,
        incarnation: int,
        port: Port,
        *,
        supervisor: str,
        now: Callable[[], float],
        wall: Callable[[], float],
        random: random.Random,
        set_log_level: Callable[[str, float | None], None] | None = None,
        crash: Callable[[], None] | None = None,
        hang: Callable[[], None] | None = None,
        allow_faults: bool = False,
        on_ready: Callable[[dict[str, Data]], None] | None = None,
    ) -> None:
        raise NotImplementedError

    async def run(
        self, checkpoint: Checkpoint | None, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """The actor's life, see the class."""
        raise NotImplementedError

    def request_stop(self, reason: str) -> None:
        """Stop as if the supervisor had said so (SIGTERM does this). Harmless when it is stopping already."""
        raise NotImplementedError


def failure_text(error: BaseException) -> tuple[str, str]:
    """(code, one line for people) for an exception or group: the class, the text and where it was raised."""
    raise NotImplementedError
