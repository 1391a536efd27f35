"""Who may tell a process of the tree what, where it concerns the runtime itself.

Theory of operation. Every process answers messages of the runtime: be stopped, start a child, copy what you send to a
tap. Which of them an actor may send is not the actor's affair but the place that it has in the tree, seen from
the receiver. `RULES` says it for each kind, in one table, and the receiver's exchange asks it before anything else
is done with a message::

    SUPERVISOR   the receiver's own supervisor
    CHILD        a child of the receiver, which is a supervisor then
    STARTER      named in the receiver's own specification as one who may have children started and stopped there
    OPERATOR     named by the node as one who may look into and disturb everything: the control API
    PREDECESSOR  named by the node as one who may let a successor start while this node is still stopping

What the table does not list only reads, and is answered for everybody. What it lists with nobody is never sent: the
receiver's own runtime makes it. A refusal goes to the sender with the reason and is counted.

A sender is a name that the transport has verified: what that proves, and what not, is in docs/architecture.md.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Final

from protocol.messages.system import (
    ActorDown,
    ActorUp,
    DropCheckpoint,
    Hang,
    InjectProcessFault,
    KeepCheckpoint,
    LastWords,
    ReadEstate,
    Ready,
    SaveCheckpoint,
    SetFaults,
    SetLogLevel,
    SetTaps,
    StartChild,
    Stop,
    StopChild,
    SuccessorMayStart,
)
from supervisor.errors import RefusedError


class Role(enum.Enum):
    """What a sender is to the receiver, in words."""

    SUPERVISOR = "its supervisor"
    CHILD = "its children"
    STARTER = "those that it starts children for"
    OPERATOR = "an operator"
    PREDECESSOR = "those that may let a successor start"


RULES: Final[Mapping[str, tuple[Role, ...]]] = MappingProxyType(
    {
        Stop.KIND: (Role.SUPERVISOR,),
        Ready.KIND: (Role.CHILD,),
        LastWords.KIND: (Role.CHILD,),
        SaveCheckpoint.KIND: (Role.CHILD,),
        DropCheckpoint.KIND: (Role.CHILD,),
        ReadEstate.KIND: (Role.CHILD,),
        KeepCheckpoint.KIND: (Role.CHILD, Role.SUPERVISOR),
        StartChild.KIND: (Role.STARTER,),
        StopChild.KIND: (Role.STARTER,),
        SuccessorMayStart.KIND: (Role.PREDECESSOR,),
        SetLogLevel.KIND: (Role.OPERATOR,),
        SetTaps.KIND: (Role.OPERATOR, Role.SUPERVISOR),
        SetFaults.KIND: (Role.OPERATOR, Role.SUPERVISOR),
        InjectProcessFault.KIND: (Role.OPERATOR, Role.SUPERVISOR),
        Hang.KIND: (Role.OPERATOR, Role.SUPERVISOR),
        ActorUp.KIND: (),
        ActorDown.KIND: (),
    }
)
"""Who may send what, see the module."""

CODE: Final = "sender-not-allowed"
"""The code of the refusals."""


class Authority:
    """Who has which role towards one process.

    Arguments:
        supervisor: the name of its supervisor; "" for a process beside the tree, which heeds everybody.
        operators: names of the operators.
        starters: names of those who may have children started here.
        predecessors: names of those who may let a successor of the node start.
        is_child: whether a name is one of its children.
    """

    def __init__(
        self,
        supervisor: str,
        operators: Collection[str] = (),
        *,
        starters: Collection[str] = (),
        predecessors: Collection[str] = (),
        is_child: Callable[[str], bool] = lambda _: False,
    ) -> None:
        self._supervisor = supervisor
        self._operators = frozenset(operators)
        self._starters = frozenset(starters)
        self._predecessors = frozenset(predecessors)
        self._is_child = is_child

    def refusal(self, receiver: str, kind: str, sender: str) -> RefusedError | None:
        """Why this sender may not send this kind to the receiver; None if it may."""
        roles = RULES.get(kind)
        if roles is None or any(self._has(sender, role) for role in roles):
            return None
        if not roles:
            reason = f"{kind} is no message that anybody sends"
        elif not self._supervisor:
            return None
        else:
            reason = f"{receiver} takes {kind} only from {' or '.join(role.value for role in roles)}, not from {sender}"
        return RefusedError(CODE, reason)

    def _has(self, sender: str, role: Role) -> bool:
        match role:
            case Role.SUPERVISOR:
                return sender == self._supervisor
            case Role.CHILD:
                return self._is_child(sender)
            case Role.STARTER:
                return sender in self._starters
            case Role.OPERATOR:
                return sender in self._operators
            case Role.PREDECESSOR:
                return sender in self._predecessors
