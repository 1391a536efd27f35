"""The file `authorized_keys`: reading it, and editing it under its lock, atomically, without touching other lines.

Who can write to this file decides who may connect, so a file that others may write to is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

from actors.files import (
    LOCK_SECONDS,
    BusyError,
    FileError,
    FileMissingError,
    check_not_writable_by_others,
    digest_of,
    locked,
    read_limited,
    write_atomic,
)
from protocol.authorized_keys import MAX_FILE, AuthorizedKeys, AuthorizedKeysError, Entry
from protocol.errors import PeerupError
from protocol.peer_id import PeerId

HEADER = (
    "# Peers that may connect to this node, one in a line: <peer id> [key=value]... [# comment]\n"
    "# Change it with `peerup auth add|remove|list`, or here; a running node notices at once.\n"
)


class AuthorizedKeysEditError(PeerupError):
    """An edit does not fit what the file says.

    Attributes:
        code: `already-exists` or `not-found`.
    """

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code  # type: ignore[misc]  # a class variable in general, this error carries two codes


def load_authorized_keys(path: Path) -> AuthorizedKeys:
    """The file's content; broken lines are in its `problems`.

    Raises:
        FileError: it is missing, cannot be read, or others may write to it.
    """
    try:
        content, status = read_limited(path, MAX_FILE)
    except FileMissingError as error:
        raise FileMissingError(
            f"there is no {path}, so nobody may connect; make one with: peerup auth add <peer id>"
        ) from error
    check_not_writable_by_others(path, status)
    return AuthorizedKeys.parse(content)


@dataclasses.dataclass(frozen=True)
class Reading:
    """What can be read of an authorized_keys file, however broken it is.

    Attributes:
        keys: its lines; none if it cannot be read at all.
        problem: why the file as a whole must not widen what is in force; empty if nothing is wrong but single lines.
        digest: the SHA-256 of its bytes in hexadecimal; empty if it cannot be read.
    """

    keys: AuthorizedKeys
    problem: str
    digest: str

    @property
    def whole(self) -> bool:
        """Whether all of it can be believed."""
        return not self.problem and not self.keys.fatal_problems


def inspect_authorized_keys(path: Path) -> Reading:
    """As much of this file as can be read.

    A file that others may write to is read as well: by taking lines away they can shut peers out, but let nobody in.

    Raises:
        BusyError: this machine is short of something; nothing is known of the file.
    """
    try:
        content, status = read_limited(path, MAX_FILE)
    except BusyError:
        raise
    except FileMissingError:
        return Reading(AuthorizedKeys.parse(b""), f"there is no {path}, so nobody may connect", "")
    except FileError as error:
        return Reading(AuthorizedKeys.parse(b""), str(error), "")
    problem = ""
    try:
        check_not_writable_by_others(path, status)
    except FileError as error:
        problem = str(error)
    return Reading(AuthorizedKeys.parse(content), problem, digest_of(content))


def add_peer(
    path: Path,
    peer: PeerId,
    comment: str = "",
    attributes: Mapping[str, str] | None = None,
    *,
    timeout: float = LOCK_SECONDS,
) -> Entry:
    """Let this peer connect. The file is made if there is none.

    Raises:
        AuthorizedKeysEditError: `already-exists`.
        AuthorizedKeysError: the comment or an attribute cannot be written.
        FileError: the file cannot be locked, read or written; it is as it was.
    """
    with _edited(path, timeout, create=True) as file:
        present = file.keys.find(peer)
        if present is not None:
            raise AuthorizedKeysEditError("already-exists", f"{peer} is already in {path}, line {present.line}")
        file.keys = file.keys.add(peer, comment, attributes)
        added = file.keys.find(peer)
        assert added is not None
        return added


def remove_peer(path: Path, peer: PeerId, *, timeout: float = LOCK_SECONDS) -> Entry | None:
    """Let this peer connect no longer; its line as it was, or None if that was broken.

    Raises:
        AuthorizedKeysEditError: `not-found`.
        FileError: the file cannot be locked, read or written; it is as it was.
    """
    with _edited(path, timeout) as file:
        entry = file.keys.find(peer)
        try:
            file.keys = file.keys.remove(peer)
        except AuthorizedKeysError as error:
            raise AuthorizedKeysEditError("not-found", f"{peer} is not in {path}") from error
        return entry


def set_peer_attribute(
    path: Path, peer: PeerId, key: str, value: str | None, *, timeout: float = LOCK_SECONDS
) -> Entry:
    """Set an attribute of a peer's line, or for None take it away; the line as it is then.

    Raises:
        AuthorizedKeysEditError: `not-found`.
        AuthorizedKeysError: the attribute cannot be written.
        FileError: the file cannot be locked, read or written; it is as it was.
    """
    with _edited(path, timeout) as file:
        _need(path, file.keys, peer)
        file.keys = file.keys.set_attribute(peer, key, value)
        return _need(path, file.keys, peer)


def set_peer_comment(path: Path, peer: PeerId, comment: str, *, timeout: float = LOCK_SECONDS) -> Entry:
    """Replace the comment of a peer's line; the line as it is then.

    Raises:
        AuthorizedKeysEditError: `not-found`.
        AuthorizedKeysError: the comment cannot be written.
        FileError: the file cannot be locked, read or written; it is as it was.
    """
    with _edited(path, timeout) as file:
        _need(path, file.keys, peer)
        file.keys = file.keys.set_comment(peer, comment)
        return _need(path, file.keys, peer)


class _Edited:
    def __init__(self, keys: AuthorizedKeys) -> None:
        self.keys = keys


@contextlib.contextmanager
def _edited(path: Path, timeout: float, *, create: bool = False) -> Iterator[_Edited]:
    """Hold the lock, hand out the content, and write back what became of it."""
    with locked(path, timeout=timeout):
        try:
            keys = load_authorized_keys(path)
            before: bytes | None = keys.to_bytes()
        except FileMissingError:
            if not create:
                raise
            keys, before = AuthorizedKeys.parse(HEADER.encode()), None
        file = _Edited(keys)
        yield file
        after = file.keys.to_bytes()
        if after != before:
            write_atomic(path, after)


def _need(path: Path, keys: AuthorizedKeys, peer: PeerId) -> Entry:
    entry = keys.find(peer)
    if entry is None:
        raise AuthorizedKeysEditError("not-found", f"{peer} is not in {path}")
    return entry
