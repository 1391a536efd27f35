from __future__ import annotations

import hashlib
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import InvalidValueError
from protocol.multibase import encode_base58, encode_multibase_base32, encode_multibase_base36
from protocol.peer_id import PeerId, PeerIdError

# libp2p specs, peer-ids.md, "Examples": the first two are the same peer.
HASHED = "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"
HASHED_CID = "bafzbeie5745rpv2m6tjyuugywy4d5ewrqgqqhfnf445he3omzpjbx5xqxe"
INLINE = "12D3KooWD3eckifWpRn9wQpMG9R9hX3sD158z7EqHWmweQAJU5SA"

inline_keys = st.one_of(
    st.binary(min_size=32, max_size=32).map(lambda key: b"\x08\x01\x12\x20" + key),
    st.binary(min_size=33, max_size=33).map(lambda key: b"\x08\x02\x12\x21" + key),
)
peer_ids = st.one_of(inline_keys, st.binary(min_size=43, max_size=80)).map(PeerId.from_public_key)


def test_both_texts_of_the_spec_are_one_peer():
    assert PeerId.from_text(HASHED) == PeerId.from_text(HASHED_CID)
    assert str(PeerId.from_text(HASHED_CID)) == HASHED
    assert PeerId.from_text(HASHED).to_cid() == HASHED_CID


def test_base36_cids_of_ed25519_peers():
    # js-libp2p and kubo write ids so in subdomains.
    peer = PeerId.from_text("k51qzi5uqu5dhb6l8spkdx7yxafegfkee5by8h7lmjh2ehc2sgg34z7c15vzqs")
    assert str(peer) == "12D3KooWCryG7Mon9orvQxcS1rYZjotPgpwoJNHHKcLLfE4Hf5mV"
    assert peer.public_key is not None


def test_ed25519_ids_hold_the_key_and_longer_keys_are_hashed():
    short, long = b"\x08\x01\x12\x20" + bytes(32), bytes(43)
    assert PeerId.from_public_key(short).multihash == b"\x00\x24" + short
    assert PeerId.from_public_key(short).public_key == short
    assert PeerId.from_public_key(long).multihash == b"\x12\x20" + hashlib.sha256(long).digest()
    assert PeerId.from_public_key(long).public_key is None


@given(peer_ids)
def test_every_text_comes_back(peer):
    assert PeerId.from_text(str(peer)) == peer
    assert PeerId.from_text(peer.to_cid()) == peer
    assert PeerId.from_text(encode_multibase_base36(b"\x01\x72" + peer.multihash)) == peer
    assert PeerId.from_wire(peer.to_wire()) == peer
    assert hash(PeerId.from_text(str(peer))) == hash(peer)
    assert pickle.loads(pickle.dumps(peer)) == peer


@given(st.binary(max_size=42))
def test_an_id_that_should_hold_its_key_and_holds_none_is_refused(content):
    multihash = bytes((0, len(content))) + content
    is_key = content[:4].hex() in ("08011220", "08021221") and len(content) == 4 + content[3]
    for text in (encode_base58(multihash), encode_multibase_base32(b"\x01\x72" + multihash)):
        if is_key:
            assert PeerId.from_text(text).public_key == content
        else:
            with pytest.raises(PeerIdError, match="is not a peer id: "):
                PeerId.from_text(text)


@given(inline_keys, st.data())
def test_an_id_of_which_a_part_is_lost_is_refused(key, data):
    """Any digits cut off at the end, or one left out, as happens in copying; a few happen to be another key."""
    text = str(PeerId.from_public_key(key))
    cut = data.draw(st.integers(1, len(text) - 1))
    with pytest.raises(PeerIdError, match="is not a peer id: "):
        PeerId.from_text(text[:cut])
    left_out = data.draw(st.integers(0, len(text) - 1))
    with pytest.raises(PeerIdError, match="is not a peer id: "):
        PeerId.from_text(text[:left_out] + text[left_out + 1 :])


def test_the_reason_is_told():
    with pytest.raises(PeerIdError, match="'12D3KooWnope' is not a peer id: it holds no public key"):
        PeerId.from_text("12D3KooWnope")
    with pytest.raises(PeerIdError, match="holds no public key; has a part of it been lost"):
        PeerId(b"\x00\x05hello")
    with pytest.raises(PeerIdError, match="an Ed25519 key has 32 bytes, not 31"):
        PeerId(b"\x00\x23\x08\x01\x12\x20" + bytes(31))


@given(st.lists(peer_ids))
def test_order_is_that_of_the_bytes(peers):
    assert [peer.multihash for peer in sorted(peers)] == sorted(peer.multihash for peer in peers)


@pytest.mark.parametrize(
    "multihash",
    [
        b"",
        b"\x00",
        b"\x00\x00",
        b"\x12\x20" + bytes(31),
        b"\x12\x20" + bytes(33),
        b"\x12\x1f" + bytes(31),  # a truncated sha2-256
        b"\x12\x21" + bytes(33),
        b"\x00\x2b" + bytes(43),  # an inline key that must be hashed
        b"\x11\x14" + bytes(20),  # sha1
        b"\x13\x40" + bytes(64),  # sha2-512
        b"\x80\x00\x01a",
    ],
)
def test_other_multihashes_are_refused(multihash):
    with pytest.raises(PeerIdError):
        PeerId(multihash)
    with pytest.raises(InvalidValueError):
        PeerId.from_wire(multihash)
    with pytest.raises(PeerIdError):
        PeerId.from_text(encode_multibase_base32(b"\x01\x72" + multihash))


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "Qm",
        "12D3",
        HASHED[:-1],
        HASHED + "1",
        HASHED + " ",
        INLINE.lower(),
        "z" + HASHED,  # multibase of a bare multihash, which is not a CID
        "home",
        "1" * 600,
        "Qm" + "z" * 600,
        "QmxoHT6iViN5xAjoz1VZ553cL31U9F94ht3QvWR1FrEbZY",  # a sha2-256 digest of more than 32 bytes
        encode_multibase_base32(b"\x01\x70\x12\x20" + bytes(32)),  # a CID of another codec
        encode_multibase_base32(b"\x02\x72\x12\x20" + bytes(32)),
        encode_multibase_base32(b"\x01"),
        "\udcff",
    ],
)
def test_other_texts_are_refused(text):
    with pytest.raises(PeerIdError, match="is not a peer id"):
        PeerId.from_text(text)


def test_wire_form_is_bytes():
    with pytest.raises(InvalidValueError):
        PeerId.from_wire(HASHED)


def test_it_cannot_change_and_shows_itself_shortly():
    peer = PeerId.from_text(INLINE)
    with pytest.raises(AttributeError):
        peer.multihash = b""
    assert peer.short == "12D3KooW…AJU5SA"
    assert repr(peer) == f"PeerId('{INLINE}')"
    assert peer != INLINE
    assert encode_base58(peer.multihash) == INLINE
