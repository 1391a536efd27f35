"""`peerup relay add | list | remove` on the node's files alone; with a running node see test_relay_end_to_end.py."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from peerup.cli import cli
from protocol.peer_id import PeerId

NEAR, FAR = (str(PeerId.from_public_key(bytes.fromhex("08011220") + bytes([n] * 32))) for n in (1, 2))
NEAR_TCP = f"/ip4/192.0.2.1/tcp/4001/p2p/{NEAR}"
NEAR_DNS = f"/dns/near.example/tcp/443/p2p/{NEAR}"
FAR_TCP = f"/ip4/192.0.2.2/tcp/4001/p2p/{FAR}"


@pytest.fixture
def peerup(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: str, status: int = 0):
        result = CliRunner().invoke(cli, ["--home", str(tmp_path / "node"), *arguments])
        assert result.exit_code == status, f"{arguments}: {result.exit_code}\n{result.output}\n{result.exception!r}"
        return result

    run("init", "--yes")
    return run


@pytest.fixture
def config(tmp_path, peerup):
    return tmp_path / "node" / "config.yaml"


def as_json(result):
    return json.loads(result.stdout)


def test_a_node_is_no_relay_of_its_own(peerup, config):
    before = config.read_text()
    own = as_json(peerup("whoami", "--json"))["peer_id"]
    result = peerup("relay", "add", NEAR_TCP, f"/ip4/192.0.2.9/tcp/4001/p2p/{own}", status=1)
    assert "is this node" in result.output
    assert config.read_text() == before


def test_relays_are_added_listed_and_removed_without_harm_to_the_file(peerup, config):
    before = config.read_text()
    assert "no relays" in peerup("relay", "list").stdout
    added = as_json(peerup("relay", "add", NEAR_TCP, FAR_TCP, NEAR_TCP, "--json"))
    assert added["added"] == added["relays"] == [NEAR_TCP, FAR_TCP]
    assert added["node"] == {"running": False, "reloaded": False, "problems": []}
    assert as_json(peerup("relay", "add", NEAR_TCP, NEAR_DNS, "--json"))["added"] == [NEAR_DNS]
    assert "nothing to add" in peerup("relay", "add", FAR_TCP).stdout
    near, far = as_json(peerup("relay", "list", "--json"))
    assert (near["peer_id"], near["addresses"], near["state"]) == (NEAR, [NEAR_TCP, NEAR_DNS], None)
    assert far["addresses"] == [FAR_TCP]
    assert as_json(peerup("relay", "remove", NEAR_TCP, "--json"))["removed"] == [NEAR_TCP]
    assert as_json(peerup("relay", "remove", FAR_TCP.rpartition("/p2p/")[0], "--json"))["relays"] == [NEAR_DNS]
    peerup("names", "add", "vps", NEAR)
    assert as_json(peerup("relay", "list", "--json"))[0]["name"] == "vps"
    peerup("relay", "remove", "vps")
    assert config.read_text().partition("names:")[0] == before.partition("names:")[0]


def test_what_a_person_wrote_in_the_list_stays(peerup, config):
    text = config.read_text().replace(
        "  addresses: []\n", f"  addresses:  # mine\n    # the old one\n    - {NEAR_TCP} # slow\n\n    - '{NEAR_DNS}'\n"
    )
    config.write_text(text)
    peerup("relay", "add", FAR_TCP)
    assert config.read_text() == text.replace(f"'{NEAR_DNS}'\n", f"'{NEAR_DNS}'\n    - \"{FAR_TCP}\"\n")
    peerup("relay", "remove", FAR_TCP)
    assert config.read_text() == text
    peerup("relay", "remove", NEAR_DNS)
    assert config.read_text() == text.replace(f"    - '{NEAR_DNS}'\n", "")
    assert as_json(peerup("config", "validate", "--json"))["valid"] is True


@pytest.mark.parametrize(
    ("address", "word"),
    [
        ("nonsense", "nonsense"),
        ("/ip4/192.0.2.1/tcp/4001", "does not end with the relay's peer id"),
        (f"{NEAR_TCP}/p2p-circuit/p2p/{FAR}", "leads through a relay"),
        (f"/ip4/192.0.2.1/p2p/{NEAR}", "no port"),
    ],
)
def test_what_is_no_relay_is_refused_and_nothing_is_written(peerup, config, address, word):
    before = config.read_text()
    assert word in peerup("relay", "add", FAR_TCP, address, status=1).stderr
    assert config.read_text() == before


def test_removing_what_is_not_there_says_what_is(peerup):
    peerup("relay", "add", NEAR_TCP)
    assert NEAR_TCP in peerup("relay", "remove", FAR, status=1).stderr
    assert "neither a peer id nor a name" in peerup("relay", "remove", "vps", status=1).stderr
    assert as_json(peerup("relay", "list", "--json"))[0]["addresses"] == [NEAR_TCP]


def test_the_table_fits_a_terminal(peerup):
    peerup("relay", "add", NEAR_TCP, NEAR_DNS, FAR_TCP)
    output = peerup("relay", "list").stdout
    lines = output.splitlines()
    assert max(len(line) for line in lines if not line.startswith("  /")) <= 80
    assert [line.strip() for line in lines if line.startswith("  /")] == [NEAR_TCP, NEAR_DNS, FAR_TCP], "in one piece"
    assert "the node is not running" in output
