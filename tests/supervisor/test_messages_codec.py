"""Messages and envelopes as bytes: all comes back as it was, and garbage gives nothing but MessageError."""

from __future__ import annotations

import importlib
import os
import pkgutil
import typing

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import protocol.messages
from protocol.messages import (
    Data,
    Descriptor,
    Envelope,
    Message,
    MessageError,
    Request,
    decode_body,
    encode_body,
    message,
    record,
)
from protocol.messages.codec import MAX_BODY, MAX_DEPTH, from_plain, kinds, to_plain
from protocol.messages.system import ChildSpec, FaultAction, Ok, Pong, Restart, Strategy, SupervisorSpec

for _module in pkgutil.iter_modules(protocol.messages.__path__):
    importlib.import_module(f"protocol.messages.{_module.name}")

Miles = typing.NewType("Miles", int)


class Word:
    """A class with a wire form of its own."""

    def __init__(self, text: str) -> None:
        self.text = text

    def to_wire(self) -> str:
        return self.text

    @classmethod
    def from_wire(cls, value: object) -> Word:
        if not isinstance(value, str) or not value.isalpha():
            raise ValueError("a word has letters only")
        return cls(value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Word) and other.text == self.text

    def __hash__(self) -> int:
        return hash(self.text)


@record
class Inner:
    number: int
    flag: bool = False


@record
class Positive:
    number: int

    def __post_init__(self) -> None:
        if self.number <= 0:
            raise ValueError("it is positive")


@message("test-codec.all")
class Everything(Request[Ok]):
    flag: bool
    number: int
    real: float
    text: str
    raw: bytes
    data: Data
    choice: FaultAction
    many: tuple[int, ...]
    pair: tuple[str, int]
    table: dict[str, Inner]
    maybe: str | None
    miles: Miles
    inner: Inner
    word: Word
    maybe_inner: Inner | None = None


@message("test-codec.descriptors")
class WithDescriptors(Message):
    first: Descriptor
    rest: tuple[Descriptor, ...]


@message("test-codec.positive")
class WithPositive(Message):
    it: Positive


INTEGERS = st.integers(-(2**63), 2**64 - 1)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
SCALARS = st.none() | st.booleans() | INTEGERS | st.floats(allow_nan=False) | TEXTS | st.binary(max_size=20)
PLAIN = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4), max_leaves=10
)
INNERS = st.builds(Inner, INTEGERS, st.booleans())
EVERYTHING = st.builds(
    Everything,
    flag=st.booleans(),
    number=INTEGERS,
    real=st.floats(allow_nan=False),
    text=TEXTS,
    raw=st.binary(max_size=40),
    data=PLAIN,
    choice=st.sampled_from(FaultAction),
    many=st.lists(INTEGERS, max_size=5).map(tuple),
    pair=st.tuples(TEXTS, INTEGERS),
    table=st.dictionaries(TEXTS, INNERS, max_size=3),
    maybe=st.none() | TEXTS,
    miles=INTEGERS.map(Miles),
    inner=INNERS,
    word=st.text(st.sampled_from("abcß"), min_size=1).map(Word),
    maybe_inner=st.none() | INNERS,
)
EXAMPLE = Everything(
    True, 1, 0.5, "t", b"r", {"k": [1, None]}, FaultAction.DROP, (1, 2), ("a", 1), {"i": Inner(1)}, None, Miles(3),
    Inner(2), Word("w"),
)  # fmt: skip


@given(EVERYTHING)
def test_everything_comes_back_as_it_was(original):
    packed, descriptors = encode_body(original)
    assert descriptors == []
    assert decode_body(original.KIND, packed) == original


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("flag", 1),
        ("number", True),
        ("number", 1.0),
        ("number", 2**64),
        ("real", "1"),
        ("text", b"t"),
        ("text", "\ud800"),
        ("raw", "r"),
        ("data", object()),
        ("data", {1: 2}),
        ("data", msgpack.Timestamp(1)),
        ("choice", "drop"),
        ("many", [1]),
        ("many", ("x",)),
        ("pair", ("a",)),
        ("table", {"a": 1}),
        ("table", {1: Inner(1)}),
        ("maybe", 3),
        ("inner", Positive(1)),
        ("word", "w"),
    ],
)
def test_a_field_of_another_type_is_refused_by_the_sender(field, wrong):
    with pytest.raises(MessageError):
        encode_body(Everything(**{**vars(EXAMPLE), field: wrong}))


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("flag", 0),
        ("number", False),
        ("real", None),
        ("text", b"t"),
        ("raw", "r"),
        ("data", msgpack.Timestamp(1)),
        ("data", msgpack.ExtType(5, b"x")),
        ("choice", "explode"),
        ("choice", [1]),
        ("many", {"a": 1}),
        ("many", ["x"]),
        ("pair", ["a", 1, 2]),
        ("table", {"a": {"number": "x"}}),
        ("inner", {"flag": True}),
        ("inner", {"number": 1, "more": 1}),
        ("word", "w1"),
        ("word", {}),
        ("unknown", 1),
    ],
)
def test_a_field_of_another_type_is_refused_by_the_receiver(field, wrong):
    value = msgpack.unpackb(encode_body(EXAMPLE)[0])
    value[field] = wrong
    with pytest.raises(MessageError):
        decode_body(EXAMPLE.KIND, msgpack.packb(value))


def test_a_missing_field_takes_its_default_or_is_refused():
    value = msgpack.unpackb(encode_body(EXAMPLE)[0])
    del value["maybe_inner"]
    assert decode_body(EXAMPLE.KIND, msgpack.packb(value)) == EXAMPLE
    del value["text"]
    with pytest.raises(MessageError, match="missing"):
        decode_body(EXAMPLE.KIND, msgpack.packb(value))


def test_checks_of_a_record_hold_on_the_receiving_side():
    assert decode_body("test-codec.positive", msgpack.packb({"it": {"number": 1}})) == WithPositive(Positive(1))
    with pytest.raises(MessageError, match="it is positive"):
        decode_body("test-codec.positive", msgpack.packb({"it": {"number": 0}}))


def test_an_unknown_kind_is_refused():
    with pytest.raises(MessageError, match="no message of kind"):
        decode_body("test-codec.unheard-of", b"\x80")


def test_plain_data_has_a_depth():
    def nested(depth):
        value: Data = 1
        for _ in range(depth):
            value = [value]
        return value

    Everything(**{**vars(EXAMPLE), "data": nested(MAX_DEPTH)})
    packed, _ = encode_body(Everything(**{**vars(EXAMPLE), "data": nested(MAX_DEPTH)}))
    assert decode_body(EXAMPLE.KIND, packed).data == nested(MAX_DEPTH)
    with pytest.raises(MessageError, match="deep"):
        encode_body(Everything(**{**vars(EXAMPLE), "data": nested(MAX_DEPTH + 1)}))
    bomb = msgpack.packb({"state": None})[:-1] + b"\x91" * 100_000 + b"\x01"
    with pytest.raises(MessageError):
        decode_body("system.description", bomb)


def test_a_body_has_a_size():
    with pytest.raises(MessageError, match="limit"):
        encode_body(Everything(**{**vars(EXAMPLE), "raw": bytes(MAX_BODY)}))
    with pytest.raises(MessageError, match="limit"):
        decode_body(EXAMPLE.KIND, bytes(MAX_BODY + 1))


def test_two_messages_cannot_share_a_kind():
    with pytest.raises(MessageError, match="claim"):

        @message("test-codec.all")
        class Other(Message):
            pass


def test_descriptors_travel_beside_the_body():
    pipes = [os.pipe() for _ in range(3)]
    ends = [Descriptor(fd) for pipe in pipes for fd in pipe]
    packed, descriptors = encode_body(WithDescriptors(ends[0], tuple(ends[1:])))
    assert descriptors == ends
    assert decode_body("test-codec.descriptors", packed, ends) == WithDescriptors(ends[0], tuple(ends[1:]))
    with pytest.raises(MessageError, match="did not come"):
        decode_body("test-codec.descriptors", packed, ends[:2])
    for end in ends:
        end.close()
        end.close()


def test_a_descriptor_is_owned_by_one():
    read, write = os.pipe()
    os.close(write)
    owner = Descriptor(read)
    twin = owner.duplicate()
    assert owner.detach() == read
    with pytest.raises(MessageError):
        owner.detach()
    os.close(read)
    inherited = twin.fileno()
    del twin
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(inherited)


def test_records_as_plain_data():
    spec = SupervisorSpec(
        Strategy.REST_FOR_ONE, 3, 5.0, 0.1, 2.0, (ChildSpec("a", "x:Y", {"k": [1]}, restart=Restart.TRANSIENT),)
    )
    plain = to_plain(spec)
    assert plain["children"][0]["restart"] == "transient"
    assert from_plain(SupervisorSpec, plain) == spec
    with pytest.raises(MessageError):
        from_plain(SupervisorSpec, {"strategy": "x"})


IDS = st.text(min_size=1, max_size=30)
ENVELOPES = st.builds(
    Envelope,
    id=TEXTS,
    cause=st.none() | TEXTS,
    reply_to=st.none() | TEXTS,
    sender=TEXTS,
    target=TEXTS,
    kind=TEXTS,
    deadline=st.none() | st.floats(allow_nan=False),
    body=st.binary(max_size=100),
)


@given(ENVELOPES)
def test_envelopes_come_back_as_they_were(envelope):
    assert Envelope.from_bytes(envelope.to_bytes()) == envelope


@given(st.binary(max_size=200))
def test_random_bytes_are_refused_as_envelopes(garbage):
    with pytest.raises(MessageError):
        Envelope.from_bytes(garbage)


@given(ENVELOPES, st.data())
def test_mutated_envelopes_are_read_or_refused(envelope, data):
    packed = bytearray(envelope.to_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.integers(0, len(packed) - 1))
        packed[where] = data.draw(st.integers(0, 255))
    try:
        decoded = Envelope.from_bytes(bytes(packed[: data.draw(st.integers(0, len(packed)))]))
    except MessageError:
        return
    assert isinstance(decoded.body, bytes)


ALL_KINDS = sorted(kinds())


@settings(max_examples=1000, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(ALL_KINDS), st.binary(max_size=60) | PLAIN.map(msgpack.packb))
def test_garbage_is_refused_whatever_the_kind(kind, garbage):
    try:
        decoded = decode_body(kind, garbage)
    except MessageError:
        return
    assert kind == decoded.KIND


def field_like(annotation, data):
    """Something of nearly the right shape for a field: gets the fuzzer past the first check."""
    fields = typing.get_type_hints(annotation)
    return {
        name: data.draw(PLAIN | st.just([]) | st.just({}) | st.just(b"\x00$\x08\x01\x12 " + bytes(32)))
        for name in fields
    }


@settings(max_examples=1500, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.sampled_from(ALL_KINDS), st.data())
def test_maps_with_the_right_fields_and_any_values_are_read_or_refused(kind, data):
    body = field_like(kinds()[kind], data)
    body.pop("KIND", None)
    try:
        decoded = decode_body(kind, msgpack.packb(body))
    except MessageError:
        return
    assert kind == decoded.KIND


@settings(max_examples=500)
@given(EVERYTHING, st.data())
def test_mutated_bodies_are_read_or_refused(original, data):
    packed = bytearray(encode_body(original)[0])
    for _ in range(data.draw(st.integers(1, 4))):
        packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    try:
        decoded = decode_body(original.KIND, bytes(packed))
    except MessageError:
        return
    assert isinstance(decoded, Everything)


def test_every_registered_message_can_be_compiled():
    for kind, cls in kinds().items():
        with pytest.raises(MessageError, match="expected a map"):
            decode_body(kind, b"\x01")
        assert kind == cls.KIND
    assert decode_body("system.pong", encode_body(Pong(1, 2))[0]) == Pong(1, 2)
