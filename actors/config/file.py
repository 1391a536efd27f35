"""The file `config.yaml`: reading it, and editing it so that two editors lose nothing and comments survive.

Every change goes the same way: take the file's lock, read, edit the text (:mod:`actors.config.yaml_text`), check
that the result is a valid configuration, replace the file as one step. So a file that was valid never becomes
invalid by a command, and a file that is broken is not touched but explained.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

from actors.config.addresses import unused_addresses, why_undialable
from actors.config.reader import Problem
from actors.config.schema import (
    ConfigError,
    NodeConfig,
    check_peer_name,
    read_config,
    read_readable,
)
from actors.config.yaml_text import YamlSyntaxError, delete_value, parse_parts, parse_yaml, set_value
from actors.files import (
    LOCK_SECONDS,
    BusyError,
    FileError,
    FileMissingError,
    check_not_writable_by_others,
    locked,
    read_limited,
    write_atomic,
)
from protocol.errors import InvalidValueError, PeerupError
from protocol.keeper import MAX_RELAYS
from protocol.multiaddr import Multiaddr
from protocol.peer_id import PeerId
from protocol.service import ServiceAddress, ServiceName

MAX_CONFIG_BYTES = 1024 * 1024
"""Far more than thousands of names and services take."""


class ConfigEditError(PeerupError):
    """An edit does not fit what the configuration says: the entry exists already, or does not exist.

    Attributes:
        code: `already-exists` or `not-found`.
    """

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code  # type: ignore[misc]  # a class variable in general, this error carries two codes


def load_config(path: Path) -> NodeConfig:
    """The configuration in this file.

    Raises:
        FileError: it cannot be read, or others may write to it.
        ConfigError: it is not YAML, or says something that cannot be.
    """
    return parse_config(read_config_text(path), path)


class ConfigEditor:
    """The configuration while it is being edited. Every method checks, changes the text, and keeps it valid.

    Attributes:
        config: as it is with the edits so far.
        text: the file's text with the edits so far.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.text = read_config_text(path)
        self.config = parse_config(self.text, path)

    def add_service(
        self, name: str, address: str, *, allowed_peers: Sequence[PeerId] | None = None, enabled: bool = True
    ) -> None:
        """Offer a local TCP service.

        Raises:
            InvalidValueError: a bad or reserved name, or not HOST:PORT.
            ConfigEditError: `already-exists`.
        """
        ServiceName(name)
        ServiceAddress.parse(address)
        if any(service.name == name for service in self.config.services):
            raise ConfigEditError("already-exists", f"the service {name!r} exists already in {self._path}")
        entry: dict[str, object] = {"enabled": enabled, "local_address": address}
        if allowed_peers is not None:
            entry["allowed_peers"] = [str(peer) for peer in allowed_peers]
        self._set(("services", name), entry)

    def remove_service(self, name: str) -> None:
        """Offer this service no longer.

        Raises:
            ConfigEditError: `not-found`.
        """
        self._need_service(name)
        self._delete(("services", name))

    def set_service_enabled(self, name: str, *, enabled: bool) -> bool:
        """Switch a service on or off without forgetting it; whether that changed anything.

        Raises:
            ConfigEditError: `not-found`.
        """
        self._need_service(name)
        if next(service.enabled for service in self.config.services if service.name == name) == enabled:
            return False
        self._set(("services", name, "enabled"), enabled)
        return True

    def add_name(self, name: str, peer: PeerId, *, replace: bool = False) -> bool:
        """Give a peer a friendly name; whether that changed anything.

        Raises:
            InvalidValueError: it cannot be a name.
            ConfigEditError: `already-exists`: the name means another peer, and `replace` is False.
        """
        check_peer_name(name)
        for entry in self.config.names:
            if entry.name == name and entry.peer == peer:
                return False
            if entry.name == name and not replace:
                raise ConfigEditError("already-exists", f"the name {name!r} already means the peer {entry.peer}")
        self._set(("names", name), str(peer))
        return True

    def remove_name(self, name: str) -> PeerId:
        """Forget a friendly name; the peer that had it. Its addresses go too when it has no other name.

        Raises:
            ConfigEditError: `not-found`.
        """
        peer = next((entry.peer for entry in self.config.names if entry.name == name), None)
        if peer is None:
            raise ConfigEditError("not-found", f"there is no name {name!r} in {self._path}")
        self._delete(("names", name))
        if not any(entry.peer == peer for entry in self.config.names):
            self.set_addresses(peer, ())
        return peer

    def add_addresses(self, peer: PeerId, addresses: Sequence[Multiaddr]) -> None:
        """Remember further addresses where this peer may be reached, behind those already known.

        Raises:
            InvalidValueError: one leads to another peer.
        """
        known = next((entry.addresses for entry in self.config.addresses if entry.peer == peer), ())
        self.set_addresses(peer, (*known, *(address for address in addresses if address not in known)))

    def set_addresses(self, peer: PeerId, addresses: Sequence[Multiaddr]) -> None:
        """Remember exactly these addresses of this peer; none forgets them.

        Raises:
            InvalidValueError: one leads to another peer.
        """
        for address in addresses:
            if address.peer_id not in (None, peer):
                raise InvalidValueError(f"{address} leads to another peer, {address.peer_id}")
        for address, why in unused_addresses(addresses):
            raise InvalidValueError(f"{address} {why}")
        # The file may name the peer in its other text form; then that entry is the one to change.
        keys = [key for key in parse_yaml(self.text).get("addresses") or {} if _same_peer(key, peer)]
        key = keys[0] if keys else str(peer)
        if addresses:
            self._set(("addresses", key), [str(address) for address in dict.fromkeys(addresses)])
        else:
            self._delete(("addresses", key))

    def add_relays(self, addresses: Sequence[Multiaddr]) -> tuple[Multiaddr, ...]:
        """Keep a reservation at these relays, too; those of the addresses that are new.

        Raises:
            InvalidValueError: one has no peer id at its end, no port, or leads through a relay itself.
        """
        for address in addresses:
            if address.peer_id is None:
                raise InvalidValueError(f"{address} does not end with the relay's peer id; append /p2p/<peer id>")
            if address.is_relayed:
                raise InvalidValueError(f"{address} leads through a relay; give the address of the relay itself")
            if why := why_undialable(address):
                raise InvalidValueError(f"{address} {why}")
        known = self.config.relay.addresses
        if len({address.peer_id for address in (*known, *addresses)}) > MAX_RELAYS:
            raise InvalidValueError(
                f"a node uses at most {MAX_RELAYS} relays; remove one that is not needed: peerup relay remove PEER"
            )
        added = tuple(address for address in dict.fromkeys(addresses) if address not in known)
        if added:
            self._set(("relay", "addresses"), [*self._written_relays(), *map(str, added)])
        return added

    def remove_relays(self, which: PeerId | Multiaddr) -> tuple[Multiaddr, ...]:
        """Want no reservation at this relay, or not at this address, any more; the addresses that were removed.

        Raises:
            ConfigEditError: `not-found`.
        """
        known = self.config.relay.addresses
        if isinstance(which, PeerId):
            removed = [address for address in known if address.peer_id == which]
        else:
            removed = [address for address in known if which in (address, address.without_peer_id())]
        if not removed:
            there = ", ".join(map(str, known)) or "none"
            raise ConfigEditError("not-found", f"there is no relay {which} in {self._path} (there are: {there})")
        written = zip(self._written_relays(), known, strict=True)
        self._set(("relay", "addresses"), [text for text, address in written if address not in removed])
        return tuple(dict.fromkeys(removed))

    def _written_relays(self) -> list[str]:
        """The relays as the file has them: one address has several spellings."""
        return [str(text) for text in (parse_yaml(self.text).get("relay") or {}).get("addresses") or ()]

    def _need_service(self, name: str) -> None:
        if not any(service.name == name for service in self.config.services):
            known = ", ".join(sorted(service.name for service in self.config.services)) or "none"
            raise ConfigEditError("not-found", f"there is no service {name!r} in {self._path} (there are: {known})")

    def _set(self, path: tuple[str, ...], value: object) -> None:
        self._become(set_value(self.text, path, value))

    def _delete(self, path: tuple[str, ...]) -> None:
        self._become(delete_value(self.text, path))

    def _become(self, text: str) -> None:
        self.config = parse_config(text, self._path)
        self.text = text


@contextlib.contextmanager
def edit_config(path: Path, *, timeout: float = LOCK_SECONDS) -> Iterator[ConfigEditor]:
    """Edit the file under its lock; what the block has changed is saved at its end, unless it raises.

    Raises:
        FileError: it cannot be locked, read or written; the file is as it was.
        ConfigError: it is already broken.
    """
    if not path.parent.exists():
        read_config_text(path)  # says better than the lock what is missing
    with locked(path, timeout=timeout):
        editor = ConfigEditor(path)
        before = editor.text
        yield editor
        if editor.text != before:
            write_atomic(path, editor.text.encode())


def read_config_text(path: Path) -> str:
    """The text of this configuration file.

    Raises:
        FileError: it cannot be read, or others may write to it.
        ConfigError: it is not UTF-8.
    """
    try:
        content, status = read_limited(path, MAX_CONFIG_BYTES)
    except FileMissingError as error:
        raise FileMissingError(f"there is no configuration at {path}; make one with: peerup init") from error
    check_not_writable_by_others(path, status)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(path, (Problem("", "not UTF-8 text", line),)) from error


def load_readable(path: Path) -> NodeConfig:
    """Of a file that cannot be used, what grants something and can be read by itself (`read_readable`).

    A file that others may write to is read as well: it can only take away.

    Raises:
        BusyError: this machine is short of something; nothing is known of the file.
    """
    try:
        content, _ = read_limited(path, MAX_CONFIG_BYTES)
    except BusyError:
        raise
    except FileError:
        content = b""
    text = content.decode("utf-8-sig", "replace")
    try:
        values = parse_yaml(text)
    except YamlSyntaxError:
        values = parse_parts(text)
    return read_readable(values, path)


@functools.lru_cache(maxsize=1)
def parse_config(text: str, path: Path) -> NodeConfig:
    """The configuration in this text, which is (or was, or shall be) that of the file at `path`.

    The last one is remembered, so a process that was forked from one that has parsed the same text need not do it
    again; parsing a small file costs a process 3 MB and 10 ms.

    Raises:
        ConfigError: it is not YAML, or says something that cannot be.
    """
    try:
        values = parse_yaml(text)
    except YamlSyntaxError as error:
        raise ConfigError(path, (error.problem,)) from error
    return read_config(values, path)


def _same_peer(key: object, peer: PeerId) -> bool:
    try:
        return PeerId.from_text(str(key)) == peer
    except InvalidValueError:
        return False
