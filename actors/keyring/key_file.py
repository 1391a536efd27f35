"""The file `identity.key`: the node's identity in libp2p's protobuf form for private keys, as go-libp2p writes it.

Whoever can read this file can be this node, so it is refused unless only its owner can: no group or other
permissions, owned by the user that runs the node, not a symbolic link (whose target somebody else may choose), in a
directory where nobody else can replace it. No error and no log ever holds a byte of it.
"""

from __future__ import annotations

import errno
import os
import secrets
import shlex
import stat
from pathlib import Path

from actors.files import FileError, FileExistsAlreadyError, FileMissingError, PermissionsError, create_exclusive
from protocol.errors import PeerupError
from protocol.keys import MAX_PRIVATE_KEY, KeyFormatError, KeyType, PrivateKey


class KeyFileError(PeerupError):
    """A file exists but is not an identity key that can be used. It is never overwritten."""

    code = "bad-key-file"


def create_key(path: Path) -> PrivateKey:
    """Make a new Ed25519 identity and its file, mode 0600, wholly or not at all.

    Raises:
        FileExistsAlreadyError: there is a file; an identity is never overwritten.
        FileError: it cannot be written.
    """
    key = PrivateKey.from_seed(secrets.token_bytes(32))
    create_exclusive(path, key.to_protobuf(), mode=0o600)
    return key


def load_key(path: Path) -> PrivateKey:
    """The identity in this file.

    Raises:
        FileMissingError: there is no such file.
        PermissionsError: others may read or replace it; the message has the command that repairs it.
        KeyFileError: it does not hold an Ed25519 private key.
        FileError: it cannot be read.
    """
    content = _read_private(path)
    if not content:
        raise KeyFileError(f"{path} is empty. {_RESTORE}")
    try:
        key = PrivateKey.from_protobuf(content)
    except KeyFormatError as error:
        raise KeyFileError(f"{path} ({len(content)} bytes) is not an identity key: {error}. {_RESTORE}") from None
    if key.key_type is not KeyType.ED25519:
        raise KeyFileError(
            f"{path} holds a key of the kind {key.key_type.name}; peerup's identities are Ed25519. "
            "Move the file away and run: peerup init"
        )
    return key


def load_or_create_key(path: Path) -> PrivateKey:
    """The identity in this file, made now if there is none.

    Raises:
        FileError, KeyFileError: as :func:`load_key` and :func:`create_key`.
    """
    try:
        return load_key(path)
    except FileMissingError:
        try:
            return create_key(path)
        except FileExistsAlreadyError:  # another process was faster
            return load_key(path)


_RESTORE = (
    "Restore it from a backup; or, to become a new node that must be authorised anew, move it away and run: peerup init"
)


def _read_private(path: Path) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise FileMissingError(
                f"the directory {path.parent} for the identity key does not exist; run: peerup init"
            ) from None
        raise FileMissingError(f"there is no identity key at {path}; make one with: peerup init") from None
    except PermissionError:
        raise PermissionsError(
            f"the identity key {path} may not be read; see: ls -l {shlex.quote(str(path))}"
        ) from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            quoted = shlex.quote(str(path))
            raise PermissionsError(
                f"the identity key {path} is a symbolic link; put the key itself there: "
                f'cp --preserve=mode --remove-destination "$(readlink -f {quoted})" {quoted}'
            ) from None
        raise FileError(f"cannot read the identity key {path}: {error.strerror}") from None
    try:
        _check_status(path, os.fstat(descriptor))
        # One byte more than the longest key tells a longer file from it.
        return os.read(descriptor, MAX_PRIVATE_KEY + 1)
    except OSError as error:
        raise FileError(f"cannot read the identity key {path}: {error.strerror}") from None
    finally:
        os.close(descriptor)


def _check_status(path: Path, status: os.stat_result) -> None:
    """Checks the open file, not its name, which may mean another file by now."""
    if not stat.S_ISREG(status.st_mode):
        raise KeyFileError(f"{path} is not a file; the identity key must be one")
    us = os.geteuid()
    if status.st_uid != us:
        raise PermissionsError(
            f"the identity key {path} belongs to user {status.st_uid}, but the node runs as user {us}; "
            f"run it as that user, or repair it: chown {us} {shlex.quote(str(path))}"
        )
    if status.st_mode & 0o077:
        raise PermissionsError(
            f"others may read the identity key {path} (mode {stat.S_IMODE(status.st_mode):04o}); "
            f"repair it: chmod 600 {shlex.quote(str(path))}"
        )
    directory = path.parent.stat()
    if directory.st_mode & 0o022 and not directory.st_mode & stat.S_ISVTX:
        raise PermissionsError(
            f"others may replace the identity key, because they may write to {path.parent}; "
            f"repair it: chmod go-w {shlex.quote(str(path.parent))}"
        )
