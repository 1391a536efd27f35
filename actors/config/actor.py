"""The actor `config`: publishes the configuration, resolves names, and keeps the desired proxies and services running.

Theory of operation. `config.yaml` is read at the start, when the watch sees it change, and on `ReloadConfig`. Of one
that cannot be used, only that counts which narrows what was in force and can be read by itself (`protocol.narrowing`,
decision 16); otherwise the last good configuration stays in force, and the problems are reported. A good one is kept in
a second file, so that a successor of this actor can go on with it even while the file is broken.

What runs follows from two lists: the enabled services of the configuration, and the desired proxies in
`state/proxies.yaml`; and, while relays are configured, the keeper of reservations runs.
:class:`~actors.config.reconciler.Reconciler` makes the children of the supervisor `proxies` agree with that, whenever
it changes or that supervisor comes (back) up.
"""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import trio

from actors.config.changes import describe_changes, describe_narrowing, not_live
from actors.config.file import load_readable, parse_config, read_config_text
from actors.config.proxies_file import DesiredProxy, ProxiesFileError, load_proxies, save_proxies
from actors.config.reconciler import KEEPER, Reconciler, proxy_child, service_child
from actors.config.schema import ConfigError, NodeConfig, check_proxy_listen, parse_listen_address
from actors.files import BusyError, FileError, digest_of, read_limited, write_atomic
from actors.publication import Publication
from actors.watch import watch_file
from protocol.errors import InvalidValueError
from protocol.messages import Data
from protocol.messages.config import (
    UNIX,
    AddProxy,
    ConfigReloaded,
    ConfigSnapshot,
    Proxies,
    ProxyAdded,
    ProxyEntry,
    ReadProxies,
    RelayService,
    ReloadConfig,
    RemoveProxy,
    Resolve,
    Resolved,
    ServiceEntry,
    SubscribeConfig,
)
from protocol.messages.system import ActorDown, ActorUp, ChildSpec
from protocol.multiaddr import Multiaddr
from protocol.narrowing import narrowed_config
from protocol.peer_id import PeerId
from protocol.service import ServiceName
from supervisor.actor import Actor, Checkpoint, handles
from supervisor.errors import RefusedError

PROXIES = "proxies"
LOOK_AGAIN = 1.0
"""Seconds until the file is looked at again for which this machine had no descriptor or memory."""

CHECKPOINT_BYTES_BROKEN = 256 * 1024
"""Of more, a successor knows only what the last good file and the broken one say together."""

MAX_PROXIES = 256
"""Each is a process; more are a mistake rather than a wish."""


class Config(Actor):
    """See the module.

    Arguments:
        path: the configuration file.
        proxies: the file of desired proxies.
        watch: whether to watch the configuration file; otherwise only `ReloadConfig` reads it again.
    """

    def __init__(self, path: str, proxies: str, *, watch: bool = True) -> None:
        self._path = Path(path).absolute()
        self._proxies_path = Path(proxies)
        self._last_good_path = self._proxies_path.with_name("config.last-good.yaml")
        self._watch = watch
        self._text = ""  # of the file when it was last looked at, also when it was broken
        self._problems: tuple[str, ...] = ()
        self._withdrawn: tuple[str, ...] = ()  # what a broken file has taken away, in words
        self._desired: dict[str, DesiredProxy] = {}
        self._passing: dict[str, DesiredProxy] = {}  # without a listener; gone when the node ends
        self._proxies_problem = ""
        self._at_start: dict[str, str] = {}  # what counts until the node is started again
        self._config: NodeConfig
        self._snapshot: ConfigSnapshot
        self._reconciler: Reconciler

    async def start(self, checkpoint: Checkpoint | None) -> dict[str, Data]:
        """Read the configuration; only the first of its name gives up when it is broken."""
        self._published = Publication(self.context)
        state = checkpoint.state if checkpoint is not None else {}
        self._config = self._first_config(restarted=checkpoint is not None)
        self._at_start = dict(state.get("at_start") or not_live(self._config))
        self._snapshot = _snapshot(self._config, state.get("version", 0) + 1)
        if self._problems:
            self._snapshot = self._narrowed(_unpack_narrowed(state.get("narrowed"), self._snapshot))
        self._load_desired()
        self._passing = {actor: _passing(actor, packed) for actor, packed in state.get("passing", {}).items()}
        self._reconciler = Reconciler(
            self.context, PROXIES, self._wanted_children, dict(state.get("started", {})), self._save_checkpoint
        )
        self._save_checkpoint()
        self._warn()
        self.context.watch(PROXIES)
        self.context.nursery.start_soon(self._reconciler.run)
        if self._watch:
            self.context.nursery.start_soon(watch_file, self._path, self._file_changed)
        return {"version": self._snapshot.version}

    def describe(self) -> dict[str, Data]:
        """The configuration in short, what is wrong with it, and what should run because of it."""
        return {
            "file": str(self._path),
            "version": self._snapshot.version,
            "gating": self._snapshot.gating,
            "services": {service.name: service.address for service in self._snapshot.services if service.enabled},
            "relays": [str(address) for address in self._snapshot.relays],
            "names": {entry.name: str(entry.peer) for entry in self._snapshot.names},
            "proxies": {actor: proxy.listen for actor, proxy in self._desired.items()},
            "problems": [
                *self._not_whole(),
                *self._problems,
                *([self._proxies_problem] if self._proxies_problem else []),
            ],
            "warnings": [str(warning) for warning in self._config.warnings],
            "after_restart": [key for key, value in not_live(self._config).items() if self._at_start.get(key) != value],
            "subscribers": list(self._published.subscribers),
            "behind": list(self._published.behind),
            "children": self._reconciler.describe(),
        }

    @handles(SubscribeConfig)
    async def subscribe(self, request: SubscribeConfig) -> ConfigSnapshot:
        """Answer with the configuration, and tell the sender each later one."""
        self._published.subscribe(self.context.current_sender)
        return self._snapshot

    @handles(ReloadConfig)
    async def reload(self, request: ReloadConfig) -> ConfigReloaded:
        """Read the file now."""
        self._published.hurry()
        changes = self._read(force=True)
        return ConfigReloaded(
            self._snapshot.version,
            changes,
            self._problems,
            str(self._path),
            digest_of(self._text.encode()) if self._text else "",
            tuple(map(str, self._config.warnings)),
        )

    @handles(Resolve)
    async def resolve(self, request: Resolve) -> Resolved:
        """Find the peer behind a name or a peer id."""
        return self._resolve(request.name)

    @handles(AddProxy, concurrent=True)
    async def add_proxy(self, request: AddProxy) -> ProxyAdded:
        """Have a proxy listen, and keep it."""
        wanted = self._new_proxy(request)
        async with self._reconciler.exclusive():
            present = self._desired.get(wanted.actor) or self._passing.get(wanted.actor)
            if present is not None and present.peer == wanted.peer and _serves(present, request):
                if not self._reconciler.is_started(present.actor):
                    await self._reconciler.start(self._proxy_child(present))
                return ProxyAdded(self._entry(present, "running"), created=False)
            if present is not None and wanted.actor not in self._passing:
                raise RefusedError(
                    "already-exists",
                    f"{present.actor} exists already and listens at {present.listen}",
                    f"stop it first: peerup proxy stop {present.peer_name} {present.service}",
                )
            if len(self._desired) + len(self._passing) >= MAX_PROXIES:
                raise RefusedError("limit-exceeded", f"there are {MAX_PROXIES} proxies already")
            if present is not None:  # it had no listener and is to get one
                await self._reconciler.stop(present.actor)
                del self._passing[present.actor]
            ready = await self._reconciler.start(self._proxy_child(wanted))
            added = dataclasses.replace(wanted, listen=str(ready.get("listen") or ""))
            if request.listen is None:
                self._passing[added.actor] = added
            else:
                await self._keep(added)
            self._reconciler.adopt(self._proxy_child(added))
        self.context.log.info("{} listens at {}", added.actor, added.listen or "nothing")
        return ProxyAdded(self._entry(added, "running"), created=True)

    @handles(RemoveProxy, concurrent=True)
    async def remove_proxy(self, request: RemoveProxy) -> None:
        """Stop a proxy and forget it."""
        async with self._reconciler.exclusive():
            kept = self._desired.pop(request.actor, None)
            if kept is None and self._passing.pop(request.actor, None) is None:
                known = ", ".join(sorted((*self._desired, *self._passing))) or "none"
                raise RefusedError("not-found", f"there is no proxy {request.actor!r} (there are: {known})")
            if kept is not None:
                try:
                    save_proxies(self._proxies_path, list(self._desired.values()))
                except FileError as error:
                    self._desired[request.actor] = kept
                    raise RefusedError(error.code, str(error)) from error
            await self._reconciler.stop(request.actor)

    @handles(ReadProxies, concurrent=True)
    async def read_proxies(self, request: ReadProxies) -> Proxies:
        """All proxies and how they are."""
        states = await self._reconciler.states()
        entries = [self._entry(proxy, states.get(proxy.actor, "down")) for proxy in self._all_proxies()]
        return Proxies(tuple(sorted(entries, key=lambda entry: entry.actor)))

    @handles(ActorUp)
    async def actor_up(self, message: ActorUp) -> None:
        """A new supervisor of proxies has no children: give it ours."""
        if message.name == PROXIES:
            self._reconciler.supervisor_restarted()

    @handles(ActorDown)
    async def actor_down(self, message: ActorDown) -> None:
        """Forget a subscriber; its successor subscribes anew."""
        self._published.forget(message.name)

    def _first_config(self, *, restarted: bool) -> NodeConfig:
        try:
            self._text = read_config_text(self._path)
            config = parse_config(self._text, self._path)
        except (ConfigError, FileError) as error:
            if not restarted:
                raise
            # The node is running with a configuration that was good. It must not end because the file is broken now.
            self._note_problems(error)
            return parse_config(read_config_text(self._last_good_path), self._path)
        self._keep_last_good(self._text)
        return config

    async def _file_changed(self) -> None:
        self._read(force=False)

    def _read(self, *, force: bool) -> tuple[str, ...]:
        """Look at the file, and take it over if it is good, else what of it narrows what is in force; what changed."""
        try:
            text = ""
            text = read_config_text(self._path)
            if text == self._text and not self._problems and not force:
                return ()
            config = parse_config(text, self._path)
        except BusyError as error:
            self.context.log.warning("{}; what is in force stays so until it can be read", error)
            self.context.nursery.start_soon(self._look_again)
            self._text = ""
            return ()
        except (ConfigError, FileError) as error:
            again = _texts(error) == self._problems and text == self._text
            self._text = text
            if force or not again:
                self._note_problems(error)
                self._publish(self._narrowed(self._snapshot))
                self._tell_narrowing()
            return ()
        self._text = text
        self._problems = self._withdrawn = ()
        self.context.metrics.gauge("peerup_config_problems").set(0)
        changes = describe_changes(self._config, config)
        self._config = config
        self._keep_last_good(text)
        if changes:
            self._warn()
            self.context.log.info("configuration changed: {}", "; ".join(changes))
        self._publish(_snapshot(config, self._snapshot.version))
        self._follow_names()
        return changes

    async def _look_again(self) -> None:
        await trio.sleep(LOOK_AGAIN)
        self._read(force=False)

    def _narrowed(self, snapshot: ConfigSnapshot) -> ConfigSnapshot:
        """What of this snapshot the broken file still allows."""
        try:
            readable = load_readable(self._path)
        except BusyError as error:
            self.context.log.warning("{}; what is in force stays so until it can be read", error)
            self.context.nursery.start_soon(self._look_again)
            return snapshot
        narrowed = narrowed_config(snapshot, _snapshot(readable, snapshot.version))
        self._withdrawn = describe_narrowing(_snapshot(self._config, 0), narrowed)
        return narrowed

    def _tell_narrowing(self) -> None:
        for line in self._not_whole():
            self.context.log.error("{}", line)

    def _not_whole(self) -> list[str]:
        """What it means for what is in force that the file cannot be used; nothing if it can."""
        if not self._problems:
            return []
        taken = "; ".join(self._withdrawn) or "so far nothing"
        return [
            f"{self._path} cannot be used: what it takes away counts ({taken}), all else waits until it is repaired"
        ]

    def _publish(self, snapshot: ConfigSnapshot) -> None:
        if dataclasses.replace(snapshot, version=self._snapshot.version) == self._snapshot:
            self._save_checkpoint()
            return
        self._snapshot = dataclasses.replace(snapshot, version=self._snapshot.version + 1)
        self._save_checkpoint()
        self._published.publish(self._snapshot)
        self._reconciler.wake()

    def _follow_names(self) -> None:
        """A proxy was asked for by name; it follows when the name means another peer now."""
        peers = {entry.name: entry.peer for entry in self._snapshot.names}
        moved = [proxy for proxy in self._desired.values() if peers.get(proxy.peer_name, proxy.peer) != proxy.peer]
        for proxy in moved:
            self._desired[proxy.actor] = dataclasses.replace(proxy, peer=peers[proxy.peer_name])
        if moved:
            try:
                save_proxies(self._proxies_path, list(self._desired.values()))
            except FileError as error:
                self.context.log.warning("{}", error)

    def _note_problems(self, error: ConfigError | FileError) -> None:
        self._problems = _texts(error)
        self.context.metrics.gauge("peerup_config_problems").set(len(self._problems))
        for problem in self._problems:
            self.context.log.error("{}", problem)

    def _warn(self) -> None:
        for warning in self._config.warnings:
            self.context.log.warning("{}: {}", self._path, warning)
        if not self._config.security.enable_connection_gating:
            self.context.log.warning(
                "every peer in the world may connect and use services without allowed_peers: "
                "security.enable_connection_gating is false in {}",
                self._path,
            )

    def _keep_last_good(self, text: str) -> None:
        content = text.encode()
        try:
            with contextlib.suppress(FileError):
                if read_limited(self._last_good_path, len(content))[0] == content:
                    return
            write_atomic(self._last_good_path, content, mode=0o600)
        except FileError as error:
            self.context.log.warning("{}", error)

    def _load_desired(self) -> None:
        try:
            self._desired = {proxy.actor: proxy for proxy in load_proxies(self._proxies_path)}
        except (ProxiesFileError, FileError) as error:
            self._proxies_problem = str(error)
            self.context.log.warning("the proxies asked for earlier are not started: {}", error)

    async def _keep(self, proxy: DesiredProxy) -> None:
        """Remember a proxy that was just started; if that fails it is not started after all."""
        if self._proxies_problem:
            await self._reconciler.stop(proxy.actor)
            raise RefusedError(
                "bad-proxies-file", self._proxies_problem, f"repair it, or remove it: {self._proxies_path}"
            )
        try:
            save_proxies(self._proxies_path, [*self._desired.values(), proxy])
        except FileError as error:
            await self._reconciler.stop(proxy.actor)
            raise RefusedError(error.code, str(error)) from error
        self._desired[proxy.actor] = proxy

    def _new_proxy(self, request: AddProxy) -> DesiredProxy:
        """What is asked for, checked."""
        peer = self._resolve(request.peer).peer
        try:
            service = ServiceName(request.service)
        except InvalidValueError as error:
            raise RefusedError("bad-name", str(error)) from error
        if request.listen is not None:
            try:
                check_proxy_listen(request.listen, only_me=request.only_me)
            except InvalidValueError as error:
                raise RefusedError("bad-address", str(error)) from error
        actor = f"proxy/{request.peer}/{service}"
        return DesiredProxy(actor, peer, request.peer, str(service), request.listen or "", request.only_me)

    def _resolve(self, name: str) -> Resolved:
        """A text that is a peer id means that peer; anything else is a name."""
        with contextlib.suppress(InvalidValueError):
            return Resolved(PeerId.from_text(name), "peer-id")
        for entry in self._snapshot.names:
            if entry.name == name:
                return Resolved(entry.peer, "config")
        known = ", ".join(sorted(entry.name for entry in self._snapshot.names)) or "none"
        raise RefusedError(
            "unknown-peer",
            f"{name[:80]!r} is neither a peer id nor a name (known names: {known})",
            "name a peer with: peerup names add NAME PEER_ID",
        )

    def _all_proxies(self) -> list[DesiredProxy]:
        return [*self._desired.values(), *self._passing.values()]

    def _wanted_children(self) -> dict[str, ChildSpec]:
        """Every child that the supervisor of proxies should have."""
        limit = self._config.limits.connections_per_service
        services = [service_child(service, limit) for service in self._snapshot.services if service.enabled]
        keeper = [KEEPER] if self._snapshot.relays else []
        return {child.name: child for child in (*services, *map(self._proxy_child, self._all_proxies()), *keeper)}

    def _proxy_child(self, proxy: DesiredProxy) -> ChildSpec:
        return proxy_child(proxy, self._config.limits.connections_per_service)

    def _entry(self, proxy: DesiredProxy, state: str) -> ProxyEntry:
        starting = proxy.listen.endswith(":0") and not proxy.listen.startswith(UNIX)
        listen = "" if starting else proxy.listen
        return ProxyEntry(proxy.actor, proxy.peer, proxy.peer_name, proxy.service, listen, state, proxy.only_me)

    def _save_checkpoint(self) -> None:
        passing = {
            actor: [proxy.peer.to_wire(), proxy.peer_name, proxy.service] for actor, proxy in self._passing.items()
        }
        self.context.checkpoint(
            {
                "version": self._snapshot.version,
                "started": self._reconciler.started,
                "passing": passing,
                "at_start": self._at_start,
                "narrowed": _pack_narrowed(self._snapshot) if self._problems else None,
            }
        )


def _passing(actor: str, packed: list[Any]) -> DesiredProxy:
    """A proxy without listener, out of a checkpoint."""
    peer, peer_name, service = packed
    return DesiredProxy(actor, PeerId.from_wire(peer), peer_name, service, "")


def _serves(present: DesiredProxy, request: AddProxy) -> bool:
    """Whether this proxy is what is asked for: port 0 and no listener at all are content with any."""
    listen = request.listen
    if listen is None:
        return True
    if not present.listen or present.only_me != request.only_me:
        return False
    if present.listen.startswith(UNIX) or listen.startswith(UNIX):
        return present.listen == listen
    (have_host, have_port), (host, port) = parse_listen_address(present.listen), parse_listen_address(listen)
    return have_host == host and port in (0, have_port)


def _snapshot(config: NodeConfig, version: int) -> ConfigSnapshot:
    served = config.relay_service
    return ConfigSnapshot(
        version,
        config.security.enable_connection_gating,
        config.services,
        config.names,
        config.addresses,
        config.relay.addresses,
        RelayService(served.announce_addresses, served.rules) if served.enabled else None,
        config.network.silence_timeout,
    )


def _pack_narrowed(snapshot: ConfigSnapshot) -> Data:
    """What is in force and no file says, as plain data for a checkpoint; None if it is too much."""
    peers = sum(len(service.allowed_peers or ()) for service in snapshot.services)
    if 64 * (peers + len(snapshot.services) + 2 * len(snapshot.relays)) > CHECKPOINT_BYTES_BROKEN:
        return None
    services = [
        [
            service.name,
            service.address,
            service.enabled,
            None if service.allowed_peers is None else [peer.to_wire() for peer in service.allowed_peers],
        ]
        for service in snapshot.services
    ]
    return {"gating": snapshot.gating, "services": services, "relays": [str(address) for address in snapshot.relays]}


def _unpack_narrowed(packed: Data, snapshot: ConfigSnapshot) -> ConfigSnapshot:
    """What of this snapshot was in force before a restart of this actor."""
    if packed is None:
        return snapshot
    services = tuple(
        ServiceEntry(name, address, enabled, None if allowed is None else tuple(map(PeerId.from_wire, allowed)))
        for name, address, enabled, allowed in packed["services"]
    )
    relays = tuple(map(Multiaddr, packed["relays"]))
    return narrowed_config(
        snapshot, dataclasses.replace(snapshot, gating=packed["gating"], services=services, relays=relays)
    )


def _texts(error: ConfigError | FileError) -> tuple[str, ...]:
    if isinstance(error, ConfigError):
        return tuple(f"{error.file}: {problem}" for problem in error.problems)
    return (str(error),)
