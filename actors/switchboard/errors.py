"""What can go wrong between this node and a peer, each with the reason code that askers are told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Final

from protocol.errors import PeerupError
from supervisor.errors import RefusedError


class SwitchboardError(PeerupError):
    """A connection or stream could not be had."""

    code: ClassVar[str] = "switchboard-error"


class NoAddressesError(SwitchboardError):
    """Nobody has told where the peer may be reached."""

    code: ClassVar[str] = "no-addresses"


class AddressError(SwitchboardError):
    """An address cannot be dialled or listened on: unknown transport, unresolvable name, port in use."""

    code: ClassVar[str] = "bad-address"


class UnreachableError(SwitchboardError):
    """No address of the peer led to a connection. `tried` tells each attempt in words."""

    code: ClassVar[str] = "unreachable"

    def __init__(self, reason: str, tried: Sequence[str] = ()) -> None:
        super().__init__(f"{reason}: {'; '.join(tried)}" if tried else reason)
        self.tried = tuple(tried)


_STAGE_WORDS: Final = {
    "security": "agreeing on encryption",
    "handshake": "proving who we are",
    "judgement": "",  # the reason says all
    "muxer": "agreeing on multiplexing",
    "transport": "first bytes",
    "tls": "TLS",
    "websocket": "WebSocket",
}
"""What a person is told of a stage."""


class HandshakeError(SwitchboardError):
    """The other side did not complete negotiation or the security handshake. `stage` says how far it came."""

    code: ClassVar[str] = "handshake-failed"

    def __init__(self, stage: str, reason: str) -> None:
        words = _STAGE_WORDS.get(stage, stage)
        super().__init__(f"{words}: {reason}" if words else reason)
        self.stage = stage


class WrongPeerError(HandshakeError):
    """Somebody else answers at the peer's address; nothing was said to them beyond the handshake."""

    code: ClassVar[str] = "wrong-peer"


class NotAuthorisedError(HandshakeError):
    """The peer closed the connection as soon as it knew who we are: it does not authorise this node."""

    code: ClassVar[str] = "not-authorised"


class ConnectionLostError(SwitchboardError):
    """The connection ended before the work on it was done."""

    code: ClassVar[str] = "connection-lost"


class CircuitCutError(ConnectionLostError):
    """A circuit through a relay has ended: cut by the relay, or with the connection to it."""

    code: ClassVar[str] = "circuit-cut"


class CircuitLostError(CircuitCutError):
    """A circuit has ended because one of the connections that it ran over has: the peer itself has said nothing."""

    code: ClassVar[str] = "circuit-lost"


class RelayRefusedError(SwitchboardError):
    """A relay refused a circuit, or is none. The reason has its status and what it said."""

    code: ClassVar[str] = "relay-refused"


class RelayUnreachableError(SwitchboardError):
    """There is no connection to the relay that the way leads through."""

    code: ClassVar[str] = "relay-unreachable"


class ProtocolNotSupportedError(SwitchboardError):
    """The peer speaks none of the protocols asked for."""

    code: ClassVar[str] = "protocol-not-supported"


class StreamRefusedError(SwitchboardError):
    """The peer reset the stream before it said anything: by its policy, or because it is overloaded."""

    code: ClassVar[str] = "stream-refused"


class TooManyError(SwitchboardError):
    """A limit of this node is reached."""

    code: ClassVar[str] = "limit-exceeded"


def refusal(error: PeerupError) -> RefusedError:
    """What an actor that asked for something is told when it fails like this."""
    if isinstance(error, RefusedError):
        return error
    action = ""
    if error.code == "no-addresses":
        action = (
            "say where it is: peerup names add NAME PEER_ID --address MULTIADDR;"
            " or name a relay that both of you use: peerup relay add MULTIADDR"
        )
    elif "NO_RESERVATION" in str(error):
        action = "see that the peer's node runs and uses the same relay (there: peerup relay list)"
    elif isinstance(error, WrongPeerError):
        action = "check the address, or the peer id if the peer has a new key"
    return RefusedError(error.code, str(error), action)
