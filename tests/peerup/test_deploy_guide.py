"""What the guides tell people to type and to write exists."""

from __future__ import annotations

import contextlib
import re
import shlex
from pathlib import Path

import click
import pytest

from actors.config.file import parse_config
from actors.config.relay_service import RelayServiceConfig
from peerup.cli import cli
from peerup.cli.framework import DefaultGroup

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "deploy-relay.md"
RELAY = ROOT / "docs" / "relay.md"
README = ROOT / "README.md"
PEER = "12D3KooWGRUVh9fmKCbmbFWaK2qXNHZq2YXLg3Y1FLQqTZNmvcV9"


def commands(page: Path) -> list[list[str]]:
    """The words behind `peerup` of each command of a page, in its blocks and within its lines."""
    text = page.read_text()
    found = []
    blocks = re.findall(r"```(?:sh|console)\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()] + re.findall(r"`((?:peerup|relay) [^`]+)`", text)
    for line in lines:
        words = shlex.split(re.sub(r"^\w*\$ +", "", line.partition("  #")[0]), comments=True)
        words = [word for word in words if word != "&"]
        words = [re.sub(r"12D3KooW…\w+", PEER, word) for word in words]
        if "peerup" in words and not {"useradd", "relay()"} & set(words):
            found.append(words[words.index("peerup") + 1 :])
        elif words[:1] == ["relay"] and len(words) > 1 and page != README:
            found.append(words)
    return [words for words in found if words and words[0] != "-g"]


@pytest.mark.parametrize("page", [README, GUIDE, RELAY], ids=lambda page: page.stem)
def test_every_command_of_the_guides_can_be_parsed(page):
    lines = [words for words in commands(page) if words[0] not in ("enable", "disable") and "/var/lib" not in words[0]]
    assert len(lines) >= 4
    for words in lines:
        context = cli.make_context("peerup", list(words), resilient_parsing=True)
        rest = list(words)
        if rest[0] == "--home":
            del rest[:2]
        command: click.Command = cli
        while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
            implied = isinstance(command, DefaultGroup) and rest[0] not in command.commands
            name = command.default if implied else rest.pop(0)
            found = command.get_command(context, name)
            assert found is not None, f"{name} in {words}"
            command = found
        if not isinstance(command, click.Group):
            with contextlib.suppress(click.MissingParameter):  # in the running text a command stands for itself
                command.make_context(words[0], rest, resilient_parsing=False).close()


def test_the_configuration_of_the_guide_is_one(tmp_path):
    (text,) = re.findall(r"```yaml\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    config = parse_config("version: 1\n" + text, tmp_path / "config.yaml")
    assert not config.warnings
    assert config.relay_service.enabled
    assert len(config.network.listen_addresses) == 4


def test_the_defaults_in_the_table_are_those_of_the_program():
    text = RELAY.read_text()
    default = RelayServiceConfig()
    for key in ("reservations", "circuits", "bytes_per_second", "requests_per_minute"):
        (row,) = re.findall(rf"^\| `{key}` \| (.*?) \|[^|]*\|$", text, re.MULTILINE)
        limit = getattr(default, key)
        numbers = (limit.per_peer, limit.per_ip, limit.per_network, limit.total)
        assert row.split(" | ") == ["unlimited" if number is None else str(number) for number in numbers]
    assert (default.circuit.seconds, default.circuit.data) == (None, None)
    assert (default.guest_circuit.seconds, default.guest_circuit.data) == (120, 128 * 1024)
    assert (default.reservation_ttl, default.drain_time) == (3600, 30)
