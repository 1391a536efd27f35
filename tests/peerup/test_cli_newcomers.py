"""What the command line says to somebody who makes the usual mistakes: what is wrong, and what to do."""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from actors.config.file import parse_config
from actors.config.schema import ConfigError
from peerup.cli import COMMANDS, cli
from peerup.stdio import _meaning_first
from protocol.peer_id import PeerId

PEERS = [str(PeerId.from_public_key(bytes.fromhex("08011220") + bytes([n] * 32))) for n in range(1, 4)]
TCP = "/ip4/127.0.0.1/tcp/4101"
QUIC = "/ip4/127.0.0.1/udp/4101/quic-v1"
NOBODY = 65534


class Shell:
    """Runs `peerup --home HOME …` in this process."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def __call__(self, *arguments: str, status: int = 0):
        result = CliRunner().invoke(cli, ["--home", str(self.home), *arguments])
        assert result.exit_code == status, f"{arguments}: {result.exit_code}\n{result.output}\n{result.exception!r}"
        return result


@pytest.fixture
def shell(tmp_path, monkeypatch) -> Shell:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("PEERUP_HOME", raising=False)
    return Shell(tmp_path / "a node")


@pytest.fixture
def relay(shell) -> Shell:
    shell("relay", "setup", "--yes", "--listen", TCP)
    return shell


@pytest.mark.parametrize("words", [("init",), ("relay", "setup")], ids=" ".join)
def test_what_to_do_next_can_be_copied_as_it_is(shell, words):
    told = shell(*words, "--yes", "--listen", TCP).stdout.partition("Next:\n")[2].splitlines()
    assert len(told) == 3
    for line in told:
        assert line.startswith(f"  peerup --home '{shell.home}' ")


def test_where_the_home_is_in_the_environment_it_is_not_repeated(shell, monkeypatch):
    monkeypatch.setenv("PEERUP_HOME", str(shell.home))
    told = CliRunner().invoke(cli, ["init", "--yes", "--listen", TCP]).stdout
    assert "\n  peerup daemon " in told


def test_the_list_of_commands_is_not_cut_off():
    told = CliRunner().invoke(cli, ["--help"]).stdout.partition("Commands:\n")[2].partition("\n\n")[0]
    lines = told.splitlines()
    assert len(lines) == len(COMMANDS)
    ours = [line for line in lines if line.split()[0] not in ("paths", "traceroute", "relay", "deadletters")]
    assert not [line for line in ours if line.endswith("...")]


@pytest.mark.parametrize("words", [("init",), ("relay", "setup")], ids=" ".join)
@pytest.mark.parametrize("address", [QUIC, "/ip4/127.0.0.1/udp/4101", "/dns/example.org/tcp/4101", "/p2p/" + PEERS[0]])
def test_where_no_node_can_listen_none_is_made(shell, words, address):
    result = shell(*words, "--yes", "--listen", TCP, "--listen", address, status=1)
    assert result.stderr.startswith(f"error: cannot listen on {address}: give an IP address with a TCP port")
    assert not shell.home.exists()


def test_an_address_of_the_everyday_kind_gets_a_pattern(shell):
    assert "looks like /ip4/192.0.2.7/tcp/4001" in shell("init", "--yes", "--listen", "0.0.0.0:4001", status=1).stderr


def test_addresses_of_other_transports_in_a_file_are_left_out_and_told():
    text = f"network:\n  listen_addresses:\n    - {TCP}\n    - {QUIC}\n"
    config = parse_config(text, Path("/nowhere/config.yaml"))
    assert [str(address) for address in config.network.listen_addresses] == [TCP, QUIC]
    assert [str(address) for address in config.network.served_addresses] == [TCP]
    (warning,) = config.warnings
    assert (warning.line, warning.key) == (2, "network.listen_addresses")
    assert QUIC in warning.reason
    with pytest.raises(ConfigError, match="cannot listen on"):
        parse_config(text.replace(f"    - {TCP}\n", ""), Path("/nowhere/config.yaml"))
    assert not parse_config("network:\n  listen_addresses: []\n", Path("/nowhere/config.yaml")).warnings


def test_a_relay_of_peer_up_that_also_served_quic_is_taken_over_without(shell, tmp_path):
    other = Shell(tmp_path / "other")
    other("init", "--yes", "--listen", TCP)
    theirs = tmp_path / "relay-server.yaml"
    theirs.write_text(
        f"version: 1\nidentity:\n  key_file: other/identity.key\nnetwork:\n  listen_addresses: ['{TCP}', '{QUIC}']\n"
        "security:\n  authorized_keys_file: other/authorized_keys\n  enable_connection_gating: true\nresources: {}\n"
    )
    theirs.chmod(0o600)
    made = shell("relay", "setup", "--yes", "--import", str(theirs), "--json")
    assert json.loads(made.stdout)["listen_addresses"] == [TCP]
    assert f"{QUIC} is not taken over" in made.stderr


def test_a_file_to_import_that_is_not_there_is_called_what_it_is(shell, tmp_path):
    told = shell("relay", "setup", "--yes", "--import", str(tmp_path / "x"), status=1).stderr
    assert told == f"error: there is no file {tmp_path / 'x'}\n  to do: name the relay-server.yaml of a peer-up relay\n"
    assert not shell.home.exists()


@pytest.mark.parametrize(
    "words", [("relay", "authorize", "laptop"), ("auth", "add", "laptop"), ("names", "add", "n", "x")], ids=" ".join
)
def test_who_gives_no_peer_id_is_told_where_to_get_one(relay, words):
    told = relay(*words, status=1).stderr
    assert "is not a peer id" in told
    assert "peerup whoami" in told
    error = json.loads(relay(*words, "--json", status=1).stderr)["error"]
    assert error["action"].startswith("`peerup whoami`")


@pytest.mark.parametrize(("add", "remove"), [("relay authorize", "relay deauthorize"), ("auth add", "auth remove")])
def test_a_peer_can_be_removed_by_what_it_was_called(relay, add, remove):
    for peer, comment in zip(PEERS, ("laptop", "old phone", "old phone"), strict=True):
        relay(*add.split(), peer, "--comment", comment)
    relay(*remove.split(), "laptop")
    assert "nor the comment of a line in" in relay(*remove.split(), "laptop", status=1).stderr
    assert "2 lines of" in relay(*remove.split(), "old phone", status=1).stderr
    relay(*remove.split(), PEERS[2])
    relay(*remove.split(), "old phone")
    assert json.loads(relay("auth", "list", "--json").stdout) == []


def test_a_relay_that_does_not_run_is_called_one(relay):
    assert "the relay is not running" in relay("relay", "authorize", PEERS[0]).stdout


def can_be_two_users() -> bool:
    """Whether we are root of a world that has another user: not so in `unshare -Ur`."""
    known = [[int(word) for word in line.split()] for line in Path("/proc/self/uid_map").read_text().splitlines()]
    return os.geteuid() == 0 and any(first <= NOBODY < first + count for first, _, count in known)


needs_root = pytest.mark.skipif(not can_be_two_users(), reason="needs root, to be two users")


@needs_root
def test_root_does_not_meddle_with_the_home_of_another_user(relay):
    """A lock or a file that root leaves there keeps the node's own user out."""
    for path in (relay.home, *relay.home.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    before = sorted(relay.home.rglob("*"))
    told = relay("relay", "authorize", PEERS[0], status=1).stderr
    assert re.search(r"belongs to the user \S+\n  to do: run this as that user: sudo -u \S+ peerup --home '", told)
    assert sorted(relay.home.rglob("*")) == before
    error = json.loads(relay("relay", "info", "--json", status=1).stderr)["error"]
    assert error["code"] == "not-yours"


@needs_root
def test_another_user_is_told_whose_node_it_is():
    with tempfile.TemporaryDirectory() as directory:  # pytest's own are closed to others
        Path(directory).chmod(0o711)
        shell = Shell(Path(directory) / "node")
        shell("relay", "setup", "--yes", "--listen", TCP)
        shell("relay", "info")  # imports what the other user may not read
        os.seteuid(NOBODY)
        try:
            result = CliRunner().invoke(cli, ["--home", str(shell.home), "relay", "info"])
        finally:
            os.seteuid(0)
    assert result.exit_code == 1
    assert "belongs to the user root" in result.stderr


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            "stream-reset: gated (the policy no longer allows it)",
            "the policy no longer allows it (stream-reset: gated)",
        ),
        ("stream-reset: x (a: b (c))", "a: b (c) (stream-reset: x)"),
        ("local-reset: lost", "local-reset: lost"),
    ],
)
def test_why_a_tunnel_broke_is_said_in_words_first(said, told):
    assert _meaning_first(said) == told
