from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import pickle
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import InvalidValueError
from protocol.keys import BadSignatureError, KeyFormatError, KeyType, PrivateKey, PublicKey
from protocol.peer_id import PeerId

VECTORS = {
    name: (bytes.fromhex(halves["private"]), bytes.fromhex(halves["public"]))
    for name, halves in json.loads((Path(__file__).parent / "data/key_vectors.json").read_text())["keys"].items()
}
ED25519 = VECTORS["ed25519"]


def test_all_vectors_are_here():
    assert set(VECTORS) == {"rsa", "ed25519", "secp256k1", "ecdsa"}


@pytest.mark.parametrize("name", VECTORS)
def test_vectors_of_the_spec(name):
    private, public = VECTORS[name]
    key = PrivateKey.from_protobuf(private)
    assert key.key_type is KeyType[name.upper()]
    assert key.public_key.to_protobuf() == public
    assert key.to_protobuf() == private
    assert PublicKey.from_protobuf(public) == key.public_key
    assert key.peer_id == PeerId.from_public_key(public)
    if len(public) > 42:
        assert key.peer_id.multihash == b"\x12\x20" + hashlib.sha256(public).digest()
    else:
        assert key.peer_id.public_key == public


@pytest.mark.parametrize("name", VECTORS)
def test_signatures_count_for_their_message_and_key_alone(name):
    key = PrivateKey.from_protobuf(VECTORS[name][0])
    signature = key.sign(b"message")
    key.public_key.verify(b"message", signature)
    wrong = [b"", signature[:-1], signature + b"\0", bytes(len(signature)), b"\xff" * 64, b"x" * 5000]
    flipped = bytearray(signature)
    flipped[len(flipped) // 2] ^= 1
    for bad in (*wrong, bytes(flipped)):
        with pytest.raises(BadSignatureError):
            key.public_key.verify(b"message", bad)
    with pytest.raises(BadSignatureError):
        key.public_key.verify(b"other", signature)
    for other in VECTORS:
        if other != name:
            with pytest.raises(BadSignatureError):
                PublicKey.from_protobuf(VECTORS[other][1]).verify(b"message", signature)


def test_a_go_peer_up_key_file_is_68_bytes_and_loads_as_is():
    key = PrivateKey.from_protobuf(ED25519[0])
    assert len(ED25519[0]) == 68
    assert str(key.peer_id) == "12D3KooWBtg3aaRMjxwedh83aGiUkwSxDwUZkzuJcfaqUmo7R3pq"


def test_the_old_96_byte_form_becomes_the_64_byte_form():
    secret, public = ED25519[0][4:36], ED25519[0][36:]
    old = b"\x08\x01\x12\x60" + secret + public + public
    assert PrivateKey.from_protobuf(old) == PrivateKey.from_protobuf(ED25519[0])
    assert PrivateKey.from_protobuf(old).to_protobuf() == ED25519[0]
    with pytest.raises(KeyFormatError, match="differ"):
        PrivateKey.from_protobuf(b"\x08\x01\x12\x60" + secret + public + secret)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x08\x01",
        ED25519[0][:-1],
        b"\x08\x01\x12\x20" + ED25519[0][4:36],  # the secret alone
        ED25519[0][:36] + bytes(32),  # another public half
        b"\x08\x04\x12\x40" + ED25519[0][4:],  # no such kind
        b"\x08\x00\x12\x40" + ED25519[0][4:],  # said to be RSA
        b"\x08\x03\x12\x40" + ED25519[0][4:],
        b"\x08\x02\x12\x20" + bytes(32),  # zero is no secp256k1 secret
        b"\x08\x02\x12\x20" + b"\xff" * 32,  # nor is what is beyond the order
        b"\x08\x02\x12\x1f" + bytes(31),
        b"\x12\x40" + ED25519[0][4:],
        VECTORS["rsa"][0].replace(b"\x08\x00", b"\x08\x03", 1),  # an RSA key said to be ECDSA
        VECTORS["ecdsa"][0].replace(b"\x08\x03", b"\x08\x00", 1),
        b"not a key at all",
        bytes(10_000),
    ],
)
def test_broken_private_keys_are_refused_without_telling_of_them(data):
    with pytest.raises(KeyFormatError) as failure:
        PrivateKey.from_protobuf(data)
    assert failure.value.__cause__ is None
    assert failure.value.__suppress_context__ or failure.value.__context__ is None
    assert ED25519[0][4:12].hex() not in str(failure.value)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x12\x20" + ED25519[1][4:] + b"\x08\x01",  # out of order
        ED25519[1] + b"\x18\x01",  # one field more
        ED25519[1] + b"\x08\x01",  # a field twice
        b"\x08\x81\x00" + ED25519[1][2:],  # a varint that is not the shortest
        b"\x08\x01\x12\x1f" + ED25519[1][4:35],
        b"\x08\x04" + ED25519[1][2:],
        b"\x12\x20" + ED25519[1][4:],
        VECTORS["ecdsa"][1].replace(b"\x08\x03", b"\x08\x00", 1),  # an ECDSA key said to be RSA
        VECTORS["rsa"][1].replace(b"\x08\x00", b"\x08\x03", 1),
        b"\x08\x02\x12\x21\x05" + bytes(32),
        b"\x08\x02\x12\x21\x02" + b"\xff" * 32,  # not on the curve
        bytes(3000),
    ],
)
def test_other_public_keys_are_refused(data):
    with pytest.raises(KeyFormatError):
        PublicKey.from_protobuf(data)


def _public(key_type, key):
    der = key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return PublicKey(key_type, der)


def test_weak_and_odd_keys_are_refused():
    with pytest.raises(KeyFormatError, match="1024"):
        _public(KeyType.RSA, rsa.generate_private_key(65537, 1024))
    strong = rsa.generate_private_key(65537, 2048).public_key().public_numbers().n
    for exponent, taken in (((1 << 31) - 1, True), ((1 << 31) + 1, False), ((1 << 2046) + 1, False)):
        der = (
            rsa.RSAPublicNumbers(exponent, strong)
            .public_key()
            .public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        )
        with contextlib.nullcontext() if taken else pytest.raises(KeyFormatError, match="exponent"):
            PublicKey(KeyType.RSA, der)
    with pytest.raises(KeyFormatError, match="curve"):
        _public(KeyType.ECDSA, ec.generate_private_key(ec.SECP256K1()))
    uncompressed = (
        ec.generate_private_key(ec.SECP256K1())
        .public_key()
        .public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)
    )
    with pytest.raises(KeyFormatError, match="33 bytes"):
        PublicKey(KeyType.SECP256K1, uncompressed)


@pytest.mark.parametrize("curve", [ec.SECP384R1(), ec.SECP521R1()])
def test_larger_ecdsa_curves_are_verified(curve):
    key = ec.generate_private_key(curve)
    _public(KeyType.ECDSA, key).verify(b"m", key.sign(b"m", ec.ECDSA(hashes.SHA256())))


def test_secp256k1_signatures_have_the_lower_s_and_either_is_verified():
    order = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
    key = PrivateKey.from_protobuf(VECTORS["secp256k1"][0])
    for number in range(20):
        message = bytes((number,))
        r, s = decode_dss_signature(key.sign(message))
        assert s <= order // 2
        key.public_key.verify(message, encode_dss_signature(r, order - s))


@given(st.binary(min_size=32, max_size=32), st.binary(max_size=200))
def test_every_seed_makes_a_key_that_comes_back(seed, message):
    key = PrivateKey.from_seed(seed)
    assert PrivateKey.from_protobuf(key.to_protobuf()) == key
    assert PublicKey.from_protobuf(key.public_key.to_protobuf()) == key.public_key
    assert PublicKey.from_protobuf(key.peer_id.public_key).peer_id == key.peer_id
    signature = key.sign(message)
    assert len(signature) == 64
    key.public_key.verify(message, signature)


def test_a_secret_is_shown_nowhere_and_leaves_nowhere():
    key = PrivateKey.from_protobuf(ED25519[0])
    secret = ED25519[0][4:36]
    for text in (repr(key), str(key), f"{key}", f"{[key]}"):
        assert secret.hex() not in text
        assert repr(secret)[2:10] not in text
        assert str(key.peer_id) in text
    for leave in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError):
            leave(key)
    with pytest.raises(AttributeError):
        key.key_type = KeyType.RSA


def test_equality():
    key, other = PrivateKey.from_seed(bytes(32)), PrivateKey.from_seed(b"\1" * 32)
    assert key == PrivateKey.from_seed(bytes(32))
    assert hash(key) == hash(PrivateKey.from_seed(bytes(32)))
    assert key != other
    assert key != key.to_protobuf()
    assert key.public_key != other.public_key
    assert repr(key.public_key) == f"PublicKey(ED25519, {key.peer_id})"
    assert len({key.public_key, PublicKey.from_protobuf(key.public_key.to_protobuf())}) == 1
    with pytest.raises(AttributeError):
        key.public_key.data = b""
    with pytest.raises(InvalidValueError):
        PrivateKey.from_seed(bytes(31))
