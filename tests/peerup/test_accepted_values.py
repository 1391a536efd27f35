"""What a command accepts, it uses: what it would not is refused, or warned of, where it is typed."""

from __future__ import annotations

import pytest
from click.testing import CliRunner, Result

from peerup.cli import cli
from protocol.keys import PrivateKey

OTHER = str(PrivateKey.from_seed(bytes(32)).peer_id)


class Home:
    def __init__(self, path) -> None:
        self.path = path
        assert self.run("init", "--yes", "--listen", "/ip4/127.0.0.1/tcp/4101").exit_code == 0
        self.peer = self.run("whoami").stdout.strip()

    def run(self, *arguments: str) -> Result:
        return CliRunner().invoke(cli, ["--home", str(self.path), *arguments])


@pytest.fixture
def home(tmp_path, monkeypatch) -> Home:
    monkeypatch.delenv("PEERUP_HOME", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    return Home(tmp_path / "home")


@pytest.mark.parametrize(
    "arguments",
    [
        ("auth", "add", "{self}"),
        ("names", "add", "me", "{self}"),
        ("service", "add", "web", "127.0.0.1:80", "--allow", "{self}"),
        ("relay", "add", "/ip4/192.0.2.1/tcp/4001/p2p/{self}"),
        ("proxy", "{self}", "ssh", "2222"),
    ],
)
def test_this_node_is_not_taken_for_another_one(home, arguments):
    before = {file.name: file.read_bytes() for file in home.path.iterdir() if file.is_file()}
    done = home.run(*(word.replace("{self}", home.peer) for word in arguments))
    assert done.exit_code != 0
    assert "this node" in done.stderr
    assert {file.name: file.read_bytes() for file in home.path.iterdir() if file.is_file()} == before


def test_a_relay_does_not_authorize_itself(tmp_path, monkeypatch):
    monkeypatch.delenv("PEERUP_HOME", raising=False)
    home = str(tmp_path / "relay")
    assert CliRunner().invoke(cli, ["--home", home, "relay", "setup", "--yes"]).exit_code == 0
    peer = CliRunner().invoke(cli, ["--home", home, "whoami"]).stdout.strip()
    done = CliRunner().invoke(cli, ["--home", home, "relay", "authorize", peer])
    assert (done.exit_code, "this node itself" in done.stderr) == (1, True)


def test_another_file_may_list_this_node(home, tmp_path):
    """It is for another node, say."""
    assert home.run("auth", "add", home.peer, "--file", str(tmp_path / "theirs")).exit_code == 0


def test_who_may_use_a_service_and_not_connect_is_named(home):
    done = home.run("service", "add", "web", "127.0.0.1:80", "--allow", OTHER, "--allow", OTHER)
    assert done.exit_code == 0
    assert f"{OTHER} may use the service and not connect" in done.stderr
    assert done.stderr.count("warning") == 1
    assert home.run("config", "show").stdout.count(OTHER) == 1
    assert home.run("auth", "add", OTHER).exit_code == 0
    assert home.run("service", "add", "ssh", "127.0.0.1:22", "--allow", OTHER).stderr == ""


@pytest.mark.parametrize(
    "address",
    [
        "/ip4/192.0.2.1/udp/4001/quic-v1",
        "/ip4/192.0.2.1/tcp/4001/http",
        "/p2p-circuit",
        "/dnsaddr/bootstrap.example",
        "/ip4/192.0.2.1",
    ],
)
def test_an_address_that_nobody_can_dial_is_refused(home, address):
    done = home.run("names", "add", "home", OTHER, "--address", address)
    assert done.exit_code == 1
    assert address in done.stderr
    assert OTHER not in home.run("names", "list").stdout


@pytest.mark.parametrize("address", ["/ip4/127.0.0.1/tcp/1/http", "/ip4/127.0.0.1/udp/1/quic-v1"])
def test_an_address_that_cannot_be_listened_at_is_refused(tmp_path, address):
    done = CliRunner().invoke(cli, ["--home", str(tmp_path / "home"), "init", "--yes", "--listen", address])
    assert done.exit_code == 1
    assert "cannot listen on" in done.stderr
    assert not (tmp_path / "home" / "config.yaml").exists()


def test_a_network_that_has_no_effect_yet_is_said_so(tmp_path):
    done = CliRunner().invoke(cli, ["--home", str(tmp_path / "home"), "init", "--yes", "--network", "family"])
    assert done.exit_code == 0
    assert "no effect yet" in done.stderr


def test_validate_tells_what_is_not_used(home):
    file = home.path / "config.yaml"
    file.write_text(file.read_text().replace("bootstrap_peers: []", f'bootstrap_peers: ["/ip4/1.2.3.4/p2p/{OTHER}"]'))
    done = home.run("config", "validate")
    assert done.exit_code == 0
    assert "discovery.bootstrap_peers: has no effect yet" in done.output


@pytest.mark.parametrize(
    "options", [("--nth", "1", "--probability", "0.5"), ("--seed", "3"), ("--nth", "1", "--seed", "3")]
)
def test_a_fault_is_not_asked_for_in_two_ways(home, options):
    done = home.run("fault", "drop", "--to", "gate", *options)
    assert done.exit_code == 2
    assert "probability" in done.stderr
