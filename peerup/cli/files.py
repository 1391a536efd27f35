"""What commands that edit the node's files share: finding the files, and telling a running node."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from peerup.cli.framework import Session
from peerup.cli.output import good, note
from protocol.errors import InvalidValueError

if TYPE_CHECKING:
    from actors.config.schema import NodeConfig
    from protocol.authorized_keys import AuthorizedKeys, Entry
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


def find_other_peer(session: Session, text: str) -> PeerId:
    """The peer that a peer id or a name of the configuration means, which must not be this node.

    Raises:
        InvalidValueError: it is neither, or this node itself.
    """
    return not_this_node(session, find_peer(session, text))


def not_this_node(session: Session, peer: PeerId) -> PeerId:
    """This peer, which must not be this node.

    Raises:
        InvalidValueError: it is.
    """
    if peer == own_peer(session):
        raise OwnPeerError(f"{peer} is this node itself, which nobody connects to from here; name another device")
    return peer


class OwnPeerError(InvalidValueError):
    """A peer was to be named, and this node was."""

    action = "`peerup whoami` on the other device prints its id"


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


@dataclasses.dataclass(frozen=True)
class Told:
    """What the running node says of a change of one of its files.

    Attributes:
        running: whether there is a running node.
        reloaded: whether the change is in force in it.
        problems: why not.
        notes: what else is to be known of the file.
    """

    running: bool
    reloaded: bool
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def data(self) -> dict[str, Any]:
        """For programs."""
        told = {"running": self.running, "reloaded": self.reloaded, "problems": list(self.problems)}
        return told | ({"notes": list(self.notes)} if self.notes else {})


NOT_RUNNING = Told(running=False, reloaded=False)


def tell_config(session: Session, *children: str) -> Told:
    """Have the running node take over its configuration as it is now, and start these actors because of it."""
    answer = _ask_to_reload(session, CONFIG, session.home.config_file)
    if isinstance(answer, Told):
        return answer
    problems = [*answer["problems"], *answer.get("not_in_force", [])]
    failed = answer.get("failed", {})
    problems += [f"{child}: {failed[child]}" for child in children if child in failed]
    return Told(running=True, reloaded=not problems, problems=tuple(problems))


def tell_authorized(session: Session, path: Path, peer: PeerId) -> Told:
    """Have the running node take over authorized_keys; in force is that this peer may connect by a line of its own."""
    answer = _ask_to_reload(session, AUTHORIZED_KEYS, path, peer=str(peer))
    if isinstance(answer, Told):
        return answer
    wrong = _lines(answer)
    rule = str(answer.get("rule", ""))
    problems = list(answer.get("not_in_force", []))
    if not rule.startswith("authorized_keys:"):
        if rule.startswith("expired:"):
            problems.append("the time until when it may connect has passed")
        elif wrong:
            problems.append("what the file adds waits until it is repaired")
            problems += wrong
        else:
            problems.append(f"the node does not list it ({rule or 'no rule'})")
        wrong = []
    return Told(running=True, reloaded=not problems, problems=tuple(problems), notes=tuple(wrong))


def tell_unauthorized(session: Session, path: Path, peer: PeerId) -> Told:
    """Have the running node take over authorized_keys; in force is that this peer may not connect any more."""
    answer = _ask_to_reload(session, AUTHORIZED_KEYS, path, peer=str(peer))
    if answer is NOT_RUNNING:
        return dataclasses.replace(NOT_RUNNING, notes=(_still_relay(peer),) if _is_relay(session, peer) else ())
    if isinstance(answer, Told):
        return answer
    problems = list(answer.get("not_in_force", []))
    notes = [*_lines(answer), *([_still_relay(peer)] if answer.get("relay") else [])]
    if answer.get("rule") == "gating-off":
        problems.append("every peer may connect as a guest: security.enable_connection_gating is false")
    elif answer.get("allowed", True):
        problems.append(f"the node still lets it connect ({answer.get('rule') or 'it does not say by which rule'})")
    return Told(running=True, reloaded=not problems, problems=tuple(problems), notes=tuple(notes))


def _is_relay(session: Session, peer: PeerId) -> bool:
    """Whether the configuration has this peer as a relay."""
    if not session.home.config_file.exists():
        return False
    return any(address.peer_id == peer for address in read_config(session).relay.addresses)


def _still_relay(peer: PeerId) -> str:
    return (
        f"{peer} is also a relay of this node, which goes on connecting to it for that; what it asks for itself is "
        f"refused. To use it as a relay no longer: peerup relay remove {peer}"
    )


def _ask_to_reload(session: Session, route: str, path: Path, **body: str) -> dict[str, Any] | Told:
    """The node's answer, if it is about this file as it is now; else why it is not."""
    from peerup.client import ClientError, NotRunningError

    for last in (False, True):
        try:
            answer: dict[str, Any] = session.client.post(route, body)
        except NotRunningError:
            return NOT_RUNNING
        except ClientError as error:
            return Told(running=True, reloaded=False, problems=(error.reason,))
        theirs = answer.get("file", "")
        if not theirs or not same_file(theirs, path):
            key = "security.authorized_keys_file" if route == AUTHORIZED_KEYS else "its directories"
            why = f"the node goes by {theirs or 'another file'} and not by {path}; if {key} changed, restart it"
            return Told(running=True, reloaded=False, problems=(why,))
        # Where somebody else changes the file at the same time, the node may have read the state before or after that.
        if answer.get("digest") in (_digest(path, as_text=route == CONFIG), ""):
            return answer
        if last:
            break
    return Told(
        running=True, reloaded=False, problems=(f"{path} is being changed by somebody else as well; try again",)
    )


def same_file(one: str | Path, other: Path) -> bool:
    """Whether two paths lead to the same file, which may be missing."""
    with contextlib.suppress(OSError):
        return os.path.samefile(one, other)  # noqa: PTH121  # Path.samefile is no shorter here
    return os.path.realpath(one) == os.path.realpath(other)


def _digest(path: Path, *, as_text: bool) -> str | None:
    from actors.config.file import read_config_text
    from actors.files import digest_of
    from protocol.errors import PeerupError

    try:
        return digest_of(read_config_text(path).encode() if as_text else path.read_bytes())
    except (OSError, PeerupError):
        return None


def _lines(answer: dict[str, Any]) -> list[str]:
    """What is wrong with authorized_keys."""
    return [
        f"line {problem['line']}: {problem['reason']}" if problem["line"] else problem["reason"]
        for problem in answer["problems"]
    ]


def node_keys(session: Session) -> dict[str, Any] | None:
    """What the running node says of its authorized_keys file: `file`, `digest`, `waiting`, ...; None if none tells."""
    from peerup.client import ClientError

    try:
        told: dict[str, Any] = session.client.get("/v1/actors/gate")["description"]
    except ClientError:
        return None
    return told


def note_in_force(path: Path, keys: AuthorizedKeys, told: dict[str, Any] | None) -> None:
    """Tell a person what is wrong in authorized_keys, and what of it is not in force in the running node."""
    for problem in keys.problems:
        note(f"warning: line {problem.line}: {problem.reason}")
    if told is None:
        return
    if not same_file(told.get("file", ""), path):
        note(f"warning: the running node goes by {told.get('file')} until it is started again, and not by {path}")
    elif told.get("whole") is False:
        note("warning: the file is not whole: what it takes away counts, what it adds waits until it is repaired")
        waiting = set(told.get("waiting", []))
        for entry in keys.entries:
            if str(entry.peer) in waiting:
                note(f"warning: line {entry.line}: {entry.peer} is not in force")


def in_force(path: Path, told: dict[str, Any] | None, entry: Entry) -> bool | None:
    """Whether the running node lets a peer connect by its line; None where that is not known."""
    if told is None or "waiting" not in told:
        return None
    if not same_file(told.get("file", ""), path) or told.get("digest") != _digest(path, as_text=False):
        return None
    return str(entry.peer) not in told["waiting"] and (entry.expires is None or time.time() < entry.expires)


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


def report(session: Session, text: str, data: dict[str, Any], told: Told, *, what: str = "node") -> None:
    """Say what was changed, if the running node (or `what` else it is) has it or none runs; else what is not in force.

    Raises:
        Exit: the change is in the file and not in force; with status 1.
    """

    def human() -> None:
        if told.running and not told.reloaded:
            return
        good(text)
        if told.running:
            click.echo(f"the running {what} has taken it over")
        else:
            click.echo(f"the {what} is not running; this counts from its next start on")

    session.show(data | {"node": told.data}, human)
    for line in told.notes:
        note(f"warning: {line}")
    if told.running and not told.reloaded:
        note(
            f"warning: the file is changed, but that is not in force in the running {what}: {'; '.join(told.problems)}"
        )
        raise click.exceptions.Exit(1)
