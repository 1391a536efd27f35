"""loguru, without asyncio.

loguru imports asyncio for sinks that are coroutines, and no sink here is one. That would be 33 modules for nothing:
2 MB in a node and some ten milliseconds of its start. So while loguru is imported it finds a stand-in, which imports
asyncio when something of it is used; everybody else finds asyncio itself.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncio

_NAME = "asyncio"


class _Later(ModuleType):
    """asyncio, as soon as something of it is needed."""

    def __getattr__(self, name: str) -> Any:
        _remove(self)  # or the import would find this
        return getattr(importlib.import_module(_NAME), name)

    @staticmethod
    def get_running_loop() -> asyncio.AbstractEventLoop:
        """The one name that loguru takes when it is imported."""
        loop: asyncio.AbstractEventLoop = importlib.import_module(_NAME).get_running_loop()
        return loop


def _remove(module: ModuleType) -> None:
    if sys.modules.get(_NAME) is module:
        del sys.modules[_NAME]


def _import_loguru() -> ModuleType:
    if _NAME in sys.modules:
        return importlib.import_module("loguru")
    stand_in = sys.modules[_NAME] = _Later(_NAME)
    try:
        return importlib.import_module("loguru")
    finally:
        _remove(stand_in)


_import_loguru()

from loguru import logger  # noqa: E402 - after what makes it cheap

__all__ = ["logger"]
