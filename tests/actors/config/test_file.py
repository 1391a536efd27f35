"""Edits of config.yaml: only what is meant changes, comments survive, no edit is lost, failures harm nothing."""

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from actors.config.file import ConfigEditError, edit_config, load_config
from actors.config.schema import ConfigError
from actors.config.template import render_config
from actors.config.yaml_text import (
    YamlSyntaxError,
    _plain,
    _without_empty,
    delete_value,
    parse_parts,
    parse_yaml,
    set_value,
)
from actors.files import DiskFullError, FileLockedError, PermissionsError, locked
from protocol.errors import InvalidValueError
from protocol.multiaddr import Multiaddr
from protocol.peer_id import PeerId
from tests.actors.config.samples import HAND_WRITTEN, HOME, NAS, PEER_UP

SAMPLES = pytest.mark.parametrize("text", [HAND_WRITTEN, PEER_UP, render_config()], ids=["hand", "peer-up", "template"])
PEER = PeerId.from_text(NAS)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "config.yaml"


def put(path, text):
    path.write_text(text)
    path.chmod(0o600)


def comments(text):
    return [line.partition("#")[2].strip() for line in text.splitlines() if "#" in line]


def changed_lines(before, after):
    """Lines that are gone and lines that are new."""
    old, new = before.splitlines(), after.splitlines()
    return [line for line in old if line not in new], [line for line in new if line not in old]


@SAMPLES
def test_adding_touches_no_other_line(path, text):
    put(path, text)
    with edit_config(path) as editor:
        editor.add_service("db", "127.0.0.1:5432", allowed_peers=[PEER])
        editor.add_name("office", PEER)
        editor.add_addresses(PEER, [Multiaddr("/ip4/192.0.2.1/tcp/4001")])
    after = path.read_text()
    gone, new = changed_lines(text, after)
    assert all("{}" in line for line in gone)  # an empty mapping gets its first entry
    assert {line.strip() for line in new} >= {"db:", "enabled: true", 'local_address: "127.0.0.1:5432"'} - {
        line.strip() for line in text.splitlines()
    }
    assert comments(after) == comments(text)
    config = load_config(path)
    assert config.services[-1].name == "db"
    assert config.services[-1].allowed_peers == (PEER,)
    assert config.names[-1].name == "office"
    assert [str(address) for entry in config.addresses for address in entry.addresses] == ["/ip4/192.0.2.1/tcp/4001"]


@SAMPLES
def test_adding_and_removing_again_gives_the_same_file(path, text):
    put(path, text)
    before = load_config(path)
    with edit_config(path) as editor:
        editor.add_service("db", "127.0.0.1:5432")
        editor.add_name("office", PEER)
    with edit_config(path) as editor:
        editor.remove_service("db")
        editor.remove_name("office")
    assert load_config(path) == before
    assert comments(path.read_text()) == comments(text)


def test_a_new_entry_stands_in_its_section(path):
    put(path, HAND_WRITTEN)
    with edit_config(path) as editor:
        editor.add_service("db", "localhost:5432")
    lines = path.read_text().splitlines()
    assert lines.index("# -------- people --------") > lines.index("    db:")
    assert lines[lines.index("    db:") - 1].lstrip().startswith("web:")


def test_switching_a_service_changes_one_word(path):
    put(path, HAND_WRITTEN)
    with edit_config(path) as editor:
        assert editor.set_service_enabled("ssh", enabled=False)
        assert not editor.set_service_enabled("ssh", enabled=False)
    gone, new = changed_lines(HAND_WRITTEN, path.read_text())
    assert gone == ["        enabled: true      # switch off on holidays"]
    assert new == ["        enabled: false      # switch off on holidays"]


def test_switching_works_in_flow_style_and_where_the_key_is_missing(path):
    put(path, "services:\n  a: {local_address: 'h:1', enabled: true}  # x\n  b:\n    local_address: 'h:2'\n")
    with edit_config(path) as editor:
        editor.set_service_enabled("a", enabled=False)
        editor.set_service_enabled("b", enabled=True)
    assert [service.enabled for service in load_config(path).services] == [False, True]
    assert comments(path.read_text()) == ["x"]


def test_removing_keeps_the_neighbours_comments(path):
    put(path, HAND_WRITTEN)
    with edit_config(path) as editor:
        editor.remove_service("ssh")
    after = path.read_text()
    assert "# The web" in after
    assert "# -------- people --------" in after
    assert "ssh" not in after
    assert [service.name for service in load_config(path).services] == ["web"]


def test_removing_the_last_entry_leaves_a_valid_file(path):
    put(path, "services:\n  a:\n    enabled: true\n    local_address: 'h:1'\n# end\n")
    with edit_config(path) as editor:
        editor.remove_service("a")
        editor.add_service("b", "h:2")
    assert [service.name for service in load_config(path).services] == ["b"]
    assert comments(path.read_text()) == ["end"]


def test_what_does_not_fit_is_refused_and_changes_nothing(path):
    put(path, HAND_WRITTEN)
    for edit, kind in [
        (lambda e: e.add_service("ssh", "h:1"), ConfigEditError),
        (lambda e: e.add_service("invite", "h:1"), InvalidValueError),
        (lambda e: e.add_service("x", "nonsense"), InvalidValueError),
        (lambda e: e.remove_service("nothing"), ConfigEditError),
        (lambda e: e.set_service_enabled("nothing", enabled=True), ConfigEditError),
        (lambda e: e.add_name("home", PEER), ConfigEditError),
        (lambda e: e.add_name("no good", PEER), InvalidValueError),
        (lambda e: e.remove_name("nobody"), ConfigEditError),
        (lambda e: e.add_addresses(PEER, [Multiaddr(f"/ip4/1.2.3.4/tcp/1/p2p/{HOME}")]), InvalidValueError),
    ]:
        with pytest.raises(kind), edit_config(path) as editor:
            edit(editor)
        assert path.read_text() == HAND_WRITTEN


def test_an_edit_that_fails_half_way_saves_nothing(path):
    put(path, HAND_WRITTEN)

    def edit():
        with edit_config(path) as editor:
            editor.add_service("db", "localhost:5432")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        edit()
    assert path.read_text() == HAND_WRITTEN


def test_names_can_be_pointed_elsewhere_only_on_purpose(path):
    put(path, HAND_WRITTEN)
    with edit_config(path) as editor:
        assert not editor.add_name("nas", PEER)
        assert editor.add_name("home", PEER, replace=True)
        assert editor.remove_name("nas") == PEER
    assert [(entry.name, entry.peer) for entry in load_config(path).names] == [("home", PEER)]


def test_addresses_go_with_the_last_name(path):
    put(path, "version: 1\n")
    address, other = Multiaddr("/ip4/192.0.2.1/tcp/1"), Multiaddr("/dns4/x.example/tcp/2")
    with edit_config(path) as editor:
        editor.add_name("one", PEER)
        editor.add_name("two", PEER)
        editor.add_addresses(PEER, [address])
        editor.add_addresses(PEER, [other, address])
        assert editor.config.addresses[0].addresses == (address, other)
        editor.remove_name("one")
        assert editor.config.addresses
        editor.remove_name("two")
    assert load_config(path).addresses == ()


def test_a_broken_file_is_explained_and_not_touched(path):
    put(path, "services:\n  a: [\n")
    with pytest.raises(ConfigError, match=r"config\.yaml: line 3: column 1: not YAML"), edit_config(path):
        pass
    assert path.read_text() == "services:\n  a: [\n"


def test_mode_and_link_survive(path, tmp_path):
    real = tmp_path / "dotfiles" / "peerup.yaml"
    real.parent.mkdir()
    put(real, "version: 1\n")
    real.chmod(0o640)
    path.symlink_to(real)
    with edit_config(path) as editor:
        editor.add_name("nas", PEER)
    assert path.is_symlink()
    assert real.stat().st_mode & 0o777 == 0o640
    assert load_config(path).names


ADD_MANY = """
import sys, pathlib
from actors.config.file import edit_config
from protocol.peer_id import PeerId
path, who = pathlib.Path(sys.argv[1]), sys.argv[2]
for number in range(12):
    with edit_config(path, timeout=60) as editor:
        editor.add_name(f"{who}-{number}", PeerId.from_text(sys.argv[3]))
"""


def test_concurrent_editors_lose_nothing(path):
    put(path, HAND_WRITTEN)
    editors = [
        subprocess.Popen([sys.executable, "-c", ADD_MANY, path, who, NAS], cwd=Path.cwd()) for who in ("a", "b", "c")
    ]
    assert [editor.wait(60) for editor in editors] == [0, 0, 0]
    names = {entry.name for entry in load_config(path).names}
    assert names == {"home", "nas"} | {f"{who}-{number}" for who in "abc" for number in range(12)}
    assert comments(path.read_text()) == comments(HAND_WRITTEN)


KILLED = """
import sys, pathlib, os, signal
from actors.config import file
from actors.config.file import edit_config
from protocol.peer_id import PeerId
import actors.files
step = int(sys.argv[3])
calls = 0
def dying(function):
    def run(*args, **kwargs):
        global calls
        calls += 1
        if calls == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return run
for name in ("open", "write", "fsync", "fchmod", "close"):
    setattr(actors.files.os, name, dying(getattr(os, name)))
pathlib.Path.replace = dying(pathlib.Path.replace)
with edit_config(pathlib.Path(sys.argv[1])) as editor:
    editor.add_name("nas2", PeerId.from_text(sys.argv[2]))
"""


def test_a_kill_at_any_step_leaves_the_old_file_or_the_new_one(path):
    step, killed, results = 0, True, set()
    while killed:
        step += 1
        put(path, HAND_WRITTEN)
        killed = subprocess.run([sys.executable, "-c", KILLED, path, NAS, str(step)], check=False).returncode != 0
        text = path.read_text()
        load_config(path)
        results.add(text == HAND_WRITTEN)
        with edit_config(path, timeout=5) as editor:  # no lock is left behind, and no temporary file
            editor.add_name("after", PEER, replace=True)
        assert {one.name for one in path.parent.iterdir()} == {"config.yaml", ".config.yaml.lock"}
    assert results == {True, False}
    assert step > 6


@pytest.mark.parametrize("failing", ["open", "write", "fchmod", "fsync"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_harms_nothing(path, monkeypatch, failing, code):
    put(path, HAND_WRITTEN)
    real = getattr(os, failing)

    def fail(target, *args):
        is_ours = (
            str(target).endswith(".tmp")
            if failing == "open"
            else ".tmp" in str(Path(f"/proc/self/fd/{target}").readlink())
        )
        if is_ours:
            raise OSError(code, os.strerror(code))
        return real(target, *args)

    monkeypatch.setattr(f"actors.files.os.{failing}", fail)
    with pytest.raises(DiskFullError, match="make room"), edit_config(path) as editor:
        editor.add_name("x", PEER)
    monkeypatch.undo()
    assert path.read_text() == HAND_WRITTEN
    assert {one.name for one in path.parent.iterdir()} == {"config.yaml", ".config.yaml.lock"}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small file system")
def test_a_really_full_file_system_harms_nothing(tmp_path):
    program = f"""
mount -t tmpfs -o size=64k tmpfs {tmp_path} || exit 77
cat > {tmp_path}/config.yaml && chmod 600 {tmp_path}/config.yaml
head -c 1000000 /dev/zero > {tmp_path}/filler
{sys.executable} -c '
import pathlib, sys
from actors.config.file import edit_config
from actors.files import DiskFullError
from protocol.peer_id import PeerId
try:
    with edit_config(pathlib.Path("{tmp_path}/config.yaml")) as editor:
        editor.add_name("x", PeerId.from_text("{NAS}"))
except DiskFullError as error:
    print("full:", error, file=sys.stderr)
' || exit 78
cat {tmp_path}/config.yaml; ls -A {tmp_path} >&2
"""
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", program], input=HAND_WRITTEN, capture_output=True, text=True, check=False
    )
    if done.returncode in (1, 77):
        pytest.skip(f"cannot mount here: {done.stderr}")
    assert done.returncode == 0, done.stderr
    assert "full: cannot" in done.stderr
    assert done.stdout == HAND_WRITTEN
    assert ".tmp" not in done.stderr.replace(str(tmp_path), "")


def test_a_lock_that_is_held_is_waited_for_and_then_explained(path):
    put(path, HAND_WRITTEN)
    with (
        locked(path),
        pytest.raises(FileLockedError, match=f"pid {os.getpid()}"),
        edit_config(path, timeout=0.05),
    ):
        pass


@pytest.mark.skipif(os.geteuid() != 0, reason="the test becomes another user")
def test_a_directory_that_may_not_be_written_is_explained():
    with tempfile.TemporaryDirectory() as directory:  # pytest's own directories are closed to other users
        path = Path(directory) / "config.yaml"
        put(path, HAND_WRITTEN)
        path.parent.chmod(0o755)
        os.chown(path, 54321, -1)
        os.seteuid(54321)
        try:
            with pytest.raises(PermissionsError, match="ls -ld"), edit_config(path) as editor:
                editor.add_name("x", PEER)
        finally:
            os.seteuid(0)
        assert path.read_text() == HAND_WRITTEN


KEYS = st.sampled_from(["services", "names", "a", "b-c", "12", "yes", "k v", "ä", '"', "#x", "null"])
SCALARS = st.one_of(
    st.booleans(), st.integers(-5, 5), st.text(max_size=8), st.sampled_from(["a: b", "- x", "#", "{}", "~"])
)
PATHS = st.lists(KEYS, min_size=1, max_size=3)


@settings(deadline=None, max_examples=60)  # parsing these takes tens of milliseconds, more on a busy machine
@given(st.sampled_from([HAND_WRITTEN, PEER_UP, "a: 1", "a: {b-c: {}}\n", "names:\n# c\nb-c:\n  - 1\n"]), PATHS, SCALARS)
@example(HAND_WRITTEN, ["12"], "a\x85b\u2028\ufeff\x7f\U0001f600")
def test_any_edit_gives_the_wanted_values_or_a_refusal(text, keys, value):
    before = _plain(parse_yaml(text))
    try:
        after = set_value(text, keys, value)
    except YamlSyntaxError as error:
        assume(error.problem.reason != "must be a mapping of keys to values")  # something on the way is none
        raise
    here = _plain(parse_yaml(after))
    for key in keys:
        here = here[key]
    assert here == value
    assert comments(after).count("the end") == comments(text).count("the end")
    if not _reaches(before, keys):
        removed = _plain(parse_yaml(delete_value(after, keys)))
        assert _pruned(removed) == _pruned(before)


def _reaches(values, keys):
    for key in keys:
        if not isinstance(values, dict) or key not in values:
            return False
        values = values[key]
    return True


def _pruned(values):
    previous = None
    while values != previous:
        previous, values = values, _without_empty(values)
    return values


@given(st.text(alphabet=st.sampled_from("ab: \n#-'\"[]{}&*\t|>~"), max_size=80))
def test_parts_of_whatever_text_are_read_or_not_but_never_fail(text):
    assert isinstance(parse_parts(text), dict)


def test_parts_of_a_broken_text_are_what_stands_by_itself():
    text = "a: 1\nb: [\nc:\n  x: {y: 1}\n  z: 'open\n  w: 2\nd: 1\nd: 2\n# end\ne: |\n  kept\n"
    assert parse_parts(text) == {"a": 1, "c": {"x": {"y": 1}, "w": 2}, "e": "kept\n"}
