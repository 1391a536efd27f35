"""`peerup relay …` for those who run a relay, on its files alone."""

from __future__ import annotations

import json
import shutil
import stat

import pytest
from click.testing import CliRunner

from actors.config.file import load_config
from peerup.cli import cli
from peerup.cli.relay_server import _use
from protocol.peer_id import PeerId

PEERS = [str(PeerId.from_public_key(bytes.fromhex("08011220") + bytes([n] * 32))) for n in range(1, 4)]
LISTEN = "/ip4/0.0.0.0/tcp/4433"

PEER_UP = """\
version: 1
identity:
  key_file: "relay_node.key"
network:
  listen_addresses:
    - "/ip4/0.0.0.0/tcp/7777"
    - "/ip6/::/tcp/7777"
security:
  authorized_keys_file: "relay_authorized_keys"
resources:
  max_reservations: 100
  max_circuits: 16
  buffer_size: 2048
  max_reservations_per_ip: 8
  max_reservations_per_asn: 0
  reservation_ttl: "1h"
  session_duration: "10m"
  session_data_limit: "64MB"
  frobnicate: true
health:
  enabled: true
  listen_address: "127.0.0.1:9090"
telemetry:
  metrics:
    enabled: true
    listen_address: "127.0.0.1:9092"
"""


class Shell:
    """Runs `peerup --home HOME …` in this process."""

    def __init__(self, home) -> None:
        self.home = home

    def __call__(self, *arguments: str, status: int = 0, input: str | None = None):  # noqa: A002 - click's own word
        result = CliRunner().invoke(cli, ["--home", str(self.home), *arguments], input=input)
        assert result.exit_code == status, f"{arguments}: {result.exit_code}\n{result.output}\n{result.exception!r}"
        return result

    def json(self, *arguments: str, status: int = 0):
        return json.loads(self("relay", *arguments, "--json", status=status).stdout)

    @property
    def config(self):
        return load_config(self.home / "config.yaml")


@pytest.fixture
def shell(tmp_path, monkeypatch) -> Shell:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("PEERUP_HOME", raising=False)
    return Shell(tmp_path / "relay")


@pytest.fixture
def relay(shell) -> Shell:
    shell("relay", "setup", "--yes", "--listen", LISTEN)
    return shell


# setup


def test_setup_makes_a_private_home_of_a_relay(shell):
    made = shell.json(
        "setup",
        "--yes",
        *("--listen", LISTEN, "--listen", "/ip6/::/tcp/4433"),
        *("--announce", "/dns/relay.example/tcp/443"),
        *("--limit", "circuits.per_peer=8", "--limit", "circuit.data=64MiB", "--limit", "reservations.total=unlimited"),
    )
    assert made["listen_addresses"] == [LISTEN, "/ip6/::/tcp/4433"]
    assert made["announce_addresses"] == ["/dns/relay.example/tcp/443"]
    for name in ("identity.key", "config.yaml", "authorized_keys"):
        assert stat.S_IMODE((shell.home / name).stat().st_mode) == 0o600
    for name in (".", "run", "state", "log"):
        assert stat.S_IMODE((shell.home / name).stat().st_mode) == 0o700
    service = shell.config.relay_service
    assert service.enabled
    assert (service.circuits.per_peer, service.circuits.per_ip) == (8, 128)
    assert service.circuit.data == 64 * 2**20
    assert service.reservations.total is None
    assert not shell.config.warnings
    assert shell("whoami").stdout.strip() == made["peer_id"]
    assert [
        line for line in (shell.home / "authorized_keys").read_text().splitlines() if not line.startswith("#")
    ] == []


def test_every_limit_is_written_down_with_its_default(relay):
    text = (relay.home / "config.yaml").read_text()
    for key in ("reservations", "circuits", "bytes_per_second", "requests_per_minute", "circuit", "guest_circuit"):
        assert f"\n  {key}:" in text
    before = relay.config.relay_service
    (relay.home / "config.yaml").write_text(
        "version: 1\nnetwork:\n  listen_addresses: [/ip4/0.0.0.0/tcp/4433]\nrelay_service:\n  enabled: true\n"
    )
    assert relay.config.relay_service == before


def test_setup_never_overwrites_and_keeps_the_key(relay):
    before = (relay.home / "config.yaml").read_bytes()
    assert "exists already" in relay("relay", "setup", "--yes", "--listen", LISTEN, status=1).stderr
    assert (relay.home / "config.yaml").read_bytes() == before
    who = relay("whoami").stdout
    relay("relay", "authorize", PEERS[0])
    (relay.home / "config.yaml").unlink()
    assert relay.json("setup", "--yes", "--listen", LISTEN)["kept_key"] is True
    assert relay("whoami").stdout == who
    assert [peer["peer_id"] for peer in relay.json("list-peers")] == [PEERS[0]]


def test_setup_asks_a_person(shell):
    result = shell("relay", "setup", input="4455\nrelay.example\n")
    assert "TCP port" in result.stdout
    assert [str(address) for address in shell.config.network.listen_addresses] == [
        "/ip4/0.0.0.0/tcp/4455",
        "/ip6/::/tcp/4455",
    ]
    assert [str(address) for address in shell.config.relay_service.announce_addresses] == [
        "/dns/relay.example/tcp/4455"
    ]


@pytest.mark.parametrize(
    ("answer", "announced"),
    [
        ("", []),
        ("192.0.2.7", ["/ip4/192.0.2.7/tcp/4001"]),
        ("2001:db8::7", ["/ip6/2001:db8::7/tcp/4001"]),
        ("/dns4/r.example/tcp/443", ["/dns4/r.example/tcp/443"]),
    ],
)
def test_a_person_may_announce_in_several_ways(shell, answer, announced):
    shell("relay", "setup", input=f"\n{answer}\n")
    assert [str(address) for address in shell.config.relay_service.announce_addresses] == announced


@pytest.mark.parametrize(
    ("options", "words", "status"),
    [
        (["--listen", "nonsense"], "nonsense", 1),
        (["--listen", LISTEN, "--announce", "/ip4/192.0.2.7"], "no port", 1),
        (["--listen", LISTEN, "--limit", "circuts.per_peer=8"], "relay_service.circuts", 1),
        (["--listen", LISTEN, "--limit", "circuits.per_pear=8"], "relay_service.circuits.per_pear", 1),
        (["--listen", LISTEN, "--limit", "circuits.per_peer=many"], "circuits.per_peer", 1),
        (["--listen", LISTEN, "--limit", "enabled.per_peer=1"], "enabled.per_peer", 1),
        (["--listen", LISTEN, "--limit", "circuits"], "KEY=VALUE", 2),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(shell, options, words, status):
    assert words in shell("relay", "setup", "--yes", *options, status=status).stderr
    assert not shell.home.exists()


def test_unattended_setup_needs_an_address_only_to_print_json(shell):
    assert "--listen" in shell("relay", "setup", "--json", status=2).stderr
    assert not shell.home.exists()


# A relay of peer-up


@pytest.fixture
def peer_up(tmp_path, relay):
    """The directory of a peer-up relay with the key of `relay`."""
    directory = tmp_path / "peer-up"
    directory.mkdir()
    (directory / "relay-server.yaml").write_text(PEER_UP)
    shutil.copy(relay.home / "identity.key", directory / "relay_node.key")
    (directory / "relay_authorized_keys").write_text(f"# peers\n{PEERS[0]} group=00112233 # home\n{PEERS[1]}\n")
    (directory / "relay_authorized_keys").chmod(0o600)
    return directory


def test_a_peer_up_relay_is_taken_over_with_its_identity_and_its_peers(peer_up, relay, tmp_path):
    new = Shell(tmp_path / "new")
    made = new.json("setup", "--yes", "--import", str(peer_up / "relay-server.yaml"))
    assert made["peer_id"] == relay("whoami").stdout.strip()
    assert made["listen_addresses"] == ["/ip4/0.0.0.0/tcp/7777", "/ip6/::/tcp/7777"]
    assert [(peer["peer_id"], peer["comment"]) for peer in new.json("list-peers")] == [
        (PEERS[0], "home"),
        (PEERS[1], ""),
    ]
    config = new.config
    service = config.relay_service
    assert service.reservations.total == 100
    assert service.reservations.per_ip == 8
    assert service.reservations.per_network == 128, "0 means the default"
    assert service.circuits.per_peer == 16
    assert (service.circuit.seconds, service.circuit.data) == (600, 64 * 2**20)
    assert service.reservation_ttl == 3600
    assert config.security.enable_connection_gating is True, "a missing key never lets everybody in"
    assert (config.telemetry.metrics_enabled, config.telemetry.metrics_listen_address) == (True, "127.0.0.1:9092")
    notes = "\n".join(made["notes"])
    for key in ("enable_connection_gating", "session_duration", "buffer_size", "frobnicate", "health"):
        assert key in notes


def test_an_import_is_all_or_nothing(peer_up, tmp_path):
    new = Shell(tmp_path / "new")
    file = str(peer_up / "relay-server.yaml")
    (peer_up / "relay_node.key").chmod(0o644)
    assert "chmod 600" in new("relay", "setup", "--yes", "--import", file, status=1).stderr
    assert not new.home.exists()
    (peer_up / "relay_node.key").chmod(0o600)
    assert (
        "circuits.nonsense"
        in new("relay", "setup", "--yes", "--import", file, "--limit", "circuits.nonsense=1", status=1).stderr
    )
    assert not new.home.exists()


def test_only_a_peer_up_relay_is_imported(relay, tmp_path):
    new = Shell(tmp_path / "new")
    result = new("relay", "setup", "--yes", "--import", str(relay.home / "config.yaml"), status=1)
    assert "not the configuration of a peer-up relay" in result.stderr


def test_validate_says_what_becomes_of_a_peer_up_configuration(peer_up, relay):
    file = peer_up / "relay-server.yaml"
    found = relay.json("config", "validate", str(file))
    assert (found["valid"], found["kind"]) == (True, "peer-up")
    lines = {item["key"]: item["line"] for item in found["warnings"]}
    assert lines["resources.frobnicate"] == PEER_UP.splitlines().index("  frobnicate: true") + 1
    assert {"resources.buffer_size", "health.enabled", "security.enable_connection_gating"} <= set(lines)
    file.write_text(PEER_UP.replace('"64MB"', '"64 parsecs"').replace("max_circuits: 16", "max_circuits: lots"))
    found = relay.json("config", "validate", str(file), status=1)
    assert {item["key"] for item in found["problems"]} == {"resources.session_data_limit", "resources.max_circuits"}
    assert all(item["line"] for item in found["problems"])


# validate


def test_validate_names_every_problem_with_its_line(relay):
    file = relay.home / "config.yaml"
    assert relay.json("config", "validate") == {
        "file": str(file),
        "valid": True,
        "kind": "peerup",
        "problems": [],
        "warnings": [],
        "after_restart": None,
    }
    text = (
        file.read_text().replace("    per_ip: 64\n", "    per_ip: some\n").replace("drain_time: 30s", "drain_time: -1s")
    )
    file.write_text(text.replace("    total: 1024\n", "    total: 1024\n    in_all: 5\n"))
    found = relay.json("config", "validate", status=1)
    lines = file.read_text().splitlines()
    assert {(item["key"], item["line"]) for item in found["problems"]} == {
        ("relay_service.reservations.per_ip", lines.index("    per_ip: some") + 1),
        ("relay_service.drain_time", next(n for n, line in enumerate(lines, 1) if "drain_time: -1s" in line)),
    }
    words = relay("relay", "config", "validate", status=1).stderr
    assert "line" in words
    assert "per_ip" in words
    assert "drain_time" in words


def test_validate_wants_a_relay_with_its_files(relay, tmp_path):
    (relay.home / "identity.key").chmod(0o644)
    with (relay.home / "authorized_keys").open("a") as keys:
        keys.write("not-a-peer\n")
    keys = {item["key"].partition(":")[0] for item in relay.json("config", "validate", status=1)["problems"]}
    assert keys == {"identity.key_file", "security.authorized_keys_file"}
    (copied := tmp_path / "copy.yaml").write_text((relay.home / "config.yaml").read_text())
    assert relay.json("config", "validate", str(copied))["valid"], "a copy elsewhere is judged by itself"
    node = Shell(tmp_path / "node")
    node("init", "--yes")
    assert [item["key"] for item in node.json("config", "validate", status=1)["problems"]] == ["relay_service.enabled"]
    (tmp_path / "broken.yaml").write_text("relay_service: [\n")
    assert relay.json("config", "validate", str(tmp_path / "broken.yaml"), status=1)["problems"][0]["line"]


def test_validate_misses_the_certificate(shell):
    shell("relay", "setup", "--yes", "--listen", "/ip4/0.0.0.0/tcp/443/tls/ws")
    found = shell.json("config", "validate", status=1)
    assert [item["key"] for item in found["problems"]] == ["network.tls.certificate_file", "network.tls.key_file"]
    (shell.home / "tls").mkdir()
    for name in ("fullchain.pem", "privkey.pem"):
        (shell.home / "tls" / name).write_text("")
    assert shell.json("config", "validate")["valid"] is True


# The other commands


@pytest.mark.parametrize("command", [["serve"], ["info"], ["authorize", PEERS[0]], ["list-peers"]])
def test_a_home_that_is_no_relay_is_refused_with_what_to_do(shell, command):
    nothing = shell("relay", *command, status=1).stderr
    assert "there is no relay in" in nothing
    assert "peerup relay setup" in nothing
    shell("init", "--yes")
    node = shell("relay", *command, status=1).stderr
    assert "is not a relay" in node
    assert "relay_service" in node


def test_info_without_a_running_relay(relay):
    peer = relay("whoami").stdout.strip()
    found = relay.json("info")
    assert found["peer_id"] == peer
    assert found["listen_addresses"] == [f"{LISTEN}/p2p/{peer}"]
    assert (found["running"], found["live"]) == (False, None)
    assert (found["addresses"], found["client_command"]) == ([], None), "nobody can dial 0.0.0.0"
    assert found["limits"]["circuit"] == {"duration": None, "data": None}
    text = relay("relay", "info").stdout
    assert "not running" in text
    assert "announce_addresses" in text
    limits = text[text.index("limits") : text.index("on a client")]
    assert max(map(len, limits.splitlines())) <= 80


def test_info_prints_the_command_for_clients(shell):
    shell("relay", "setup", "--yes", "--listen", LISTEN, "--announce", "/dns/relay.example/tcp/443")
    found = shell.json("info")
    assert found["addresses"] == [f"/dns/relay.example/tcp/443/p2p/{found['peer_id']}"]
    assert found["client_command"] == f"peerup relay add {found['addresses'][0]}"
    client = Shell(shell.home.parent / "client")
    client("init", "--yes")
    client(*found["client_command"].split()[1:])
    assert [str(address) for address in client.config.relay.addresses] == found["addresses"]


def test_authorize_list_and_deauthorize(relay):
    added = relay.json("authorize", PEERS[0], "--comment", "laptop", "--expires", "2030-12-31T18:00:00Z")
    assert (added["peer_id"], added["comment"], added["expires"]) == (PEERS[0], "laptop", 1924970400)
    assert added["node"]["running"] is False
    relay("relay", "authorize", PEERS[1], "--comment", "tv")
    assert "already in" in relay("relay", "authorize", PEERS[0], status=1).stderr
    relay("relay", "authorize", "nonsense", status=1)
    relay("relay", "authorize", PEERS[2], "--expires", "soon", status=2)
    listed = relay.json("list-peers")
    assert [(item["peer_id"], item["comment"], item["connected"]) for item in listed] == [
        (PEERS[0], "laptop", None),
        (PEERS[1], "tv", None),
    ]
    output = relay("relay", "list-peers").stdout
    assert "not running" in output
    assert max(map(len, output.splitlines())) <= 80
    relay("relay", "deauthorize", "tv")
    relay("relay", "deauthorize", PEERS[0])
    assert relay.json("list-peers") == []
    assert relay("relay", "deauthorize", PEERS[0], status=1).stderr
    assert "nobody may use this relay" in relay("relay", "list-peers").stdout


def test_a_comment_of_several_lines_deauthorizes_none_of_them(relay):
    for peer in PEERS[:2]:
        relay("relay", "authorize", peer, "--comment", "tablet")
    assert "have the comment 'tablet'" in relay("relay", "deauthorize", "tablet", status=1).stderr
    assert len(relay.json("list-peers")) == 2


def test_every_command_has_help_that_fits(shell):
    for command in (
        [],
        ["setup"],
        ["serve"],
        ["info"],
        ["authorize"],
        ["deauthorize"],
        ["list-peers"],
        ["config"],
        ["config", "validate"],
    ):
        output = shell("relay", *command, "--help").stdout
        assert "Usage:" in output
        assert max(map(len, output.splitlines())) <= 80, command


def told(held: int, circuits: int) -> dict:
    """What a relay tells that has these numbers of reservations and circuits and names one of each."""
    circuit = {"source": PEERS[0], "destination": PEERS[1], "to_destination": 3, "to_source": 4}
    return {
        "reservations": held,
        "circuits": circuits,
        "held": [{"peer_id": PEERS[0], "expires": 4e9}],
        "open": [circuit],
    }


def test_what_a_large_relay_does_not_tell_one_by_one_is_not_made_up():
    small, large = told(1, 1), told(500, 300)
    used = {"authorized": True, "connected": False}
    first = used | {"reserved": True, "reserved_until": 4e9}
    assert _use(PEERS[0], small, set(), authorized=True) == first | {"circuits": 1, "bytes": 7}
    assert _use(PEERS[0], large, set(), authorized=True) == first | {"circuits": None, "bytes": None}
    second = _use(PEERS[1], small, {PEERS[1]}, authorized=True)
    assert (second["connected"], second["reserved"], second["circuits"]) == (True, False, 1)
    assert _use(PEERS[1], large, set(), authorized=True)["reserved"] is None
    assert set(_use(PEERS[0], None, set(), authorized=True).values()) == {None, True}
