"""`peerup tap` and `peerup why`: messages as they pass, and the reason of each."""

from __future__ import annotations

import contextlib
from typing import Any

import click

from peerup.cli.framework import DURATION, Session, command, examples
from peerup.cli.output import size


@command(
    "tap",
    json_output=True,
    epilog=examples(
        "peerup tap --for 30s",
        "peerup tap --to switchboard --kind 'switchboard.*' --limit 5",
        "peerup tap --from gate --json",
    ),
)
@click.option("--from", "sender", metavar="ACTOR", help="Only messages of this actor ('*' matches any part).")
@click.option("--to", "target", metavar="ACTOR", help="Only messages to this actor.")
@click.option("--kind", metavar="KIND", help="Only this kind, such as 'switchboard.*'.")
@click.option("--limit", type=click.IntRange(min=1), help="End after so many messages.")
@click.option("--for", "seconds", type=DURATION, default="10s", show_default=True, help="End after this time.")
@click.option(
    "--rate", type=click.FloatRange(min=0.1), default=200.0, show_default=True, help="At most so many a second."
)
@click.option("--all", "show_all", is_flag=True, help="Show heartbeats and readings of the tree, too.")
def tap(
    session: Session,
    sender: str | None,
    target: str | None,
    kind: str | None,
    limit: int | None,
    seconds: float,
    rate: float,
    *,
    show_all: bool,
) -> None:
    """Watch messages between actors as they pass.

    Each line: message id, from, to, kind, size of the body. With --json the full envelope. Messages above the rate
    are counted, not shown. Copies never slow down the actors.
    """
    query = {"from": sender, "to": target, "kind": kind, "limit": limit, "seconds": seconds, "rate": rate}
    if show_all:
        query["all"] = "true"
    with contextlib.closing(session.client.lines("/v1/tap", **query)) as lines:
        for line in lines:
            raise_for_error(line)
            session.show_line(line, describe(line))


def describe(line: dict[str, Any]) -> str:
    """One tapped message for people."""
    skipped = f"({line['skipped']} more were not shown)" if line["skipped"] else ""
    if "id" not in line:
        return skipped
    answer = f" answers {line['reply_to']}" if line["reply_to"] else ""
    text = f"{line['id']}  {line['sender']} -> {line['target']}  {line['kind']}  {size(line['size'])}{answer}"
    return f"{skipped}\n{text}" if skipped else text


def raise_for_error(line: dict[str, Any]) -> None:
    """Raise what a stream's last line says, if it is a failure."""
    error = line.get("error")
    if error is not None and "seq" not in line:
        from peerup.client import RefusedByNodeError

        raise RefusedByNodeError(error["code"], error["reason"], error["action"], 0)


@command(
    "why",
    json_output=True,
    short_help="Show what led to a message.",
    epilog=examples(
        "peerup tap --limit 1          prints an id such as switchboard:1:57",
        "peerup why switchboard:1:57",
    ),
)
@click.argument("message_id")
def why(session: Session, message_id: str) -> None:
    """Show the chain of causes of a message, back to where it began."""
    from peerup.client import segment

    data = session.client.get(f"/v1/why/{segment(message_id)}")
    session.show(data, lambda: _print_chain(data))


def _print_chain(data: dict[str, Any]) -> None:
    for depth, entry in enumerate(data["chain"]):
        because = "because of " if depth else ""
        click.echo(f"{'  ' * depth}{because}{entry['id']}  {entry['sender']} -> {entry['target']}  {entry['kind']}")
    depth = len(data["chain"])
    if data["forgotten"]:
        click.echo(f"{'  ' * depth}because of {data['forgotten']}, which nobody remembers any more")
    else:
        click.echo(f"{'  ' * depth}where it began")
