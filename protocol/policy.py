"""Who may connect and what each may use: pure decisions on an immutable policy.

Default deny: what no rule allows is refused, and each decision names the rule that made it.
"""

from __future__ import annotations

import dataclasses

from protocol.messages.codec import record
from protocol.peer_id import PeerId


@record
class PeerRule:
    """One line of authorized_keys. `expires` is in seconds since the Unix epoch, None for never."""

    peer: PeerId
    line: int
    expires: float | None
    comment: str


@record
class ServiceRule:
    """A service and, if not None, the only peers that may use it."""

    service: str
    allowed_peers: tuple[PeerId, ...] | None


@record
class Policy:
    """Everything that decides. `version` grows with each change.

    `gating` False (peer-up's `enable_connection_gating: false`) lets every peer connect and use
    the services that have no `allowed_peers`; it must be said explicitly.
    """

    version: int
    gating: bool
    peers: tuple[PeerRule, ...]
    services: tuple[ServiceRule, ...]


@dataclasses.dataclass(frozen=True)
class Decision:
    """Allowed or not, and by which rule, such as `authorized_keys:12`, `expired:12`, `not-listed`, `service:ssh`."""

    allowed: bool
    rule: str
