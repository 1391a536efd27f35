"""`peerup ping`, `connect`, `disconnect` and `resolve`: other peers."""

from __future__ import annotations

import contextlib
from typing import Any

import click

from peerup.cli.framework import DURATION, EXIT_FAILURE, EXIT_INTERRUPTED, Session, command, examples
from peerup.cli.output import good
from peerup.cli.paths import way_words
from peerup.cli.trace import raise_for_error


@command(
    "ping",
    json_output=True,
    epilog=examples(
        "peerup ping home",
        "peerup ping home -c 1 --json",
    ),
)
@click.argument("peer")
@click.option(
    "-c", "-n", "--count", type=click.IntRange(min=0), default=4, show_default=True, help="0 goes on until Ctrl-C."
)
@click.option("--interval", type=DURATION, default="1s", show_default=True, help="Time between two pings.")
@click.option("--timeout", type=DURATION, default="20s", show_default=True, help="Longest wait for one answer.")
def ping(session: Session, peer: str, count: int, interval: float, timeout: float) -> None:
    """Measure the round trip to a peer, by its name or peer id.

    Connects first if need be. Exit status 1 if not one ping was answered. With --json one line per ping, then the
    statistics.
    """
    from peerup.client import segment

    session.wait_message(f"pinging {peer}...")
    query = {"count": count, "interval": interval, "timeout": timeout}
    answered: list[float] = []
    sent = 0
    statistics: dict[str, Any] | None = None
    try:
        with contextlib.closing(session.client.lines(f"/v1/peers/{segment(peer)}/ping", **query)) as lines:
            for line in lines:
                raise_for_error(line)
                statistics = line.get("stats")
                if statistics is None:
                    sent += 1
                    answered += [line["rtt_ms"]] if line["rtt_ms"] is not None else []
                session.show_line(line, _ping_statistics(statistics) if statistics else _ping_line(line))
    except KeyboardInterrupt:
        _show_own_statistics(session, sent, answered)
        raise click.exceptions.Exit(EXIT_INTERRUPTED if not answered else 0) from None
    if not answered:
        raise click.exceptions.Exit(EXIT_FAILURE)


def _show_own_statistics(session: Session, sent: int, answered: list[float]) -> None:
    """After Ctrl-C the node no longer sends them."""
    own: dict[str, Any] = {"sent": sent, "received": len(answered), "lost": sent - len(answered)}
    own["loss_pct"] = round(100 * own["lost"] / sent, 1) if sent else 0.0
    own["min_ms"] = min(answered, default=None)
    own["avg_ms"] = round(sum(answered) / len(answered), 3) if answered else None
    own["max_ms"] = max(answered, default=None)
    session.show_line({"stats": own}, _ping_statistics(own))


def _ping_line(line: dict[str, Any]) -> str:
    if line["rtt_ms"] is None:
        advice = f" (to do: {line['error']['action']})" if line["error"]["action"] else ""
        return f"seq={line['seq']} lost: {line['error']['reason']}{advice}"
    connected = f" (connected in {line['connected_in_ms']:.1f} ms)" if line["connected_in_ms"] is not None else ""
    way = way_words(line["path"], line["transport"], line["relay"], line["relay_name"])
    return f"seq={line['seq']} rtt={line['rtt_ms']:.2f} ms {way} {line['address']}{connected}"


def _ping_statistics(stats: dict[str, Any]) -> str:
    head = f"{stats['sent']} sent, {stats['received']} answered, {stats['loss_pct']:g} % lost"
    if not stats["received"]:
        return head
    return f"{head}; min/avg/max {stats['min_ms']:.2f}/{stats['avg_ms']:.2f}/{stats['max_ms']:.2f} ms"


@command("connect", json_output=True)
@click.argument("peer")
def connect(session: Session, peer: str) -> None:
    """Connect to a peer now, and say over which path."""
    from peerup.client import segment

    session.wait_message(f"connecting to {peer}...")
    data = session.client.post(f"/v1/peers/{segment(peer)}/connect")
    path = data["connection"]
    way = f"{way_words(path['path'], path['transport'], path['relay'], path['relay_name'])} {path['remote_address']}"
    text = f"connected to {peer}: {way} in {data['elapsed'] * 1000:.0f} ms"
    session.show(data, lambda: good(text))


@command("disconnect", json_output=True)
@click.argument("peer")
def disconnect(session: Session, peer: str) -> None:
    """Close all connections to a peer."""
    from peerup.client import segment

    data = session.client.post(f"/v1/peers/{segment(peer)}/disconnect")
    session.show(data, lambda: good(f"disconnected from {peer}"))


@command("resolve", json_output=True)
@click.argument("name")
def resolve(session: Session, name: str) -> None:
    """Show which peer a name means."""
    data = session.client.post("/v1/resolve", {"name": name})
    session.show(data, lambda: click.echo(data["peer_id"]))
