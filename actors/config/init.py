"""Making a new node: its directories, configuration, identity and authorized_keys. All of it, or nothing."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from actors.config.paths import NodeHome
from actors.config.schema import check_network_name, check_served
from actors.config.template import render_config
from actors.files import FileExistsAlreadyError, create_exclusive, make_private_directory
from actors.gate.authorized_keys_file import HEADER
from actors.keyring.key_file import create_key, load_key
from protocol.multiaddr import Multiaddr
from protocol.peer_id import PeerId


@dataclasses.dataclass(frozen=True)
class NewNode:
    """What was made.

    Attributes:
        kept_key: whether an identity was already there and was kept.
        kept_authorized_keys: likewise.
    """

    home: NodeHome
    peer: PeerId
    kept_key: bool
    kept_authorized_keys: bool


def init_node(
    home: NodeHome,
    *,
    listen_addresses: Sequence[Multiaddr] | None = None,
    network: str | None = None,
    text: str | None = None,
) -> NewNode:
    """Make a new node in this home. An identity or authorized_keys found there are kept, a configuration is refused.

    The configuration is `text`, or one for these addresses and this network.

    If anything fails, what was made is removed again.

    Raises:
        FileExistsAlreadyError: there is a configuration already.
        FileError, KeyFileError: something cannot be made, or an existing key cannot be used.
        InvalidValueError: not a network name, or an address where no node can listen.
    """
    if network is not None:
        check_network_name(network)
    check_served(listen_addresses or ())
    home.check()
    if home.config_file.exists():
        raise FileExistsAlreadyError(
            f"{home.config_file} exists already and is not overwritten; for another node choose another --home"
        )
    with contextlib.ExitStack() as undo:
        for directory in (home.config_dir, home.state_dir, home.run_dir, home.log_dir):
            for missing in _missing(directory):
                undo.callback(_remove_directory, missing)
            make_private_directory(directory)
        kept_key = home.key_file.exists() or home.key_file.is_symlink()
        if kept_key:
            key = load_key(home.key_file)
        else:
            key = create_key(home.key_file)
            undo.callback(home.key_file.unlink, missing_ok=True)
        kept_authorized_keys = home.authorized_keys_file.exists()
        if not kept_authorized_keys:
            create_exclusive(home.authorized_keys_file, HEADER.encode())
            undo.callback(home.authorized_keys_file.unlink, missing_ok=True)
        # The configuration comes last: where it is, everything is.
        written = render_config(listen_addresses, network) if text is None else text
        create_exclusive(home.config_file, written.encode())
        undo.pop_all()
    return NewNode(home, key.peer_id, kept_key, kept_authorized_keys)


def _missing(directory: Path) -> list[Path]:
    """The directories that will be made for this one, from the outermost inwards."""
    missing: list[Path] = []
    while not directory.exists():
        missing.insert(0, directory)
        directory = directory.parent
    return missing


def _remove_directory(directory: Path) -> None:
    with contextlib.suppress(OSError):  # somebody put something into it meanwhile
        directory.rmdir()
