"""`peerup fault`: break a part of the running node on purpose."""

from __future__ import annotations

from typing import Any

import click

from peerup.cli.framework import DURATION, Failure, Session, command, examples
from peerup.cli.output import Column, good, span, table


@click.group(
    "fault",
    short_help="Break a part of the running node on purpose.",
    epilog=examples(
        "peerup fault kill switchboard",
        "peerup fault hang gate",
        "peerup fault delay --to gate --kind 'gate.*' --delay 200ms --ttl 1m",
        "peerup fault drop --from proxy/home/ssh --to switchboard --nth 3",
        "peerup fault clear",
    ),
)
def fault() -> None:
    """Break a part of the running node on purpose, to see it recover.

    Only a node that was started with `peerup daemon --allow-faults` takes faults.
    """


def _process_fault(word: str, text: str) -> None:
    def run(session: Session, name: str) -> None:
        from peerup.client import segment

        data = session.client.post(f"/v1/actors/{segment(name)}/fault", {"fault": word})
        session.show(data, lambda: good(f"{word}: {name} (pid {data['pid']})"))

    run.__doc__ = text
    fault.add_command(command(word, json_output=True)(click.argument("name")(run)))


_process_fault("kill", "End an actor's process with SIGKILL.")
_process_fault("stop", "Stop an actor's process with SIGSTOP; its heartbeat must find it.")
_process_fault("hang", "Keep an actor from turning its event loop; its heartbeat must find it.")


def _message_fault(word: str, text: str) -> None:
    def run(session: Session, sender: str | None, target: str | None, **values: Any) -> None:
        if values.get("nth") is not None and values.get("probability") is not None:
            raise click.UsageError("--nth hits exactly one message; leave --probability out")
        if values.get("seed") is not None and values.get("probability") is None:
            raise click.UsageError("--seed draws by a --probability; give that, too")
        body = {"action": word, "from": sender, "to": target, **values}
        data = session.client.post("/v1/faults", {key: value for key, value in body.items() if value is not None})
        session.show(data, lambda: good(f"{data['id']}: {_describe(data)}, for {span(data['seconds_left'])}"))

    run.__doc__ = text
    options = [
        click.option("--from", "sender", metavar="ACTOR", help="Messages of this actor ('*' matches any part)."),
        click.option("--to", "target", metavar="ACTOR", help="Messages to this actor."),
        click.option("--kind", metavar="KIND", help="Messages of this kind, such as 'gate.*'."),
        click.option("--probability", type=click.FloatRange(0, 1), help="Hit each with this probability (default 1)."),
        click.option("--nth", type=click.IntRange(min=1), help="Hit only the nth, counted in each actor."),
        click.option("--seed", type=click.IntRange(min=0), help="Seed of the probability, to have it again."),
        click.option("--ttl", "seconds", type=DURATION, help="How long (default 30s)."),
    ]
    if word == "delay":
        options.append(click.option("--delay", type=DURATION, help="By how much (default 100ms)."))
    function: Any = run
    for option in reversed(options):
        function = option(function)
    fault.add_command(command(word, json_output=True)(function))


_message_fault("drop", "Lose messages.")
_message_fault("delay", "Deliver messages later.")
_message_fault("duplicate", "Deliver messages twice.")
_message_fault("reorder", "Let messages swap places with the next that matches.")
_message_fault("corrupt", "Flip one bit of the body of messages.")
_message_fault("crash", "Let the receiver end itself by SIGKILL on receipt.")


def _describe(data: dict[str, Any]) -> str:
    edge = f"{data['from'] or '*'} -> {data['to'] or '*'} {data['kind'] or '*'}"
    which = f"number {data['nth']}" if data["nth"] else f"p={data['probability']:g} seed={data['seed']}"
    return f"{data['action']} {edge}, {which}"


def _where(data: dict[str, Any]) -> str:
    """In how many actors a fault is in force."""
    there, missing = len(data["actors"]), len(data["missing"]) + len(data["silent"])
    return f"{there} of {there + missing} actors"


@command("list", json_output=True)
def list_faults(session: Session) -> None:
    """Show the message faults in force."""
    data = session.client.get("/v1/faults")
    columns = (Column("ID"), Column("FAULT", fold=True), Column("IN FORCE"), Column("LEFT", right=True))
    rows = [(item["id"], _describe(item), _where(item), span(item["seconds_left"])) for item in data]
    session.show(data, lambda: table(columns, rows, empty="no message fault is in force"))


@command("clear", json_output=True)
@click.argument("ident", metavar="[ID]", required=False)
def clear(session: Session, ident: str | None) -> None:
    """End one message fault, or all."""
    from peerup.client import segment

    data = session.client.delete(f"/v1/faults/{segment(ident)}" if ident else "/v1/faults")
    session.show(data, lambda: good(f"{data['cleared']} cleared") if not data["remaining"] else None)
    if data["remaining"]:
        name, reason = next(iter(data["remaining"].items()))
        more = f", and {len(data['remaining']) - 1} more" if len(data["remaining"]) > 1 else ""
        raise Failure(
            f"faults may still be in force: {name}: {reason}{more}",
            "try again; `peerup fault list` shows where",
            as_json=session.as_json,
        )


fault.add_command(list_faults)
fault.add_command(clear)
