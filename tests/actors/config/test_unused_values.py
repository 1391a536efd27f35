"""Values of a configuration that peerup takes and does not use are refused or warned of, with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.config.file import ConfigEditor
from actors.config.schema import ConfigError, NodeConfig, check_served, read_config
from actors.config.template import render_config
from actors.config.yaml_text import parse_yaml
from protocol.dialing import MAX_ADDRESSES, MAX_RELAYED
from protocol.errors import InvalidValueError
from protocol.keeper import MAX_RELAYS
from protocol.keys import PrivateKey
from protocol.multiaddr import Multiaddr

PEERS = [str(PrivateKey.from_seed(bytes([number]) * 32).peer_id) for number in range(50)]
RELAYS = [f"/ip4/192.0.2.1/tcp/{4001 + number}/p2p/{peer}" for number, peer in enumerate(PEERS)]


def read(text: str) -> NodeConfig:
    return read_config(parse_yaml(text), Path("/etc/node/config.yaml"))


def listed(*items: str) -> str:
    return "[" + ", ".join(f'"{item}"' for item in items) + "]"


WARNED = [
    (f"relay: {{addresses: {listed(*RELAYS[: MAX_RELAYS + 1])}}}", "relay.addresses", "only the first 16 are used"),
    (f"relay: {{addresses: {listed(f'/dnsaddr/a.example/tcp/1/p2p/{PEERS[0]}')}}}", "relay.addresses", "is not used"),
    (
        f"relay: {{addresses: {listed(f'{RELAYS[0]}/p2p-circuit/p2p/{PEERS[1]}')}}}",
        "relay.addresses",
        "leads through a relay itself",
    ),
    (
        "relay: {{addresses: {}}}".format(
            listed(*(f"/ip4/192.0.2.1/tcp/{port}/p2p/{PEERS[0]}" for port in range(1, MAX_ADDRESSES + 2)))
        ),
        "relay.addresses",
        f"is one of more than {MAX_ADDRESSES} addresses",
    ),
    (
        'addresses: {{"{}": {}}}'.format(
            PEERS[0], listed(*(f"/ip4/192.0.2.1/tcp/{port}" for port in range(1, MAX_ADDRESSES + 2)))
        ),
        f"addresses.{PEERS[0]}",
        f"/tcp/{MAX_ADDRESSES + 1} is not used: it is one of more than {MAX_ADDRESSES} addresses",
    ),
    (
        'addresses: {{"{}": {}}}'.format(
            PEERS[0], listed(*(f"{relay}/p2p-circuit" for relay in RELAYS[1 : MAX_RELAYED + 2]))
        ),
        f"addresses.{PEERS[0]}",
        f"more than {MAX_RELAYED} relays",
    ),
    (f'addresses: {{"{PEERS[0]}": ["/ip4/192.0.2.1/udp/1/quic-v1"]}}', f"addresses.{PEERS[0]}", "is not used"),
    (
        'network: {listen_addresses: ["/ip4/0.0.0.0/tcp/1", "/ip4/0.0.0.0/udp/1/quic-v1"]}',
        "network.listen_addresses",
        "does not listen on /ip4/0.0.0.0/udp/1/quic-v1",
    ),
    (
        'network: {listen_addresses: ["/ip4/0.0.0.0/tcp/1", "/ip4/0.0.0.0/tcp/2/http"]}',
        "network.listen_addresses",
        "does not listen on /ip4/0.0.0.0/tcp/2/http",
    ),
    (
        f"network: {{listen_addresses: {listed(f'/ip4/0.0.0.0/tcp/1/p2p/{PEERS[0]}')}}}",
        "network.listen_addresses",
        "/p2p/... is not used",
    ),
    (
        'network: {listen_addresses: ["/ip4/0.0.0.0/tcp/1/ws"], tls: {certificate_file: a, key_file: b}}',
        "network.tls",
        "no listen address ends with /tls/ws",
    ),
    ("discovery: {network: family}", "discovery.network", "no effect yet"),
    ("discovery: {rendezvous: somewhere}", "discovery.rendezvous", "no effect yet"),
    (f"discovery: {{bootstrap_peers: {listed(RELAYS[0])}}}", "discovery.bootstrap_peers", "no effect yet"),
    ("protocols: {ping_pong: {id: /our-ping/1.0.0}}", "protocols.ping_pong.id", "answered under /pingpong/1.0.0"),
    (
        'services: {ssh: {local_address: "localhost:22", protocol: /custom/1.0.0}}',
        "services.ssh.protocol",
        "reached as /peerup/ssh/1.0.0",
    ),
    ('services: {ping: {local_address: "localhost:22"}}', "services.ping", "rename it"),
    ("relay_service: {reservations: {per_peer: 2}}", "relay_service.reservations", "at most one reservation"),
    (
        'relay_service: {announce_addresses: ["/ip4/192.0.2.1/udp/1/quic-v1"]}',
        "relay_service.announce_addresses",
        "of no use to clients",
    ),
    ("colour: green", "colour", "is ignored"),
]

REFUSED = [
    (
        "network: {{listen_addresses: {}}}".format(listed(*(f"/ip4/0.0.0.0/tcp/{port}" for port in range(1, 18)))),
        "network.listen_addresses",
        "more than 16",
    ),
    ('network: {listen_addresses: ["/ip4/0.0.0.0/tcp/1/http"]}', "network.listen_addresses", "cannot listen on"),
    (
        "relay_service: {{announce_addresses: {}}}".format(
            listed(*(f"/ip4/192.0.2.1/tcp/{port}" for port in range(1, 18)))
        ),
        "relay_service.announce_addresses",
        "more than 16",
    ),
    (
        'telemetry: {metrics: {listen_address: "metrics.example:9091"}}',
        "telemetry.metrics.listen_address",
        "must be an IP address or localhost",
    ),
    ("limits: {connections: 0}", "limits.connections", "must be from 1"),
    ("network: {silence_timeout: 1s}", "network.silence_timeout", "must be from 30s"),
]


@pytest.mark.parametrize(("text", "key", "reason"), WARNED)
def test_what_is_not_used_is_warned_of(text: str, key: str, reason: str) -> None:
    [warning] = read(text).warnings
    assert warning.key == key
    assert reason in warning.reason
    assert warning.line == 1


@pytest.mark.parametrize(("text", "key", "reason"), REFUSED)
def test_what_cannot_be_used_is_refused(text: str, key: str, reason: str) -> None:
    with pytest.raises(ConfigError) as failure:
        read(text)
    [problem] = failure.value.problems
    assert problem.key == key
    assert reason in problem.reason


@pytest.mark.parametrize(
    "text",
    [
        f"relay: {{addresses: {listed(*RELAYS[:MAX_RELAYS])}}}",
        f"relay: {{addresses: {listed(RELAYS[0], RELAYS[0])}}}",
        'services: {ssh: {local_address: "localhost:22", protocol: /peerup/ssh/1.0.0}}',
        "relay_service: {reservations: {per_peer: 1}}",
        "discovery: {rendezvous: peerup-default-network, bootstrap_peers: []}",
        'network: {listen_addresses: ["/ip4/0.0.0.0/tcp/1/tls/ws"], tls: {certificate_file: a, key_file: b}}',
        "network: {{listen_addresses: {}}}".format(listed(*(f"/ip4/0.0.0.0/tcp/7{end}" for end in ("", "/ws") * 9))),
        "protocols: {ping_pong: {enabled: false}}",
    ],
)
def test_what_is_used_is_not(text: str) -> None:
    assert read(text).warnings == ()


@pytest.fixture
def editor(tmp_path: Path) -> ConfigEditor:
    file = tmp_path / "config.yaml"
    file.write_text(render_config())
    file.chmod(0o600)
    return ConfigEditor(file)


def test_the_17th_relay_is_refused_where_it_is_typed(editor: ConfigEditor) -> None:
    known = [Multiaddr(relay) for relay in RELAYS[:MAX_RELAYS]]
    assert editor.add_relays(known) == tuple(known)
    with pytest.raises(InvalidValueError, match="at most 16 relays"):
        editor.add_relays([Multiaddr(RELAYS[MAX_RELAYS])])
    another_way = Multiaddr(f"/dns/relay.example/tcp/443/tls/ws/p2p/{PEERS[0]}")
    assert editor.add_relays([another_way]) == (another_way,)
    assert len(editor.config.relay.addresses) == MAX_RELAYS + 1


def test_more_addresses_of_a_peer_than_are_tried_are_refused_where_they_are_typed(editor: ConfigEditor) -> None:
    peer = PrivateKey.from_seed(bytes(32)).peer_id
    known = [Multiaddr(f"/ip4/192.0.2.1/tcp/{port}") for port in range(1, MAX_ADDRESSES + 1)]
    editor.add_addresses(peer, known)
    editor.add_addresses(peer, known[:3])
    with pytest.raises(InvalidValueError, match=f"more than {MAX_ADDRESSES} addresses"):
        editor.add_addresses(peer, [Multiaddr("/ip4/192.0.2.1/tcp/4999")])


def test_a_new_configuration_takes_no_listen_address_with_a_peer_id() -> None:
    with pytest.raises(InvalidValueError, match="leave /p2p/"):
        check_served([Multiaddr(f"/ip4/0.0.0.0/tcp/1/p2p/{PEERS[0]}")])
    check_served([Multiaddr("/ip4/0.0.0.0/tcp/1/tls/ws"), Multiaddr("/ip6zone/lo/ip6/fe80::1/tcp/1")])
