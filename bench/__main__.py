"""`python -m bench`: measure peerup beside its references, in one run, on this machine."""

from __future__ import annotations

import contextlib
import re
import resource
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import click

from bench import references, relay, runtime
from bench.candidate import NodePair, lone_node, peerup, reachable_node
from bench.catalogue import CATALOGUE
from bench.load import Load, LoadError
from bench.references import AbsentError, Tunnel
from bench.results import OURS, Samples, measurement, print_table, save
from bench.tunnels import FULL, GROUPS, QUICK, Group, Scale, idle_tunnel
from demo.node import DemoError
from tests.support.processes import ConditionNotMetError

Start = Callable[[int], AbstractContextManager[Tunnel]]

START = 30.0
"""Seconds that a tunnel may take from its start to the first byte back."""

COLD = ("cold_start",)
LONE = ("node_ready", "idle_node_memory", "idle_node_cpu")
REACHABLE = ("idle_node_at_relay_memory", "idle_node_at_relay_cpu")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--only", "patterns", multiple=True, metavar="NAME", help="Values whose name contains this (repeatable).")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(min=1), help="How often, interleaved.")
@click.option("--quick", is_flag=True, help="One round of little, to see that it works; not kept.")
@click.option(
    "--candidate", "candidates", multiple=True, metavar="NAME", help="Only these: peerup, loopback, socat, ssh…"
)
@click.option("--no-save", is_flag=True, help="Print only; leave bench/results/ alone.")
def main(patterns: tuple[str, ...], rounds: int, quick: bool, candidates: tuple[str, ...], no_save: bool) -> None:  # noqa: FBT001 - click passes flags by name
    """Measure peerup beside its references.

    Each round starts every candidate afresh, one after the other, and does the same with each; the next round begins
    with another one. Nothing else should run on the machine. Exit status 1 if a candidate failed.
    """
    _allow_many_descriptors()
    wanted = {value.name for value in CATALOGUE if _matches(value.name, patterns)}
    if not wanted:
        raise click.UsageError("no value has such a name; they are: " + ", ".join(value.name for value in CATALOGUE))
    scale = QUICK if quick else FULL
    rounds = 1 if quick else rounds
    load = Load()
    samples = Samples()
    everyone: dict[str, Start] = {OURS: peerup, **references.REFERENCES}
    chosen = [name for name in everyone if not candidates or name in candidates]
    groups = [group for group in GROUPS if wanted.intersection(group.values)]
    for number in range(rounds):
        turn = number % len(chosen)
        for name in chosen[turn:] + chosen[:turn]:
            if name not in samples.absent and (groups or wanted.intersection(COLD)):
                _say(f"round {number + 1} of {rounds}: {name}")
                _measure_tunnel(name, everyone[name], load, groups, scale, samples=samples)
        if OURS in chosen and wanted.intersection(LONE):
            _say(f"round {number + 1} of {rounds}: a node alone")
            _measure_lone_node(load, scale, samples)
        if OURS in chosen and wanted.intersection(REACHABLE):
            _say(f"round {number + 1} of {rounds}: a node at a relay")
            _measure_reachable_node(load, scale, samples)
        if OURS in chosen and any(name.startswith("runtime_") for name in wanted):
            _say(f"round {number + 1} of {rounds}: the actor runtime")
            ours, floor = runtime.measure()
            samples.add(OURS, ours)
            samples.add(runtime.FLOOR, floor)
        if OURS in chosen and any(name.startswith("relay") for name in wanted):
            _say(f"round {number + 1} of {rounds}: a relay")
            _measure_relay(scale, samples, quick=quick)
    found = [measurement(value, samples) for value in CATALOGUE if value.name in wanted]
    measurements = [each for each in found if each is not None]
    print_table(measurements, samples)
    if not (no_save or quick or patterns or candidates):
        options = {"rounds": rounds, "load": load.description}
        click.echo(f"written to {save(measurements, samples, options)}")
    sys.exit(1 if samples.failures else 0)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return not patterns or any(re.search(pattern, name) for pattern in patterns)


def _measure_tunnel(
    name: str, candidate: Start, load: Load, groups: list[Group], scale: Scale, *, samples: Samples
) -> None:
    """One candidate, started afresh. What it cannot do is recorded, and the others are measured all the same."""
    with load.server() as server:
        try:
            with candidate(server.port) as tunnel:
                first = load.first(tunnel.port, START)
                samples.add(name, {"cold_start": (first - tunnel.started) * 1e3})
                for group in groups:
                    try:
                        samples.add(name, group.run(load, tunnel, scale))
                    except LoadError as error:
                        samples.failures.append(f"{name}, {', '.join(group.values)}: {error}")
        except AbsentError as error:
            samples.absent[name] = str(error)
        except (LoadError, DemoError) as error:
            samples.failures.append(f"{name}: {error}")


def _measure_relay(scale: Scale, samples: Samples, *, quick: bool) -> None:
    try:
        ours, direct = relay.measure(scale, quick=quick)
    except (LoadError, DemoError) as error:
        samples.failures.append(f"a relay: {error}")
    else:
        samples.add(OURS, ours)
        samples.add(relay.DIRECT, direct)


def _measure_lone_node(load: Load, scale: Scale, samples: Samples) -> None:
    try:
        with lone_node() as node:
            assert isinstance(node, NodePair)
            idle = idle_tunnel(load, node, scale)
            samples.add(
                OURS,
                {
                    "node_ready": node.ready[0] * 1e3,
                    "idle_node_memory": idle["idle_memory"],
                    "idle_node_cpu": idle["idle_cpu"],
                },
            )
    except DemoError as error:
        samples.failures.append(f"a node alone: {error}")


def _measure_reachable_node(load: Load, scale: Scale, samples: Samples) -> None:
    try:
        with reachable_node() as node:
            idle = idle_tunnel(load, node, scale)
            memory, cpu = REACHABLE
            samples.add(OURS, {memory: idle["idle_memory"], cpu: idle["idle_cpu"]})
    except (DemoError, ConditionNotMetError) as error:
        samples.failures.append(f"a node at a relay: {error}")


def _allow_many_descriptors() -> None:
    """A thousand connections need more than the usual soft limit; every candidate inherits the same."""
    with contextlib.suppress(ValueError, OSError):
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _say(text: str) -> None:
    click.echo(f"{time.strftime('%H:%M:%S')} {text}", err=True)


if __name__ == "__main__":
    main()
