"""Messages of the config actor: what the configuration says, and the tunnels that should exist because of it."""

from __future__ import annotations

from typing import Final

from protocol.messages.codec import Message, Request, message, record
from protocol.messages.relay import RelayRules
from protocol.messages.system import Ok
from protocol.multiaddr import Multiaddr
from protocol.peer_id import PeerId

DEFAULT_SILENCE = 900.0
"""Seconds that a connection may be silent unless the configuration says otherwise: about as long as TCP tries."""

UNIX: Final = "unix:"
"""What stands before the path of a Unix socket that a proxy listens at."""


@record
class ServiceEntry:
    """A local TCP service offered to peers. `allowed_peers` None means every authorised peer."""

    name: str
    address: str
    enabled: bool
    allowed_peers: tuple[PeerId, ...] | None


@record
class NameEntry:
    """A friendly name of a peer."""

    name: str
    peer: PeerId


@record
class AddressEntry:
    """Where a peer may be reached, as the person told us."""

    peer: PeerId
    addresses: tuple[Multiaddr, ...]


@record
class RelayService:
    """This node serves as a relay, by these rules.

    `announce` says where it can be reached; if it is empty, that is found out.
    """

    announce: tuple[Multiaddr, ...]
    rules: RelayRules


@message("config.snapshot")
class ConfigSnapshot(Request[Ok]):
    """What the running node needs of its configuration: the answer to `SubscribeConfig`, and sent to each subscriber
    when it changes. Whoever answers has taken it over.

    `relays` are those where this node keeps reservations, each address with its relay's `/p2p/…`. `relay_service` is
    None unless this node serves as a relay itself. `silence` is how many seconds a connection may be silent.
    """

    version: int
    gating: bool
    services: tuple[ServiceEntry, ...]
    names: tuple[NameEntry, ...]
    addresses: tuple[AddressEntry, ...]
    relays: tuple[Multiaddr, ...] = ()
    relay_service: RelayService | None = None
    silence: float = DEFAULT_SILENCE


@message("config.subscribe")
class SubscribeConfig(Request[ConfigSnapshot]):
    """Give me the configuration now and whenever it changes. Subscribe again when the config actor was restarted."""


@message("config.reloaded")
class ConfigReloaded(Message):
    """What a reload found.

    Attributes:
        version: of the snapshot in force. It is being sent to its subscribers, which does not say that it has arrived.
        changes: what has changed, in words.
        problems: what is wrong with the file; then of what it says only that has been taken over which narrows what was
            in force before.
        file: which file that is, with an absolute path.
        digest: the SHA-256 of the text that was read, in hexadecimal; empty if none could be.
        warnings: what is no mistake but has no effect, or is not as it may seem.
    """

    version: int
    changes: tuple[str, ...]
    problems: tuple[str, ...]
    file: str = ""
    digest: str = ""
    warnings: tuple[str, ...] = ()


@message("config.reload")
class ReloadConfig(Request[ConfigReloaded]):
    """Read the configuration file again now."""


@message("config.resolved")
class Resolved(Message):
    """The peer behind a name, and where that was learned: `config` or `peer-id`."""

    peer: PeerId
    source: str


@message("config.resolve")
class Resolve(Request[Resolved]):
    """Find the peer that a person means by a name or a peer id. Refused with `unknown-peer`."""

    name: str


@record
class ProxyEntry:
    """A local listener that leads to a peer's service.

    `actor` is the name of its actor, `proxy/<peer as given>/<service>`; `listen` is `host:port` or `unix:/path`, empty
    while it starts. `only_me` says that it serves only connections of the user as whom the node runs.
    """

    actor: str
    peer: PeerId
    peer_name: str
    service: str
    listen: str
    state: str
    only_me: bool = False


@message("config.proxy-added")
class ProxyAdded(Message):
    """The proxy listens. `created` is False if it already did."""

    proxy: ProxyEntry
    created: bool


@message("config.add-proxy")
class AddProxy(Request[ProxyAdded]):
    """Have a local listener to this peer's service, now and after restarts. Port 0 picks a free one and keeps it.

    Refused with `unknown-peer`, `bad-name`, `port-in-use`, `already-exists` (with another port).
    `listen` None makes a proxy without a listener, for `--stdio` alone; it is not kept. `unix:/path` makes one at a
    Unix socket. `only_me` is for addresses of the loopback interface.
    """

    peer: str
    service: str
    listen: str | None
    only_me: bool = False


@message("config.remove-proxy")
class RemoveProxy(Request[Ok]):
    """Stop the proxy with this actor name and forget it."""

    actor: str


@message("config.proxies")
class Proxies(Message):
    """All proxies."""

    proxies: tuple[ProxyEntry, ...]


@message("config.read-proxies")
class ReadProxies(Request[Proxies]):
    """Ask for all proxies."""
