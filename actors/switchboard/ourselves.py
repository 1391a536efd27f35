"""What this node says of itself: its addresses, what it serves, and the signed record of both.

Addresses are those of the listening sockets and what other actors announce (a relayed address, the public one of a
translated machine). When anything of it changes the record is signed anew, and each connected peer is sent a push.
"""

from __future__ import annotations

from collections.abc import Callable

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from actors.switchboard.connections import Connection, ConnectionTable
from actors.switchboard.errors import TooManyError
from actors.switchboard.identify import OwnDescription
from actors.switchboard.interfaces import expand, machine_addresses
from actors.switchboard.listeners import Listeners
from actors.switchboard.own_machine import IpAddress, OwnMachine
from actors.switchboard.protocols import ProtocolTable
from actors.switchboard.version import AGENT
from protocol.messages.keyring import SignNoiseStaticKey, SignPeerRecord
from protocol.multiaddr import Multiaddr
from protocol.noise import Identity as NoiseIdentity
from protocol.peer_id import PeerId
from supervisor.actor import Context
from supervisor.errors import AskError

KEYRING = "keyring"

KEYRING_DEADLINE = 5.0
"""Seconds for the keyring to sign."""
MAX_ANNOUNCED = 64
"""Addresses that one actor may announce: more would not fit into the messages that tell them."""


async def noise_key(context: Context) -> tuple[X25519PrivateKey, NoiseIdentity]:
    """A Noise key for the life of this process, and the word of the node's identity that it is its own.

    Raises:
        AskError: the keyring does not sign.
    """
    static = X25519PrivateKey.generate()
    request = SignNoiseStaticKey(static.public_key().public_bytes_raw())
    signature = await context.ask(KEYRING, request, timeout=KEYRING_DEADLINE)
    return static, NoiseIdentity(signature.public_key, signature.signature)


class Ourselves:
    """See the module.

    Args:
        public_key: the node's, in the libp2p protobuf form.
        protocols_for: the protocols that the peer of a connection may use.
    """

    def __init__(
        self,
        context: Context,
        public_key: bytes,
        *,
        listeners: Listeners,
        protocols: ProtocolTable,
        table: ConnectionTable,
        protocols_for: Callable[[Connection], tuple[str, ...]],
    ) -> None:
        self._context = context
        self._public_key = public_key
        self._listeners = listeners
        self._protocols = protocols
        self._table = table
        self._may_use = protocols_for
        self._announcements: dict[str, tuple[tuple[Multiaddr, ...], bool]] = {}
        self._record: bytes | None = None
        self._record_seq = 0
        self._described: tuple[object, ...] = ()

    def announced(self) -> tuple[Multiaddr, ...]:
        """Where this node says that it can be reached."""
        told = [address for addresses, _ in self._announcements.values() for address in addresses]
        if not any(instead for _, instead in self._announcements.values()):
            told = [address for listener in self._listeners for address in expand(listener.address)] + told
        return tuple(dict.fromkeys(told))

    def machine(self) -> OwnMachine:
        """What is known of this machine's addresses.

        What one peer says that it sees may be a lie; what two say counts.
        """
        seen: dict[IpAddress, set[PeerId]] = {}
        for connection in self._table:
            told = connection.identification
            ip = told.observed_address.ip if told is not None and told.observed_address is not None else None
            if ip is not None and not connection.relayed:
                seen.setdefault(ip, set()).add(connection.peer)
        observed = [ip for ip, peers in seen.items() if len(peers) > 1]
        listening = [listener.address for listener in self._listeners]
        return OwnMachine.of(machine_addresses(link_local=True), [*listening, *self.announced()], observed)

    def announce(self, actor: str, addresses: tuple[Multiaddr, ...], *, instead: bool) -> None:
        """This actor says where the node can be reached, too; in place of what it said before.

        Raises:
            TooManyError: more addresses than peers could be told.
        """
        if len(addresses) > MAX_ANNOUNCED:
            raise TooManyError(f"{len(addresses)} addresses; at most {MAX_ANNOUNCED} can be announced")
        if addresses:
            self._announcements[actor] = (addresses, instead)
        else:
            self._announcements.pop(actor, None)

    def withdraw(self, actor: str) -> bool:
        """This actor is gone; whether it had announced anything."""
        return self._announcements.pop(actor, None) is not None

    def describe(self) -> OwnDescription:
        """What identify tells."""
        return OwnDescription(self._public_key, AGENT, self.announced(), self._record)

    def protocols_for(self, connection: Connection) -> tuple[str, ...]:
        """The protocols served here that the peer of a connection may use."""
        may_use = set(self._may_use(connection))
        return tuple(protocol for protocol in self._protocols.names() if protocol in may_use)

    async def tell_anew(self, push: Callable[[Connection], object]) -> None:
        """If what we say of ourselves has changed: have the record signed, and `push` it to the connected peers."""
        addresses = self.announced()
        described = (addresses, self._protocols.names())
        if described == self._described:
            return
        signed_before, self._described = self._described, described
        if not signed_before or signed_before[0] != addresses:
            await self._sign(addresses)
        for connection in self._table:
            if not connection.draining:
                push(connection)

    async def _sign(self, addresses: tuple[Multiaddr, ...]) -> None:
        self._record_seq = seq = max(self._record_seq + 1, int(self._context.wall() * 1000))
        try:
            signed = await self._context.ask(KEYRING, SignPeerRecord(addresses, seq), timeout=KEYRING_DEADLINE)
        except AskError as error:
            self._context.log.warning("the peer record is not signed: {}", error)
            record = None
        else:
            record = signed.envelope
        if seq == self._record_seq:  # else a newer one was asked for meanwhile
            self._record = record
