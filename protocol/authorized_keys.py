"""The grammar of `authorized_keys`, read without loss and edited without touching what is not meant.

One peer a line, in the form that peer-up writes::

    <peer-id>  [key=value]…  [# comment]

Blank lines and lines that begin with `#` are for people. Known attributes are `expires` (RFC 3339), `verified`
(`sha256:` and 8 hex digits), `group` (8 hex digits) and `hmac_proof` (64 hex digits); others are kept and mean
nothing here. Every edit gives a new value; each line that it does not concern keeps every byte, its line end too.

What is wrong with a line is reported with its number and never guessed at: an `expires` that cannot be read must
not become "never".
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import re
import unicodedata
from collections.abc import Mapping
from typing import ClassVar, Final, Self

from protocol.errors import InvalidValueError
from protocol.peer_id import PeerId, PeerIdError
from protocol.policy import PeerRule

MAX_FILE: Final = 4 * 1024 * 1024
"""The largest file in bytes that is taken: some 50,000 peers."""

MAX_LINE: Final = 4096
"""The longest line in bytes."""

MAX_COMMENT: Final = 256
"""The longest comment in characters that is written."""

_KEY: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)
_VALUE: Final = re.compile(r"[^\s#\"'`\\]{0,512}")
_RFC3339: Final = re.compile(r"\d{4}-\d{2}-\d{2}[Tt]\d{2}:\d{2}:\d{2}(\.\d{1,9})?([Zz]|[+-]\d{2}:\d{2})", re.ASCII)
_SHAPES: Final = {
    "verified": (re.compile(r"sha256:[0-9a-f]{8}", re.ASCII), "sha256: and 8 hex digits"),
    "group": (re.compile(r"[0-9a-f]{8}", re.ASCII), "8 hex digits"),
    "hmac_proof": (re.compile(r"[0-9a-f]{64}", re.ASCII), "64 hex digits"),
}
_SPACES: Final = " \t"
_TOKEN: Final = re.compile(r"[^ \t]+")


class AuthorizedKeysError(InvalidValueError):
    """An edit of authorized_keys that cannot be made: a bad value, a peer that is or is not there."""

    code: ClassVar[str] = "bad-authorized-keys"


@dataclasses.dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with one line.

    Attributes:
        line: its number, from 1.
        code: `not-utf-8`, `line-too-long`, `control-character`, `bad-peer-id`, `bad-attribute`,
            `duplicate-attribute`, `bad-expires`, `bad-value`, `duplicate-peer`, `file-too-large`.
        reason: for a person.
        fatal: whether the file must not come into force with it. `bad-value` of an attribute that decides
            nothing (`verified`, `group`, `hmac_proof`) is the only one that may be lived with.
    """

    line: int
    code: str
    reason: str
    fatal: bool = True


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One peer's line.

    Attributes:
        line: its number, from 1.
        peer: whose line.
        attributes: in the order of the line.
        comment: without `#` and surrounding spaces; characters that could harm a terminal are replaced.
        expires: seconds since the Unix epoch; None for never.
    """

    line: int
    peer: PeerId
    attributes: tuple[tuple[str, str], ...]
    comment: str
    expires: float | None

    def attribute(self, key: str) -> str | None:
        """The value of this attribute; None without it."""
        for name, value in self.attributes:
            if name == key:
                return value
        return None

    @property
    def verified(self) -> str | None:
        """What `peerup verify` left: `sha256:` and 8 hex digits; None if the peer was not verified."""
        value = self.attribute("verified")
        return value if value is not None and _SHAPES["verified"][0].fullmatch(value) else None


@dataclasses.dataclass(frozen=True, slots=True)
class AuthorizedKeys:
    """The content of an authorized_keys file. Immutable: each edit gives a new one.

    Attributes:
        lines: every line with its line end, exactly as read; bytes that are not UTF-8 stand as lone surrogates.
        entries: the peers of the lines that are right, by order of lines, each peer once (the first line counts).
        problems: what is wrong with the others, by order of lines.
        duplicates: further lines of peers that are in `entries`; each is among the problems, too.
    """

    lines: tuple[str, ...]
    entries: tuple[Entry, ...]
    problems: tuple[Problem, ...]
    duplicates: tuple[Entry, ...] = ()

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Read a file's bytes. Never fails: what is wrong is in `problems`."""
        if len(data) > MAX_FILE:
            problem = Problem(1, "file-too-large", f"the file has {len(data)} bytes, more than {MAX_FILE}")
            return cls((), (), (problem,))
        return cls._of_lines(_split(data.decode("utf-8", "surrogateescape")))

    @classmethod
    def _of_lines(cls, lines: tuple[str, ...]) -> Self:
        entries: dict[PeerId, Entry] = {}
        problems: list[Problem] = []
        duplicates: list[Entry] = []
        for number, line in enumerate(lines, 1):
            entry = _parse_line(line, number, problems)
            if entry is None:
                continue
            if (first := entries.setdefault(entry.peer, entry)) is not entry:
                reason = f"{entry.peer.short} stands in line {first.line} already"
                problems.append(Problem(number, "duplicate-peer", reason))
                duplicates.append(entry)
        return cls(lines, tuple(entries.values()), tuple(problems), tuple(duplicates))

    def to_bytes(self) -> bytes:
        """The file's bytes; for an unedited file exactly those that were read.

        Raises:
            AuthorizedKeysError: the file was too large to be read, so that nothing of it is known.
        """
        if self.problems and self.problems[0].code == "file-too-large":
            raise AuthorizedKeysError("the file is too large to be edited")
        return "".join(self.lines).encode("utf-8", "surrogateescape")

    @property
    def fatal_problems(self) -> tuple[Problem, ...]:
        """The problems with which the file must not come into force."""
        return tuple(problem for problem in self.problems if problem.fatal)

    def find(self, peer: PeerId) -> Entry | None:
        """The peer's line; None if it has none."""
        for entry in self.entries:
            if entry.peer == peer:
                return entry
        return None

    def rules(self) -> tuple[PeerRule, ...]:
        """The lines that are right as rules of a policy, duplicates too: of those the stricter counts.

        With `fatal_problems` these are not the whole file; see :mod:`protocol.narrowing`.
        """
        return tuple(
            PeerRule(entry.peer, entry.line, entry.expires, entry.comment)
            for entry in (*self.entries, *self.duplicates)
        )

    def add(self, peer: PeerId, comment: str = "", attributes: Mapping[str, str] | None = None) -> Self:
        """This file with a line for the peer at its end.

        Raises:
            AuthorizedKeysError: the peer has a line, or the comment or an attribute cannot be written.
        """
        self.to_bytes()
        if (present := self.find(peer)) is not None:
            raise AuthorizedKeysError(f"{peer} stands in line {present.line} already")
        words = [str(peer)]
        words += [f"{key}={check_attribute(key, value)}" for key, value in (attributes or {}).items()]
        if comment := check_comment(comment):
            words.append(f"# {comment}")
        lines = list(self.lines)
        if lines and not lines[-1].endswith("\n"):
            lines[-1] += _line_end(lines)
        return self._of_lines((*lines, " ".join(words) + _line_end(lines)))

    def remove(self, peer: PeerId) -> Self:
        """This file without any line of the peer: also of a duplicate, and of one whose attributes are broken.

        Raises:
            AuthorizedKeysError: no line has this peer.
        """
        kept = tuple(line for line in self.lines if _peer_of(line) != peer)
        if len(kept) == len(self.lines):
            raise AuthorizedKeysError(f"{peer} is not in the file")
        return self._of_lines(kept)

    def set_attribute(self, peer: PeerId, key: str, value: str | None) -> Self:
        """This file with the attribute set (where it stood, or behind the last one) or, for None, taken away.

        Raises:
            AuthorizedKeysError: the peer has no line, or the attribute cannot be written.
        """
        entry = self.find(peer)
        if entry is None:
            raise AuthorizedKeysError(f"{peer} is not in the file")
        if value is not None:
            check_attribute(key, value)
        line = self.lines[entry.line - 1]
        changed = _with_attribute(line, key, value)
        return self._of_lines((*self.lines[: entry.line - 1], changed, *self.lines[entry.line :]))

    def set_comment(self, peer: PeerId, comment: str) -> Self:
        """This file with the comment of the peer's line replaced, or taken away if empty.

        Raises:
            AuthorizedKeysError: the peer has no line, or the comment cannot be written.
        """
        entry = self.find(peer)
        if entry is None:
            raise AuthorizedKeysError(f"{peer} is not in the file")
        comment = check_comment(comment)
        line = self.lines[entry.line - 1]
        body, end = _cut_end(line)
        changed = body.partition("#")[0].rstrip(_SPACES) + (f" # {comment}" if comment else "") + end
        return self._of_lines((*self.lines[: entry.line - 1], changed, *self.lines[entry.line :]))


def check_comment(comment: str) -> str:
    """The comment without surrounding spaces.

    Raises:
        AuthorizedKeysError: too long, or with a line end, control or direction character, or one that quotes
            (`"`, backquote, backslash), which other readers of the file may take for more than text.
    """
    comment = comment.strip()
    if len(comment) > MAX_COMMENT:
        raise AuthorizedKeysError(f"a comment has at most {MAX_COMMENT} characters, not {len(comment)}")
    for character in comment:
        if character in '"`\\' or not _is_plain(character):
            raise AuthorizedKeysError(f"a comment cannot hold the character {character!a}")
    return comment


def check_attribute(key: str, value: str) -> str:
    """The value of this attribute, if both can be written.

    Raises:
        AuthorizedKeysError: they cannot, or the value does not have the form of this known attribute.
    """
    if _KEY.fullmatch(key) is None:
        raise AuthorizedKeysError(f"{key[:80]!r} cannot be the name of an attribute")
    if _VALUE.fullmatch(value) is None or not all(map(_is_plain, value)):
        raise AuthorizedKeysError(f"{value[:80]!r} cannot be the value of {key}: no spaces, quotes or '#'")
    if key == "expires":
        parse_expires(value)
    elif key in _SHAPES and _SHAPES[key][0].fullmatch(value) is None:
        raise AuthorizedKeysError(f"{value[:80]!r} cannot be the value of {key}: it is {_SHAPES[key][1]}")
    return value


def parse_expires(text: str) -> float:
    """The time that an `expires` attribute tells, in seconds since the Unix epoch.

    Raises:
        AuthorizedKeysError: not a time in the form of RFC 3339, such as `2026-12-24T18:00:00Z`.
    """
    if _RFC3339.fullmatch(text) is not None:
        try:
            # Python's datetimes end at microseconds; what is cut off makes the line expire that much earlier.
            return dt.datetime.fromisoformat(re.sub(r"(\.\d{6})\d+", r"\1", text.upper())).timestamp()
        except (ValueError, OverflowError):
            pass
    raise AuthorizedKeysError(f"{text[:80]!r} is not a time such as 2026-12-24T18:00:00Z (RFC 3339)")


def format_expires(when: float) -> str:
    """The `expires` attribute for this time in seconds since the Unix epoch, in UTC and whole seconds (rounded down).

    Raises:
        AuthorizedKeysError: before the year 1 or after 9999.
    """
    try:
        moment = dt.datetime.fromtimestamp(int(when // 1), dt.UTC)
    except (ValueError, OverflowError, OSError):
        raise AuthorizedKeysError(f"{when} cannot be written as a date") from None
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ").rjust(20, "0")


def _split(text: str) -> tuple[str, ...]:
    # Not str.splitlines: a comment may hold characters that it takes for line ends.
    lines = text.split("\n")
    last = lines.pop()
    return (*(line + "\n" for line in lines), *((last,) if last else ()))


def _cut_end(line: str) -> tuple[str, str]:
    body = line.removesuffix("\n").removesuffix("\r")
    return body, line[len(body) :]


def _line_end(lines: list[str]) -> str:
    return "\r\n" if lines and lines[0].endswith("\r\n") else "\n"


def _is_plain(character: str) -> bool:
    # Cc: control, Cf: invisible and direction, Cs: lone surrogates, Zl and Zp: line and paragraph separators.
    return unicodedata.category(character) not in {"Cc", "Cf", "Cs", "Zl", "Zp"}


def _content(line: str, number: int) -> str:
    """The line without its end, and the first one without a byte order mark."""
    body = _cut_end(line)[0]
    return body.removeprefix("\N{BYTE ORDER MARK}") if number == 1 else body


def _parse_line(line: str, number: int, problems: list[Problem]) -> Entry | None:
    content = _content(line, number)
    code_part, _, comment = content.partition("#")
    if not code_part.strip(_SPACES):
        return None  # blank, or for people only: whatever it holds decides nothing
    problem = _line_problem(content, code_part)
    words = _TOKEN.findall(code_part)
    attributes: dict[str, str] = {}
    expires: float | None = None
    if problem is None:
        try:
            peer = PeerId.from_text(words[0])
        except PeerIdError as error:
            problem = ("bad-peer-id", str(error))
    for word in words[1:] if problem is None else ():
        key, equals, value = word.partition("=")
        if not equals or _KEY.fullmatch(key) is None:
            problem = ("bad-attribute", f"{word[:80]!r} is not an attribute (key=value); a comment begins with '#'")
        elif key in attributes:
            problem = ("duplicate-attribute", f"the attribute {key} stands twice")
        elif key == "expires":
            try:
                expires = parse_expires(value)
            except AuthorizedKeysError as error:
                problem = ("bad-expires", str(error))
        if problem is not None:
            break
        attributes[key] = value
    if problem is not None:
        problems.append(Problem(number, *problem))
        return None
    for key, (shape, description) in _SHAPES.items():
        if key in attributes and shape.fullmatch(attributes[key]) is None:
            problems.append(Problem(number, "bad-value", f"the value of {key} is not {description}", fatal=False))
    shown = "".join([character if _is_plain(character) else "\N{REPLACEMENT CHARACTER}" for character in comment])
    return Entry(number, peer, tuple(attributes.items()), shown.strip(), expires)


def _line_problem(content: str, code_part: str) -> tuple[str, str] | None:
    if len(content.encode("utf-8", "surrogateescape")) > MAX_LINE:
        return "line-too-long", f"the line has more than {MAX_LINE} bytes"
    if any("\ud800" <= character <= "\udfff" for character in content):
        return "not-utf-8", "the line is not UTF-8"
    for character in code_part:
        if character not in _SPACES and not _is_plain(character):
            return "control-character", f"the line holds the character {character!a}"
    return None


def _peer_of(line: str) -> PeerId | None:
    """The peer that a line is about, however broken the rest of it is."""
    words = _TOKEN.findall(_cut_end(line)[0].removeprefix("\N{BYTE ORDER MARK}").partition("#")[0])
    try:
        return PeerId.from_text(words[0]) if words else None
    except PeerIdError:
        return None


def _with_attribute(line: str, key: str, value: str | None) -> str:
    body, end = _cut_end(line)
    code_part, hash_sign, comment = body.partition("#")
    tokens = list(_TOKEN.finditer(code_part))
    for token in tokens[1:]:
        if token.group().partition("=")[0] != key:
            continue
        start, stop = token.span()
        if value is None:
            start -= len(code_part[:start]) - len(code_part[:start].rstrip(_SPACES))  # the gap before it goes too
            return code_part[:start] + code_part[stop:] + hash_sign + comment + end
        return f"{code_part[:start]}{key}={value}{code_part[stop:]}{hash_sign}{comment}{end}"
    if value is None:
        return line
    stop = tokens[-1].end()
    return f"{code_part[:stop]} {key}={value}{code_part[stop:]}{hash_sign}{comment}{end}"
