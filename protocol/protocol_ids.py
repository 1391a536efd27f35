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
