"""Where a node keeps its things: one directory for one node, or the XDG places for the default node.

With an explicit home (`--home DIR` or `PEERUP_HOME`) everything lives inside it::

    DIR/config.yaml  DIR/identity.key  DIR/authorized_keys  DIR/state/  DIR/run/  DIR/log/

The default node follows the XDG base directory specification: what a person writes is in
`$XDG_CONFIG_HOME/peerup` (where peer-up keeps it too, when that is `~/.config`), what the node remembers in
`$XDG_STATE_HOME/peerup`, sockets in `$XDG_RUNTIME_DIR/peerup` or, without one, in the state directory's `run`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from actors.files import FileError, make_private_directory

_LONGEST_RUN_PATH = 87
"""A Unix socket's path ends at 107 bytes; what is put into the run directory gets the last 20."""


@dataclasses.dataclass(frozen=True)
class NodeHome:
    """The directories of one node, all absolute, whether they exist or not.

    Attributes:
        config_dir: what a person edits: `config.yaml`, `authorized_keys`, and the identity key.
        state_dir: what the node remembers across restarts.
        run_dir: sockets and names of the running node; 0700.
        log_dir: log files and the audit log.
        explicit: how it was chosen: the home as given, or None for the XDG places.
    """

    config_dir: Path
    state_dir: Path
    run_dir: Path
    log_dir: Path
    explicit: Path | None

    @property
    def config_file(self) -> Path:
        """The node's configuration."""
        return self.config_dir / "config.yaml"

    @property
    def key_file(self) -> Path:
        """The identity key, unless the configuration names another."""
        return self.config_dir / "identity.key"

    @property
    def authorized_keys_file(self) -> Path:
        """Who may connect, unless the configuration names another file."""
        return self.config_dir / "authorized_keys"

    @property
    def proxies_file(self) -> Path:
        """The proxies that should exist (see :mod:`actors.config.proxies_file`)."""
        return self.state_dir / "proxies.yaml"

    @property
    def audit_file(self) -> Path:
        """The audit log."""
        return self.log_dir / "audit.jsonl"

    @property
    def control_socket(self) -> Path:
        """The control API's Unix socket."""
        return self.run_dir / "control.sock"

    def create(self) -> None:
        """Make all directories, 0700, and check those that exist.

        Raises:
            FileError: one cannot be made, or others may write to it, or the path of the run directory is too long.
        """
        self.check()
        for path in (self.config_dir, self.state_dir, self.run_dir, self.log_dir):
            make_private_directory(path)

    def check(self) -> None:
        """Check what can be wrong with the paths themselves.

        Raises:
            FileError: the path of the run directory is too long for Unix sockets.
        """
        if len(bytes(self.run_dir)) > _LONGEST_RUN_PATH:
            raise FileError(
                f"the path {self.run_dir} is longer than {_LONGEST_RUN_PATH} bytes, too long for the sockets in it; "
                "choose a home directory with a shorter path"
            )


def node_home(explicit: str | Path | None, environment: Mapping[str, str]) -> NodeHome:
    """The home that `--home` (`explicit`), else `PEERUP_HOME`, else the XDG variables of this environment name.

    Raises:
        FileError: no place can be found, because not even HOME is set.
    """
    if explicit is not None and not str(explicit).strip():
        raise FileError("--home names no directory: what was given is empty")
    chosen = explicit or environment.get("PEERUP_HOME")
    if chosen:
        root = Path(chosen).expanduser().absolute()
        return NodeHome(root, root / "state", root / "run", root / "log", root)
    config = _xdg(environment, "XDG_CONFIG_HOME", ".config") / "peerup"
    state = _xdg(environment, "XDG_STATE_HOME", ".local/state") / "peerup"
    runtime = environment.get("XDG_RUNTIME_DIR", "")
    run = Path(runtime) / "peerup" if runtime.startswith("/") else state / "run"
    return NodeHome(config, state, run, state / "log", None)


def _xdg(environment: Mapping[str, str], variable: str, below_home: str) -> Path:
    value = environment.get(variable, "")
    if value.startswith("/"):  # the specification: relative paths are invalid and to be ignored
        return Path(value)
    home = environment.get("HOME", "")
    if not home.startswith("/"):
        raise FileError("neither PEERUP_HOME nor HOME says where the node lives; give --home DIR")
    return Path(home) / below_home
