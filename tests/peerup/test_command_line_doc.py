"""What docs/command-line.md promises to programs is what the commands print."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from peerup.cli import cli
from protocol.peer_id import PeerId

PAGE = Path(__file__).parents[2] / "docs" / "command-line.md"
PEER = str(PeerId.from_public_key(bytes.fromhex("08011220") + bytes([7] * 32)))
LISTEN = "/ip4/127.0.0.1/tcp/4101"

COMMANDS = (
    f"relay setup --yes --listen {LISTEN}",
    "whoami",
    "version",
    f"auth add {PEER} --comment laptop",
    "auth list",
    "auth validate",
    "auth remove laptop",
    f"names add home {PEER}",
    "names list",
    "names remove home",
    "service add web 127.0.0.1:80",
    "service list",
    "service disable web",
    "service enable web",
    "service remove web",
    "config validate",
    f"relay add /ip4/192.0.2.1/tcp/4001/p2p/{PEER}",
    f"relay remove {PEER}",
    f"relay authorize {PEER}",
    "relay list-peers",
    f"relay deauthorize {PEER}",
    "relay info",
    "relay config validate",
    "doctor",
)
"""Each of the table but `init` and `config show`, in an order in which each has something to tell."""


def promised() -> dict[str, tuple[bool, list[str]]]:
    """Of each command: whether it prints a list, and its keys in order."""
    found = {}
    for names, keys in re.findall(r"^\| (`.*?) \| (.*) \|$", PAGE.read_text(), re.MULTILINE):
        keys_outside_brackets = re.findall(r"`(\w+)`", re.sub(r"\(.*?\)|:.*", "", keys))
        for name in re.findall(r"`([^`]+)`", names):
            found[name] = ("(a list)" in names, keys_outside_brackets)
    return found


def name_of(command: str) -> str:
    return next(name for name in sorted(promised(), key=len, reverse=True) if f"{command} ".startswith(f"{name} "))


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> dict[str, object]:
    """What each command printed, by its name."""
    home = tmp_path_factory.mktemp("home") / "node"
    answers: dict[str, object] = {}
    for command in COMMANDS:
        done = CliRunner().invoke(cli, ["--home", str(home), *command.split(), "--json"], env={"PEERUP_HOME": None})
        assert done.exit_code == 0, done.output
        answers[name_of(command)] = json.loads(done.stdout)
    other = ["--home", str(home.with_name("other")), "init", "--yes", "--json"]
    answers["init"] = json.loads(CliRunner().invoke(cli, other, env={"PEERUP_HOME": None}).stdout)
    return answers


def test_every_command_of_the_table_is_tried(told):
    assert set(told) == set(promised()) - {"config show"}


@pytest.mark.parametrize("name", sorted(set(map(name_of, COMMANDS)) | {"init"}))
def test_a_command_prints_the_keys_that_are_promised(told, name):
    is_list, keys = promised()[name]
    answer = told[name]
    assert isinstance(answer, list) is is_list
    one = answer[0] if isinstance(answer, list) else answer
    assert isinstance(one, dict)
    assert list(one) == keys


def test_a_script_finds_the_address_as_the_page_says(told):
    info = told["relay info"]
    assert isinstance(info, dict)
    (address,) = info["addresses"]
    assert address == f"{LISTEN}/p2p/{info['peer_id']}"
    assert info["client_command"] == f"peerup relay add {address}"
    assert info["live"] is None
