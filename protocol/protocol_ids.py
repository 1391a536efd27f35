"""The protocol ids of the protocols that every node speaks. Services have `/peerup/<name>/1.0.0`, see `service`."""

from __future__ import annotations

from typing import Final

IDENTIFY: Final = "/ipfs/id/1.0.0"
"""Ask a peer to describe itself."""

IDENTIFY_PUSH: Final = "/ipfs/id/push/1.0.0"
"""Tell a peer what has changed."""

PING: Final = "/ipfs/ping/1.0.0"
"""libp2p's ping."""

PINGPONG: Final = "/pingpong/1.0.0"
"""peer-up's ping."""

CIRCUIT_HOP: Final = "/libp2p/circuit/relay/0.2.0/hop"
"""Circuit relay v2: what a client asks of a relay."""

CIRCUIT_STOP: Final = "/libp2p/circuit/relay/0.2.0/stop"
"""Circuit relay v2: how a relay tells a peer of a circuit to it."""

DELIVERY: Final = "/peerup/stream/delivery/1.0.0"
"""Watch a stream and tell whether all that went into it came out; peerup nodes only."""

RECALL: Final = "/peerup/stream/recall/1.0.0"
"""Have a peer refuse streams of a silent connection that have not reached it; peerup nodes only."""
