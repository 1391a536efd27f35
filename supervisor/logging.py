"""Log set-up of one process: loguru to standard error, one write for each record.

A text record is one line, `time level actor text [message=… peer=… key=value …]`; a traceback follows as lines that
begin with `  | `. A JSON record is always one line. Whatever is logged, it cannot forge another record or drive a
terminal: all characters that are not printable are escaped. It cannot easily carry a secret either: bytes are shown as
their length, fields with a telling name and PEM private keys are replaced, and tracebacks never show values.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import os
import re
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from supervisor.errors import RefusedError
from supervisor.log_library import logger as _root
from supervisor.log_output import LogOutput

if TYPE_CHECKING:
    import loguru

LEVELS = ("trace", "debug", "info", "warning", "error", "critical")
"""The words for levels, from the most to the least talkative."""

RETRY = 0.25
"""Seconds between attempts to write what nobody has read yet."""

FIELD_LIMIT = 2000
"""Characters of a text or field that are kept."""

_REDACTED = "<redacted>"
_TELLING = re.compile(r"secret|passw|private|token|credential|(^|_)key$|(^|_)psk$|invite|seed", re.IGNORECASE)
_PEM = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END [A-Z ]*-----|\Z)", re.DOTALL)
_COLOURS = {"trace": "2", "debug": "2", "info": "32", "warning": "33", "error": "31", "critical": "1;31"}


class Sink(Protocol):
    """Where records go; each is one `write` call."""

    def write(self, text: str, /) -> int:
        """Take one record; raises OSError or ValueError where nobody can read it."""
        ...

    def flush(self) -> None:
        """Pass on what was written."""

    def isatty(self) -> bool:
        """Whether a person reads along."""
        ...


class LogControl:
    """The log of this process: loguru's one logger, set up. The last one made is the one in force.

    Arguments:
        actor: whose process this is.
        level: one of LEVELS.
        json: one JSON object per line for programs instead of text for people.
        sink: where records go; standard error, without ever waiting for its reader, unless told otherwise.
        colour: None = only on a terminal and without NO_COLOR.
    """

    def __init__(
        self,
        actor: str,
        *,
        level: str = "info",
        json: bool = False,
        sink: Sink | None = None,
        colour: bool | None = None,
    ) -> None:
        self._actor = actor
        self._json = json
        self._output: LogOutput | None = None
        if sink is None:
            sink = self._output = LogOutput()
        self._sink: Sink = sink
        self._later: Callable[[float, Callable[[], None]], object] | None = None
        self._retry_planned = False
        self._colour = colour if colour is not None else "NO_COLOR" not in os.environ and self._sink.isatty()
        self._install(level)
        _State.active = self

    @property
    def logger(self) -> loguru.Logger:
        """Bound to the actor's name. `logger.bind(message=..., peer=...)` adds the other known fields."""
        return _root.bind(actor=self._actor)

    def set_level(self, level: str) -> None:
        """Change the level now.

        Raises:
            RefusedError: there is no such level.
        """
        self._install(level)

    def retry_with(self, later: Callable[[float, Callable[[], None]], object]) -> None:
        """Use this to be called back after so many seconds while the reader of the log does not keep up."""
        self._later = later
        self._retry_planned = False  # whoever was asked before may have ended
        self._plan_retry()

    def close(self) -> None:
        """Let go of the sink; what is logged later is lost, and so is what nobody has read by now."""
        if _State.active is self:
            _State.active = None
        self._later = None
        if self._output is not None:
            with contextlib.suppress(OSError):
                self._output.retry()
            self._output.close()

    @staticmethod
    def _install(level: str) -> None:
        if level not in LEVELS:
            raise RefusedError("invalid-level", f"{level[:40]!r} is not a log level", f"use one of {', '.join(LEVELS)}")
        if _State.level == level:
            return
        _root.remove()
        _root.add(_write, level=level.upper(), format=_no_format, colorize=False, backtrace=False, diagnose=False)
        _State.level = level

    def write(self, message: loguru.Message) -> None:
        """Write one record."""
        line = json_line(message.record) if self._json else text_lines(message.record, colour=self._colour)
        try:
            self._sink.write(line)
            self._sink.flush()
        except (OSError, ValueError):
            return  # nobody reads standard error any more: no reason for an actor to end
        self._plan_retry()

    def _plan_retry(self) -> None:
        if self._output is not None and self._output.stuck and self._later is not None and not self._retry_planned:
            self._retry_planned = True
            self._later(RETRY, self._retry)

    def _retry(self) -> None:
        self._retry_planned = False
        if self._output is None:
            return
        with contextlib.suppress(OSError):
            if self._output.retry() and (lost := self._output.take_lost()):
                self.logger.warning("{} records were left out of this log because nobody was reading it", lost)
        self._plan_retry()


class _State:
    """What this process has set up. loguru takes 3 ms to add a handler, so a child goes on with its parent's."""

    level: ClassVar[str] = ""
    active: ClassVar[LogControl | None] = None


def _write(message: loguru.Message) -> None:
    if _State.active is not None:
        _State.active.write(message)


def text_lines(record: loguru.Record, *, colour: bool = False) -> str:
    """A record for people, with its final line break."""
    level = record["level"].name.lower()
    fields = _fields(record)
    actor = fields.pop("actor", "-")
    shown = f"\x1b[{_COLOURS.get(level, '0')}m{level:<8}\x1b[0m" if colour else f"{level:<8}"
    line = f"{_time(record)} {shown} {_clean(str(actor))}: {_clean(_redact(record['message']))}"
    if fields:
        line += " [" + " ".join(f"{_clean(name)}={_clean(str(value))}" for name, value in fields.items()) + "]"
    trace = "".join(f"\n  | {_clean(part)}" for part in _traceback(record))
    return f"{line}{trace}\n"


def json_line(record: loguru.Record) -> str:
    """A record for programs: one JSON object in ASCII, with its final line break."""
    entry: dict[str, Any] = {"time": _time(record), "level": record["level"].name.lower()}
    entry |= _fields(record)
    entry["text"] = _cut(_redact(record["message"]))
    if record["exception"] is not None:
        entry["exception"] = "\n".join(_traceback(record))
    return json.dumps(entry) + "\n"


def _no_format(_: loguru.Record) -> str:
    return ""


def _time(record: loguru.Record) -> str:
    return record["time"].astimezone(dt.UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def _fields(record: loguru.Record) -> dict[str, Any]:
    """The bound fields: actor, message and peer first, then the others as they were bound."""
    extra = record["extra"]
    ordered = [name for name in ("actor", "message", "peer") if name in extra]
    ordered += [name for name in extra if name not in ordered]
    return {name: _safe(name, extra[name]) for name in ordered}


def _safe(name: str, value: Any) -> Any:
    if _TELLING.search(name):
        return _REDACTED
    if isinstance(value, bytes | bytearray | memoryview):
        return f"<{len(value)} bytes>"
    if value is None or isinstance(value, bool | int | float):
        return value
    return _cut(_redact(str(value)))


def _redact(text: str) -> str:
    return _PEM.sub(_REDACTED, text) if "PRIVATE KEY" in text else text


def _cut(text: str) -> str:
    return text if len(text) <= FIELD_LIMIT else text[:FIELD_LIMIT] + "…"


def _clean(text: str) -> str:
    """Without line breaks, terminal sequences, direction marks and whatever else is not printable."""
    text = _cut(text)
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


def _traceback(record: loguru.Record) -> list[str]:
    """The lines of a traceback, without the values of variables."""
    caught = record["exception"]
    if caught is None or caught.type is None or caught.value is None:
        return []
    text = "".join(traceback.format_exception(caught.type, caught.value, caught.traceback))
    return _redact(text).splitlines()
