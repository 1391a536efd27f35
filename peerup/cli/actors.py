"""`peerup actors`, `log` and `deadletters`: the parts of the running node."""

from __future__ import annotations

import sys
import textwrap
import time
from typing import Any

import click

from peerup.cli.framework import DURATION, DefaultGroup, Failure, Session, command, examples
from peerup.cli.output import Column, good, span, styled, table, width

TREE_COLUMNS = (
    Column("NAME", fold=True),
    Column("PID", right=True),
    Column("STATE"),
    Column("UP", right=True),
    Column("RST", right=True),
    Column("MBOX", right=True),
    Column("HANDLED", right=True),
)
FAILURE_COLUMN = Column("LAST FAILURE", fold=True)
ROOMY = 120
"""Columns from which on the last failure has a column of its own; below, the names need the room, and it is told
under the table."""

BUSY = 1.0
"""Seconds from which on what an actor is busy with is told."""

_STATE_STYLES = {"running": "green", "starting": "yellow", "stopping": "yellow", "backing-off": "red", "failed": "red"}


@click.group(
    "actors",
    cls=DefaultGroup,
    default="list",
    invoke_without_command=True,
    epilog=examples(
        "peerup actors                 the tree: state, restarts, mailboxes",
        "peerup actors --watch         again every second",
        "peerup actors get gate        what the gate says of itself",
    ),
)
def actors() -> None:
    """Show the tree of actors, or one of them."""


@command("list", json_output=True)
@click.option("--watch", is_flag=True, help="Show it again every second until Ctrl-C.")
@click.option("--interval", type=DURATION, default="1s", show_default=True, help="How often --watch looks.")
def list_actors(session: Session, *, watch: bool, interval: float) -> None:
    """Show the tree: restarts count in the supervisor's window, mailbox is what waits."""
    tree = session.client.get("/v1/actors")
    if not watch:
        session.show(tree, lambda: print_tree(tree))
        return
    while True:
        if session.as_json:
            session.show_line(tree, "")
        else:
            if sys.stdout.isatty():
                click.clear()
            print_tree(tree)
        sys.stdout.flush()
        time.sleep(max(0.1, interval))
        tree = _look_again(session, tree)


def _look_again(session: Session, before: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tree now; while the API is being restarted, what was seen before. A node that has ended ends the watch."""
    from peerup.client import LostConnectionError

    try:
        tree: list[dict[str, Any]] = session.client.get("/v1/actors")
    except LostConnectionError:
        return before
    return tree


def print_tree(tree: list[dict[str, Any]]) -> None:
    """Print the tree, children indented below their supervisor."""
    depth: dict[str, int] = {}
    rows: list[tuple[Any, ...]] = []
    failures = {actor["name"]: actor["last_failure"] for actor in tree if actor["last_failure"]}
    beside = width() >= ROOMY
    for actor in tree:
        depth[actor["name"]] = depth.get(actor["supervisor"], -1) + 1
        rows.append(
            (
                "  " * depth[actor["name"]] + actor["name"],
                actor["pid"] or "-",
                styled(actor["state"], _STATE_STYLES.get(actor["state"], "")),
                span(actor["uptime"]) if actor["state"] == "running" else "-",
                actor["restarts"],
                actor["mailbox"],
                actor["handled"],
                *([actor["last_failure"]] if beside else []),
            )
        )
    table((*TREE_COLUMNS, FAILURE_COLUMN) if beside else TREE_COLUMNS, rows)
    busy = {actor["name"]: actor["work"] for actor in tree if (actor.get("work") or {}).get("age", 0) >= BUSY}
    if busy:
        click.echo("\nbusy:")
    for name, work in busy.items():
        waits = f", waiting for {work['waits_for']} for {span(work['waiting'])}" if work["waits_for"] else ""
        text = f"{name}: handling {work['kind']} for {span(work['age'])}{waits}"
        click.echo(textwrap.fill(text, width(), initial_indent="  ", subsequent_indent="    "))
    if failures and not beside:
        click.echo("\nlast failures:")
        for name, failure in failures.items():
            text = f"{name}: {failure}"
            click.echo(textwrap.fill(text, width(), initial_indent="  ", subsequent_indent="    "))


@command(
    "get",
    json_output=True,
    epilog=examples(
        "peerup actors get switchboard",
        "peerup actors get proxy/home/ssh --json",
    ),
)
@click.argument("name")
def get(session: Session, name: str) -> None:
    """Show what an actor says of its own state."""
    from peerup.client import segment

    data = session.client.get(f"/v1/actors/{segment(name)}")
    session.show(data, lambda: _print_description(data))


def _print_description(data: dict[str, Any]) -> None:
    status = data["status"]
    click.echo(f"{status['name']}: {status['state']}, pid {status['pid']}, up {span(status['uptime'])}")
    if status["last_failure"]:
        click.echo(f"last failure: {status['last_failure']}")
    for line in outline(data["description"], ""):
        click.echo(line)


def outline(value: Any, indent: str) -> list[str]:
    """Nested data as indented lines."""
    if isinstance(value, dict):
        lines = []
        for key, item in value.items():
            if isinstance(item, dict | list) and item:
                lines.append(f"{indent}{key}:")
                lines.extend(outline(item, indent + "  "))
            else:
                lines.append(f"{indent}{key}: {_leaf(item)}")
        return lines
    if isinstance(value, list):
        lines = []
        for item in value:
            inner = outline(item, indent + "  ")
            inner[0] = f"{indent}- {inner[0].lstrip()}"
            lines.extend(inner)
        return lines
    return [f"{indent}{_leaf(value)}"]


def _leaf(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if value in ({}, []):
        return "none"
    return str(value)


@command(
    "log",
    json_output=True,
    short_help="Change the log level of actors while they run.",
    epilog=examples(
        "peerup log switchboard debug --for 5m",
        "peerup log 'proxy/*' trace --for 30s",
    ),
)
@click.argument("name")
@click.argument("level", type=click.Choice(["trace", "debug", "info", "warning", "error", "critical"]))
@click.option("--for", "seconds", type=DURATION, help="How long, such as 5m (default: while the actor lives).")
def log(session: Session, name: str, level: str, seconds: float | None) -> None:
    """Change the log level of an actor, or of all that a pattern names."""
    from peerup.client import segment

    body = {"level": level} | ({"seconds": seconds} if seconds is not None else {})
    data = session.client.post(f"/v1/actors/{segment(name)}/log", body)
    until = f" for {span(seconds)}" if seconds is not None else ""
    session.show(data, lambda: good(f"{', '.join(data['changed'])}: {level}{until}"))
    if data["unchanged"]:
        name, reason = next(iter(data["unchanged"].items()))
        raise Failure(f"{name}: {reason}", as_json=session.as_json)


@command("deadletters", json_output=True)
def deadletters(session: Session) -> None:
    """Show the last messages that reached nobody, and why."""
    data = session.client.get("/v1/deadletters")
    session.show(data, lambda: _print_letters(data))


def _print_letters(data: dict[str, Any]) -> None:
    columns = (Column("ID", fold=True), Column("FROM", fold=True), Column("TO", fold=True), Column("KIND", fold=True))
    rows = [
        (entry["id"], entry["sender"], entry["target"], entry["kind"], letter["reason"])
        for letter in data["letters"]
        for entry in (letter["entry"],)
    ]
    table((*columns, Column("REASON", fold=True)), rows, empty="no message was lost")
    if data["dropped"]:
        click.echo(f"{data['dropped']} older ones are no longer kept")
    for name, refused in data["refused"].items():
        for reason, count in refused.items():
            click.echo(f"{name} refused {count} before they were read: {reason}")
    for name, reason in data["silent"].items():
        click.echo(f"{name} did not answer: {reason}", err=True)


actors.add_command(list_actors)
actors.add_command(get)
