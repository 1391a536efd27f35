"""The identity key's file in every state that it can be found in, and the actor that signs with it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from actors.files import FileExistsAlreadyError, FileMissingError, PermissionsError
from actors.keyring.actor import BURST, MAX_VOUCHER_SECONDS, VOUCHER_BURST, Keyring
from actors.keyring.key_file import KeyFileError, create_key, load_key, load_or_create_key
from protocol.circuit.voucher import open_voucher
from protocol.keys import BadSignatureError, KeyType, PrivateKey, PublicKey
from protocol.messages.keyring import ReadIdentity, SignNoiseStaticKey, SignPeerRecord, SignRelayVoucher
from protocol.multiaddr import Multiaddr
from protocol.noise import SIGNATURE_PREFIX
from protocol.peer_record import open_peer_record
from tests.support.stage import Stage, StartFailedError, refused

# The form in which go-libp2p writes an Ed25519 key: field 1 = 1 (type), field 2 = 64 bytes (secret, public). The pair
# is test vector 1 of RFC 8032, section 7.1.
SECRET = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
PUBLIC = bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
GO_KEY = b"\x08\x01\x12\x40" + SECRET + PUBLIC


@pytest.fixture
def path(tmp_path):
    return tmp_path / "identity.key"


def write(path, content, mode=0o600):
    path.write_bytes(content)
    path.chmod(mode)


def test_a_key_that_go_wrote_loads_as_it_is(path):
    write(path, GO_KEY)
    key = load_key(path)
    assert key.public_key.data == PUBLIC
    assert str(key.peer_id).startswith("12D3KooW")
    assert key.to_protobuf() == path.read_bytes()


def test_a_new_key_is_private_and_stays(path):
    key = create_key(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.stat().st_size == 68
    assert load_key(path) == key
    with pytest.raises(FileExistsAlreadyError):
        create_key(path)
    assert load_key(path) == key
    assert load_or_create_key(path) == key
    assert list(path.parent.iterdir()) == [path]


def test_two_new_keys_differ(tmp_path):
    assert create_key(tmp_path / "a") != create_key(tmp_path / "b")


def test_a_new_key_is_private_whatever_the_umask(path):
    before = os.umask(0)
    try:
        create_key(path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o610, 0o777])
def test_loose_permissions_are_refused_with_the_command_that_repairs_them(path, mode):
    write(path, GO_KEY, mode)
    with pytest.raises(PermissionsError, match="repair it: ") as refusal:
        load_key(path)
    command = str(refusal.value).partition("repair it: ")[2]
    subprocess.run(command, shell=True, check=True)
    assert load_key(path).public_key.data == PUBLIC


def test_the_repairing_command_bears_any_path(tmp_path):
    path = tmp_path / "it's a $(key)" / "identity.key"
    path.parent.mkdir(mode=0o700)
    write(path, GO_KEY, 0o644)
    with pytest.raises(PermissionsError) as refusal:
        load_key(path)
    subprocess.run(str(refusal.value).partition("repair it: ")[2], shell=True, check=True)
    load_key(path)


def test_a_symbolic_link_is_refused_with_the_command_that_repairs_it(path, tmp_path):
    write(tmp_path / "elsewhere", GO_KEY)
    path.symlink_to("elsewhere")
    with pytest.raises(PermissionsError, match="symbolic link") as refusal:
        load_key(path)
    subprocess.run(str(refusal.value).partition("put the key itself there: ")[2], shell=True, check=True)
    assert load_key(path).public_key.data == PUBLIC


def test_a_directory_where_others_may_replace_the_key_is_refused(tmp_path):
    directory = tmp_path / "open"
    directory.mkdir()
    directory.chmod(0o777)
    write(directory / "identity.key", GO_KEY)
    with pytest.raises(PermissionsError, match="chmod go-w"):
        load_key(directory / "identity.key")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_key_of_another_user_is_refused(path):
    write(path, GO_KEY)
    os.chown(path, 12345, 12345)
    with pytest.raises(PermissionsError, match="belongs to user 12345"):
        load_key(path)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "is empty"),
        (GO_KEY[:40], "not an identity key"),
        (GO_KEY[:-1] + b"\x00", "does not belong"),
        (b"\x08\x01\x12\x20" + SECRET, "64 bytes"),
        (b"-----BEGIN OPENSSH PRIVATE KEY-----\n", "not an identity key"),
        (b"\xff" * 9000, "longer than"),
        (b"\x08\x02\x12\x20" + SECRET, "SECP256K1"),
    ],
)
def test_what_is_not_an_identity_key_is_explained_and_kept(path, content, text):
    write(path, content)
    with pytest.raises(KeyFileError, match=text) as refusal:
        load_key(path)
    assert SECRET.hex() not in str(refusal.value)
    assert repr(SECRET)[2:20] not in str(refusal.value)
    with pytest.raises(KeyFileError):
        load_or_create_key(path)
    assert path.read_bytes() == content


def test_missing_file_and_missing_directory_are_told_apart(tmp_path):
    with pytest.raises(FileMissingError, match="peerup init"):
        load_key(tmp_path / "identity.key")
    with pytest.raises(FileMissingError, match="directory"):
        load_key(tmp_path / "nowhere" / "identity.key")


def test_a_pipe_in_the_keys_place_does_not_hang(path):
    os.mkfifo(path, 0o600)
    with pytest.raises(KeyFileError, match="not a file"):
        load_key(path)


def test_a_full_disk_leaves_no_key_behind(path):
    # A file size limit of 10 bytes in a process of its own: the kernel then cuts and refuses writes.
    program = (
        "import resource, signal, sys, pathlib\n"
        "from actors.keyring.key_file import create_key\n"
        "from actors.files import DiskFullError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))\n"
        "try:\n    create_key(pathlib.Path(sys.argv[1]))\n"
        "except DiskFullError as error:\n    print('full', error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, path], capture_output=True, text=True, check=True, cwd=Path.cwd()
    )
    assert done.stdout.startswith("full")
    assert list(path.parent.iterdir()) == []


async def test_the_actor_signs_what_the_specifications_name(path):
    write(path, GO_KEY)
    async with Stage() as stage:
        ready = await stage.start("keyring", Keyring(str(path)))
        switchboard = stage.visitor("switchboard")
        identity = await switchboard.ask("keyring", ReadIdentity())
        assert ready == {"peer_id": str(identity.peer_id)}
        key = PublicKey.from_protobuf(identity.public_key)
        assert (key.key_type, key.data) == (KeyType.ED25519, PUBLIC)
        signed = await switchboard.ask("keyring", SignNoiseStaticKey(b"\x07" * 32))
        assert signed.public_key == identity.public_key
        key.verify(SIGNATURE_PREFIX + b"\x07" * 32, signed.signature)
        with pytest.raises(BadSignatureError):
            key.verify(SIGNATURE_PREFIX + b"\x08" * 32, signed.signature)
        address = Multiaddr("/ip4/192.0.2.1/tcp/4001")
        record = open_peer_record((await switchboard.ask("keyring", SignPeerRecord((address,), 5))).envelope)
        assert (record.peer_id, record.addresses, record.seq) == (identity.peer_id, (address,), 5)
        assert stage.metrics("keyring")["peerup_signatures_total", ("purpose", "peer-record")] == 1


async def test_only_the_switchboard_has_something_signed(path):
    write(path, GO_KEY)
    async with Stage() as stage:
        await stage.start("keyring", Keyring(str(path)))
        await stage.visitor("api").ask("keyring", ReadIdentity())
        for sender, request in [
            ("api", SignNoiseStaticKey(b"\x07" * 32)),
            ("gate", ReadIdentity()),
            ("proxy/home/ssh", SignPeerRecord((), 1)),
            ("relay/server", SignRelayVoucher(load_key(path).peer_id, 2_000_000_000)),
        ]:
            with refused("not-allowed"):
                await stage.visitor(sender).ask("keyring", request)


async def test_what_is_out_of_size_or_too_often_is_refused(path, autojump_clock):
    write(path, GO_KEY)
    async with Stage() as stage:
        await stage.start("keyring", Keyring(str(path)))
        switchboard = stage.visitor("switchboard")
        for static_key in (b"", b"\x07" * 31, b"noise-libp2p-static-key:" + b"\x07" * 32):
            with refused("bad-request"):
                await switchboard.ask("keyring", SignNoiseStaticKey(static_key))
        with refused("bad-request"):
            await switchboard.ask("keyring", SignPeerRecord((Multiaddr("/ip4/192.0.2.1/tcp/1"),) * 1000, 1))
        with refused("bad-request"):
            await switchboard.ask("keyring", SignPeerRecord((), -1))
        signed = 0
        with refused("too-many-requests"):
            while True:
                await switchboard.ask("keyring", SignNoiseStaticKey(b"\x07" * 32))
                signed += 1
        assert signed <= BURST


async def test_vouchers_are_signed_within_bounds_of_their_own(path, autojump_clock):
    write(path, GO_KEY)
    async with Stage() as stage:
        await stage.start("keyring", Keyring(str(path)))
        switchboard = stage.visitor("switchboard")
        own = (await switchboard.ask("keyring", ReadIdentity())).peer_id
        client = PrivateKey.from_seed(b"\x09" * 32).peer_id
        expiration = int(stage.wall()) + 3600
        voucher = open_voucher(
            (await switchboard.ask("keyring", SignRelayVoucher(client, expiration))).envelope, relay=own, peer=client
        )
        assert (voucher.relay, voucher.peer, voucher.expiration) == (own, client, expiration)
        for never in (int(stage.wall()) - 1, int(stage.wall()) + MAX_VOUCHER_SECONDS + 10, -5):
            with refused("bad-request"):
                await switchboard.ask("keyring", SignRelayVoucher(client, never))
        for _ in range(VOUCHER_BURST - 1):
            await switchboard.ask("keyring", SignRelayVoucher(client, expiration))
        with refused("too-many-requests"):
            await switchboard.ask("keyring", SignRelayVoucher(client, expiration))
        await switchboard.ask("keyring", SignNoiseStaticKey(b"\x07" * 32))


async def test_a_description_holds_no_secret(path):
    write(path, GO_KEY)
    async with Stage() as stage:
        await stage.start("keyring", Keyring(str(path)))
        described = repr(stage.describe("keyring"))
        assert str(load_key(path).peer_id) in described
        assert SECRET.hex() not in described
        assert repr(SECRET)[2:-1] not in described


async def test_an_unusable_key_ends_the_actor_with_its_reason(path):
    write(path, GO_KEY, 0o644)
    async with Stage() as stage:
        with pytest.raises(StartFailedError, match="chmod 600") as failure:
            await stage.start("keyring", Keyring(str(path)))
        assert failure.value.code == "bad-permissions"
