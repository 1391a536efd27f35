"""Typed messages to msgpack and back.

A message is a frozen dataclass with a kind::

    @message("gate.decide")
    class Decide(Request[Decision]):
        peer: PeerId
        protocol: str

Theory of operation. Only classes registered with :func:`message` can be decoded: the kind in the envelope
selects the class, the class's annotations select a converter for each field, and a value of any other type is
refused. Nothing is ever instantiated by name and nothing is pickled, so a corrupt or hostile body can at worst
be refused. Converters are compiled once for each class, at its first use.

Field types that can cross: `None`, `bool`, `int`, `float`, `str`, `bytes`, `Data` (any plain data),
string enums, tuples (`tuple[X, ...]`, `tuple[X, Y]`), `dict[str, X]`, unions of these with `None`,
`NewType` over these, records (see :func:`record`), :class:`Descriptor`, and classes with the pair of methods
`to_wire() -> bytes | str | int` and `from_wire(value)` (peer ids and multiaddrs have it).
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import os
import types
import typing
from collections.abc import Callable
from typing import Any, ClassVar, Generic, NewType, TypeVar, Union, dataclass_transform, get_args, get_origin

import msgpack

from protocol.errors import PeerupError

Data = Any
"""Plain data: None, bool, int, float, str, bytes, and lists and string-keyed dicts of these."""

MAX_DEPTH = 32
"""How deep plain data may be nested."""

MAX_BODY = 16 * 1024 * 1024
"""The largest body in bytes. Messages should stay far below (guide: 16 KiB); state dumps may be large."""


class MessageError(PeerupError):
    """A message cannot be encoded, or bytes do not decode to a known message."""

    code: ClassVar[str] = "bad-message"


class Descriptor:
    """An open file descriptor inside a message. It crosses to the receiver by `SCM_RIGHTS`.

    Ownership moves with the message: sending closes the sender's copy, and a receiver that does not
    :meth:`detach` it closes it when the object is collected.
    """

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        if fd < 0:
            raise MessageError(f"{fd} is not an open descriptor")
        self._fd = fd

    def fileno(self) -> int:
        """The descriptor number, still owned by this object; -1 once detached or closed."""
        return self._fd

    def detach(self) -> int:
        """Hand the descriptor number to the caller, who must close it."""
        fd, self._fd = self._fd, -1
        if fd < 0:
            raise MessageError("the descriptor was already taken or closed")
        return fd

    def duplicate(self) -> Descriptor:
        """Another descriptor of the same open file, which lives on its own."""
        return Descriptor(os.dup(self._fd))

    def close(self) -> None:
        """Close the descriptor; harmless when it is already gone."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __repr__(self) -> str:
        return f"Descriptor({self._fd})"

    def __del__(self) -> None:
        with contextlib.suppress(OSError):
            self.close()


@dataclass_transform(frozen_default=True)
class Message:
    """The base of every message. Subclasses are decorated with :func:`message`."""

    __slots__ = ()
    KIND: ClassVar[str] = ""


R_co = TypeVar("R_co", covariant=True)


class Request(Message, Generic[R_co]):
    """A message that is answered by exactly one message of type `R_co`, or by a refusal."""

    __slots__ = ()


C = TypeVar("C")
_KINDS: dict[str, type[Message]] = {}
_RECORDS: set[type] = set()


@dataclass_transform(frozen_default=True)
def message(kind: str) -> Callable[[type[C]], type[C]]:
    """Make a class a message of this kind: a frozen dataclass that the codec knows.

    A kind is `<owner>.<verb-or-fact>` in lower case with hyphens, and is unique in the program.
    """

    def decorate(cls: type[C]) -> type[C]:
        made = dataclasses.dataclass(frozen=True)(cls)
        made.KIND = kind  # type: ignore[attr-defined]
        if kind in _KINDS and _KINDS[kind].__qualname__ != made.__qualname__:
            raise MessageError(f"two messages claim the kind {kind!r}")
        _KINDS[kind] = made  # type: ignore[assignment]
        return made

    return decorate


@dataclass_transform(frozen_default=True)
def record(cls: type[C]) -> type[C]:
    """Make a class a frozen dataclass that may stand as a field inside messages."""
    made = dataclasses.dataclass(frozen=True)(cls)
    _RECORDS.add(made)
    return made


def kinds() -> dict[str, type[Message]]:
    """Every message class known to this process, by kind."""
    return dict(_KINDS)


def prepare() -> None:
    """Compile the converters of every class known to this process now, for all processes that it will fork."""
    for cls in _KINDS.values():
        _converter_for(cls)


def is_kind(kind: str) -> bool:
    """Whether this process knows messages of this kind."""
    return kind in _KINDS


def encode_body(body: Message) -> tuple[bytes, list[Descriptor]]:
    """The message's fields as msgpack, and the descriptors in it, in order of their place in the body.

    Raises:
        MessageError: the class is not registered or a field holds a value of another type.
    """
    descriptors: list[Descriptor] = []
    converter = _converter_for(type(body))
    try:
        packed: bytes = msgpack.packb(converter.encode(body, descriptors), use_bin_type=True)
    except (ValueError, TypeError, OverflowError) as error:  # an integer over 64 bits, a lone surrogate in a string
        raise MessageError(f"a {body.KIND} cannot be packed: {error}") from error
    if len(packed) > MAX_BODY:
        raise MessageError(f"a {body.KIND} of {len(packed)} bytes is over the limit of {MAX_BODY}")
    return packed, descriptors


def decode_body(kind: str, packed: bytes | memoryview, descriptors: typing.Sequence[Descriptor] = ()) -> Message:
    """The message of this kind with these fields.

    Raises:
        MessageError: the kind is unknown, the bytes are not msgpack, or a field has a wrong type.
    """
    cls = _KINDS.get(kind)
    if cls is None:
        raise MessageError(f"there is no message of kind {kind!r}")
    if len(packed) > MAX_BODY:
        raise MessageError(f"a {kind} of {len(packed)} bytes is over the limit of {MAX_BODY}")
    try:
        value = msgpack.unpackb(packed, raw=False, strict_map_key=True, use_list=True)
    except (ValueError, msgpack.exceptions.UnpackException, UnicodeDecodeError, RecursionError) as error:
        raise MessageError(f"the body of a {kind} is not msgpack: {error}") from error
    decoded = _converter_for(cls).decode(value, list(descriptors))
    return typing.cast("Message", decoded)


def to_plain(value: Any) -> Data:
    """A record or message as plain data, such as fits into a field of type `Data`. It must hold no descriptors.

    Raises:
        MessageError: a field holds a value of another type.
    """
    descriptors: list[Descriptor] = []
    plain = _converter_for(type(value)).encode(value, descriptors)
    if descriptors:
        raise MessageError("a descriptor is not plain data")
    return plain


def from_plain(cls: type[C], value: Data) -> C:
    """The record or message of this class that :func:`to_plain` made this of.

    Raises:
        MessageError: it is not one.
    """
    return typing.cast("C", _converter_for(cls).decode(value, []))


@dataclasses.dataclass(frozen=True)
class _Converter:
    """How values of one type go to msgpack values and back."""

    encode: Callable[[Any, list[Descriptor]], Any]
    decode: Callable[[Any, list[Descriptor]], Any]


_CONVERTERS: dict[Any, _Converter] = {}


def _converter_for(annotation: Any) -> _Converter:
    made = _CONVERTERS.get(annotation)
    if made is None:
        made = _CONVERTERS[annotation] = _make_converter(annotation)
    return made


def _make_converter(annotation: Any) -> _Converter:
    if annotation is Any:
        return _Converter(_plain, _plain)
    if annotation is None or annotation is types.NoneType:
        return _exactly(types.NoneType)
    if isinstance(annotation, NewType):
        return _converter_for(annotation.__supertype__)
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return _union(get_args(annotation))
    if origin is tuple:
        return _tuple(get_args(annotation))
    if origin is dict:
        return _mapping(get_args(annotation))
    if isinstance(annotation, type):
        if annotation in (bool, int, float, str, bytes):
            return _exactly(annotation)
        if annotation is Descriptor:
            return _Converter(_encode_descriptor, _decode_descriptor)
        if issubclass(annotation, enum.Enum):
            return _enumeration(annotation)
        if hasattr(annotation, "to_wire") and hasattr(annotation, "from_wire"):
            return _wire_class(annotation)
        if annotation in _RECORDS or (issubclass(annotation, Message) and dataclasses.is_dataclass(annotation)):
            return _dataclass(annotation)
    raise MessageError(f"values of type {annotation!r} cannot cross between actors")


_SCALARS = frozenset((types.NoneType, bool, int, float, str, bytes))


def _plain(value: Any, _: list[Descriptor]) -> Any:
    _check_plain(value, 0)
    return value


def _check_plain(value: Any, depth: int) -> None:
    kind = type(value)
    if kind in _SCALARS:
        return
    if depth >= MAX_DEPTH:
        raise MessageError(f"plain data is nested at most {MAX_DEPTH} deep")
    if kind is list or kind is tuple:
        for item in value:
            _check_plain(item, depth + 1)
    elif kind is dict:
        for key, item in value.items():
            if type(key) is not str:
                raise MessageError(f"a key in plain data is a string, not {type(key).__name__}")
            _check_plain(item, depth + 1)
    else:
        raise MessageError(f"{kind.__name__} is not plain data")


def _exactly(expected: type) -> _Converter:
    def check(value: Any, _: list[Descriptor]) -> Any:
        if type(value) is expected:
            return value
        if expected is float and type(value) is int:
            return float(value)
        if expected is bytes and isinstance(value, bytearray | memoryview):
            return bytes(value)
        raise MessageError(f"expected {expected.__name__}, got {type(value).__name__}")

    return _Converter(check, check)


def _union(options: tuple[Any, ...]) -> _Converter:
    concrete = [option for option in options if option is not types.NoneType]
    if len(concrete) != 1 or len(concrete) == len(options):
        raise MessageError("only a union of one type with None can cross between actors")
    inner = _converter_for(concrete[0])

    def encode(value: Any, descriptors: list[Descriptor]) -> Any:
        return None if value is None else inner.encode(value, descriptors)

    def decode(value: Any, descriptors: list[Descriptor]) -> Any:
        return None if value is None else inner.decode(value, descriptors)

    return _Converter(encode, decode)


def _tuple(arguments: tuple[Any, ...]) -> _Converter:
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        inner = _converter_for(arguments[0])

        def encode_many(value: Any, descriptors: list[Descriptor]) -> Any:
            if not isinstance(value, tuple):
                raise MessageError(f"expected a tuple, got {type(value).__name__}")
            return [inner.encode(item, descriptors) for item in value]

        def decode_many(value: Any, descriptors: list[Descriptor]) -> Any:
            if not isinstance(value, list):
                raise MessageError(f"expected a list, got {type(value).__name__}")
            return tuple(inner.decode(item, descriptors) for item in value)

        return _Converter(encode_many, decode_many)
    parts = [_converter_for(argument) for argument in arguments]

    def encode_each(value: Any, descriptors: list[Descriptor]) -> Any:
        if not isinstance(value, tuple) or len(value) != len(parts):
            raise MessageError(f"expected a tuple of {len(parts)}")
        return [part.encode(item, descriptors) for part, item in zip(parts, value, strict=True)]

    def decode_each(value: Any, descriptors: list[Descriptor]) -> Any:
        if not isinstance(value, list) or len(value) != len(parts):
            raise MessageError(f"expected a list of {len(parts)}")
        return tuple(part.decode(item, descriptors) for part, item in zip(parts, value, strict=True))

    return _Converter(encode_each, decode_each)


def _mapping(arguments: tuple[Any, ...]) -> _Converter:
    if not arguments or arguments[0] is not str:
        raise MessageError("only dicts with string keys can cross between actors")
    inner = _converter_for(arguments[1])

    def convert(half: str) -> Callable[[Any, list[Descriptor]], Any]:
        each = getattr(inner, half)

        def run(value: Any, descriptors: list[Descriptor]) -> Any:
            if not isinstance(value, dict) or not all(type(key) is str for key in value):
                raise MessageError(f"expected a dict with string keys, got {type(value).__name__}")
            return {key: each(item, descriptors) for key, item in value.items()}

        return run

    return _Converter(convert("encode"), convert("decode"))


def _encode_descriptor(value: Any, descriptors: list[Descriptor]) -> int:
    if not isinstance(value, Descriptor):
        raise MessageError(f"expected a Descriptor, got {type(value).__name__}")
    descriptors.append(value)
    return len(descriptors) - 1


def _decode_descriptor(value: Any, descriptors: list[Descriptor]) -> Descriptor:
    if type(value) is not int or not 0 <= value < len(descriptors):
        raise MessageError("the message names a descriptor that did not come with it")
    return descriptors[value]


def _enumeration(cls: type[enum.Enum]) -> _Converter:
    def encode(value: Any, _: list[Descriptor]) -> Any:
        if not isinstance(value, cls):
            raise MessageError(f"expected {cls.__name__}, got {type(value).__name__}")
        return value.value

    def decode(value: Any, _: list[Descriptor]) -> Any:
        try:
            return cls(value)
        except ValueError as error:
            raise MessageError(f"{value!r} is not a {cls.__name__}") from error

    return _Converter(encode, decode)


def _wire_class(cls: Any) -> _Converter:
    def encode(value: Any, _: list[Descriptor]) -> Any:
        if not isinstance(value, cls):
            raise MessageError(f"expected {cls.__name__}, got {type(value).__name__}")
        return value.to_wire()

    def decode(value: Any, _: list[Descriptor]) -> Any:
        try:
            return cls.from_wire(value)
        except (ValueError, TypeError) as error:
            raise MessageError(f"not a {cls.__name__}: {error}") from error

    return _Converter(encode, decode)


def _dataclass(cls: Any) -> _Converter:
    hints = typing.get_type_hints(cls)
    converters = {field.name: _converter_for(hints[field.name]) for field in dataclasses.fields(cls)}
    encoders = [(name, converter.encode) for name, converter in converters.items()]
    decoders = {name: converter.decode for name, converter in converters.items()}
    required = {
        field.name
        for field in dataclasses.fields(cls)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }

    def encode(value: Any, descriptors: list[Descriptor]) -> Any:
        if type(value) is not cls:
            raise MessageError(f"expected {cls.__name__}, got {type(value).__name__}")
        packed = {}
        name = ""
        try:
            for name, convert in encoders:
                packed[name] = convert(getattr(value, name), descriptors)
        except MessageError as error:
            raise MessageError(f"{cls.__name__}.{name}: {error}") from None
        return packed

    def decode(value: Any, descriptors: list[Descriptor]) -> Any:
        if type(value) is not dict:
            raise MessageError(f"{cls.__name__}: expected a map, got {type(value).__name__}")
        if value.keys() != decoders.keys():
            missing = required - value.keys()
            unknown = value.keys() - decoders.keys()
            if missing or unknown:
                raise MessageError(f"{cls.__name__}: missing {sorted(missing)}, unknown {sorted(map(str, unknown))}")
        unpacked = {}
        name = ""
        try:
            for name, item in value.items():
                unpacked[name] = decoders[name](item, descriptors)
        except MessageError as error:
            raise MessageError(f"{cls.__name__}.{name}: {error}") from None
        try:
            return cls(**unpacked)
        except ValueError as error:  # raised by __post_init__ checks
            raise MessageError(f"{cls.__name__}: {error}") from error

    return _Converter(encode, decode)
