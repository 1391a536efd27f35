from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import InvalidValueError
from protocol.multibase import (
    MAX_TEXT,
    MultibaseError,
    decode_base58,
    decode_multibase,
    encode_base58,
    encode_multibase_base32,
    encode_multibase_base36,
    encode_multibase_base64url,
)
from protocol.varint import MAX_VALUE, VarintError, decode_varint, encode_varint, read_varint

# The table of the unsigned-varint spec.
SPEC = {
    1: "01",
    127: "7f",
    128: "8001",
    255: "ff01",
    300: "ac02",
    16384: "808001",
    MAX_VALUE: "ffffffffffffffff7f",
}


@pytest.mark.parametrize(("value", "encoded"), SPEC.items())
def test_varints_of_the_spec(value, encoded):
    assert encode_varint(value).hex() == encoded
    assert decode_varint(bytes.fromhex(encoded)) == (value, len(encoded) // 2)


@given(st.integers(0, MAX_VALUE), st.binary(max_size=12), st.binary(max_size=12))
def test_varint_comes_back_from_any_place(value, before, after):
    data = before + encode_varint(value) + after
    assert decode_varint(data, len(before)) == (value, len(data) - len(after))


@given(st.integers(0, MAX_VALUE))
def test_varint_is_waited_for_until_its_last_byte(value):
    data = encode_varint(value)
    for cut in range(len(data)):
        assert read_varint(data[:cut]) is None
        with pytest.raises(VarintError):
            decode_varint(data[:cut])


@pytest.mark.parametrize("data", ["8000", "ff8000", "80808080808080808000", "80" * 9, "ff" * 9 + "01", "80" * 20])
def test_varint_that_is_long_or_not_shortest_is_refused(data):
    with pytest.raises(VarintError):
        read_varint(bytes.fromhex(data))


@pytest.mark.parametrize("value", [-1, MAX_VALUE + 1])
def test_varint_has_bounds(value):
    with pytest.raises(InvalidValueError):
        encode_varint(value)


# draft-msporny-base58, test vectors
@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"Hello World!", "2NEpo7TZRRrLZSi2U"),
        (
            b"The quick brown fox jumps over the lazy dog.",
            "USm3fpXnKG5EUBx2ndxBDMPVciP5hGey2Jh4NDv6gmeo1LkMeiKrLJUUBk6Z",
        ),
        (bytes.fromhex("0000287fb4cd"), "11233QC4"),
        (b"", ""),
    ],
)
def test_base58_vectors(data, text):
    assert encode_base58(data) == text
    assert decode_base58(text) == data


@given(st.binary(max_size=100))
def test_every_base_comes_back(data):
    assert decode_base58(encode_base58(data)) == data
    for encode in (encode_multibase_base32, encode_multibase_base36, encode_multibase_base64url):
        assert decode_multibase(encode(data)) == data
    upper = encode_multibase_base32(data).upper()
    assert decode_multibase(upper) == data
    assert decode_multibase(encode_multibase_base36(data).upper()) == data


@pytest.mark.parametrize(
    "text", ["", "x12", "z0", "zl", "kA", "Ka", "bA", "Ba", "b1", "ba", "bb=", "ua", "u+/", "uAB", "mAA", "bäb"]
)
def test_multibase_refuses(text):
    with pytest.raises(MultibaseError):
        decode_multibase(text)


def test_long_texts_are_refused_before_they_cost_time():
    with pytest.raises(MultibaseError):
        decode_base58("2" * (MAX_TEXT + 1))
    with pytest.raises(MultibaseError):
        decode_multibase("b" * (MAX_TEXT + 1))
