"""What commands that edit the node's files share: finding the files, and telling a running node."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from peerup.cli.framework import Session
from peerup.cli.output import good, note
from protocol.errors import InvalidValueError

if TYPE_CHECKING:
    from actors.config.schema import NodeConfig
    from protocol.peer_id import PeerId

CONFIG = "/v1/config/reload"
AUTHORIZED_KEYS = "/v1/auth/reload"


class NoPeerIdError(InvalidValueError):
    """A text is no peer id. `action` says where to get one."""

    action = "`peerup whoami` on the other device prints its id, such as 12D3KooW..."


def read_config(session: Session) -> NodeConfig:
    """The configuration of this home."""
    from actors.config.file import load_config

    return load_config(session.home.config_file)


def key_path(session: Session) -> Path:
    """The identity key: where the configuration says, else beside it."""
    return read_config(session).key_path if session.home.config_file.exists() else session.home.key_file


def own_peer(session: Session) -> PeerId | None:
    """Who this node is; None if its key cannot be read."""
    from actors.keyring.key_file import load_key
    from protocol.errors import PeerupError

    try:
        return load_key(key_path(session)).peer_id
    except PeerupError:
        return None


def authorized_keys_path(session: Session, given: Path | None = None) -> Path:
    """The authorized_keys file: as given, else where the configuration says, else beside it."""
    if given is not None:
        return given
    if session.home.config_file.exists():
        return read_config(session).authorized_keys_path
    return session.home.authorized_keys_file


def find_peer(session: Session, text: str) -> PeerId:
    """The peer that a peer id or a name of the configuration means.

    Raises:
        InvalidValueError: it is neither.
    """
    from protocol.peer_id import PeerId

    try:
        return PeerId.from_text(text)
    except InvalidValueError as error:
        if session.home.config_file.exists():
            for entry in read_config(session).names:
                if entry.name == text:
                    return entry.peer
        raise InvalidValueError(f"{text!r} is neither a peer id nor a name of this node") from error


def find_peer_id(text: str) -> PeerId:
    """The peer id in this text, for commands where a name would have no meaning yet.

    Raises:
        NoPeerIdError: it is none.
    """
    from protocol.peer_id import PeerId

    try:
        return PeerId.from_text(text)
    except InvalidValueError as error:
        raise NoPeerIdError(str(error)) from error


class AmbiguousPeerError(InvalidValueError):
    """A text could mean several peers. `action` lists them."""

    def __init__(self, reason: str, action: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.action = action


def find_listed_peer(session: Session, path: Path, text: str) -> PeerId:
    """The peer that is meant, of those in this authorized_keys file: by id, else by name, else by its line's comment.

    A text that is a peer id means that peer whatever names and comments say, and a name is asked for before comments.

    Raises:
        AmbiguousPeerError: several lines have this comment, or a name means a peer that is not in the file while
            another one's line has it as comment.
        InvalidValueError: no peer is meant.
    """
    from actors.gate.authorized_keys_file import load_authorized_keys
    from protocol.peer_id import PeerId

    with contextlib.suppress(InvalidValueError):
        return PeerId.from_text(text)
    entries = load_authorized_keys(path).entries
    commented = [entry for entry in entries if entry.comment == text]
    lines = "; ".join(f"{entry.peer} (line {entry.line})" for entry in commented)
    try:
        named = find_peer(session, text)
    except InvalidValueError as error:
        if not commented:
            raise InvalidValueError(
                f"{text!r} is neither a peer id, nor a name of this node, nor the comment of a line in {path}"
            ) from error
        if len(commented) > 1:
            raise AmbiguousPeerError(
                f"{len(commented)} lines of {path} have the comment {text!r}", f"say which by the peer id: {lines}"
            ) from error
        return commented[0].peer
    others = [entry for entry in commented if entry.peer != named]
    if others and all(entry.peer != named for entry in entries):
        raise AmbiguousPeerError(
            f"{text!r} is the name of {named}, which is not in {path}, and the comment of another peer there",
            f"say which by the peer id: {lines}",
        )
    for entry in others:
        note(f"note: {text!r} is also the comment of line {entry.line}, {entry.peer}; that peer is not meant")
    return named


def tell_node(session: Session, route: str) -> dict[str, Any]:
    """Have the running node read the file again.

    `running` says whether there is a node, `reloaded` whether the change is in force in it, `problems` why not.
    """
    from peerup.client import ClientError, NotRunningError

    try:
        answer = session.client.post(route)
    except NotRunningError:
        return {"running": False, "reloaded": False, "problems": []}
    except ClientError as error:
        return {"running": True, "reloaded": False, "problems": [error.reason]}
    problems = [
        f"line {problem['line']}: {problem['reason']}" if isinstance(problem, dict) else str(problem)
        for problem in answer["problems"]
    ]
    return {"running": True, "reloaded": not problems, "problems": problems}


def after_restart(session: Session) -> list[str] | None:
    """The keys of the configuration that the running node goes by as they were; None where no node tells.

    What they say now takes effect when the node is started again.
    """
    from peerup.client import ClientError

    try:
        told = session.client.get("/v1/actors/config")["description"].get("after_restart", [])
    except ClientError:
        return None
    return list(told)


def note_after_restart(keys: list[str] | None) -> None:
    """Tell a person of these keys."""
    for key in keys or []:
        note(f"{key}: changed since the node was started; takes effect when it is started again")


def report(session: Session, text: str, data: dict[str, Any], node: dict[str, Any], *, what: str = "node") -> None:
    """Say what was changed, and whether the running node (or `what` else it is) has it."""

    def human() -> None:
        good(text)
        if node["reloaded"]:
            click.echo(f"the running {what} has taken it over")
        elif not node["running"]:
            click.echo(f"the {what} is not running; this counts from its next start on")

    session.show(data | {"node": node}, human)
    if node["running"] and not node["reloaded"]:
        note(f"warning: the running {what} has not taken it over: {'; '.join(node['problems'])}")
        raise click.exceptions.Exit(1)
