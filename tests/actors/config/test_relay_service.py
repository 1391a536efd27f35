"""The section `relay_service`: defaults, limits and their spellings, mistakes, and what reaches the running node."""

import dataclasses
from pathlib import Path

import pytest

from actors.config.changes import describe_changes
from actors.config.file import parse_yaml
from actors.config.relay_service import RelayServiceConfig, parse_size
from actors.config.schema import ConfigError, read_config
from actors.config.template import render_config
from protocol.circuit.messages import Limit
from protocol.messages.relay import CircuitLimit, ScopedLimit

FILE = Path("/etc/relay/config.yaml")


def read(text):
    return read_config(parse_yaml(text), FILE)


def section(text):
    return read("relay_service:\n" + "".join(f"  {line}\n" for line in text.splitlines())).relay_service


def test_a_node_is_no_relay_unless_it_says_so():
    assert not read("version: 1\n").relay_service.enabled
    assert section("enabled: true").enabled


def test_the_template_says_the_defaults():
    lines = render_config().splitlines()
    begin = lines.index("# relay_service:")
    told = [line.removeprefix("#").removeprefix(" ") for line in lines[begin:]]
    text = "\n".join(told[: told.index("")]) + "\n"
    config = read(text)
    assert config.relay_service == RelayServiceConfig()
    assert config.warnings == ()
    for field in dataclasses.fields(RelayServiceConfig):
        assert f"  {field.name}:" in text


def test_limits_may_be_numbers_sizes_or_unlimited():
    made = section(
        "circuits: {per_peer: 3, per_ip: unlimited, total: 0}\n"
        "bytes_per_second: {total: 10MB, per_peer: 1.5MiB}\n"
        "circuit: {duration: 10m, data: 64MiB}\n"
        "guest_circuit: {duration: unlimited, data: 4096}\n"
        "reservation_ttl: 30m\n"
    )
    assert made.circuits == ScopedLimit(3, None, 256, 0)
    assert made.bytes_per_second == ScopedLimit(3 * 2**19, None, None, 10_000_000)
    assert made.circuit == CircuitLimit(600, 64 * 2**20)
    assert made.guest_circuit == CircuitLimit(None, 4096)
    limits = made.rules.limits()
    assert (limits.ttl, limits.circuit, limits.guest_circuit) == (1800, Limit(600, 64 * 2**20), Limit(0, 4096))


def test_devices_of_ones_own_are_not_cut_by_default():
    assert RelayServiceConfig().rules.limits().circuit.unlimited
    assert not RelayServiceConfig().rules.limits().guest_circuit.unlimited


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("circuits: {total: -1}", "relay_service.circuits.total: must be from 0 to"),
        ("circuits: {total: lots}", "'lots' is not a size such as 128KiB, 64MB or 2GiB, nor unlimited"),
        ("circuits: {total: true}", "must be a whole number or unlimited, not true"),
        ("circuits: {total: 1.5}", "must be a whole number or unlimited, not '1.5'"),
        ("circuits: 7", "relay_service.circuits: must be a mapping"),
        ("circuit: {duration: 0s}", "relay_service.circuit.duration: must be from 1 to"),
        ("circuit: {duration: 5 minutes}", "'5 minutes' is not a duration such as 30s, 2m or 1h30m, nor unlimited"),
        ("circuit: {data: 0}", "relay_service.circuit.data: must be from 1 to"),
        ("reservation_ttl: 30d", "is not a duration"),
        ("reservation_ttl: 200h", "relay_service.reservation_ttl: must be from 30s to 604800s"),
        ("reservation_ttl: 29s", "must be from 30s to 604800s: in less, devices lose their places"),
        ("drain_time: 2h", "relay_service.drain_time: must be from 1s to 3600s"),
        ("announce_addresses: [/ip4/192.0.2.7]", "has no port to connect to"),
        ("announce_addresses: [nonsense]", "relay_service.announce_addresses[0]"),
    ],
)
def test_what_is_wrong_is_told(text, expected):
    with pytest.raises(ConfigError) as failure:
        section(text)
    assert any(expected in str(problem) for problem in failure.value.problems), failure.value.problems


def test_unknown_keys_are_told():
    warnings = read("relay_service:\n  circuits:\n    per_house: 3\n").warnings
    assert [warning.key for warning in warnings] == ["relay_service.circuits.per_house"]


def test_sizes():
    assert [parse_size(text) for text in ("1B", "2kB", "1KiB", "1.5 MB", "1TiB")] == [1, 2000, 1024, 1_500_000, 2**40]


def test_changed_limits_take_effect_at_once_and_being_a_relay_does_not():
    before = read("relay_service: {enabled: true}\n")
    after = read("relay_service: {enabled: true, circuits: {total: 9}, drain_time: 5s}\n")
    assert describe_changes(before, after) == (
        "relay_service.drain_time changed (takes effect when the node is started again)",
        "relay_service.circuits changed",
    )
