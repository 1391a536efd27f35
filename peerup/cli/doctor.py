"""`peerup doctor`: checks of the node and of what it needs from this machine, each with a hint where it is not well.

A check is a function in `CHECKS` that takes the facts and yields results. It asks nothing itself, so what is asked of
the running node is asked once, and each check can be tried with made-up facts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from peerup.cli.framework import EXIT_FAILURE, Session, command, examples
from peerup.cli.output import colours

OK = "ok"
WARNING = "warning"
FAILED = "failed"
SKIPPED = "skipped"

_STYLES = {OK: "green", WARNING: "yellow", FAILED: "red", SKIPPED: "bright_black"}

_GOOD_WORDS = ("full", "base")
"""Of :mod:`supervisor.confinement`: an actor, and a supervisor, for which the kernel enforces all that was asked."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What one check came to.

    Attributes:
        check: its name, for programs: dotted, from the general to the particular.
        result: one of the words above. Only `failed` makes the command fail.
        reason: what was found, in words.
        hint: what to do about it; empty if nothing is to be done.
    """

    check: str
    result: str
    reason: str
    hint: str = ""


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the checks judge.

    Attributes:
        wanted: `security.confinement` of the configuration.
        shortcomings: what this kernel lacks for confinement.
        actors: the tree as the control API tells it; None if the node does not run.
        kernel: by process, the fields of `/proc/PID/status`; only of processes that are there.
    """

    wanted: str
    shortcomings: tuple[str, ...]
    actors: tuple[dict[str, Any], ...] | None
    kernel: dict[int, dict[str, str]]


def node_runs(facts: Facts) -> Iterator[Result]:
    """Whether the node runs, with all its parts."""
    if facts.actors is None:
        yield Result("node.running", SKIPPED, "the node does not run", "start it: peerup daemon")
        return
    missing = [actor["name"] for actor in facts.actors if actor["state"] != "running"]
    if missing:
        yield Result("node.running", FAILED, f"does not run: {', '.join(missing)}", "see its log, and: peerup actors")
    else:
        yield Result("node.running", OK, f"{len(facts.actors)} actors run")


def kernel_confines(facts: Facts) -> Iterator[Result]:
    """Whether this kernel can confine processes."""
    name = "confinement.kernel"
    if not facts.shortcomings:
        yield Result(name, OK, "this kernel has Landlock and seccomp")
        return
    for shortcoming in facts.shortcomings:
        hint = "run the node on a newer kernel, or as a user of its own who can read nothing else"
        yield Result(name, WARNING, shortcoming, hint)


def actors_are_confined(facts: Facts) -> Iterator[Result]:
    """Whether each actor's process is limited to what it needs; by what it says, and by what the kernel says of it."""
    if facts.wanted == "disabled":
        hint = "take security.confinement out of config.yaml, and start the node again"
        yield Result("confinement.wanted", WARNING, "security.confinement is `disabled`", hint)
    for actor in facts.actors or ():
        name = f"confinement.{actor['name']}"
        if actor["state"] != "running":
            yield Result(name, SKIPPED, "it does not run")
            continue
        told = facts.kernel.get(actor["pid"])
        filtered = told is None or told.get("Seccomp") == "2"
        word = actor["confinement"]
        if word in _GOOD_WORDS and not filtered:
            yield Result(name, FAILED, f"it says `{word}`, but the kernel filters none of its system calls")
        elif word in _GOOD_WORDS:
            yield Result(name, OK, _MEANINGS[word])
        elif facts.wanted == "disabled" and not word:
            yield Result(name, SKIPPED, "not confined")
        else:
            level = FAILED if facts.wanted == "required" else WARNING
            hint = "" if facts.shortcomings else "start the node again, so that the configuration counts"
            yield Result(name, level, _MEANINGS.get(word, "not confined"), hint)


_MEANINGS = {
    "full": "files, ports, signals and system calls limited to what it needs",
    "partial": "limited, but this kernel's Landlock does not govern all of ports and signals",
    "seccomp": "only system calls limited, not files",
    "landlock": "only files limited, not system calls",
    "none": "not confined",
    "base": "a supervisor; system calls limited to what its children need",
}

CHECKS: tuple[Callable[[Facts], Iterator[Result]], ...] = (node_runs, kernel_confines, actors_are_confined)
"""In the order in which they are shown."""


@command(
    "doctor",
    json_output=True,
    short_help="Check the node and what it needs from this machine.",
    epilog=examples("peerup doctor", "peerup doctor --json"),
)
def doctor(session: Session) -> None:
    """Check the node and what it needs from this machine, and say what to do about what is not well.

    Works without a running node too, with fewer checks. Exit status 1 if a check has failed; warnings are no failure.
    """
    facts = gather(session)
    results = [result for check in CHECKS for result in check(facts)]
    session.show([dataclasses.asdict(result) for result in results], lambda: _print(results))
    if any(result.result == FAILED for result in results):
        raise click.exceptions.Exit(EXIT_FAILURE)


def gather(session: Session) -> Facts:
    """Find out what the checks judge.

    Raises:
        PeerupError: the configuration cannot be read.
    """
    from peerup.cli.files import read_config
    from peerup.client import ClientError
    from supervisor.confinement import shortcomings

    config = read_config(session)
    actors: tuple[dict[str, Any], ...] | None
    try:
        actors = tuple(session.client.get("/v1/actors"))
    except ClientError as error:
        if error.code != "not-running":
            raise
        actors = None
    pids = [actor["pid"] for actor in actors or () if actor["pid"]]
    kernel = {pid: told for pid in pids if (told := _kernel_status(pid))}
    return Facts(config.security.confinement, tuple(shortcomings()), actors, kernel)


def _kernel_status(pid: int) -> dict[str, str]:
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    return {key: value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}


def _print(results: list[Result]) -> None:
    for result in results:
        click.echo(f"{_coloured(result.result)} {result.check}: {result.reason}")
        if result.hint:
            click.echo(f"{'':8} to do: {result.hint}")


def _coloured(word: str) -> str:
    padded = f"{word:8}"
    return click.style(padded, fg=_STYLES[word]) if colours() else padded
