"""Noise XX: the published vectors, the libp2p payload, and everything a peer may get wrong."""

import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.keys import PrivateKey
from protocol.noise import (
    MAX_HANDSHAKE_MESSAGE,
    MAX_PLAINTEXT,
    SIGNATURE_PREFIX,
    BadSignatureError,
    HandshakeXX,
    Identity,
    NoiseHandshake,
    NoMuxerError,
    WrongPeerError,
    _derive,
)
from protocol.noise_cipher import (
    MAX_NONCE,
    REKEY_AFTER,
    Cipher,
    CipherState,
    NoiseError,
    NonceExhaustedError,
)
from protocol.pb.noise_pb2 import NoiseHandshakePayload

YAMUX = "/yamux/1.0.0"
ALICE, BOB = PrivateKey.from_seed(b"a" * 32), PrivateKey.from_seed(b"b" * 32)

# The cacophony test vectors of the two patterns.
VECTORS = json.loads((Path(__file__).parent / "data/noise_vectors.json").read_text())


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


def opened(cipher: CipherState, sealed: bytes | int) -> int:
    """Open a message in place; the length of the plaintext."""
    buffer = memoryview(bytearray(sealed))
    return cipher.open_into(buffer, buffer)


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


@pytest.mark.parametrize("cipher", Cipher)
def test_published_vectors(cipher):
    vector = VECTORS[f"Noise_XX_25519_{cipher.value}_SHA256"]
    prologue = bytes.fromhex(vector["init_prologue"])
    sides = [
        HandshakeXX(
            initiator=side == "init",
            static_key=key(vector[f"{side}_static"]),
            prologue=prologue,
            ephemeral=key(vector[f"{side}_ephemeral"]),
            cipher=cipher,
        )
        for side in ("init", "resp")
    ]
    handshake, transport = vector["messages"][:3], vector["messages"][3:]
    for turn, told in enumerate(handshake):
        message = sides[turn % 2].write_message(bytes.fromhex(told["payload"]))
        assert message.hex() == told["ciphertext"]
        assert sides[1 - turn % 2].read_message(message).hex() == told["payload"]
    for side in sides:
        assert side.symmetric.handshake_hash.hex() == vector["handshake_hash"]
    ciphers = [side.symmetric.split() for side in sides]
    assert len(transport) > 2
    for turn, told in enumerate(transport, 1):
        sender, receiver = ciphers[turn % 2][turn % 2], ciphers[1 - turn % 2][turn % 2]
        sealed = sender.encrypt(bytes.fromhex(told["payload"]))
        assert sealed.hex() == told["ciphertext"]
        buffer = memoryview(bytearray(sealed))
        length = receiver.open_into(buffer, buffer)
        assert bytes(buffer[:length]).hex() == told["payload"]


@pytest.mark.parametrize("cipher", Cipher)
def test_sealing_in_place_gives_what_the_vectors_say(cipher):
    copying, in_place = CipherState(b"k" * 32, cipher), CipherState(b"k" * 32, cipher)
    for length in (0, 1, 15, 16, 17, 4096, MAX_PLAINTEXT):
        plain = bytes(range(256)) * (length // 256 + 1)
        buffer = memoryview(bytearray(plain[:length] + b"?" * 16))
        assert in_place.seal_into(buffer[:length], buffer) == length + 16
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


AES, CHACHA = Cipher.AES_GCM, Cipher.CHACHA_POLY


@pytest.mark.parametrize(
    ("ours", "theirs", "agreed"),
    [
        ((AES,), (AES,), AES),
        ((AES, CHACHA), (CHACHA, AES), AES),  # the initiator's order counts
        ((CHACHA, AES), (AES, CHACHA), CHACHA),
        ((AES,), (), CHACHA),
        ((), (AES,), CHACHA),
        ((), (), CHACHA),
        ((AES,), (CHACHA,), CHACHA),  # none in common
    ],
)
def test_transport_cipher(ours, theirs, agreed):
    alice = make(ALICE, initiator=True, muxers=(YAMUX,), ciphers=ours)
    bob = make(BOB, initiator=False, muxers=(YAMUX,), ciphers=theirs)
    converse(alice, bob)
    for sender, receiver in ((alice.result, bob.result), (bob.result, alice.result)):
        assert sender.send.cipher is receiver.receive.cipher is agreed
        for message in (b"hello", b"again"):
            assert receiver.receive.decrypt(sender.send.encrypt(message)) == message


def test_each_transport_cipher_has_keys_of_its_own():
    symmetric = HandshakeXX(initiator=True, static_key=X25519PrivateKey.generate()).symmetric
    symmetric.mix_key(b"secret")
    states = [state for cipher in (None, CHACHA, AES) for state in symmetric.split(cipher)]
    assert [state.cipher for state in states] == [CHACHA] * 4 + [AES] * 2
    streams = [state.encrypt(bytes(64)) for state in states]
    assert streams[:2] == streams[2:4]  # the handshake's own cipher is what the specification says
    assert len(set(streams)) == 4
    first, second = (CipherState(key, AES).encrypt(bytes(64)) for key in _derive(symmetric._chaining_key, b""))
    assert not {first, second} & set(streams)


@pytest.mark.parametrize("name", [b"\xff\xfe", b"", b"AES", b"AESGCM ", b"\n" * 200])
def test_names_that_we_do_not_know(name):
    """Whatever a stranger says: a refusal, or what both know."""
    for initiator in (True, False):
        liar = make(ALICE, initiator=initiator, muxers=(YAMUX,))
        payload = NoiseHandshakePayload()
        payload.ParseFromString(liar._own_payload())
        payload.extensions.transport_ciphers.append(name)
        liar._own_payload = payload.SerializeToString
        honest = make(BOB, initiator=not initiator, muxers=(YAMUX,), ciphers=(AES,))
        converse(*((liar, honest) if initiator else (honest, liar)))
        assert honest.result.send.cipher is CHACHA
        payload.extensions.ClearField("stream_muxers")
        payload.extensions.stream_muxers.append(name)
        liar = make(ALICE, initiator=initiator, muxers=(YAMUX,))
        proof = NoiseHandshakePayload()
        proof.ParseFromString(liar._own_payload())
        payload.identity_sig = proof.identity_sig
        liar._own_payload = payload.SerializeToString
        honest = make(BOB, initiator=not initiator, muxers=(YAMUX,), ciphers=(AES,))
        with pytest.raises(NoMuxerError) as caught:
            converse(*((liar, honest) if initiator else (honest, liar)))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["stream_muxers", "transport_ciphers"])
def test_too_many_names(field):
    liar = make(ALICE, initiator=True)
    payload = NoiseHandshakePayload()
    payload.ParseFromString(liar._own_payload())
    getattr(payload.extensions, field).extend([b"x"] * 1000)
    liar._own_payload = payload.SerializeToString
    with pytest.raises(NoiseError, match="1000"):
        converse(liar, make(BOB, initiator=False))


def test_aes_keys_are_replaced_and_chacha_keys_are_not():
    for cipher in Cipher:
        ends = CipherState(b"k" * 32, cipher), CipherState(b"k" * 32, cipher)
        first = ends[0]._aead
        for nonce in (REKEY_AFTER - 1, REKEY_AFTER, REKEY_AFTER + 1, 2 * REKEY_AFTER - 1, 2 * REKEY_AFTER):
            for end in ends:
                end.nonce = nonce
            kept = ends[0]._aead
            buffer = memoryview(bytearray(b"hello" + bytes(16)))
            assert ends[0].seal_into(buffer[:5], buffer) == 21
            assert ends[1].open_into(buffer, buffer) == 5
            assert buffer[:5] == b"hello"
            renewed = cipher is AES and nonce % REKEY_AFTER == 0
            assert (ends[0]._aead is not kept) == renewed
        assert (ends[0]._aead is first) == (cipher is CHACHA)


def test_rekey_is_that_of_the_specification():
    state = CipherState(b"k" * 32, AES)
    state.nonce = REKEY_AFTER
    key = AESGCM(b"k" * 32).encrypt(bytes(4) + b"\xff" * 8, bytes(32), None)[:32]
    nonce = bytes(4) + REKEY_AFTER.to_bytes(8, "big")
    assert state.encrypt(b"hello") == AESGCM(key).encrypt(nonce, b"hello", None)


def test_an_altered_message_does_not_move_the_key():
    """Else a stranger's bytes at the right moment would part the two ends."""
    sender, receiver = CipherState(b"k" * 32, AES), CipherState(b"k" * 32, AES)
    sender.nonce = receiver.nonce = REKEY_AFTER
    sealed = sender.encrypt(b"hello")
    with pytest.raises(NoiseError):
        receiver.decrypt(sealed[:-1] + bytes([sealed[-1] ^ 1]))
    assert receiver.decrypt(sealed) == b"hello"


def test_bytes_after_the_handshake_are_kept():
    alice, bob = make(ALICE, initiator=True), make(BOB, initiator=False)
    bob.receive_data(alice.data_to_send())
    alice.receive_data(bob.data_to_send())
    bob.receive_data(alice.data_to_send() + b"\0\5extra")
    assert bob.result is not None
    assert bob.result.unread == b"\0\5extra"
    with pytest.raises(NoiseError):
        bob.receive_data(b"x")


@pytest.mark.parametrize("ours", [None, 1, 1024, 0xFFFF_FFFF])
def test_how_many_streams_each_side_accepts(ours):
    alice, bob = make(ALICE, initiator=True, streams=ours), make(BOB, initiator=False, streams=7)
    converse(alice, bob)
    assert alice.result is not None
    assert bob.result is not None
    assert (alice.result.streams, bob.result.streams) == (7, ours)


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
        opened(receiver, second)
    assert opened(receiver, first) == 5
    with pytest.raises(NoiseError):
        opened(receiver, first)
    assert opened(receiver, second) == 6
    with pytest.raises(NoiseError):
        opened(receiver, 15)


def test_nonces_are_never_used_twice():
    cipher = CipherState(b"k" * 32)
    cipher.nonce = MAX_NONCE
    cipher.encrypt(b"last")
    for use in (
        lambda: cipher.encrypt(b""),
        lambda: cipher.seal_into(memoryview(b""), memoryview(bytearray(16))),
        lambda: opened(cipher, 16),
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
        assert sealed == other.seal_into(memoryview(in_place)[:length], memoryview(in_place)) == length + 16
        assert out[:sealed] == in_place[:sealed]
        assert reader.open_into(memoryview(out)[:sealed], memoryview(out)) == length
        assert out[:length] == plain[:length]
