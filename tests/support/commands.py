"""One of each message that commands the runtime, as somebody would send it who may not."""

from __future__ import annotations

from protocol.messages import Message
from protocol.messages.system import (
    ActorDown,
    ActorUp,
    ChildSpec,
    DropCheckpoint,
    EdgeFilter,
    Hang,
    InjectProcessFault,
    KeepCheckpoint,
    LastWords,
    ProcessFault,
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
    TapRule,
)


def commands(sender: str, *, victim: str, sibling: str, child: ChildSpec) -> dict[str, Message]:
    """The messages, by what they would do.

    Args:
        sender: who sends them, and would hear what a tap copies.
        victim: who would be hurt, overwritten or spoken for.
        sibling: who would be stopped.
        child: what would be started.
    """
    return {
        "stop": Stop("because I say so"),
        "ready": Ready(99, {}),
        "last words": LastWords(1, "x", "I am somebody else, and I end"),
        "checkpoint": SaveCheckpoint({"evil": True}, ()),
        "foreign checkpoint": KeepCheckpoint(victim, (sender,), {"evil": True}, ()),
        "drop": DropCheckpoint(victim),
        "estate": ReadEstate(),
        "start": StartChild(child),
        "stop child": StopChild(sibling),
        "successor": SuccessorMayStart(),
        "log": SetLogLevel("trace", None),
        "taps": SetTaps((TapRule("t", EdgeFilter(), sender, 1e12, 1e9),)),
        "faults": SetFaults(()),
        "process fault": InjectProcessFault(victim, ProcessFault.KILL),
        "hang": Hang(),
        "up": ActorUp(victim, 7),
        "down": ActorDown(victim, "so they say"),
    }
