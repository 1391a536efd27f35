"""Messages of the gate: who may do what, and what was decided."""

from __future__ import annotations

from protocol.messages.codec import Message, Request, message, record
from protocol.messages.system import Ok
from protocol.peer_id import PeerId
from protocol.policy import Policy


@message("gate.policy")
class PolicyPublished(Request[Ok]):
    """The policy now in force: the answer to `SubscribePolicy`, and sent to each subscriber when it changes.

    Whoever answers that goes by it.
    """

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
    """What was found in authorized_keys, and what of it is in force.

    Attributes:
        version: of the policy. It is being sent to whoever enforces it, which does not say that it has arrived.
        peers: how many peers it lists.
        problems: what is wrong with the file, line 0 for the file as a whole.
        file: which file that is, with an absolute path.
        digest: the SHA-256 of the bytes that were read, in hexadecimal; empty if none could be.
        whole: whether nothing is wrong that matters. Otherwise only what narrows the policy has been taken over.
        waiting: peers (the first 1,000 of them) whose lines allow more than what is in force, until the file is whole.
        withdrawn: how many peers have been refused because no line that can be read allows them any more.
        allowed: whether the peer that was asked about may connect now; None if none was.
        rule: the rule that says so, see `protocol.policy`.
    """

    version: int
    peers: int
    problems: tuple[LineProblem, ...]
    file: str = ""
    digest: str = ""
    whole: bool = True
    waiting: tuple[PeerId, ...] = ()
    withdrawn: int = 0
    allowed: bool | None = None
    rule: str = ""


@message("gate.reload")
class Reload(Request[Reloaded]):
    """Read authorized_keys again now instead of when the file watcher gets to it, and tell what is in force.

    `peer` asks what that means for this peer.
    """

    peer: PeerId | None = None


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
