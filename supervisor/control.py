"""The messages of the actor system itself, as bytes: the only ones that may cross, and who may send them.

Thespian would pickle whatever it is given. Here each class that may cross is listed with its fields, and anything else
is refused by the sender and by the receiver. The sender is known from the kernel (the pid behind the link), and a
message is obeyed only if it comes from where it belongs: orders from the parent process, answers from a child.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from typing import Any

import msgpack
from thespian.actors import ActorAddress, ActorExitRequest
from thespian.system.messages.admin import (
    PendingActor,
    PendingActorResponse,
    QueryAck,
    QueryExists,
    SystemShutdown,
    SystemShutdownCompleted,
)
from thespian.system.messages.multiproc import EndpointConnected

from protocol.messages import MessageError


class From(enum.Enum):
    """Where a message must come from."""

    PARENT = "parent"
    CHILD = "child"


@dataclasses.dataclass(frozen=True)
class ProcessAddress:
    """What is inside Thespian's addresses: an actor is its process."""

    pid: int

    def __str__(self) -> str:
        return str(self.pid)


def address_of(pid: int) -> ActorAddress:
    """Thespian's address of the actor in this process."""
    return ActorAddress(ProcessAddress(pid))


def pid_of(address: Any) -> int | None:
    """The process behind a Thespian address; None for a local one that is not known to have a process yet."""
    details = address.addressDetails
    return details.pid if isinstance(details, ProcessAddress) else None


@dataclasses.dataclass(frozen=True)
class _Form:
    """How one class crosses: its fields as plain data, the types they must have, and back."""

    cls: type
    sender: From
    fields: Callable[[Any], list[Any]]
    types: tuple[tuple[type, ...], ...]
    build: Callable[..., Any]


def _pending_fields(request: Any) -> list[Any]:
    if request.forActor or request.targetActorReq or request.globalName or request.sourceHash:
        raise MessageError("only the actor system's own process asks for actors, by class name alone")
    return [request.actorClassName, request.instanceNum]


def _response_fields(response: Any) -> list[Any]:
    pid = None if response.actualAddress is None else pid_of(response.actualAddress)
    return [response.instanceNum, response.errorCode, pid, response.errorStr]


def _response(instance: int, code: int | None, pid: int | None, text: str | None) -> Any:
    address = None if pid is None else address_of(pid)
    return PendingActorResponse(None, instance, None, errorCode=code, actualAddress=address, errorStr=text)


_NONE = type(None)
_FORMS: dict[str, _Form] = {
    form.cls.__name__: form
    for form in (
        _Form(QueryExists, From.PARENT, lambda _: [], (), QueryExists),
        _Form(
            QueryAck,
            From.CHILD,
            lambda ack: [ack.systemName, ack.systemVersion, ack.inShutdown],
            ((str,), (int,), (bool,)),
            QueryAck,
        ),
        _Form(
            PendingActor,
            From.PARENT,
            _pending_fields,
            ((str,), (int,)),
            lambda name, instance: PendingActor(name, None, instance, None, None),
        ),
        _Form(
            PendingActorResponse,
            From.CHILD,
            _response_fields,
            ((int,), (int, _NONE), (int, _NONE), (str, _NONE)),
            _response,
        ),
        _Form(EndpointConnected, From.CHILD, lambda ready: [ready.childInstance], ((int,),), EndpointConnected),
        _Form(ActorExitRequest, From.PARENT, lambda _: [], (), ActorExitRequest),
        _Form(SystemShutdown, From.PARENT, lambda _: [], (), SystemShutdown),
        _Form(SystemShutdownCompleted, From.CHILD, lambda _: [], (), SystemShutdownCompleted),
    )
}


def encode(message: object) -> bytes:
    """A message of the actor system as msgpack.

    Raises:
        MessageError: its class is not one that may cross.
    """
    form = _FORMS.get(type(message).__name__)
    if form is None or form.cls is not type(message):
        raise MessageError(f"a {type(message).__name__} of the actor system may not leave its process")
    packed: bytes = msgpack.packb([form.cls.__name__, *form.fields(message)], use_bin_type=True)
    return packed


def decode(body: bytes, *, from_parent: bool, from_child: bool) -> Any:
    """The message in these bytes, if whoever sent it may.

    Raises:
        MessageError: unknown, malformed, or not from where such a message must come from.
    """
    try:
        value = msgpack.unpackb(body, raw=False)
    except (ValueError, msgpack.exceptions.UnpackException, RecursionError) as error:
        raise MessageError(f"not a control frame: {error}") from error
    form = _FORMS.get(value[0]) if isinstance(value, list) and value and isinstance(value[0], str) else None
    if form is None:
        raise MessageError("not a control frame")
    if not (from_parent if form.sender is From.PARENT else from_child):
        raise MessageError(f"a {form.cls.__name__} must come from a {form.sender.value} process")
    fields = value[1:]
    if len(fields) != len(form.types) or any(
        type(field) not in types for field, types in zip(fields, form.types, strict=False)
    ):
        raise MessageError(f"the fields of a {form.cls.__name__} are of other types")
    return form.build(*fields)
