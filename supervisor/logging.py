"""Log set-up of one process: loguru to standard error, one write for each line. (Skeleton: bodies follow.)"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    import loguru

LEVELS = ("trace", "debug", "info", "warning", "error", "critical")


class LogControl:
    """One process's log: its level, which can change for a while.

    Arguments:
        level: one of LEVELS.
        json: one JSON object per line for programs instead of text for people.
        sink: where lines go; each is one `write` call.
        colour: None = only on a terminal and without NO_COLOR.
    """

    def __init__(
        self,
        actor: str,
        *,
        level: str = "info",
        json: bool = False,
        sink: TextIO = sys.stderr,
        colour: bool | None = None,
    ) -> None:
        raise NotImplementedError

    @property
    def logger(self) -> loguru.Logger:
        """Bound to the actor's name. `logger.bind(message=..., peer=...)` adds the other known fields."""
        raise NotImplementedError

    def set_level(self, level: str) -> None:
        """Change the level now. Raises RefusedError for a word that is not a level."""
        raise NotImplementedError

    def close(self) -> None:
        """Flush and let go of the sink."""
        raise NotImplementedError
