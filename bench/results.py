"""From samples to results: medians, spread, ratios; as a table for people and as JSON for programs and for later."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import os
import platform
import statistics
import subprocess
import sys
from collections import defaultdict
from importlib import metadata
from pathlib import Path
from typing import Any

from bench.catalogue import Value

OURS = "peerup"
DIRECTORY = Path(__file__).parent / "results"


class Samples:
    """Everything measured in a run: by value, by candidate, one sample for each round."""

    def __init__(self) -> None:
        self._samples: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        self.absent: dict[str, str] = {}
        self.failures: list[str] = []

    def add(self, candidate: str, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._samples[name][candidate].append(value)

    def of(self, name: str) -> dict[str, list[float]]:
        """The samples of a value by candidate."""
        return {candidate: list(samples) for candidate, samples in self._samples[name].items()}


@dataclasses.dataclass(frozen=True)
class Summary:
    """Median, least and most of the samples of one candidate."""

    median: float
    least: float
    most: float
    runs: int

    @classmethod
    def of(cls, samples: list[float]) -> Summary:
        return cls(statistics.median(samples), min(samples), max(samples), len(samples))

    def as_json(self) -> dict[str, Any]:
        return {"median": _round(self.median), "least": _round(self.least), "most": _round(self.most)}


def measurement(value: Value, samples: Samples) -> dict[str, Any] | None:
    """One object of the results; what has no sample is null. None: no sample at all."""
    summaries = {candidate: Summary.of(each) for candidate, each in samples.of(value.name).items() if each}
    if not summaries:
        return None
    ours = summaries.get(OURS)
    reference = summaries.get(value.reference)
    ratio = ours.median / reference.median if ours and reference and reference.median else None
    return {
        "name": value.name,
        "unit": value.unit,
        "ours": None if ours is None else _round(ours.median),
        "reference": None if reference is None else _round(reference.median),
        "reference_name": value.reference or None,
        "ratio": None if ratio is None else _round(ratio),
        "runs": max(summary.runs for summary in summaries.values()),
        "meaning": value.meaning,
        "better": value.better,
        "spread": {name: summary.as_json() for name, summary in summaries.items()},
        "bound": _bound(value),
        "holds": None if ours is None else _holds(value, ours.median, ratio),
    }


def _bound(value: Value) -> str | None:
    if value.at_least is not None:
        return f"ratio >= {value.at_least:g}"
    if value.at_most is not None:
        return f"ratio <= {value.at_most:g}"
    if value.limit is not None:
        return f"ours <= {value.limit:g}"
    return None


def _holds(value: Value, ours: float, ratio: float | None) -> bool | None:
    """Whether the bound holds; None where there is none, or nothing to compare with."""
    if value.limit is not None:
        return ours <= value.limit
    if ratio is None:
        return None
    if value.at_least is not None:
        return ratio >= value.at_least
    if value.at_most is not None:
        return ratio <= value.at_most
    return None


def _round(number: float) -> float:
    """Four significant digits: more would pretend."""
    return float(f"{number:.4g}")


def machine() -> dict[str, Any]:
    """What the results were measured on; nothing that names the host."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "congestion_control": _congestion_control(),
        "python": platform.python_version(),
        "versions": {
            name: metadata.version(name) for name in ("peerup", "cryptography", "trio", "thespian", "msgpack")
        },
        "openssh": _first_line("ssh", "-V"),
        "socat": _first_line("socat", "-V", having="version"),
    }


def _congestion_control() -> str | None:
    try:
        return Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()
    except OSError:
        return None


def _first_line(*command: str, having: str = "") -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except FileNotFoundError:
        return None
    lines = (done.stdout + done.stderr).splitlines()
    return next((line.strip() for line in lines if having in line), None)


def save(measurements: list[dict[str, Any]], samples: Samples, options: dict[str, Any]) -> Path:
    """Write the results under the day and the kind of machine, and the measurements as `latest.json`."""
    now = dt.datetime.now(dt.UTC)
    about = machine()
    DIRECTORY.mkdir(exist_ok=True)
    kind = "".join(each if each.isalnum() else "-" for each in about["cpu"].lower()).strip("-")
    while "--" in kind:
        kind = kind.replace("--", "-")
    path = DIRECTORY / f"{now:%Y-%m-%d}-{kind}-{about['cores']}-cores.json"
    document = {
        "measured_at": f"{now:%Y-%m-%dT%H:%M:%SZ}",
        "commit": _first_line("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"),
        "machine": about,
        "options": options,
        "absent": samples.absent,
        "failures": samples.failures,
        "measurements": measurements,
    }
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    latest = [{**each, "machine": about, "measured_at": document["measured_at"]} for each in measurements]
    (DIRECTORY / "latest.json").write_text(json.dumps(latest, indent=2, ensure_ascii=False) + "\n")
    return path


def print_table(measurements: list[dict[str, Any]], samples: Samples) -> None:
    """The results for people: our median and range, the medians of the references."""
    from rich.console import Console
    from rich.table import Table

    candidates = [name for each in measurements for name in each["spread"]]
    references = [name for name in dict.fromkeys(candidates) if name != OURS]
    table = Table(title="medians of the rounds; of peerup with the least and the most")
    table.add_column("value", no_wrap=True)
    table.add_column(OURS, justify="right", no_wrap=True)
    for name in references:
        table.add_column(name, justify="right")
    table.add_column("ratio", justify="right")
    table.add_column("bound", no_wrap=True)
    for each in measurements:
        spread = each["spread"]
        cells = [f"{spread[name]['median']:g}" if name in spread else "" for name in references]
        ratio = "" if each["ratio"] is None else f"{each['ratio']:.2f}"
        verdict = {True: "[green]holds[/]", False: "[red]broken[/]", None: ""}[each["holds"]]
        unit = f" {each['unit']}" if each["unit"] else ""
        bound = f"{each['bound'] or ''} {verdict}".strip()
        table.add_row(f"{each['name']}{unit}", _ours(spread.get(OURS)), *cells, ratio, bound)
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    for name, reason in samples.absent.items():
        console.print(f"{name} was not measured: {reason}", markup=False)
    for failure in samples.failures:
        console.print(f"failed: {failure}", markup=False)


def _ours(spread: dict[str, float] | None) -> str:
    if spread is None:
        return ""
    if spread["least"] == spread["most"]:
        return f"{spread['median']:g}"
    return f"{spread['median']:g} ({spread['least']:g} to {spread['most']:g})"
