"""`peerup auth`: who may connect."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from peerup.cli.files import (
    NOT_RUNNING,
    authorized_keys_path,
    find_listed_peer,
    find_peer_id,
    in_force,
    node_keys,
    not_this_node,
    note_in_force,
    report,
    same_file,
    tell_authorized,
    tell_unauthorized,
)
from peerup.cli.framework import DURATION, Failure, Session, command, examples
from peerup.cli.output import Column, good, table

if TYPE_CHECKING:
    from protocol.authorized_keys import Entry

FILE = click.option("--file", "path", type=click.Path(path_type=Path), help="Another authorized_keys file.")


@click.group(
    "auth",
    epilog=examples(
        "peerup auth add 12D3KooW... --comment laptop",
        "peerup auth add 12D3KooW... --comment guest --expires 7d",
        "peerup auth list",
        "peerup auth remove 12D3KooW...",
    ),
)
def auth() -> None:
    """Say which peers may connect. A running node takes changes over at once."""


def expiry(text: str | None) -> str | None:
    """The moment that `7d` from now or an ISO date means, as RFC 3339."""
    if text is None:
        return None
    try:
        moment = dt.datetime.fromisoformat(text)
    except ValueError:
        try:
            seconds = DURATION.convert(text, None, None)
        except click.BadParameter:
            reason = f"{text!r} is neither a date such as 2030-12-31T18:00 nor a span of time such as 7d"
            raise click.BadParameter(reason, param_hint="--expires") from None
        moment = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=seconds)
    return moment.astimezone(dt.UTC).replace(microsecond=0).isoformat().replace("+00:00", "Z")


@command("add", json_output=True)
@click.argument("peer_id")
@click.option("--comment", default="", help="Whose device this is.")
@click.option("--expires", metavar="WHEN", help="Until when: 7d from now, or a date such as 2030-12-31T18:00.")
@FILE
def add(session: Session, peer_id: str, comment: str, expires: str | None, path: Path | None) -> None:
    """Let the peer with this id connect."""
    from actors.gate.authorized_keys_file import add_peer

    until = expiry(expires)
    attributes = {} if until is None else {"expires": until}
    file = authorized_keys_path(session, path)
    foreign = _is_foreign(session, path)
    peer = find_peer_id(peer_id)
    entry = add_peer(file, peer if foreign else not_this_node(session, peer), comment, attributes)
    if foreign:
        _report_foreign(session, f"{entry.peer} is now in {file}", present(entry))
        return
    report(session, f"{entry.peer} may connect", present(entry), tell_authorized(session, file, entry.peer))


@command("remove", json_output=True)
@click.argument("peer")
@FILE
def remove(session: Session, peer: str, path: Path | None) -> None:
    """Let a peer connect no longer, and cut its connections.

    PEER is a peer id, else a name (`peerup names`), else the comment of a line. What could mean several is refused.
    A peer that is also a relay of this node goes on relaying: the node connects to it, and refuses what it asks for
    itself. `peerup relay remove` ends that.
    """
    from actors.gate.authorized_keys_file import remove_peer

    file = authorized_keys_path(session, path)
    found = find_listed_peer(session, file, peer)
    remove_peer(file, found)
    data = {"peer_id": str(found), "removed": True}
    if _is_foreign(session, path):
        _report_foreign(session, f"{found} is no longer in {file}", data)
        return
    report(session, f"{found} may connect no longer", data, tell_unauthorized(session, file, found))


@command("list", json_output=True)
@FILE
def list_peers(session: Session, path: Path | None) -> None:
    """Show who may connect."""
    from actors.gate.authorized_keys_file import load_authorized_keys

    file = authorized_keys_path(session, path)
    keys = load_authorized_keys(file)
    told = None if _is_foreign(session, path) else node_keys(session)
    data = [present(entry) | {"in_force": in_force(file, told, entry)} for entry in keys.entries]
    columns = (
        Column("LINE", right=True),
        Column("PEER ID", fold=True),
        Column("EXPIRES"),
        Column("COMMENT", fold=True),
    )
    rows = [(item["line"], item["peer_id"], when(item), item["comment"]) for item in data]
    session.show(data, lambda: table(columns, rows, empty="nobody may connect; see `peerup auth add --help`"))
    note_in_force(file, keys, told)


@command("validate", json_output=True)
@click.argument("path", metavar="[FILE]", type=click.Path(path_type=Path), required=False)
def validate(session: Session, path: Path | None) -> None:
    """Check an authorized_keys file line by line. Exit status 1 if the node would refuse it."""
    from actors.gate.authorized_keys_file import load_authorized_keys

    file = authorized_keys_path(session, path)
    keys = load_authorized_keys(file)
    problems = [
        {"line": problem.line, "code": problem.code, "reason": problem.reason, "fatal": problem.fatal}
        for problem in keys.problems
    ]
    fatal = sum(1 for problem in keys.problems if problem.fatal)
    data = {"file": str(file), "valid": not fatal, "peers": len(keys.entries), "problems": problems}

    def human() -> None:
        for problem in problems:
            click.echo(f"line {problem['line']}: {problem['reason']}{'' if problem['fatal'] else ' (harmless)'}")
        if not fatal:
            good(f"{file}: {len(keys.entries)} peers, valid")

    session.show(data, human)
    if fatal:
        raise Failure(
            f"{file} has {fatal} broken line{'s' if fatal > 1 else ''}",
            "repair or remove them; until then a running node takes over only what the file takes away",
            code="bad-authorized-keys",
            as_json=session.as_json,
        )


def _is_foreign(session: Session, given: Path | None) -> bool:
    """Whether the file that was given is neither the one of the running node nor that of the configuration."""
    if given is None:
        return False
    told = node_keys(session)
    return not (
        same_file(given, authorized_keys_path(session)) or (told is not None and same_file(told["file"], given))
    )


def _report_foreign(session: Session, text: str, data: dict[str, Any]) -> None:
    def human() -> None:
        good(text)
        click.echo("the node in this home does not go by that file")

    session.show(data | {"node": NOT_RUNNING.data}, human)


def present(entry: Entry) -> dict[str, Any]:
    """A line of authorized_keys as JSON."""
    return {
        "line": entry.line,
        "peer_id": str(entry.peer),
        "comment": entry.comment,
        "expires": entry.expires,
        "verified": entry.verified,
        "attributes": dict(entry.attributes),
    }


def when(item: dict[str, Any]) -> str:
    """Until when the peer of this line may connect, for people."""
    if item["expires"] is None:
        return "never"
    try:
        moment = dt.datetime.fromtimestamp(item["expires"], dt.UTC)
    except (OverflowError, ValueError, OSError):
        return str(item["attributes"].get("expires"))
    passed = " (passed)" if moment < dt.datetime.now(dt.UTC) else ""
    return f"{moment:%Y-%m-%d %H:%M}Z{passed}"


for _command in (add, list_peers, remove, validate):
    auth.add_command(_command)
