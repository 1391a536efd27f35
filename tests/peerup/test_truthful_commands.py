"""Commands that change what a running node enforces say success only when it is so: on a real node."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from protocol.keys import PrivateKey
from tests.support.nodes import Node
from tests.support.processes import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

PEERS = [str(PrivateKey.from_seed(bytes([number]) * 32).peer_id) for number in range(1, 5)]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    node = Node("node", tmp_path_factory.mktemp("truth"))
    node.initialise()
    node.start("--allow-faults")
    yield node
    node.stop()


@pytest.fixture
def node(running: Node) -> Iterator[Node]:
    """The node with the files of its beginning."""
    files = [running.home / "config.yaml", running.home / "authorized_keys"]
    before = [file.read_bytes() for file in files]
    yield running
    for file, content in zip(files, before, strict=True):
        file.write_bytes(content)
    said(running, 0, "config", "reload")
    said(running, 0, "auth", "list")


def said(node: Node, status: int, *arguments: str, env: dict[str, str] | None = None) -> tuple[str, str]:
    """What a command says, which must end with this status."""
    done = subprocess.run(node.command(*arguments), check=False, capture_output=True, text=True, timeout=60, env=env)
    assert done.returncode == status, (arguments, done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    return done.stdout, done.stderr


def listed(node: Node) -> dict[str, bool | None]:
    return {entry["peer_id"]: entry["in_force"] for entry in json.loads(said(node, 0, "auth", "list", "--json")[0])}


def test_success_is_said_when_it_is_so(node: Node) -> None:
    out, err = said(node, 0, "auth", "add", PEERS[0])
    assert (f"{PEERS[0]} may connect" in out, "has taken it over" in out, err) == (True, True, "")
    assert listed(node) == {PEERS[0]: True}
    out, _ = said(node, 0, "auth", "remove", PEERS[0])
    assert "may connect no longer" in out
    assert "as web" in said(node, 0, "service", "add", "web", "127.0.0.1:9")[0]
    assert "service/web" in {actor["name"] for actor in node.actors()}, "the service does not run yet"
    assert "no longer offered" in said(node, 0, "service", "remove", "web")[0]


def test_another_file_of_authorised_peers_is_not_the_one_in_force(node: Node) -> None:
    said(node, 0, "auth", "add", PEERS[0])
    config = node.home / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace("authorized_keys_file: authorized_keys", "authorized_keys_file: others"))
    (node.home / "others").write_text(f"{PEERS[0]}\n")
    (node.home / "others").chmod(0o600)
    for arguments in (("auth", "add", PEERS[1]), ("auth", "remove", PEERS[0])):
        out, err = said(node, 1, *arguments)
        assert out == ""
        assert str(node.home / "authorized_keys") in err
        assert "restart" in err
    data = json.loads(said(node, 1, "auth", "add", PEERS[2], "--json")[0])
    assert (data["node"]["running"], data["node"]["reloaded"]) == (True, False)
    _, err = said(node, 0, "auth", "list")
    assert "the running node goes by" in err
    assert set(listed(node).values()) == {None}
    # The file that the running node goes by can still be named.
    assert (
        "has taken it over"
        in said(node, 0, "auth", "remove", PEERS[0], "--file", str(node.home / "authorized_keys"))[0]
    )
    assert "does not go by that file" in said(node, 0, "auth", "add", PEERS[0], "--file", str(node.home / "third"))[0]
    (node.home / "others").unlink()


def test_what_a_broken_file_adds_waits_and_what_it_takes_away_counts(node: Node) -> None:
    said(node, 0, "auth", "add", PEERS[0])
    with (node.home / "authorized_keys").open("a") as file:
        file.write("a slip of the pen\n")
    out, err = said(node, 1, "auth", "add", PEERS[1])
    assert out == ""
    assert "waits until it is repaired" in err
    assert "slip" in err or "line " in err
    assert listed(node) == {PEERS[0]: True, PEERS[1]: False}
    assert f"{PEERS[1]} is not in force" in said(node, 0, "auth", "list")[1]
    out, err = said(node, 0, "auth", "remove", PEERS[0])
    assert "may connect no longer" in out
    assert "line " in err


def test_a_guest_may_still_connect(node: Node) -> None:
    said(node, 0, "auth", "add", PEERS[0])
    config = node.home / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace("enable_connection_gating: true", "enable_connection_gating: false"))
    said(node, 0, "config", "reload")
    out, err = said(node, 1, "auth", "remove", PEERS[0])
    assert out == ""
    assert "enable_connection_gating" in err


def test_a_time_that_has_passed_lets_nobody_in(node: Node) -> None:
    out, err = said(node, 1, "auth", "add", PEERS[0], "--expires", "2020-01-01T00:00:00Z")
    assert (out, "has passed" in err) == ("", True)


def test_the_configuration_of_another_directory_is_not_the_one_in_force(node: Node, tmp_path: Path) -> None:
    """With the XDG places, the command may see other directories than the node was started with."""
    config = tmp_path / "config" / "peerup"
    config.mkdir(parents=True, mode=0o700)
    (config / "config.yaml").write_bytes((node.home / "config.yaml").read_bytes())
    (config / "config.yaml").chmod(0o600)
    runtime = tmp_path / "runtime"
    runtime.mkdir()
    (runtime / "peerup").symlink_to(node.home / "run")
    env = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
        "XDG_RUNTIME_DIR": str(runtime),
    }
    program = [word for word in node.command() if word not in ("--home", str(node.home))]
    for arguments in (
        ("service", "add", "web", "127.0.0.1:9"),
        ("names", "add", "home", PEERS[0]),
        ("relay", "add", f"/ip4/192.0.2.1/tcp/4001/p2p/{PEERS[0]}"),
        ("auth", "add", PEERS[0]),
    ):
        done = subprocess.run([*program, *arguments], check=False, capture_output=True, text=True, timeout=60, env=env)
        assert (done.returncode, done.stdout) == (1, ""), (arguments, done.stdout, done.stderr)
        assert "the node goes by" in done.stderr


def test_a_reload_tells_what_is_not_used(node: Node) -> None:
    config = node.home / "config.yaml"
    addresses = ", ".join(f'"/ip4/127.0.0.1/tcp/9/p2p/{peer}"' for peer in MANY)
    config.write_text(config.read_text().replace("  addresses: []", f"  addresses: [{addresses}]", 1))
    out, err = said(node, 0, "config", "reload")
    assert "reloaded" in out
    assert "more than 16 relays, and only the first 16 are used" in err
    assert "at most 16 relays" in said(node, 1, "relay", "add", RELAY)[1]


MANY = [str(PrivateKey.from_seed(bytes([number]) * 32).peer_id) for number in range(100, 117)]
RELAY, OTHER_RELAY = (f"/ip4/127.0.0.1/tcp/9/p2p/{peer}" for peer in PEERS[2:4])


@contextlib.contextmanager
def losing(node: Node, kind: str, to: str) -> Iterator[None]:
    """Messages of this kind do not reach that actor."""
    said(node, 0, "fault", "drop", "--to", to, "--kind", kind, "--ttl", "60s")
    try:
        yield
    finally:
        said(node, 0, "fault", "clear")


def test_relays_that_the_keeper_does_not_have_are_not_in_force(node: Node) -> None:
    assert "has taken it over" in said(node, 0, "relay", "add", RELAY)[0]
    with losing(node, "config.snapshot", to="relay/keeper"):
        for arguments in (("relay", "add", OTHER_RELAY), ("relay", "remove", OTHER_RELAY)):
            out, err = said(node, 1, *arguments)
            assert (out, "relay/keeper" in err) == ("", True)
    # What got lost is sent again.
    assert "has taken it over" in said(node, 0, "relay", "add", OTHER_RELAY)[0]
    told = node.run_json("actors", "get", "relay/keeper")["description"]
    assert [relay["relay"] for relay in told["relays"]] == PEERS[2:4]
    for peer in PEERS[2:4]:
        assert "has taken it over" in said(node, 0, "relay", "remove", peer)[0]
    assert "relay/keeper" not in {actor["name"] for actor in node.actors()}


def test_limits_that_the_relay_does_not_go_by_are_not_in_force(tmp_path: Path) -> None:
    relay = Node("relay", tmp_path)
    relay.initialise()
    config = relay.home / "config.yaml"
    text = config.read_text()
    served = "\nrelay_service:\n  enabled: true\n  drain_time: 1s\n  circuits:\n    per_peer: {}\n"
    config.write_text(text + served.format(16))
    relay.start("--allow-faults")
    try:
        for kind, to, limit in (("config.snapshot", "relay/server", 8), ("relay.serve", "switchboard", 4)):
            with losing(relay, kind, to):
                config.write_text(text + served.format(limit))
                out, err = said(relay, 1, "config", "reload")
                assert "not in force: relay/server" in err
                assert "reloaded" not in out
        said(relay, 0, "config", "reload")
        assert relay.run_json("actors", "get", "relay/server")["description"]["limits"]["circuits"]["per_peer"] == 4
    finally:
        relay.stop()


def test_a_removed_peer_that_goes_on_as_a_relay_is_named(node: Node) -> None:
    peer = PEERS[2]
    said(node, 0, "auth", "add", peer)
    said(node, 0, "relay", "add", RELAY)
    out, err = said(node, 0, "auth", "remove", peer)
    assert "may connect no longer" in out
    assert f"peerup relay remove {peer}" in err
    said(node, 0, "relay", "remove", peer)
    said(node, 0, "auth", "add", peer)
    assert said(node, 0, "auth", "remove", peer)[1] == ""


@pytest.mark.parametrize(
    ("prepare", "change"),
    [
        (lambda node: said(node, 0, "auth", "add", PEERS[0]), ("auth", "remove", PEERS[0])),
        (lambda _: None, ("names", "add", "home", PEERS[0])),
    ],
)
def test_what_the_switchboard_does_not_have_is_not_in_force(
    node: Node, prepare: Callable[[Node], object], change: tuple[str, ...]
) -> None:
    prepare(node)
    pid = {actor["name"]: actor["pid"] for actor in node.actors()}["switchboard"]
    said(node, 0, "fault", "drop", "--to", "switchboard", "--kind", "gate.policy", "--ttl", "60s")
    said(node, 0, "fault", "drop", "--to", "switchboard", "--kind", "config.snapshot", "--ttl", "60s")
    try:
        out, err = said(node, 1, *change)
        assert out == ""
        assert "switchboard" in err
    finally:
        said(node, 0, "fault", "clear")
        said(node, 0, "fault", "kill", "switchboard")
        wait_until(
            lambda: {actor["name"]: actor for actor in node.actors()}["switchboard"]["pid"] not in (None, pid),
            within=20,
            what="a new switchboard",
        )
