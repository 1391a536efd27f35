"""Reading typed values out of a parsed YAML mapping, with problems that say where, what and what to do.

A :class:`SectionReader` stands for one mapping of the file. Each `take` method reads one key, remembers that
it is known, and gives back its value or, after noting a problem, a default, so that one pass finds everything that
is wrong. What was never asked for is an unknown key. A key that is there and empty (nothing, `null`, or a text of
spaces alone) is not taken for one that is absent: most often everything below it was commented out, and what is meant
by that is not for us to guess. Lines come from ruamel.yaml's mappings where the
value was read from a file; plain mappings work as well, without lines.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from protocol.errors import InvalidValueError

T = TypeVar("T")

_DURATION = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(ns|us|µs|μs|ms|s|m|h)")
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
# YAML 1.2 knows only true and false; the Go library that peer-up uses also takes these of YAML 1.1 as booleans.
_OLD_BOOLEANS = {"yes": True, "on": True, "y": True, "no": False, "off": False, "n": False}
_MISSING = object()


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something in the configuration that is wrong or not understood.

    Attributes:
        key: the path of the key, such as `services.ssh.local_address`; empty for the file as a whole.
        reason: what is wrong and what to do.
        line: from 1; None where it is not known.
    """

    key: str
    reason: str
    line: int | None = None

    def __str__(self) -> str:
        where = f"line {self.line}: " if self.line is not None else ""
        return f"{where}{self.key}: {self.reason}" if self.key else f"{where}{self.reason}"


def parse_duration(text: str) -> float:
    """Seconds in a duration as Go writes it: `90s`, `1h30m`, `1.5s`, `100ms`, `0`.

    Raises:
        InvalidValueError: not such a duration.
    """
    sign, rest = (-1.0, text[1:]) if text.startswith("-") else (1.0, text.removeprefix("+"))
    if rest == "0":
        return 0.0
    seconds, end = 0.0, 0
    for match in _DURATION.finditer(rest):
        if match.start() != end:
            break
        seconds += float(match[1]) * _UNITS[match[2]]
        end = match.end()
    if not rest or end != len(rest):
        raise InvalidValueError(f"{text!r} is not a duration such as 30s, 2m or 1h30m")
    return sign * seconds


class SectionReader:
    """One mapping of the file being read.

    Arguments:
        values: the mapping, or what stands in its place.
        path: the dotted path of the mapping; empty for the file as a whole.
        problems: where mistakes are noted; shared by all readers of a file.
        warnings: where keys that nobody asked for are noted by :meth:`finish`, and what else is no mistake.
        asked: where the path of every key that is asked for is noted, whether it is there or not.
    """

    def __init__(
        self,
        values: Any,
        path: str,
        problems: list[Problem],
        warnings: list[Problem],
        asked: set[str] | None = None,
    ) -> None:
        self.path = path
        self._asked = set() if asked is None else asked
        self._problems = problems
        self._warnings = warnings
        self._seen: set[Any] = set()
        self._values: Mapping[Any, Any] = {}
        if isinstance(values, Mapping):
            self._values = values
        elif values is not None:  # an empty section is read as None
            problems.append(Problem(path, f"must be a mapping of keys to values, not {describe(values)}", None))

    def keys(self) -> list[Any]:
        """All keys of the mapping, in order."""
        return list(self._values)

    def line(self, key: Any) -> int | None:
        """The line (from 1) of this key, where it is known."""
        positions = getattr(self._values, "lc", None)
        if positions is None or key not in self._values:
            return None
        try:
            return int(positions.key(key)[0]) + 1
        except (KeyError, TypeError):  # a key that was merged in from elsewhere has no position of its own
            return None

    def problem(self, key: Any, reason: str) -> None:
        """Note that the value of this key is wrong."""
        self._problems.append(Problem(self.key_path(key), reason, self.line(key)))

    def warn(self, key: Any, reason: str) -> None:
        """Note something about this key that is no mistake but should be known."""
        self._warnings.append(Problem(self.key_path(key), reason, self.line(key)))

    def key_path(self, key: Any) -> str:
        """The dotted path of a key of this mapping."""
        return f"{self.path}.{key}" if self.path else str(key)

    def peek(self, key: str) -> Any:
        """The value of a key as it stands there, None without one; reading it for good is up to the other methods."""
        return self._values.get(key)

    def section(self, key: str, *, may_be_empty: bool = False) -> SectionReader:
        """The mapping below this key; an empty one if it is absent.

        `may_be_empty` is for a collection, in which nothing can only mean none.
        """
        value = self._take(key) if may_be_empty else self._filled(key, "remove it, or write what belongs below it")
        if value is _MISSING or value is None:
            value = None
        elif not isinstance(value, Mapping):
            self.problem(key, f"must be a mapping of keys to values, not {describe(value)}")
            value = None
        return SectionReader(value, self.key_path(key), self._problems, self._warnings, self._asked)

    def text(self, key: str, default: str) -> str:
        """A string."""
        return self.parsed(key, default, str)

    def parsed(self, key: str, default: T, parse: Callable[[str], T]) -> T:
        """A string that `parse` turns into a value; it raises ValueError for what it does not take."""
        value = self._filled(key)
        if value is _MISSING:
            return default
        if not isinstance(value, str):
            self.problem(key, f"must be text, not {describe(value)}; put it in quotes")
            return default
        try:
            return parse(str(value))
        except ValueError as error:
            self.problem(key, str(error))
            return default

    def boolean(self, key: str, default: bool) -> bool:  # noqa: FBT001  # the default is a value here, not a switch
        """Whether the key says true or false."""
        value = self._filled(key)
        if value is _MISSING:
            return default
        if isinstance(value, str):
            value = _OLD_BOOLEANS.get(value.lower(), value)
        if not isinstance(value, bool):
            self.problem(key, f"must be true or false, not {describe(value)}")
            return default
        return value

    def integer(self, key: str, default: int, *, least: int, most: int) -> int:
        """A whole number within these bounds."""
        value = self._filled(key)
        if value is _MISSING:
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            self.problem(key, f"must be a whole number, not {describe(value)}")
            return default
        if not least <= value <= most:
            self.problem(key, f"must be from {least} to {most}, not {value}")
            return default
        return int(value)

    def limit(
        self, key: str, default: int | None, *, least: int = 0, most: int, parse: Callable[[str], int]
    ) -> int | None:
        """A whole number within these bounds, as such or in the form that `parse` takes; None for `unlimited`."""
        value = self._filled(key)
        if value is _MISSING:
            return default
        if value == "unlimited":
            return None
        try:
            number = parse(str(value)) if isinstance(value, str) else value
        except InvalidValueError as error:
            self.problem(key, f"{error}, nor unlimited")
            return default
        if isinstance(number, bool) or not isinstance(number, int):
            self.problem(key, f"must be a whole number or unlimited, not {describe(value)}")
            return default
        if not least <= number <= most:
            self.problem(key, f"must be from {least} to {most} or unlimited, not {describe(value)}")
            return default
        return int(number)

    def duration(self, key: str, default: float) -> float:
        """A duration as Go writes it, in seconds; must be positive."""
        value = self._filled(key)
        if value is _MISSING:
            return default
        try:
            seconds = parse_duration(str(value)) if isinstance(value, str) or value == 0 else None
        except InvalidValueError as error:
            self.problem(key, str(error))
            return default
        if seconds is None or seconds <= 0:
            self.problem(key, f"must be a duration above zero such as 30s, 2m or 1h30m, not {describe(value)}")
            return default
        return seconds

    def items(
        self, key: str, parse: Callable[[str], T], *, if_empty: str = "write [] for none, or remove it for its default"
    ) -> tuple[T, ...] | None:
        """A list of strings that `parse` turns into values; None if it is absent.

        Wrong items are left out, and of a key without a list there are none.

        `if_empty` says what to do about a key without a value.
        """
        value = self._filled(key, if_empty)
        if value is _MISSING:
            return None if key not in self._values else ()
        if isinstance(value, str) or not isinstance(value, Sequence):
            self.problem(key, f"must be a list, not {describe(value)}; write it as [a, b] or one `- item` a line")
            return ()
        found: list[T] = []
        for index, item in enumerate(value):
            if not isinstance(item, str):
                self._item_problem(key, value, index, f"must be text, not {describe(item)}; put it in quotes")
                continue
            try:
                found.append(parse(str(item)))
            except ValueError as error:
                self._item_problem(key, value, index, str(error))
        return tuple(found)

    def ignore(self, *keys: str) -> None:
        """Count these keys as known without reading them."""
        self._seen.update(keys)

    def without_effect(self, key: str, why: str) -> None:
        """Take a key that means nothing here, whatever it says, and tell whoever has written it."""
        if self._take(key) is not _MISSING:
            self.warn(key, f"has no effect and can be removed: {why}")

    def finish(self) -> None:
        """Note every key that nobody asked for."""
        for key in self._values:
            if key not in self._seen:
                self.warn(key, "is not a key that peerup knows; it is ignored")

    def _filled(self, key: str, advice: str = "write its value, or remove it for its default") -> Any:
        """The value of this key; `_MISSING` without one. A key that is there and has none is noted as a problem."""
        value = self._take(key)
        if value is None or (isinstance(value, str) and not value.strip()):
            self.problem(key, f"is there and empty; {advice}")
            return _MISSING
        return value

    def _take(self, key: str) -> Any:
        self._seen.add(key)
        self._asked.add(self.key_path(key))
        return self._values.get(key, _MISSING)

    def _item_problem(self, key: str, items: Any, index: int, reason: str) -> None:
        line = self.line(key)
        positions = getattr(items, "lc", None)
        if positions is not None:
            line = int(positions.item(index)[0]) + 1
        self._problems.append(Problem(f"{self.key_path(key)}[{index}]", reason, line))


def describe(value: Any) -> str:
    """A value as it stands in a message: short, and with its kind where that is what matters."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "a list"
    text = str(value)
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
