"""Messages of the gate: who may do what, and what was decided."""

from __future__ import annotations

from protocol.messages.codec import Message, Request, message, record
from protocol.messages.system import Ok
from protocol.peer_id import PeerId
from protocol.policy import Policy


@message("gate.policy")
class PolicyPublished(Message):
    """The policy now in force; the answer to `SubscribePolicy`, and told to each subscriber when it changes."""

    policy: Policy


@message("gate.subscribe-policy")
class SubscribePolicy(Request[PolicyPublished]):
    """Give me the policy now and whenever it changes. Subscribe again when the gate was restarted."""


@record
class LineProblem:
    """What is wrong with one line (from 1) of authorized_keys."""

    line: int
    reason: str


@message("gate.reloaded")
class Reloaded(Message):
    """What a reload found. With problems the last good policy stays in force and `version` did not grow."""

    version: int
    peers: int
    problems: tuple[LineProblem, ...]


@message("gate.reload")
class Reload(Request[Reloaded]):
    """Read authorized_keys again now instead of when the file watcher gets to it."""


@message("gate.decided")
class Decided(Request[Ok]):
    """To the gate's audit log: one decision about a connection or stream. The answer says that the gate has it.

    Attributes:
        subject: `connection` or the protocol id of the stream.
        allowed, rule: the outcome, and the rule that gave it (see `protocol.policy`).
        path: how the peer is connected, such as `direct tcp /ip4/…`.
        count: so many equal decisions this stands for (floods are folded).
    """

    peer: PeerId | None
    subject: str
    allowed: bool
    rule: str
    path: str
    count: int = 1


@message("gate.tunnel-ended")
class TunnelEnded(Request[Ok]):
    """To the gate's audit log: one tunnelled connection is over. The answer says that the gate has it.

    Attributes:
        role: `client` (we opened it to the peer's service) or `server` (the peer used ours).
        sent, received: bytes, seen from this node.
        duration: seconds.
        outcome: `finished`, or why it broke.
    """

    peer: PeerId
    service: str
    role: str
    path: str
    sent: int
    received: int
    duration: float
    outcome: str
