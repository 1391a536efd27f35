"""Errors that the runtime raises in an actor's code."""

from __future__ import annotations

from protocol.errors import PeerupError


class AskError(PeerupError):
    """A request got no useful answer."""

    code = "ask-failed"


class NoSuchActorError(AskError):
    """No actor has this name, and none is being (re)started under it."""

    code = "no-such-actor"


class ActorRestartingError(AskError):
    """The actor ended before it answered, or is being restarted. Whether it did the work is unknown."""

    code = "actor-restarting"


class ActorNotReadyError(ActorRestartingError):
    """The actor is being started or restarted. The request did not reach it, and may be made again."""


class DeadlineExceededError(AskError):
    """The deadline of the request passed without an answer."""

    code = "deadline-exceeded"


class RefusedError(AskError):
    """The actor answered with a refusal.

    Also what a handler raises in order to refuse: it then reaches the asker as this same error.

    Attributes:
        code: a stable word for programs.
        reason: what and why, for people.
        action: what the person can do about it; may be empty.
    """

    def __init__(self, code: str, reason: str, action: str = "") -> None:
        super().__init__(f"{reason}; {action}" if action else reason)
        self.code = code  # type: ignore[misc]
        self.reason = reason
        self.action = action
