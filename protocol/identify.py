"""Identify and identify-push: who a peer is, what it speaks, where it can be reached (libp2p specs, identify/).

On `/ipfs/id/1.0.0` the side that was asked, and on `/ipfs/id/push/1.0.0` the side that opened the stream, sends
its description and closes. The description is one message or several behind their lengths, which the receiver
merges: single fields of later messages win, lists are joined. A push may leave out what did not change.

All of it is a peer's own word about itself, except what its key proves: the connection's peer id must match the
public key, and the signed peer record must be the peer's own. Texts are stripped of what could harm a terminal.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Sequence
from typing import ClassVar, Final

from google.protobuf.message import DecodeError

from protocol.delimited import DelimitedReader, encode_delimited
from protocol.errors import LimitExceededError, ProtocolError
from protocol.keys import KeyFormatError, PublicKey
from protocol.multiaddr import Multiaddr, MultiaddrError
from protocol.pb import identify_pb2
from protocol.peer_id import PeerId
from protocol.peer_record import PeerRecord, open_peer_record, parse_addresses
from protocol.signed_envelope import EnvelopeTypeError

MAX_MESSAGE: Final = 8 * 1024
"""The longest single message in bytes; go-libp2p and js-libp2p take no longer one either."""

MAX_MESSAGES: Final = 10
"""The most messages merged into one description, as in go-libp2p."""

MAX_TOTAL: Final = 32 * 1024
"""The most bytes of all messages of one description."""

MAX_ADDRESSES: Final = 64
"""The most listen addresses kept of one peer."""

MAX_PROTOCOLS: Final = 256
"""The most protocol ids kept of one peer."""

MAX_PROTOCOL_LENGTH: Final = 256
"""The longest protocol id in characters that is kept."""

MAX_VERSION_LENGTH: Final = 128
"""Agent and protocol versions are cut to so many characters."""


class IdentifyError(ProtocolError):
    """A peer's description of itself is broken, or does not belong to it."""

    code: ClassVar[str] = "bad-identify"


@dataclasses.dataclass(frozen=True, slots=True)
class Identification:
    """What a peer says of itself. None or empty: it did not say.

    Attributes:
        public_key: proved to be the peer's.
        protocol_version, agent_version: printable and cut to `MAX_VERSION_LENGTH`.
        protocols: what it serves, without texts that cannot be a protocol id.
        listen_addresses: where it says it listens; those that are unknown here are left out.
        observed_address: where it saw us come from.
        peer_record: its signed record, verified to be its own.
        signed_peer_record: the envelope around that record, to be kept and passed on.
    """

    public_key: PublicKey | None = None
    protocol_version: str | None = None
    agent_version: str | None = None
    protocols: tuple[str, ...] = ()
    listen_addresses: tuple[Multiaddr, ...] = ()
    observed_address: Multiaddr | None = None
    peer_record: PeerRecord | None = None
    signed_peer_record: bytes | None = None

    def updated_by(self, push: Identification) -> Identification:
        """This description with what a push says put in place of what it said before.

        A peer record is taken only if its `seq` is greater (RFC 0003).
        """
        changes = {
            field.name: value
            for field in dataclasses.fields(push)
            if field.name not in {"peer_record", "signed_peer_record"} and (value := getattr(push, field.name))
        }
        if push.peer_record is not None and push.peer_record.replaces(self.peer_record):
            changes |= {"peer_record": push.peer_record, "signed_peer_record": push.signed_peer_record}
        return dataclasses.replace(self, **changes)


class IdentifyReader:
    """Takes what arrives on an identify or push stream, and makes an `Identification` of it at its end."""

    __slots__ = ("_merged", "_messages", "_reader", "_total")

    def __init__(self) -> None:
        self._reader = DelimitedReader(MAX_MESSAGE)
        self._merged = identify_pb2.Identify()
        self._messages = 0
        self._total = 0

    def receive_data(self, data: bytes) -> None:
        """Take bytes from the peer, in any pieces.

        Raises:
            IdentifyError: a message cannot be parsed.
            LimitExceededError: a message is too long, or there are too many or too many bytes of them.
            VarintError: a length is broken.
        """
        self._total += len(data)
        if self._total > MAX_TOTAL:
            raise LimitExceededError(f"an identify stream brought more than {MAX_TOTAL} bytes")
        self._reader.receive_data(data)
        while (message := self._reader.next_message()) is not None:
            self._messages += 1
            if self._messages > MAX_MESSAGES:
                raise LimitExceededError(f"an identify stream brought more than {MAX_MESSAGES} messages")
            try:
                # MergeFromString is protobuf's own merge: the one that the messages are made for.
                self._merged.MergeFromString(message)
            except DecodeError:
                raise IdentifyError("an identify message cannot be parsed") from None

    def finish(self, peer: PeerId) -> Identification:
        """The whole description, when the peer has closed its side. `peer` is who the secure channel says it is.

        Raises:
            IdentifyError: nothing arrived, or the public key or the peer record is not this peer's.
            ProtocolError: the peer record's envelope is broken (see `protocol.peer_record.open_peer_record`).
            TruncatedMessageError: the stream ended in the middle of a message.
        """
        self._reader.finish()
        if self._messages == 0:
            raise IdentifyError("the peer closed the identify stream without a message")
        return _identification(self._merged, peer)


def _identification(message: identify_pb2.Identify, peer: PeerId) -> Identification:
    record = None
    if message.HasField("signed_peer_record") and message.signed_peer_record:
        # rust-libp2p signs records of an older type that nobody else knows: as good as none, and no reason to take
        # nothing of what the peer says.
        with contextlib.suppress(EnvelopeTypeError):
            record = open_peer_record(message.signed_peer_record)
        if record is not None and record.peer_id != peer:
            raise IdentifyError(f"{peer} sent a peer record of {record.peer_id}")
    return Identification(
        public_key=_public_key(message.public_key, peer) if message.public_key else None,
        protocol_version=printable(message.protocol_version) if message.HasField("protocol_version") else None,
        agent_version=printable(message.agent_version) if message.HasField("agent_version") else None,
        protocols=_protocols(message.protocols),
        listen_addresses=parse_addresses(message.listen_addrs, MAX_ADDRESSES),
        observed_address=_address(message.observed_addr) if message.observed_addr else None,
        peer_record=record,
        signed_peer_record=message.signed_peer_record if record is not None else None,
    )


def _public_key(data: bytes, peer: PeerId) -> PublicKey:
    try:
        key = PublicKey.from_protobuf(data)
    except KeyFormatError as error:
        raise IdentifyError(f"{peer} sent a public key that is none: {error}") from None
    if key.peer_id != peer:
        raise IdentifyError(f"{peer} sent the public key of {key.peer_id}")
    return key


def _protocols(raw: Iterable[bytes]) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for data in raw:
        if len(found) == MAX_PROTOCOLS:
            break
        text = data.decode("utf-8", "replace")
        if 1 <= len(text) <= MAX_PROTOCOL_LENGTH and text.isprintable() and "\N{REPLACEMENT CHARACTER}" not in text:
            found[text] = None
    return tuple(found)


def _address(data: bytes) -> Multiaddr | None:
    try:
        return Multiaddr.from_bytes(data)
    except MultiaddrError:
        return None


def printable(data: bytes, longest: int = MAX_VERSION_LENGTH) -> str:
    """A stranger's text for logs and terminals: cut, and with a replacement character for what cannot be printed."""
    text = data[: longest * 4].decode("utf-8", "replace")[:longest]
    return "".join([character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text])


def encode_identification(
    *,
    public_key: bytes,
    agent_version: str,
    protocol_version: str,
    protocols: Sequence[str],
    listen_addresses: Sequence[Multiaddr],
    observed_address: Multiaddr | None = None,
    signed_peer_record: bytes | None = None,
) -> bytes:
    """All bytes to send on an identify or push stream before closing it.

    One message where everything fits into `MAX_MESSAGE`, because js-libp2p reads only one; otherwise the
    essentials come first, and addresses and protocols follow in further messages.

    Args:
        public_key: in its libp2p protobuf form (`Identity.public_key` of the keyring).
        agent_version: such as `peerup/0.1.0`.
        protocol_version: the family of protocols, such as `peerup/0.1.0`.
        protocols: what this node serves to that peer.
        listen_addresses: without `/p2p/…`; at most `MAX_ADDRESSES`, further ones are left out.
        observed_address: where the peer is seen to come from; None if that says nothing (a relay's socket).
        signed_peer_record: the envelope that the keyring made.

    Raises:
        LimitExceededError: more than a receiver takes.
    """
    first = identify_pb2.Identify(
        public_key=public_key,
        agent_version=agent_version.encode("utf-8"),
        protocol_version=protocol_version.encode("utf-8"),
    )
    if observed_address is not None:
        first.observed_addr = observed_address.to_bytes()
    addresses = [address.to_bytes() for address in listen_addresses[:MAX_ADDRESSES]]
    names = [protocol.encode("utf-8") for protocol in protocols]
    parts = [first]
    for field, value in (
        [("signed_peer_record", signed_peer_record)]
        + [("protocols", name) for name in names]
        + [("listen_addrs", address) for address in addresses]
    ):
        if value is None:
            continue
        extra = identify_pb2.Identify()
        _put(extra, field, value)
        if parts[-1].ByteSize() + extra.ByteSize() > MAX_MESSAGE:
            parts.append(identify_pb2.Identify())
        _put(parts[-1], field, value)
    data = b"".join([encode_delimited(part.SerializeToString()) for part in parts])
    if len(parts) > MAX_MESSAGES or len(data) > MAX_TOTAL or any(part.ByteSize() > MAX_MESSAGE for part in parts):
        raise LimitExceededError(f"an identification of {len(data)} bytes is more than a peer takes")
    return data


def _put(message: identify_pb2.Identify, field: str, value: bytes) -> None:
    if field == "signed_peer_record":
        message.signed_peer_record = value
    elif field == "protocols":
        message.protocols.append(value)
    else:
        message.listen_addrs.append(value)
