"""Edits of authorized_keys: other lines keep every byte, no edit is lost, failures harm nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from actors.files import DiskFullError, FileMissingError, PermissionsError
from actors.gate.authorized_keys_file import (
    HEADER,
    AuthorizedKeysEditError,
    add_peer,
    load_authorized_keys,
    remove_peer,
    set_peer_attribute,
    set_peer_comment,
)
from protocol.authorized_keys import AuthorizedKeysError
from protocol.keys import PrivateKey

PEERS = [PrivateKey.from_seed(bytes([number]) * 32).peer_id for number in range(40)]
A, B, C = PEERS[:3]
TEXT = f"# friends\n{A}   group=0a1b2c3d  colour=green # laptop\n\n{B} # phone, lost in May\nbroken line\n"


@pytest.fixture
def path(tmp_path):
    found = tmp_path / "authorized_keys"
    found.write_text(TEXT)
    found.chmod(0o600)
    return found


def test_edits_touch_their_own_line_only(path):
    add_peer(path, C, "tablet", {"expires": "2030-01-01T00:00:00Z"})
    assert path.read_text() == TEXT + f"{C} expires=2030-01-01T00:00:00Z # tablet\n"
    entry = set_peer_attribute(path, A, "verified", "sha256:00112233")
    assert (entry.verified, entry.attribute("colour"), entry.comment) == ("sha256:00112233", "green", "laptop")
    set_peer_comment(path, B, "new phone")
    assert remove_peer(path, C).comment == "tablet"
    set_peer_attribute(path, A, "verified", None)
    assert path.read_text() == TEXT.replace("phone, lost in May", "new phone")
    assert path.stat().st_mode & 0o777 == 0o600


def test_what_does_not_fit_is_refused_and_changes_nothing(path):
    for edit, code in [
        (lambda: add_peer(path, A), "already-exists"),
        (lambda: remove_peer(path, C), "not-found"),
        (lambda: set_peer_attribute(path, C, "group", "0a1b2c3d"), "not-found"),
        (lambda: set_peer_comment(path, C, "x"), "not-found"),
        (lambda: add_peer(path, C, "two\nlines"), "bad-authorized-keys"),
        (lambda: add_peer(path, C, "", {"expires": "tomorrow"}), "bad-authorized-keys"),
    ]:
        with pytest.raises((AuthorizedKeysEditError, AuthorizedKeysError)) as refusal:
            edit()
        assert refusal.value.code == code
        assert path.read_text() == TEXT


def test_the_first_peer_makes_the_file(tmp_path):
    path = tmp_path / "authorized_keys"
    with pytest.raises(FileMissingError, match="peerup auth add"):
        load_authorized_keys(path)
    with pytest.raises(FileMissingError):
        remove_peer(path, A)
    add_peer(path, A)
    assert path.read_text() == f"{HEADER}{A}\n"
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_file_that_others_may_write_to_is_refused_with_the_repair(path):
    path.chmod(0o620)
    with pytest.raises(PermissionsError, match="repair it: ") as refusal:
        load_authorized_keys(path)
    with pytest.raises(PermissionsError):
        add_peer(path, C)
    subprocess.run(str(refusal.value).partition("repair it: ")[2], shell=True, check=True)
    assert len(load_authorized_keys(path).entries) == 2


ADD = """
import sys, pathlib
from actors.gate.authorized_keys_file import add_peer
from protocol.peer_id import PeerId
for text in sys.argv[2:]:
    add_peer(pathlib.Path(sys.argv[1]), PeerId.from_text(text), timeout=60)
"""


def test_concurrent_editors_lose_nothing(path):
    editors = [
        subprocess.Popen([sys.executable, "-c", ADD, path, *map(str, PEERS[start:40:3])], cwd=Path.cwd())
        for start in (3, 4, 5)
    ]
    assert [editor.wait(60) for editor in editors] == [0, 0, 0]
    assert {entry.peer for entry in load_authorized_keys(path).entries} == set(PEERS) - {C}
    assert path.read_text().startswith(TEXT)


def test_a_full_disk_harms_nothing(path):
    program = (
        "import resource, signal, sys\n"
        f"{ADD.splitlines()[1]}\nfrom actors.gate.authorized_keys_file import add_peer\n"
        "from actors.files import DiskFullError\nfrom protocol.peer_id import PeerId\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "try:\n    add_peer(pathlib.Path(sys.argv[1]), PeerId.from_text(sys.argv[2]))\n"
        "except DiskFullError as error:\n    print('full', error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, path, str(C)], capture_output=True, text=True, check=True, cwd=Path.cwd()
    )
    assert done.stdout.startswith("full")
    assert path.read_text() == TEXT
    assert not list(path.parent.glob(".*.tmp"))
    assert DiskFullError.code == "disk-full"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_an_edit_keeps_the_owner(path):
    os.chown(path, 12345, 23456)
    add_peer(path, C)
    assert (path.stat().st_uid, path.stat().st_gid) == (12345, 23456)
