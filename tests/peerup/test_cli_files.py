"""Commands that work on the node's files alone, without a daemon."""

from __future__ import annotations

import json
import stat

import pytest
from click.testing import CliRunner

from peerup.cli import cli
from protocol.peer_id import PeerId

PEERS = [str(PeerId.from_public_key(bytes.fromhex("08011220") + bytes([n] * 32))) for n in range(1, 4)]


class Shell:
    """Runs `peerup --home HOME …` in this process."""

    def __init__(self, home) -> None:
        self.home = home

    def __call__(self, *arguments: str, status: int = 0, input: str | None = None):  # noqa: A002 - click's own word
        result = CliRunner().invoke(cli, ["--home", str(self.home), *arguments], input=input)
        assert result.exit_code == status, f"{arguments}: {result.exit_code}\n{result.output}\n{result.exception!r}"
        return result

    def json(self, *arguments: str, status: int = 0):
        return json.loads(self(*arguments, "--json", status=status).stdout)


@pytest.fixture
def shell(tmp_path, monkeypatch) -> Shell:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("PEERUP_HOME", raising=False)
    return Shell(tmp_path / "node")


@pytest.fixture
def node(shell) -> Shell:
    shell("init", "--yes", "--listen", "/ip4/127.0.0.1/tcp/4101")
    return shell


def test_init_makes_everything_private_and_whoami_agrees(shell):
    made = shell.json("init", "--yes", "--listen", "/ip4/127.0.0.1/tcp/4101", "--listen", "/ip6/::1/tcp/4101")
    assert made["listen_addresses"] == ["/ip4/127.0.0.1/tcp/4101", "/ip6/::1/tcp/4101"]
    assert PeerId.from_text(made["peer_id"])
    for name in ("identity.key", "config.yaml", "authorized_keys"):
        assert stat.S_IMODE((shell.home / name).stat().st_mode) == 0o600
    assert stat.S_IMODE((shell.home / "run").stat().st_mode) == 0o700
    assert shell("whoami").stdout.strip() == made["peer_id"]
    assert shell.json("config", "show")["network"]["listen_addresses"] == made["listen_addresses"]


def test_init_never_overwrites_and_keeps_the_key(node):
    before = (node.home / "config.yaml").read_text()
    result = node("init", "--yes", status=1)
    assert "exists already" in result.stderr
    assert (node.home / "config.yaml").read_text() == before
    who = node("whoami").stdout
    (node.home / "config.yaml").unlink()
    assert node.json("init", "--yes")["kept_key"] is True
    assert node("whoami").stdout == who


def test_init_asks_a_person_and_refuses_nonsense(shell):
    result = shell("init", input="/ip4/127.0.0.1/tcp/4999\n")
    assert "Where to listen" in result.stdout
    assert shell.json("config", "show")["network"]["listen_addresses"] == ["/ip4/127.0.0.1/tcp/4999"]
    other = Shell(shell.home.parent / "other")
    assert other("init", "--yes", "--listen", "nonsense", status=1).stderr.startswith("error: ")
    assert not other.home.exists()


def test_home_may_stand_before_or_after_the_command_or_in_the_environment(node, monkeypatch):
    who = node("whoami").stdout
    assert CliRunner().invoke(cli, ["whoami", "--home", str(node.home)]).stdout == who
    monkeypatch.setenv("PEERUP_HOME", str(node.home))
    assert CliRunner().invoke(cli, ["whoami"]).stdout == who


def test_whoami_refuses_a_key_that_others_may_read(node):
    (node.home / "identity.key").chmod(0o644)
    assert "chmod 600" in node("whoami", status=1).stderr


def test_auth_add_list_remove(node):
    added = node.json("auth", "add", PEERS[0], "--comment", "laptop")
    assert added["peer_id"] == PEERS[0]
    assert added["node"] == {"running": False, "reloaded": False, "problems": []}
    node("auth", "add", PEERS[1], "--expires", "2030-12-31T18:00:00Z")
    listed = node.json("auth", "list")
    assert [(peer["peer_id"], peer["comment"]) for peer in listed] == [(PEERS[0], "laptop"), (PEERS[1], "")]
    assert listed[1]["expires"] == 1924970400
    assert "already in" in node("auth", "add", PEERS[0], status=1).stderr
    node("names", "add", "laptop", PEERS[0])
    node("auth", "remove", "laptop")
    assert [peer["peer_id"] for peer in node.json("auth", "list")] == [PEERS[1]]
    assert "neither a peer id, nor a name" in node("auth", "remove", "laptop2", status=1).stderr
    assert node("auth", "remove", PEERS[2], status=1).stderr
    node("auth", "add", PEERS[2], "--expires", "soon", status=2)


def listed(node: Shell) -> list[str]:
    return [peer["peer_id"] for peer in node.json("auth", "list")]


@pytest.mark.parametrize("command", [("auth", "remove"), ("relay", "deauthorize")])
def test_an_id_is_that_id_whatever_comments_say(node, command):
    config = node.home / "config.yaml"
    config.write_text(config.read_text() + "relay_service:\n  enabled: true\n")
    node("auth", "add", PEERS[0], "--comment", PEERS[1])
    node("auth", "add", PEERS[2], "--comment", PEERS[2][:20])
    assert "is not in" in node(*command, PEERS[1], status=1).stderr
    assert listed(node) == [PEERS[0], PEERS[2]]
    node("auth", "add", PEERS[1])
    assert node.json(*command, PEERS[1])["peer_id"] == PEERS[1]
    assert listed(node) == [PEERS[0], PEERS[2]]


def test_a_name_comes_before_a_comment(node):
    node("names", "add", "laptop", PEERS[0])
    node("auth", "add", PEERS[1], "--comment", "laptop")
    # The name's peer is not in the file: neither is guessed at, and the candidate is shown.
    refused = node("auth", "remove", "laptop", status=1)
    assert PEERS[0] in refused.stderr
    assert f"{PEERS[1]} (line " in refused.stderr
    node("auth", "add", PEERS[0])
    removed = node("auth", "remove", "laptop")
    assert f"{PEERS[0]} may connect no longer" in removed.stdout
    assert PEERS[1] in removed.stderr
    assert listed(node) == [PEERS[1]]
    node("names", "remove", "laptop")
    node("auth", "remove", "laptop")
    assert listed(node) == []


def test_a_comment_of_several_lines_is_refused_and_the_candidates_are_listed(node):
    for peer in PEERS[:2]:
        node("auth", "add", peer, "--comment", "tablet")
    refused = node("auth", "remove", "tablet", status=1)
    assert all(f"{peer} (line " in refused.stderr for peer in PEERS[:2])
    assert listed(node) == PEERS[:2]


def test_auth_list_fits_80_columns(node):
    node("auth", "add", PEERS[0], "--comment", "the laptop in the kitchen, which has a rather long description")
    node("auth", "add", PEERS[1], "--comment", "tv", "--expires", "2030-12-31T18:00:00Z")
    output = node("auth", "list").stdout
    assert max(map(len, output.splitlines())) <= 80
    first = output.replace("\n", " ")
    assert PEERS[0][:20] in first
    assert "2030-12-31 18:00Z" in first


def test_auth_validate_names_lines(node):
    file = node.home / "authorized_keys"
    assert node.json("auth", "validate")["valid"] is True
    lines = len(file.read_text().splitlines())
    with file.open("a") as out:
        out.write(f"{PEERS[0]} verified=sha256:00112233 unknown=x # fine\nnot-a-peer\n")
    result = node("auth", "validate", status=1)
    assert f"line {lines + 2}: " in result.stdout
    assert f"line {lines + 1}: " not in result.stdout
    assert "1 broken line" in result.stderr
    other = node.home / "other"
    other.write_text(f"{PEERS[0]}\n")
    assert node.json("auth", "validate", str(other))["peers"] == 1


def test_services(node):
    node("service", "add", "ssh", "127.0.0.1:22")
    node("names", "add", "laptop", PEERS[0])
    added = node.json("service", "add", "web", "localhost:8080", "--allow", "laptop", "--allow", PEERS[1])
    assert added["allowed_peers"] == [PEERS[0], PEERS[1]]
    node("service", "disable", "ssh")
    assert node("service", "disable", "ssh").stdout.startswith("ssh is already disabled")
    listed = {service["name"]: service for service in node.json("service", "list")}
    assert listed["ssh"] == {"name": "ssh", "address": "127.0.0.1:22", "enabled": False, "allowed_peers": None}
    node("service", "enable", "ssh")
    node("service", "remove", "web")
    assert [service["name"] for service in node.json("service", "list")] == ["ssh"]
    for arguments in (
        ("service", "add", "ssh", "127.0.0.1:23"),
        ("service", "add", "invite", "127.0.0.1:23"),
        ("service", "add", "Bad Name", "127.0.0.1:23"),
        ("service", "add", "x", "no-port"),
        ("service", "remove", "nothing"),
        ("service", "enable", "nothing"),
        ("service", "add", "x", "127.0.0.1:1", "--allow", "stranger"),
    ):
        assert node(*arguments, status=1).stderr.startswith("error: ")
    assert [service["name"] for service in node.json("service", "list")] == ["ssh"]


def test_service_list_for_people(node):
    node("names", "add", "laptop", PEERS[0])
    node("service", "add", "ssh", "127.0.0.1:22")
    node("service", "add", "web", "localhost:8080", "--allow", "laptop", "--disabled")
    assert node("service", "list").stdout.splitlines() == [
        "NAME  ADDRESS         STATE     FOR",
        "ssh   127.0.0.1:22    enabled   all authorised peers",
        "web   localhost:8080  disabled  laptop",
    ]


def test_names(node):
    first, second = "/ip4/192.0.2.1/tcp/4001", "/ip6/2001:db8::1/tcp/4001"
    node("names", "add", "home", PEERS[0], "--address", first)
    assert node.json("names", "add", "home", PEERS[0], "--address", second)["addresses"] == [first, second]
    assert "already means" in node("names", "add", "home", PEERS[1], status=1).stderr
    node("names", "add", "home", PEERS[1], "--replace", "--address", f"{first}/p2p/{PEERS[1]}")
    assert node("names", "add", "x", PEERS[2], "--address", f"{first}/p2p/{PEERS[1]}", status=1).stderr
    listed = {entry["name"]: entry for entry in node.json("names", "list")}
    assert listed["home"]["peer_id"] == PEERS[1]
    assert "x" not in listed
    node("names", "remove", "home")
    assert node("names", "remove", "home", status=1).stderr


def test_comments_survive_edits(node):
    config = node.home / "config.yaml"
    comments = [line for line in config.read_text().splitlines() if line.lstrip().startswith("#")]
    node("service", "add", "ssh", "127.0.0.1:22")
    node("names", "add", "home", PEERS[0], "--address", "/ip4/192.0.2.1/tcp/4001")
    kept = config.read_text().splitlines()
    assert [line for line in comments if line not in kept] == []


def test_config_validate(node):
    assert node.json("config", "validate") == {
        "file": str(node.home / "config.yaml"),
        "valid": True,
        "problems": [],
        "warnings": [],
        "after_restart": None,
    }
    bad = node.home / "bad.yaml"
    bad.write_text("version: 1\nservices:\n  ssh:\n    local_address: nowhere\n")
    result = node("config", "validate", str(bad), status=1)
    assert "line 4" in result.stderr
    assert node.json("config", "validate", str(bad), status=1)["problems"][0]["line"] == 4
    bad.write_text("version: [1\n")
    assert "line" in node("config", "validate", str(bad), status=1).stderr
    assert "peerup init" in node("config", "validate", str(node.home / "none.yaml"), status=1).stderr


def test_a_missing_home_is_explained(shell):
    for arguments in (("whoami",), ("service", "list"), ("service", "add", "x", "h:1"), ("names", "list")):
        result = shell(*arguments, status=1)
        assert "peerup init" in result.stderr, arguments
    assert not shell.home.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("status",),
        ("actors",),
        ("actors", "get", "gate"),
        ("tap",),
        ("why", "x:1:1"),
        ("ping", "home"),
        ("paths",),
        ("proxy", "home", "ssh", "0"),
        ("proxy", "home", "ssh", "--stdio"),
        ("proxy", "list"),
        ("fault", "kill", "gate"),
        ("fault", "list"),
        ("deadletters",),
        ("log", "gate", "debug"),
        ("config", "reload"),
        ("stop",),
    ],
)
def test_commands_that_need_the_node_say_so(node, arguments):
    result = node(*arguments, status=3)
    assert "no node is running" in result.stderr
    assert "peerup daemon" in result.stderr
    assert result.stdout == ""


def test_errors_as_json_for_programs(node):
    result = node("actors", "--json", status=3)
    error = json.loads(result.stderr)["error"]
    assert error["code"] == "not-running"
    assert set(error) == {"code", "reason", "action"}


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("ping",),
        ("proxy", "home"),
        ("proxy", "home", "ssh"),
        ("proxy", "home", "ssh", "0", "--stdio"),
        ("proxy", "home", "ssh", "70000"),
        ("proxy", "home", "ssh", "::1:22"),
        ("proxy", "stop", "home"),
        ("tap", "--for", "soon"),
        ("fault", "drop", "--probability", "2"),
        ("log", "gate", "loud"),
    ],
)
def test_wrong_usage_is_2(node, arguments):
    assert "Usage:" in node(*arguments, status=2).stderr


def test_every_command_has_help():
    def walk(command, path):
        result = CliRunner().invoke(cli, [*path, "--help"])
        assert result.exit_code == 0, path
        assert max(map(len, result.output.splitlines())) <= 80, path
        assert command.help, path
        if hasattr(command, "list_commands"):
            import click

            context = click.Context(command)
            for name in command.list_commands(context):
                walk(command.get_command(context, name), [*path, name])

    walk(cli, [])


def test_completion_and_version():
    for shell in ("bash", "zsh", "fish"):
        assert "_PEERUP_COMPLETE" in CliRunner().invoke(cli, ["completion", shell]).output
    from peerup import __version__

    assert CliRunner().invoke(cli, ["--version"]).output == f"peerup {__version__}\n"
    assert json.loads(CliRunner().invoke(cli, ["version", "--json"]).output)["version"] == __version__
