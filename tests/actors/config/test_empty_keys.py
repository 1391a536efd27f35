"""A key that is there and empty is an error, or nothing is what it can only mean; it is never as good as absent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from actors.config.file import parse_config
from actors.config.schema import ConfigError, known_keys
from peerup.cli import cli
from tests.actors.config.samples import HOME

COLLECTIONS = {"services", "names", "addresses"}
"""What is empty in these is nothing, which lets nobody do anything."""

WITHOUT_EFFECT = {
    "relay.reservation_interval",
    "network.force_private_reachability",
    "network.resource_limits_enabled",
}

NOTHINGS = ("", " null", " ~", "  # - commented out", ' ""', " '  '")


def text_with(key: str, nothing: str) -> str:
    """A configuration that has this key without a value, what could be below it commented out, and others around it."""
    *sections, last = key.split(".")
    lines = [f"{'  ' * depth}{name}:" for depth, name in enumerate(sections)]
    margin = "  " * len(sections)
    if sections[:1] == ["services"] and len(sections) == 2 and last != "local_address":
        lines.append(f"{margin}local_address: localhost:22")
    lines += [f"{margin}{last}:{nothing}", f"{margin}  # something: commented out", f"{margin}#  - commented out"]
    return "\n".join(["# a node", *lines, "version: 1" if key != "version" else "log: {level: info}", ""])


def read(key: str, nothing: str):
    return parse_config(text_with(key, nothing), Path("/etc/node/config.yaml"))


def test_the_walk_goes_through_every_section() -> None:
    keys = set(known_keys())
    assert {"services.name.allowed_peers", "network.listen_addresses", f"addresses.{HOME}".partition(".")[0]} <= keys
    assert {"relay_service.circuit.data", "network.tls.trusted_file", "security.enable_connection_gating"} <= keys
    assert len(keys) > 60
    assert keys >= COLLECTIONS | WITHOUT_EFFECT


@pytest.mark.parametrize("nothing", NOTHINGS)
@pytest.mark.parametrize("key", [key for key in known_keys() if key not in COLLECTIONS | WITHOUT_EFFECT])
def test_an_empty_key_is_an_error_that_names_it(key: str, nothing: str) -> None:
    with pytest.raises(ConfigError) as failure:
        read(key, nothing)
    found = [problem for problem in failure.value.problems if problem.key == key]
    assert found, failure.value.problems
    assert found[0].line is not None


@pytest.mark.parametrize("nothing", ["", " null", " ~", " {}"])
@pytest.mark.parametrize("key", sorted(COLLECTIONS))
def test_an_empty_collection_holds_nothing(key: str, nothing: str) -> None:
    assert getattr(read(key, nothing), key) == ()


@pytest.mark.parametrize("key", sorted(WITHOUT_EFFECT))
def test_what_has_no_effect_has_none_when_it_is_empty(key: str) -> None:
    assert [warning.key for warning in read(key, "").warnings] == [key]


@pytest.mark.parametrize(
    ("key", "advice"),
    [
        ("services.ssh.allowed_peers", "write [] to let nobody use the service"),
        ("network.listen_addresses", "write [] to listen nowhere"),
        ("relay.addresses", "write [] for none"),
        ("discovery.network", "remove it for its default"),
    ],
)
def test_the_error_says_what_to_write(key: str, advice: str) -> None:
    with pytest.raises(ConfigError, match="is there and empty") as failure:
        read(key, "")
    assert advice in str(failure.value)


def test_validate_refuses_a_service_whose_list_of_peers_is_commented_out(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        f"services:\n  ssh:\n    enabled: true\n    local_address: localhost:22\n    allowed_peers:\n    # - {HOME}\n"
    )
    file.chmod(0o600)
    done = CliRunner().invoke(cli, ["--home", str(tmp_path), "config", "validate", "--json"])
    assert done.exit_code == 1
    (problem,) = json.loads(done.stdout)["problems"]
    assert (problem["key"], problem["line"]) == ("services.ssh.allowed_peers", 5)


def test_a_home_that_is_given_and_empty_is_not_the_default_one(tmp_path: Path) -> None:
    for arguments in (["--home", "", "whoami"], ["whoami", "--home", " "]):
        done = CliRunner().invoke(cli, arguments, env={"PEERUP_HOME": str(tmp_path)})
        assert (done.exit_code, "--home names no directory" in done.stderr) == (1, True), done.output
