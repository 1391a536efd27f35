"""Reading a configuration: peer-up's as it is, ours, and every way to get it wrong."""

import contextlib
import dataclasses
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.config.file import load_config
from actors.config.reader import parse_duration
from actors.config.schema import ConfigError, TlsConfig, check_peer_name, parse_listen_address, read_config
from actors.config.template import render_config
from actors.config.yaml_text import YamlSyntaxError, parse_yaml
from actors.files import FileMissingError, PermissionsError
from protocol.errors import InvalidValueError
from protocol.multiaddr import Multiaddr
from protocol.peer_id import PeerId
from tests.actors.config.samples import HAND_WRITTEN, HOME, NAS, PEER_UP

FILE = Path("/etc/node/config.yaml")


def read(text):
    return read_config(parse_yaml(text), FILE)


def problems(text):
    with pytest.raises(ConfigError) as failure:
        read(text)
    return [str(problem) for problem in failure.value.problems]


def test_a_peer_up_configuration_loads_as_it_is():
    config = read(PEER_UP)
    assert [str(address) for address in config.network.listen_addresses] == [
        "/ip4/0.0.0.0/tcp/0",
        "/ip4/0.0.0.0/udp/0/quic-v1",
        "/ip6/::/tcp/0",
        "/ip6/::/udp/0/quic-v1",
    ]
    assert [str(address.peer_id) for address in config.relay.addresses] == [HOME]
    assert config.discovery.network == "family"
    assert config.security.enable_connection_gating
    assert [(s.name, s.address, s.enabled, s.allowed_peers) for s in config.services] == [
        ("ssh", "localhost:22", True, None),
        ("xrdp", "192.168.1.20:3389", False, (PeerId.from_text(NAS),)),
    ]
    assert [(entry.name, str(entry.peer)) for entry in config.names] == [("home", HOME)]
    assert config.telemetry.metrics_enabled
    assert config.telemetry.audit_enabled
    assert config.key_path == Path("/etc/node/identity.key")
    assert config.authorized_keys_path == Path("/etc/node/authorized_keys")


def test_an_unknown_key_is_reported_with_its_line_and_is_not_fatal():
    warnings = [str(warning) for warning in read(PEER_UP).warnings]
    line = PEER_UP.splitlines().index("colour_of_the_bike_shed: green") + 1
    assert warnings[-1] == f"line {line}: colour_of_the_bike_shed: is not a key that peerup knows; it is ignored"
    assert [warning.key for warning in read(PEER_UP).warnings] == [
        "network.listen_addresses",
        "network.force_private_reachability",
        "network.resource_limits_enabled",
        "relay.reservation_interval",
        "discovery.network",
        "services.xrdp.protocol",
        "colour_of_the_bike_shed",
    ]
    nested = read("telemetry:\n  metrics:\n    enabled: true\n    port: 9\n").warnings
    assert [(warning.line, warning.key) for warning in nested] == [(4, "telemetry.metrics.port")]


@pytest.mark.parametrize("value", ["2m", "2", "-1h", "never", "[]", ""])
def test_a_key_that_means_nothing_here_is_told_whatever_it_says(value):
    (warning,) = read(f"relay:\n  reservation_interval: {value}\n").warnings
    assert str(warning) == (
        "line 2: relay.reservation_interval: has no effect and can be removed: each relay says how long a reservation "
        "lasts; it is renewed in time"
    )
    assert read("relay: {addresses: []}\nnetwork: {}\n").warnings == ()


def test_relays_may_be_absent_and_gating_is_on_unless_it_is_switched_off():
    config = read("version: 1\n")
    assert config.relay.addresses == ()
    assert config.security.enable_connection_gating
    assert not read("security: {enable_connection_gating: false}\n").security.enable_connection_gating


def test_the_template_is_valid_says_the_defaults_and_knows_every_key():
    config = read(render_config([Multiaddr("/ip4/127.0.0.1/tcp/4101")], "family"))
    defaults = read("version: 1\n")
    assert [warning.key for warning in config.warnings] == ["discovery.network"]
    assert read(render_config()).warnings == ()
    assert [str(address) for address in config.network.listen_addresses] == ["/ip4/127.0.0.1/tcp/4101"]
    assert config.discovery.network == "family"
    same = dataclasses.replace(config, network=defaults.network, discovery=defaults.discovery, warnings=())
    assert same == defaults
    assert read(render_config()).network == defaults.network


def test_every_default_that_the_template_only_mentions_is_the_default():
    text = render_config()
    for name, value in dataclasses.asdict(read("version: 1\n").limits).items():
        assert f"#   {name}: {value} " in text
    for name, value in dataclasses.asdict(read("version: 1\n").network).items():
        told = f"{value / 60:.0f}m" if name == "silence_timeout" else str(value).lower()
        assert name in {"listen_addresses", "tls"} or f"# {name}: {told}\n" in text


def test_the_template_names_files_where_addresses_need_a_certificate(tmp_path):
    plain = render_config([Multiaddr("/ip4/0.0.0.0/tcp/443/ws")])
    assert read(plain).network.tls == TlsConfig()
    assert read(plain.replace("  # tls:", "  tls:").replace("  #   trusted", "    trusted")).network.tls == TlsConfig(
        trusted_file="tls/authority.pem"
    )
    secure = render_config([Multiaddr("/ip4/0.0.0.0/tcp/443"), Multiaddr("/ip4/0.0.0.0/tcp/443/wss")])
    assert read(secure).network.tls == TlsConfig("tls/fullchain.pem", "tls/privkey.pem")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "network:\n  listen_addresses:\n    - /ip4/0.0.0.0/tcp/443/wss\n",
            "line 2: network.listen_addresses: has /ip4/0.0.0.0/tcp/443/tls/ws, which needs a certificate",
        ),
        ("network:\n  tls:\n    key_file: a\n", "line 3: network.tls.key_file: is of no use without certificate_file"),
        ("network:\n  tls:\n    certificate_file: a\n", "network.tls.certificate_file: is of no use without key_file"),
        ("network:\n  tls: a.pem\n", "line 2: network.tls: must be a mapping"),
        ("version: 2\n", "line 1: version: is 2, but this peerup knows versions up to 1; update peerup"),
        ("version: one\n", "line 1: version: must be a whole number, not 'one'"),
        ("network: yes please\n", "line 1: network: must be a mapping of keys to values, not 'yes please'"),
        ("network:\n  listen_addresses: /ip4/1.2.3.4/tcp/1\n", "line 2: network.listen_addresses: must be a list"),
        (
            "network:\n  listen_addresses:\n    - /ip4/0.0.0.0/tcp/1\n    - nonsense\n",
            "line 4: network.listen_addresses[1]",
        ),
        ("relay_service:\n  drain_time: 2\n", "line 2: relay_service.drain_time: must be a duration above zero"),
        ("relay_service:\n  drain_time: 2 minutes\n", "'2 minutes' is not a duration such as 30s, 2m or 1h30m"),
        (
            "relay:\n  addresses:\n    - /ip4/1.2.3.4/tcp/1\n",
            "line 3: relay.addresses[0]: /ip4/1.2.3.4/tcp/1 does not end",
        ),
        ("discovery: {network: Not OK}\n", "discovery.network: 'Not OK' cannot be used here"),
        ("security: {enable_connection_gating: maybe}\n", "must be true or false, not 'maybe'"),
        ("security: {authorized_keys_file: 7}\n", "must be text, not '7'; put it in quotes"),
        ("services:\n  ssh:\n    enabled: true\n", "line 2: services.ssh: has no local_address; add one"),
        (
            "services:\n  ssh:\n    local_address: localhost\n",
            "line 3: services.ssh.local_address: 'localhost' is not an",
        ),
        ("services:\n  SSH:\n    local_address: localhost:22\n", "line 2: services.SSH: 'SSH' cannot be the name"),
        ("services:\n  ssh: localhost:22\n", "line 2: services.ssh: must be a mapping of keys to values"),
        (
            "services:\n  a:\n    local_address: b:1\n    allowed_peers: [x]\n",
            "services.a.allowed_peers[0]: 'x' is not a peer",
        ),
        ("names:\n  home: nonsense\n", "line 2: names.home: 'nonsense' is not a peer id"),
        ("names:\n  7: nonsense\n", "line 2: names.7: must be text; put the key in quotes"),
        (f"names:\n  'a b': {HOME}\n", "line 2: names.a b: 'a b' cannot be a name"),
        (f"names:\n  {NAS}: {HOME}\n", "is a peer id and cannot be a name"),
        (f"addresses:\n  {HOME}:\n    - /ip4/1.2.3.4/tcp/1/p2p/{NAS}\n", f"line 3: addresses.{HOME}[0]"),
        ("addresses:\n  home: []\n", "line 2: addresses.home: 'home' is not a peer id"),
        (
            "telemetry: {metrics: {listen_address: '9091'}}\n",
            "telemetry.metrics.listen_address: '9091' is not an address",
        ),
        ("log: {level: loud}\n", "log.level: must be one of trace, debug, info, warning, error, not 'loud'"),
        ("limits: {connections: 0}\n", "limits.connections: must be from 1 to 100000, not 0"),
        ("limits: {connections: true}\n", "limits.connections: must be a whole number, not true"),
    ],
)
def test_what_is_wrong_is_told_with_line_key_and_remedy(text, expected):
    assert any(expected in problem for problem in problems(text)), problems(text)


def test_all_mistakes_are_told_at_once_in_order_of_lines():
    found = problems("version: 9\nlog:\n  level: x\n  format: y\nnames: []\n")
    assert [text.partition(":")[0] for text in found] == ["line 1", "line 3", "line 4", "line 5"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [1\nb: 2\n", "line 2: column 2: not YAML"),
        ("a: b: c\n", "line 1: column 5: not YAML: mapping values are not allowed here"),
        ("names:\n  x: 1\n  x: 2\n", 'line 3: column 3: not YAML: found duplicate key "x"'),
        ("a:\n\tb: 1\n", "line 2: column 1: not YAML"),
        ("", "the file is empty"),
        ("# only a comment\n", "the file is empty"),
        ("- a\n", "not a mapping"),
        ("a: *nowhere\n", "line 1: column 4: not YAML: found undefined alias"),
        ("a: 'open\n", "not YAML: found unexpected end of stream"),
        ("[" * 1000, "not YAML"),
    ],
)
def test_broken_yaml_is_told_with_line_and_column(text, expected):
    with pytest.raises(YamlSyntaxError) as failure:
        parse_yaml(text)
    assert expected in str(failure.value)


def test_tags_make_no_objects():
    marker = FILE.parent / "made"
    values = parse_yaml(f"version: !!python/object/apply:os.mkdir ['{marker}']\n")
    with pytest.raises(ConfigError):
        read_config(values, FILE)
    assert not marker.exists()


def test_aliases_do_not_explode():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    config = read("\n".join(lines) + "\n")
    assert len(config.warnings) == 12


def test_a_reserved_service_name_does_not_stop_a_peer_up_configuration():
    config = read("services:\n  ping: {enabled: true, local_address: 'localhost:1'}\n")
    assert config.services == ()
    assert "rename it" in str(config.warnings[0])


def test_yes_and_no_of_old_yaml_are_booleans_as_for_peer_up():
    config = read("services:\n  a: {enabled: yes, local_address: 'h:1'}\n  b: {enabled: off, local_address: 'h:1'}\n")
    assert [service.enabled for service in config.services] == [True, False]


def test_a_hand_written_file_reads():
    config = read(HAND_WRITTEN)
    assert config.warnings == ()
    assert [service.name for service in config.services] == ["ssh", "web"]
    assert [entry.name for entry in config.names] == ["home", "nas"]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("2m", 120), ("1h30m", 5400), ("1.5s", 1.5), ("100ms", 0.1), ("0", 0), ("-3s", -3), ("2h0m1us", 7200.000001)],
)
def test_durations_as_go_writes_them(text, seconds):
    assert parse_duration(text) == pytest.approx(seconds)


@given(st.text(alphabet="0123456789.hmsuµn -+", max_size=12))
def test_no_text_breaks_the_duration_parser(text):
    with contextlib.suppress(InvalidValueError):
        assert isinstance(parse_duration(text), float)


@pytest.mark.parametrize("text", ["home", "n.a-s_2", "a" * 64])
def test_names_as_peer_up_writes_them(text):
    assert check_peer_name(text) == text


@pytest.mark.parametrize("text", ["", "a b", "a" * 65, "ä", "-x", "..", "a/b", HOME])
def test_what_cannot_be_a_name(text):
    with pytest.raises(InvalidValueError):
        check_peer_name(text)


def test_listen_addresses():
    assert parse_listen_address("127.0.0.1:0") == ("127.0.0.1", 0)
    assert parse_listen_address("[::1]:80") == ("::1", 80)
    for text in (":80", "localhost", "localhost:65536", "localhost:00", "::1:80", "a b:0"):
        with pytest.raises(InvalidValueError):
            parse_listen_address(text)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["services", "names", "network", "limits", "enabled", "a", "log"]), inner, max_size=4
            )
        ),
        max_leaves=20,
    )
)
def test_no_plain_data_breaks_the_reader(values):
    sections = ("services", "names", "network", "relay", "limits")
    with contextlib.suppress(ConfigError):
        assert read_config(dict.fromkeys(sections, values), FILE).version == 1


def test_files_that_cannot_be_used(tmp_path):
    path = tmp_path / "config.yaml"
    with pytest.raises(FileMissingError, match="peerup init"):
        load_config(path)
    path.write_text("version: 1\n")
    path.chmod(0o666)
    with pytest.raises(PermissionsError) as refusal:
        load_config(path)
    subprocess.run(str(refusal.value).partition("repair it: ")[2], shell=True, check=True)
    assert load_config(path).version == 1
    path.write_bytes(b"version: 1\nnames: \xff\n")
    with pytest.raises(ConfigError, match="line 2: not UTF-8"):
        load_config(path)
    path.write_bytes(b"\xef\xbb\xbfversion: 1\n")
    assert load_config(path).version == 1


def test_a_node_may_listen_nowhere():
    assert read("network:\n  listen_addresses: []\n").network.listen_addresses == ()
    assert read(render_config(())).network.listen_addresses == ()
    assert read(render_config()).network.listen_addresses == read("version: 1\n").network.listen_addresses
