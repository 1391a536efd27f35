"""The systemd units: that systemd understands them, and that they and the program agree."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from actors.config.relay_service import RelayServiceConfig
from peerup.cli import cli
from peerup.daemon import STOP_GRACE
from peerup.tree import DRAIN_SLACK
from supervisor.service import STOP_DEADLINE

UNITS = Path(__file__).parents[2] / "deploy" / "systemd"
NODE, RELAY, USER = (UNITS / name for name in ("peerup.service", "peerup-relay.service", "peerup-user.service"))
ALL = pytest.mark.parametrize("unit", [NODE, RELAY, USER], ids=lambda path: path.stem)
SYSTEM = pytest.mark.parametrize("unit", [NODE, RELAY], ids=lambda path: path.stem)


def read(unit: Path) -> dict[str, list[str]]:
    """The settings of a unit, each with its values in order."""
    found: dict[str, list[str]] = {}
    section = ""
    for line in unit.read_text().splitlines():
        if line.startswith("["):
            section = line
        elif line and not line.startswith("#"):
            key, equals, value = line.partition("=")
            assert equals, line
            assert section, line
            assert re.fullmatch("[A-Z][A-Za-z]+", key), line
            found.setdefault(key, []).append(value)
    return found


@ALL
def test_the_program_has_the_command_that_the_unit_runs(unit):
    words = shlex.split(read(unit)["ExecStart"][0])
    assert words[0] == "/usr/local/bin/peerup"
    arguments = words[1:]
    if arguments[0] == "--home":
        assert arguments[1] == "${STATE_DIRECTORY}"
        del arguments[:2]
    context = cli.make_context("peerup", ["--home", "/nowhere", *arguments], resilient_parsing=True)
    command = cli
    while arguments:
        command = command.get_command(context, arguments.pop(0))  # type: ignore[union-attr]  # fails the test
        assert command is not None


@ALL
def test_it_waits_for_what_the_program_says_and_for_its_stop(unit):
    settings = read(unit)
    assert settings["Type"] == ["notify"]
    assert settings["NotifyAccess"] == ["main"]
    # a relay that is restarted carries its open circuits to their end behind the process that was started
    assert settings["KillMode"] == ["process" if unit == RELAY else "mixed"]
    assert settings["Restart"] == ["on-failure"]
    drain = RelayServiceConfig().drain_time + DRAIN_SLACK if unit == RELAY else 0
    assert float(settings["TimeoutStopSec"][0]) >= STOP_DEADLINE + drain + STOP_GRACE
    # A hung actor is found out after five seconds; its replacement must fit in well before anything worse happens.
    assert float(settings["WatchdogSec"][0]) >= 20


@SYSTEM
def test_the_home_is_where_the_condition_and_the_guide_look_for_it(unit):
    settings = read(unit)
    home = f"/var/lib/{settings['StateDirectory'][0]}"
    assert settings["ConditionPathExists"] == [f"{home}/config.yaml"]
    assert settings["StateDirectoryMode"] == ["0700"]
    assert f"--home {home} " in unit.read_text()
    assert re.search(rf"^u {settings['User'][0]} ", (UNITS / "peerup.sysusers").read_text(), re.MULTILINE)


def test_a_relay_may_have_port_443_and_nothing_more():
    assert read(RELAY)["CapabilityBoundingSet"] == ["CAP_NET_BIND_SERVICE"] == read(RELAY)["AmbientCapabilities"]
    assert read(NODE)["CapabilityBoundingSet"] == [""]
    assert "AmbientCapabilities" not in read(NODE)


needs_analyze = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze")


def runnable(unit: Path, directory: Path) -> Path:
    """The unit with a program that exists."""
    made = directory / unit.name
    made.write_text(unit.read_text().replace("/usr/local/bin/peerup", shutil.which("true") or "/bin/true"))
    return made


@needs_analyze
@SYSTEM
def test_systemd_understands_every_line(unit, tmp_path):
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", runnable(unit, tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    about = [line for line in (done.stdout + done.stderr).splitlines() if unit.name in line]
    assert (done.returncode, about) == (0, [])


@needs_analyze
@SYSTEM
def test_little_of_the_machine_is_exposed(unit, tmp_path):
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", "--json=short", runnable(unit, tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if done.returncode != 0 and "offline" in done.stderr:
        pytest.skip("this systemd-analyze cannot judge files")
    settings = json.loads(done.stdout)
    exposed = {item["json_field"] for item in settings if item["set"] is False}
    network = {"PrivateNetwork", "IPAddressDeny", "RestrictAddressFamilies_AF_INET_INET6"}
    # Names of the rest: local sockets, netlink (which networks there are), the root directory, and for the relay
    # its one capability, which a user namespace of its own would make worthless.
    local = {"RestrictAddressFamilies_AF_UNIX", "RestrictAddressFamilies_AF_NETLINK", "RootDirectory_Or_RootImage"}
    relay = {"AmbientCapabilities", "PrivateUsers", "CapabilityBoundingSet_CAP_NET_BIND_SERVICE_BROADCAST_RAW"}
    clock = {"DeviceAllow"}  # ProtectClock itself lets the clock be read
    allowed = network | local | clock | (relay if unit == RELAY else set())
    plain = {re.sub(r"[^A-Za-z]+", "", name).lower() for name in allowed}
    assert {re.sub(r"[^A-Za-z]+", "", name).lower() for name in exposed} <= plain
