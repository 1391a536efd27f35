"""Noise XX: the published vectors, the libp2p payload, and everything a peer may get wrong."""

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.keys import PrivateKey
from protocol.noise import (
    MAX_HANDSHAKE_MESSAGE,
    MAX_NONCE,
    MAX_PLAINTEXT,
    SIGNATURE_PREFIX,
    BadSignatureError,
    CipherState,
    HandshakeXX,
    Identity,
    NoiseError,
    NoiseHandshake,
    NoMuxerError,
    NonceExhaustedError,
    WrongPeerError,
)
from protocol.pb.noise_pb2 import NoiseHandshakePayload

YAMUX = "/yamux/1.0.0"
ALICE, BOB = PrivateKey.from_seed(b"a" * 32), PrivateKey.from_seed(b"b" * 32)

# The values of Noise_XX_25519_ChaChaPoly_SHA256 among the cacophony test vectors.
PROLOGUE = bytes.fromhex("4a6f686e2047616c74")
INITIATOR_STATIC = "e61ef9919cde45dd5f82166404bd08e38bceb5dfdfded0a34c8df7ed542214d1"
INITIATOR_EPHEMERAL = "893e28b9dc6ca8d611ab664754b8ceb7bac5117349a4439a6b0569da977c464a"
RESPONDER_STATIC = "4a3acbfdb163dec651dfa3194dece676d437029c62a408b4c5ea9114246e4893"
RESPONDER_EPHEMERAL = "bbdb4cdbd309f1a1f2e1456967fe288cadd6f712d65dc7b7793d5e63da6b375b"
HANDSHAKE_HASH = "c8e5f64e846193be2a834104c2a009868d6c9f3bd3c186299888b488b2f1f58e"
HANDSHAKE = [
    (
        "4c756477696720766f6e204d69736573",
        "ca35def5ae56cec33dc2036731ab14896bc4c75dbb07a61f879f8e3afa4c79444c756477696720766f6e204d69736573",
    ),
    (
        "4d757272617920526f746862617264",
        (
            "95ebc60d2b1fa672c1f46a8aa265ef51bfe38e7ccb39ec5be34069f14480884381cbad1f276e038c48378ffce2b65285e08d6b68"
            "aaa3629a5a8639392490e5b9bd5269c2f1e4f488ed8831161f19b7815528f8982ffe09be9b5c412f8a0db50f8814c7194e83f23d"
            "bd8d162c9326ad"
        ),
    ),
    (
        "462e20412e20486179656b",
        (
            "c7195ffacac1307ff99046f219750fc47693e23c3cb08b89c2af808b444850a80ae475b9df0f169ae80a89be0865b57f58c9fea0"
            "d4ec82a286427402f113e4b6ae769a1d95941d49b25030"
        ),
    ),
]
TRANSPORT = [
    ("4361726c204d656e676572", "96763ed773f8e47bb3712f0e29b3060ffc956ffc146cee53d5e1df"),
    ("4a65616e2d426170746973746520536179", "3e40f15f6f3a46ae446b253bf8b1d9ffb6ed9b174d272328ff91a7e2e5c79c07f5"),
    (
        "457567656e2042f6686d20766f6e2042617765726b",
        "eb3f3515110702e047a6c9da4478b6ead94873c11c0f2d710ddb3f09fce024b3a58502ae3f",
    ),
]


def key(value: str) -> X25519PrivateKey:
    return X25519PrivateKey.from_private_bytes(bytes.fromhex(value))


def identity_of(identity: PrivateKey, static: X25519PrivateKey) -> Identity:
    message = SIGNATURE_PREFIX + static.public_key().public_bytes_raw()
    return Identity(identity.public_key.to_protobuf(), identity.sign(message))


def make(identity: PrivateKey, *, initiator: bool, proof: Identity | None = None, **options) -> NoiseHandshake:
    static = X25519PrivateKey.generate()
    return NoiseHandshake(
        initiator=initiator, static_key=static, identity=proof or identity_of(identity, static), **options
    )


def converse(alice: NoiseHandshake, bob: NoiseHandshake, piece: int = 1 << 20) -> None:
    """Until neither has anything to say; each message in pieces of so many bytes."""
    while True:
        said = False
        for speaker, listener in ((alice, bob), (bob, alice)):
            data = speaker.data_to_send()
            said = said or bool(data)
            for start in range(0, len(data), piece):
                listener.receive_data(data[start : start + piece])
        if not said:
            return


def test_published_vectors():
    sides = [
        HandshakeXX(
            initiator=True, static_key=key(INITIATOR_STATIC), prologue=PROLOGUE, ephemeral=key(INITIATOR_EPHEMERAL)
        ),
        HandshakeXX(
            initiator=False, static_key=key(RESPONDER_STATIC), prologue=PROLOGUE, ephemeral=key(RESPONDER_EPHEMERAL)
        ),
    ]
    for turn, (payload, ciphertext) in enumerate(HANDSHAKE):
        message = sides[turn % 2].write_message(bytes.fromhex(payload))
        assert message.hex() == ciphertext
        assert sides[1 - turn % 2].read_message(message).hex() == payload
    assert sides[0].symmetric.handshake_hash.hex() == sides[1].symmetric.handshake_hash.hex() == HANDSHAKE_HASH
    ciphers = [side.symmetric.split() for side in sides]
    for turn, (payload, ciphertext) in enumerate(TRANSPORT, 1):
        sender, receiver = ciphers[turn % 2][turn % 2], ciphers[1 - turn % 2][turn % 2]
        sealed = sender.encrypt(bytes.fromhex(payload))
        assert sealed.hex() == ciphertext
        buffer = memoryview(bytearray(sealed))
        length = receiver.open(buffer)
        assert bytes(buffer[:length]).hex() == payload


def test_sealing_in_place_gives_what_the_vectors_say():
    copying, in_place = CipherState(b"k" * 32), CipherState(b"k" * 32)
    for length in (0, 1, 15, 16, 17, 4096, MAX_PLAINTEXT):
        plain = bytes(range(256)) * (length // 256 + 1)
        buffer = memoryview(bytearray(plain[:length] + b"?" * 16))
        assert in_place.seal(buffer, length) == length + 16
        assert bytes(buffer) == copying.encrypt(plain[:length])


@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
@pytest.mark.parametrize(
    ("ours", "theirs", "agreed"),
    [
        ((YAMUX,), (YAMUX,), YAMUX),
        (("/b", YAMUX), (YAMUX, "/b"), "/b"),  # the initiator's order counts
        ((), (YAMUX,), None),
        ((YAMUX,), (), None),
        ((), (), None),
    ],
)
def test_handshake(piece, ours, theirs, agreed):
    alice = make(ALICE, initiator=True, muxers=ours, expected_peer=BOB.peer_id)
    bob = make(BOB, initiator=False, muxers=theirs)
    converse(alice, bob, piece)
    assert alice.result is not None
    assert bob.result is not None
    assert (alice.result.peer_id, bob.result.peer_id) == (BOB.peer_id, ALICE.peer_id)
    assert alice.result.public_key == BOB.public_key.to_protobuf()
    assert alice.result.muxer == bob.result.muxer == agreed
    for sender, receiver in ((alice.result, bob.result), (bob.result, alice.result)):
        assert receiver.receive.decrypt(sender.send.encrypt(b"hello")) == b"hello"


def test_bytes_after_the_handshake_are_kept():
    alice, bob = make(ALICE, initiator=True), make(BOB, initiator=False)
    bob.receive_data(alice.data_to_send())
    alice.receive_data(bob.data_to_send())
    bob.receive_data(alice.data_to_send() + b"\0\5extra")
    assert bob.result is not None
    assert bob.result.unread == b"\0\5extra"
    with pytest.raises(NoiseError):
        bob.receive_data(b"x")


def test_no_common_muxer_fails():
    alice, bob = make(ALICE, initiator=True, muxers=("/a",)), make(BOB, initiator=False, muxers=("/b",))
    with pytest.raises(NoMuxerError):
        converse(alice, bob)


def test_wrong_peer():
    alice = make(ALICE, initiator=True, expected_peer=ALICE.peer_id)
    bob = make(BOB, initiator=False)
    with pytest.raises(WrongPeerError):
        converse(alice, bob)
    assert alice.result is None
    assert alice.data_to_send() == b""  # who we are is not told to the wrong peer


@pytest.mark.parametrize("liar_initiates", [True, False])
def test_identity_of_somebody_else(liar_initiates):
    stolen = identity_of(BOB, X25519PrivateKey.generate())  # Bob's true signature, for another static key
    liar = make(ALICE, initiator=liar_initiates, proof=stolen)
    honest = make(ALICE, initiator=not liar_initiates)
    with pytest.raises(BadSignatureError):
        converse(*((liar, honest) if liar_initiates else (honest, liar)))
    assert honest.result is None


@pytest.mark.parametrize("public_key", [b"", b"\x08\x01\x12\x20" + b"\0" * 31, b"\xff" * 40])
def test_identity_key_that_is_none(public_key):
    alice = make(ALICE, initiator=True, proof=Identity(public_key, b"s" * 64))
    bob = make(BOB, initiator=False)
    with pytest.raises(NoiseError):
        converse(alice, bob)


def respond_with(payload: bytes) -> NoiseHandshake:
    """An initiator that got this payload in the second message."""
    alice = make(ALICE, initiator=True)
    responder = HandshakeXX(initiator=False, static_key=X25519PrivateKey.generate())
    responder.read_message(alice.data_to_send()[2:])
    message = responder.write_message(payload)
    alice.receive_data(len(message).to_bytes(2, "big") + message)
    return alice


@pytest.mark.parametrize("payload", [b"", b"\xff", b"\x0a\x05ab"])
def test_payload_that_is_none(payload):
    with pytest.raises(NoiseError):
        respond_with(payload)


def test_too_many_muxers():
    static = X25519PrivateKey.generate()
    proof = identity_of(BOB, static)
    payload = NoiseHandshakePayload(identity_key=proof.public_key, identity_sig=proof.signature)
    payload.extensions.stream_muxers.extend(f"/{n}" for n in range(1000))
    alice = make(ALICE, initiator=True)
    responder = HandshakeXX(initiator=False, static_key=static)
    responder.read_message(alice.data_to_send()[2:])
    message = responder.write_message(payload.SerializeToString())
    with pytest.raises(NoiseError):
        alice.receive_data(len(message).to_bytes(2, "big") + message)


def test_payload_in_the_clear_first_message():
    bob = make(BOB, initiator=False)
    message = HandshakeXX(initiator=True, static_key=X25519PrivateKey.generate()).write_message(b"early")
    with pytest.raises(NoiseError):
        bob.receive_data(len(message).to_bytes(2, "big") + message)


def test_truncation_at_each_byte_is_never_a_handshake():
    alice, bob = make(ALICE, initiator=True), make(BOB, initiator=False)
    first = alice.data_to_send()
    bob.receive_data(first)
    second = bob.data_to_send()
    for length in range(len(first)):
        victim = make(BOB, initiator=False)
        victim.receive_data(first[:length])
        assert victim.data_to_send() == b""
        with pytest.raises(NoiseError):
            victim.receive_eof()
    for length in range(2, len(second)):
        # cut short and the length set right, so that the message is whole but wrong
        victim = make(ALICE, initiator=True)
        with pytest.raises(NoiseError):
            victim.receive_data((length - 2).to_bytes(2, "big") + second[2:length])
        with pytest.raises(NoiseError):
            victim.receive_data(b"")


def test_each_changed_byte_is_noticed():
    alice, bob = make(ALICE, initiator=True), make(BOB, initiator=False)
    bob.receive_data(alice.data_to_send())
    alice.receive_data(bob.data_to_send())
    third = alice.data_to_send()
    for position in range(2, len(third), 5):
        fresh_alice, victim = make(ALICE, initiator=True), make(BOB, initiator=False)
        victim.receive_data(fresh_alice.data_to_send())
        fresh_alice.receive_data(victim.data_to_send())
        message = bytearray(fresh_alice.data_to_send())
        message[position] ^= 1
        with pytest.raises(NoiseError):
            victim.receive_data(bytes(message))
        assert victim.result is None


def test_oversized_message_is_refused_by_its_length():
    bob = make(BOB, initiator=False)
    with pytest.raises(NoiseError, match="limit"):
        bob.receive_data((MAX_HANDSHAKE_MESSAGE + 1).to_bytes(2, "big"))


def test_degenerate_ephemeral_key():
    bob = make(BOB, initiator=False)
    with pytest.raises(NoiseError):
        bob.receive_data(b"\0\x20" + bytes(32))


def test_replayed_reordered_and_short_messages():
    sender, receiver = CipherState(b"k" * 32), CipherState(b"k" * 32)
    first, second = sender.encrypt(b"first"), sender.encrypt(b"second")
    with pytest.raises(NoiseError):
        receiver.open(memoryview(bytearray(second)))
    assert receiver.open(memoryview(bytearray(first))) == 5
    with pytest.raises(NoiseError):
        receiver.open(memoryview(bytearray(first)))
    assert receiver.open(memoryview(bytearray(second))) == 6
    with pytest.raises(NoiseError):
        receiver.open(memoryview(bytearray(15)))


def test_nonces_are_never_used_twice():
    cipher = CipherState(b"k" * 32)
    cipher.nonce = MAX_NONCE
    cipher.encrypt(b"last")
    for use in (
        lambda: cipher.encrypt(b""),
        lambda: cipher.seal(memoryview(bytearray(16)), 0),
        lambda: cipher.open(memoryview(bytearray(16))),
        lambda: cipher.decrypt(bytes(16)),
    ):
        with pytest.raises(NonceExhaustedError):
            use()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=200), max_size=5), st.booleans())
def test_any_bytes_are_refused_or_waited_for(chunks, initiator):
    victim = make(ALICE, initiator=initiator)
    try:
        for chunk in chunks:
            victim.receive_data(chunk)
    except NoiseError:
        pass
    assert victim.result is None


def test_sealing_into_another_buffer_is_sealing():
    one, other, reader = (CipherState(b"k" * 32) for _ in range(3))
    for length in (0, 1, 65_519):
        plain = bytes(range(256)) * 256
        out, in_place = bytearray(70_000), bytearray(70_000)
        in_place[:length] = plain[:length]
        sealed = one.seal_into(memoryview(plain)[:length], memoryview(out))
        assert sealed == other.seal(memoryview(in_place), length) == length + 16
        assert out[:sealed] == in_place[:sealed]
        assert reader.open(memoryview(out)[:sealed]) == length
        assert out[:length] == plain[:length]
