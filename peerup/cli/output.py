"""Tables and words for people: 80 columns, colours only on a terminal, nothing cut off in a pipe."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import click

WIDE = 10_000
"""Columns where nobody's screen limits us."""


@dataclasses.dataclass(frozen=True)
class Column:
    """One column. A `fold` column takes what room is left and continues on the next line; others keep their width."""

    title: str
    right: bool = False
    fold: bool = False


def width() -> int:
    """The columns to fill: of `COLUMNS` or the terminal; in a pipe as many as it takes."""
    given = os.environ.get("COLUMNS", "")
    if given.isdecimal() and int(given) > 0:
        return int(given)
    if sys.stdout.isatty():
        return os.get_terminal_size(sys.stdout.fileno()).columns or 80
    return WIDE


def colours() -> bool:
    """Whether to colour standard output."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def table(columns: Sequence[Column], rows: Iterable[Sequence[Any]], *, empty: str = "nothing to show") -> None:
    """Print rows below a line of titles, or the words for no rows. Cells may hold rich markup-free text only."""
    lines = [[cell if hasattr(cell, "plain") else str(cell) for cell in row] for row in rows]
    if not lines:
        click.echo(empty)
        return
    click.echo(render_table(columns, lines, width=width(), coloured=colours()))


def render_table(columns: Sequence[Column], rows: Sequence[Sequence[Any]], *, width: int, coloured: bool) -> str:
    """The table as text, no line longer than `width` columns, no blanks at the ends of lines."""
    import io

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold" if coloured else "")
    for column in columns:
        justify: Literal["left", "right"] = "right" if column.right else "left"
        made.add_column(column.title, justify=justify, no_wrap=not column.fold, overflow="fold")
    for row in rows:
        made.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    sink = io.StringIO()
    console = Console(
        file=sink,
        width=width,
        force_terminal=coloured,
        color_system="standard" if coloured else None,
        legacy_windows=False,
        highlight=False,
    )
    console.print(made)
    return "\n".join(line.rstrip() for line in sink.getvalue().rstrip("\n").split("\n"))


def styled(text: str, style: str) -> Any:
    """A table cell in a rich style such as `green` or `bold red`."""
    from rich.text import Text

    return Text(text, style=style)


def good(text: str) -> None:
    """Say that something was done."""
    click.echo(click.style(text, fg="green") if colours() else text)


def note(text: str) -> None:
    """Say something beside the result, on standard error."""
    click.echo(text, err=True)


def process_of(status: Mapping[str, Any]) -> str:
    """The node's process, and the one that was started if that is another: `pid 12 (main process 11)`."""
    main = status.get("main_pid", status["pid"])  # nodes of older versions do not tell
    return f"pid {status['pid']}" + (f" (main process {main})" if main != status["pid"] else "")


def span(seconds: float | None) -> str:
    """A span of time in few characters: `0.4s`, `12s`, `3m05s`, `2h14m`, `5d03h`."""
    if seconds is None:
        return "-"
    if seconds < 10:
        return f"{seconds:.1f}s"
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02}h"


def size(count: float) -> str:
    """A number of bytes in few characters: `512 B`, `1.5 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def short_id(peer_id: str) -> str:
    """A peer id shortened for tables; not unique, never to be parsed."""
    return peer_id if len(peer_id) <= 16 else f"{peer_id[:8]}…{peer_id[-6:]}"
