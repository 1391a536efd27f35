"""Where a node lives, making a new one, and the files that the node keeps for itself."""

import os
import stat
from pathlib import Path

import pytest

from actors.config.file import load_config
from actors.config.init import init_node
from actors.config.paths import node_home
from actors.config.proxies_file import DesiredProxy, ProxiesFileError, load_proxies, save_proxies
from actors.files import (
    FileError,
    FileExistsAlreadyError,
    PermissionsError,
    create_exclusive,
    make_private_directory,
    read_limited,
    write_atomic,
)
from actors.gate.authorized_keys_file import load_authorized_keys
from actors.keyring.key_file import KeyFileError, create_key, load_key
from protocol.multiaddr import Multiaddr
from protocol.peer_id import PeerId
from tests.actors.config.samples import HOME, NAS

ME = {"HOME": "/home/me"}


@pytest.mark.parametrize(
    ("explicit", "environment", "config", "state", "run"),
    [
        ("/n", {"PEERUP_HOME": "/m", **ME}, "/n", "/n/state", "/n/run"),
        (None, {"PEERUP_HOME": "/m", **ME}, "/m", "/m/state", "/m/run"),
        (None, ME, "/home/me/.config/peerup", "/home/me/.local/state/peerup", "/home/me/.local/state/peerup/run"),
        (
            None,
            {"XDG_CONFIG_HOME": "/c", "XDG_STATE_HOME": "/s", "XDG_RUNTIME_DIR": "/r", **ME},
            "/c/peerup",
            "/s/peerup",
            "/r/peerup",
        ),
        # Relative XDG paths are invalid and to be ignored; empty variables count as not set.
        (
            None,
            {"XDG_CONFIG_HOME": "c", "XDG_STATE_HOME": "", "PEERUP_HOME": "", **ME},
            "/home/me/.config/peerup",
            "/home/me/.local/state/peerup",
            "/home/me/.local/state/peerup/run",
        ),
    ],
)
def test_where_a_node_lives(explicit, environment, config, state, run):
    home = node_home(explicit, environment)
    assert (str(home.config_dir), str(home.state_dir), str(home.run_dir)) == (config, state, run)
    assert home.config_file == Path(config) / "config.yaml"
    assert home.control_socket == Path(run) / "control.sock"


def test_a_relative_home_is_made_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert node_home("x", ME).config_dir == tmp_path / "x"


def test_without_any_home_it_says_what_to_give():
    with pytest.raises(FileError, match="--home"):
        node_home(None, {})


def test_a_home_too_deep_for_sockets_is_refused():
    with pytest.raises(FileError, match="shorter path"):
        node_home("/" + "x" * 120, ME).check()


def test_a_new_node_is_complete_and_private(tmp_path):
    home = node_home(tmp_path / "node", ME)
    node = init_node(home, listen_addresses=[Multiaddr("/ip4/127.0.0.1/tcp/4101")], network="family")
    config = load_config(home.config_file)
    assert [str(address) for address in config.network.listen_addresses] == ["/ip4/127.0.0.1/tcp/4101"]
    assert config.discovery.network == "family"
    assert load_key(config.key_path).peer_id == node.peer
    keys = load_authorized_keys(config.authorized_keys_path)
    assert (keys.entries, keys.problems) == ((), ())
    for path in [home.config_dir, home.state_dir, home.run_dir, home.log_dir]:
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    for path in [home.config_file, home.key_file, home.authorized_keys_file]:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_node_is_not_made_over_another(tmp_path):
    home = node_home(tmp_path / "node", ME)
    node = init_node(home)
    before = {path: path.read_bytes() for path in home.config_dir.iterdir() if path.is_file()}
    with pytest.raises(FileExistsAlreadyError, match="--home"):
        init_node(home)
    assert {path: path.read_bytes() for path in home.config_dir.iterdir() if path.is_file()} == before
    home.config_file.unlink()
    again = init_node(home)
    assert (again.peer, again.kept_key, again.kept_authorized_keys) == (node.peer, True, True)


@pytest.mark.parametrize("broken", ["config.yaml", "authorized_keys", "identity.key"])
def test_a_new_node_is_made_wholly_or_not_at_all(tmp_path, monkeypatch, broken):
    from actors.config import init
    from actors.keyring import key_file

    def failing(path, content, **options):
        if path.name == broken:
            raise FileError("no")
        return create_exclusive(path, content, **options)

    monkeypatch.setattr(init, "create_exclusive", failing)
    monkeypatch.setattr(key_file, "create_exclusive", failing)
    with pytest.raises(FileError, match="no"):
        init_node(node_home(tmp_path / "a" / "node", ME))
    assert list(tmp_path.iterdir()) == []


def test_what_was_there_before_a_failed_init_stays(tmp_path):
    home = node_home(tmp_path / "node", ME)
    home.create()
    home.key_file.write_bytes(b"not a key")
    home.key_file.chmod(0o600)
    with pytest.raises(KeyFileError):
        init_node(home)
    assert {path.name for path in home.config_dir.iterdir()} == {"identity.key", "state", "run", "log"}


def test_directories_that_others_may_write_to_are_refused(tmp_path):
    path = tmp_path / "d"
    path.mkdir()
    path.chmod(0o777)
    with pytest.raises(PermissionsError, match="chmod 700"):
        make_private_directory(path)
    (tmp_path / "file").touch()
    with pytest.raises(FileError):
        make_private_directory(tmp_path / "file")


def test_proxies_come_back_as_they_were(tmp_path):
    path = tmp_path / "proxies.yaml"
    assert load_proxies(path) == ()
    proxies = (
        DesiredProxy("proxy/home/ssh", PeerId.from_text(HOME), "home", "ssh", "127.0.0.1:2222"),
        DesiredProxy(f"proxy/{NAS}/web", PeerId.from_text(NAS), NAS, "web", "[::1]:8080"),
    )
    save_proxies(path, proxies)
    assert load_proxies(path) == proxies
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    save_proxies(path, ())
    assert load_proxies(path) == ()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("proxies: [", "not YAML"),
        ("proxies:\n  proxy/a/b: {peer: x, service: b, listen: 'h:1'}\n", "line 2: proxies.proxy/a/b.peer: 'x' is not"),
        ("proxies:\n  proxy/a/b: {}\n", "needs peer, service and listen"),
        (f"proxies:\n  proxy/a/b: {{peer: {HOME}, service: b, listen: 7}}\n", "listen: must be text"),
    ],
)
def test_a_broken_file_of_proxies_is_explained(tmp_path, text, expected):
    path = tmp_path / "proxies.yaml"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(ProxiesFileError) as failure:
        load_proxies(path)
    assert expected in str(failure.value)


def test_reading_is_bounded_and_never_hangs(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 101)
    with pytest.raises(FileError, match="longer than 100 bytes"):
        read_limited(path, 100)
    os.mkfifo(tmp_path / "pipe")
    for other in (tmp_path / "pipe", tmp_path):
        with pytest.raises(FileError):
            read_limited(other, 100)
        with pytest.raises(FileError, match="not a regular file"):
            write_atomic(other, b"")


def test_atomic_writing_keeps_mode_and_makes_private_files(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, b"one")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o640)
    write_atomic(path, b"two")
    assert (path.read_bytes(), stat.S_IMODE(path.stat().st_mode)) == (b"two", 0o640)
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_a_key_is_never_made_over_another(tmp_path):
    key = create_key(tmp_path / "k")
    with pytest.raises(FileExistsAlreadyError):
        create_exclusive(tmp_path / "k", b"")
    assert load_key(tmp_path / "k") == key
