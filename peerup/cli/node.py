"""`peerup status` and `peerup stop`: the node as a whole."""

from __future__ import annotations

import time
from typing import Any

import click

from peerup.cli.framework import Failure, Session, command
from peerup.cli.output import good, process_of, span
from protocol.errors import PeerupError

STOP_SECONDS = 40.0
"""How long `stop` waits for the node to end: a little longer than the node itself gives its actors."""


@command("status", json_output=True, short_help="Show who this node is, and whether all of it runs.")
def status(session: Session) -> None:
    """Show who this node is, whom it is connected to, and whether all of it runs.

    Exit status 1 if something is not well: a part of the node does not run, a proxy does not accept connections, or no
    relay holds a reservation for this node though there are relays. 3 if the node does not run.
    """
    data = session.client.get("/v1/status")
    session.show(data, lambda: _print(data))
    if data["problems"] or data.get("actors_not_running"):
        raise click.exceptions.Exit(1)


def _print(data: dict[str, Any]) -> None:
    services = [service for service in data["services"] if service["enabled"]]
    lines = [
        ("peer id", data["peer_id"] or "unknown"),
        ("home", data["home"]),
        ("running", f"{span(data['uptime'])}, {process_of(data)}, version {data['version']}"),
        ("actors", f"{data.get('actors', '?')}, {data.get('restarts', '?')} restarts lately"),
        ("confined", _confinement(data)),
        ("peers", f"{data.get('connected_peers', '?')} connected"),
        *([("relays", f"{data['reservations_held']} reservations")] if "reservations_held" in data else []),
        *(("listening", address) for address in data.get("listen_addresses", [])),
        *(("service", f"{service['name']} -> {service['address']}") for service in services),
        *(("proxy", f"{entry['listen']} -> {_goal(entry)}") for entry in data.get("proxies", []) if entry["listen"]),
    ]
    if data["allow_faults"]:
        lines.append(("faults", f"allowed, {data['faults']} in force"))
    lines.extend(("not running", name) for name in data.get("actors_not_running", []))
    lines.extend(("problem", problem) for problem in data["problems"])
    lines.extend(("warning", warning) for warning in data["warnings"])
    for title, text in lines:
        click.echo(f"{title:<12} {text}")


def _confinement(data: dict[str, Any]) -> str:
    told = data.get("confinement")
    if told is None:
        return "?"
    words = {"full": "yes, each actor to what it needs", "none": "no", "partial": "partly"}[told["state"]]
    return words if told["state"] == "full" else f"{words}; see: peerup doctor"


def _goal(proxy: dict[str, Any]) -> str:
    return f"{proxy.get('peer_name') or proxy['peer']}/{proxy['service']}"


@command("stop", json_output=True)
def stop(session: Session) -> None:
    """Stop the running node, and wait until it has ended."""
    answer = session.client.post("/v1/shutdown")
    pid = int(answer["pid"])
    session.wait_message("stopping...")
    began, seconds = time.monotonic(), STOP_SECONDS
    while _lives(pid):
        if time.monotonic() > began + seconds:
            if seconds == STOP_SECONDS:
                seconds += _time_to_drain(session)
            if time.monotonic() > began + seconds:
                raise Failure(f"process {pid} still runs after {seconds:g} seconds", "see the node's log")
        time.sleep(0.02)
    session.show({"stopped": True, "pid": pid}, lambda: good("stopped"))


def _time_to_drain(session: Session) -> float:
    """Seconds that the circuits of a relay get to end; 0 for a node that is none, and where that cannot be read."""
    from peerup.cli.files import read_config

    try:
        served = read_config(session).relay_service
    except PeerupError:
        return 0.0
    return served.drain_time if served.enabled else 0.0


def _lives(pid: int) -> bool:
    """Whether the process runs; one that has ended and waits to be collected by its parent does not."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:  # noqa: PTH123  # quick start
            return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False
