"""`peerup version` and `peerup completion`: about the program itself."""

from __future__ import annotations

import platform

import click

from peerup import __version__
from peerup.cli.framework import Session, command, examples


@command("version", json_output=True)
def version(session: Session) -> None:
    """Print the version of peerup and of what it runs on."""
    python = f"{platform.python_implementation()} {platform.python_version()}"
    system = f"{platform.system()} {platform.machine()}"
    data = {"version": __version__, "python": python, "platform": system}
    session.show(data, lambda: click.echo(f"peerup {__version__}\n{python} {system}"))


_INSTALL = {
    "bash": "~/.bashrc",
    "zsh": "~/.zshrc",
    "fish": "~/.config/fish/completions/peerup.fish",
}


@command(
    "completion",
    epilog=examples(
        'eval "$(peerup completion bash)"         in ~/.bashrc',
        'eval "$(peerup completion zsh)"          in ~/.zshrc',
        "peerup completion fish > ~/.config/fish/completions/peerup.fish",
    ),
)
@click.argument("shell", type=click.Choice(sorted(_INSTALL)))
def completion(session: Session, shell: str) -> None:
    """Print the completion script for your shell."""
    from click.shell_completion import get_completion_class

    from peerup.cli import cli

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(cli, {}, "peerup", "_PEERUP_COMPLETE").source())
