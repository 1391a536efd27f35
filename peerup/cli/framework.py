"""What all commands share: the home option, JSON output, errors and exit codes, commands loaded when needed.

Exit codes: 0 done; 1 it failed, and standard error says what, why and what to do; 2 wrong usage; 3 the command
needs the running node and there is none; 130 interrupted with Ctrl-C.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import pwd
import re
import shlex
import sys
from collections.abc import Callable, Mapping
from typing import IO, TYPE_CHECKING, Any, ClassVar

import click

from protocol.errors import PeerupError

if TYPE_CHECKING:
    from pathlib import Path

    from actors.config.paths import NodeHome
    from peerup.client import Client

EXIT_FAILURE = 1
EXIT_NOT_RUNNING = 3
EXIT_INTERRUPTED = 130

EXIT_CODES = (
    "Exit status: 0 done, 1 failed (standard error says why and what to do), 2 wrong usage, "
    "3 the node is not running, 130 interrupted."
)


class Failure(click.ClickException):
    """Ends the command with a message and a status that is not 0."""

    exit_code: ClassVar[int] = EXIT_FAILURE

    def __init__(self, reason: str, action: str = "", *, code: str = "failed", as_json: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.action = action
        self.code = code
        self.as_json = as_json

    @staticmethod
    def from_error(error: PeerupError, *, as_json: bool) -> Failure:
        """The failure that tells of this error."""
        reason = getattr(error, "reason", "") or str(error) or error.code
        action = getattr(error, "action", "")
        kind = NotRunningFailure if error.code == "not-running" else Failure
        return kind(reason, action, code=error.code, as_json=as_json)

    def show(self, file: IO[Any] | None = None) -> None:
        """Write the message to standard error."""
        if self.as_json:
            error = {"error": {"code": self.code, "reason": self.reason, "action": self.action}}
            click.echo(json.dumps(error, ensure_ascii=False), file=file, err=file is None)
            return
        click.echo(f"{mark('error:', 'red')} {self.reason}", file=file, err=file is None)
        if self.action:
            click.echo(f"  {mark('to do:', 'yellow')} {self.action}", file=file, err=file is None)


class NotRunningFailure(Failure):
    """Ends a command that needs the running node and finds none."""

    exit_code: ClassVar[int] = EXIT_NOT_RUNNING


def mark(text: str, colour: str) -> str:
    """The text in this colour for standard error; plain where colours are not wanted."""
    return text if os.environ.get("NO_COLOR") else click.style(text, fg=colour)


class Session:
    """One run of a command: where the node lives and how to answer."""

    def __init__(self, home: str | None, *, as_json: bool) -> None:
        self._given_home = home
        self.as_json = as_json

    @functools.cached_property
    def home(self) -> NodeHome:
        """The node's directories.

        Raises:
            Failure: they are another user's. We could not read them; or, as root, would leave what that user cannot.
        """
        from actors.config.paths import node_home

        home = node_home(self._given_home, os.environ)
        owner = _owner_if_not_ours(home.config_file)
        if owner is not None:
            where = "" if home.explicit is None else f" --home {shlex.quote(str(home.explicit))}"
            raise Failure(
                f"the node in {home.config_dir} belongs to the user {owner}",
                f"run this as that user: sudo -u {shlex.quote(owner)} peerup{where} ...",
                code="not-yours",
                as_json=self.as_json,
            )
        return home

    @functools.cached_property
    def program(self) -> str:
        """What to type for this program and this node, such as `peerup --home DIR`, for hints that can be copied."""
        if self._given_home is None or os.environ.get("PEERUP_HOME") == self._given_home:
            return "peerup"
        return f"peerup --home {shlex.quote(self._given_home)}"

    @functools.cached_property
    def client(self) -> Client:
        """The control API of the node in this home."""
        from peerup.client import Client

        return Client(self.home.control_socket)

    def show(self, data: Any, human: Callable[[], None]) -> None:
        """Print the data as JSON if that was asked for, else for people."""
        if self.as_json:
            click.echo(json.dumps(data, indent=2, ensure_ascii=False))
        else:
            human()

    def show_line(self, data: Any, human: str) -> None:
        """Print one item of a stream: a line of JSON, or a line for people."""
        click.echo(json.dumps(data, ensure_ascii=False, separators=(",", ":")) if self.as_json else human)

    def wait_message(self, text: str) -> None:
        """Tell a person at a terminal what takes time; nothing for programs."""
        if sys.stderr.isatty() and not self.as_json:
            click.echo(text, err=True)


def _owner_if_not_ours(config_file: Path) -> str | None:
    """The user to whom a node belongs that we cannot work on: we may not look, or are root. None if we can."""
    for path in (config_file, *config_file.parents):
        try:
            owner = path.stat().st_uid
        except PermissionError:
            continue  # whoever keeps us out owns a directory above
        except OSError:
            return None  # there is no such node; what wants one says so
        ours = os.geteuid()
        if owner == ours or (path == config_file and ours != 0):
            return None
        return _user_name(owner)
    return None


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"#{uid}"  # as sudo understands it


def examples(*lines: str) -> str:
    """An epilog with these lines as they are."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def command(
    name: str, *, json_output: bool = False, **attributes: Any
) -> Callable[[Callable[..., None]], click.Command]:
    """Make a function a command that gets a :class:`Session` first and its own options by name.

    Every command takes `--home`; one with `json_output` also `--json`.
    """

    def decorate(function: Callable[..., None]) -> click.Command:
        @click.option("--home", metavar="DIR", hidden=True, help="The node's directory.")
        @functools.wraps(function)
        @click.pass_context
        def run(context: click.Context, /, *args: Any, home: str | None, **values: Any) -> None:
            as_json = bool(values.pop("as_json", False))
            session = Session(context.find_root().params.get("home") if home is None else home, as_json=as_json)
            try:
                function(session, *args, **values)
            except PeerupError as error:
                raise Failure.from_error(error, as_json=as_json) from error
            except PermissionError as error:
                raise Failure(
                    f"cannot use {error.filename}: permission denied" if error.filename else f"not permitted: {error}",
                    "run this as the user to whom it belongs (`ls -ld` tells), or give it to you",
                    code="not-permitted",
                    as_json=as_json,
                ) from error
            except KeyboardInterrupt:
                raise click.exceptions.Exit(EXIT_INTERRUPTED) from None

        if json_output:
            run = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")(run)
        made: click.Command = click.command(name, click.Command, **attributes)(run)
        return made

    return decorate


class LazyGroup(click.Group):
    """A group whose commands are imported when they are used: the command line starts in a tenth of a second.

    `sources` maps a command's name to `module:attribute`.
    """

    def __init__(self, *args: Any, sources: Mapping[str, str] | None = None, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.sources = dict(sources or {})

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names in the order in which they were written down."""
        return [*self.sources, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of this name, imported now."""
        source = self.sources.get(cmd_name)
        if source is None:
            return super().get_command(ctx, cmd_name)
        module, _, attribute = source.partition(":")
        found = getattr(importlib.import_module(module), attribute)
        assert isinstance(found, click.Command)
        return found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that the arguments name; what is not one gets a suggestion."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            import difflib

            near = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1)
            if not near:
                raise
            raise click.UsageError(f"No such command {args[0]!r}. Did you mean {near[0]!r}?", ctx) from error


class DefaultGroup(click.Group):
    """A group that is also a command: what does not begin with a subcommand's name goes to the default one."""

    def __init__(self, *args: Any, default: str, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.default = default

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the default command's name in front where no command is named."""
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h"):
            args = [self.default, *args]
        elif not args and self.invoke_without_command:
            args = [self.default]
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The default command's options, and the subcommands."""
        self.commands[self.default].format_options(ctx, formatter)
        self.format_commands(ctx, formatter)

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        """Usage shows both forms."""
        default = self.commands[self.default].collect_usage_pieces(ctx)
        return [" ".join(default), f"| {'|'.join(name for name in self.commands if name != self.default)} ..."]


class Duration(click.ParamType[float]):
    """A span of time such as `500ms`, `10s`, `1m30s`, `2h`; a bare number counts seconds. Becomes seconds."""

    name = "duration"
    _UNITS: Mapping[str, float] = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
    _PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The seconds that the text means."""
        if isinstance(value, int | float):
            return float(value)
        text = str(value).strip()
        if re.fullmatch(r"\d+(\.\d+)?", text):
            return float(text)
        if text and re.fullmatch(rf"(?:{self._PART.pattern})+", text):
            return sum(float(number) * self._UNITS[unit] for number, unit in self._PART.findall(text))
        raise click.BadParameter(f"{value!r} is not a span of time; write it like 500ms, 10s, 1m30s or 2h", ctx, param)


DURATION = Duration()
