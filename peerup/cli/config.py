"""`peerup config`: the configuration file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from peerup.cli.actors import outline
from peerup.cli.files import after_restart, note_after_restart
from peerup.cli.framework import Failure, Session, command, examples
from peerup.cli.output import good, note


@click.group(
    "config",
    epilog=examples("peerup config validate", "peerup config show", "peerup config reload"),
)
def config() -> None:
    """Check, show and reload the configuration."""


@command("validate", json_output=True)
@click.argument("path", metavar="[FILE]", type=click.Path(path_type=Path), required=False)
def validate(session: Session, path: Path | None) -> None:
    """Check a configuration file, by default this home's.

    Exit status 1 if the node would refuse it; unknown keys are warnings. Says which keys of a running node take effect
    only when it is started again.
    """
    from actors.config.file import load_config
    from actors.config.schema import ConfigError

    file = path or session.home.config_file
    try:
        found = load_config(file)
    except ConfigError as error:
        problems = [dataclasses.asdict(problem) for problem in error.problems]
        if session.as_json:
            data = {"file": str(file), "valid": False, "problems": problems, "warnings": [], "after_restart": None}
            session.show(data, lambda: None)
            raise click.exceptions.Exit(1) from None
        raise Failure(
            f"{file} cannot be used:\n" + "\n".join(f"  {problem}" for problem in error.problems), code=error.code
        ) from error
    warnings = [dataclasses.asdict(warning) for warning in found.warnings]
    later = after_restart(session) if file == session.home.config_file else None

    def human() -> None:
        for warning in found.warnings:
            note(f"warning: {warning}")
        good(f"{file}: valid")
        note_after_restart(later)

    data = {"file": str(file), "valid": True, "problems": [], "warnings": warnings, "after_restart": later}
    session.show(data, human)


@command("show", json_output=True)
def show(session: Session) -> None:
    """Show the configuration as the node understands it, defaults included."""
    from actors.config.file import load_config

    found = load_config(session.home.config_file)
    data = _plain(found)
    session.show(data, lambda: click.echo("\n".join(outline(data, ""))))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


@command("reload", json_output=True)
def reload(session: Session) -> None:
    """Have the running node read its configuration again, and say what changed."""
    data = session.client.post("/v1/config/reload")

    def human() -> None:
        for change in data["changes"]:
            click.echo(change)
        if not data["problems"] and not data["not_in_force"]:
            good("reloaded" if data["changes"] else "nothing has changed")

    session.show(data, human)
    for warning in data["warnings"] if not data["problems"] else ():
        note(f"warning: {warning}")
    if data["problems"]:
        reason = "\n".join(f"  {problem}" for problem in data["problems"])
        action = "repair it and reload; until then what it takes away counts, and all else stays as it was"
        raise Failure(f"the configuration cannot be used:\n{reason}", action, as_json=session.as_json)
    if data["not_in_force"]:
        raise Failure(f"not in force: {'; '.join(data['not_in_force'])}", as_json=session.as_json)
    for child, reason in data["failed"].items():
        note(f"warning: {child} could not be started: {reason}")


for _command in (validate, show, reload):
    config.add_command(_command)
