from __future__ import annotations

import ipaddress
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import InvalidValueError
from protocol.multiaddr import MAX_BYTES, MAX_COMPONENTS, Component, Endpoint, Multiaddr, MultiaddrError
from protocol.multiaddr_values import PROTOCOLS_BY_CODE
from protocol.peer_id import PeerId

PEER = "12D3KooWCryG7Mon9orvQxcS1rYZjotPgpwoJNHHKcLLfE4Hf5mV"
RELAY = "QmcgpsyWgH8Y8ajJz1Cu72KnS5uo2Aa2LpzU7kinSupNKC"

# Texts and bytes as go-multiaddr and rust-multiaddr have them in their tests.
VECTORS = {
    "/ip4/1.2.3.4": "0401020304",
    "/ip4/0.0.0.0": "0400000000",
    "/ip6/::1": "2900000000000000000000000000000001",
    "/ip6/2601:9:4f81:9700:803e:ca65:66e8:c21": "29260100094f819700803eca6566e80c21",
    "/ip6zone/x/ip6/fe80::1": "2a017829fe800000000000000000000000000001",
    "/udp/0": "91020000",
    "/tcp/0": "060000",
    "/sctp/1234": "840104d2",
    "/tcp/65535": "06ffff",
    "/udp/1234/udt": "910204d2ad02",
    "/udp/1234/utp": "910204d2ae02",
    "/tcp/1234/http": "0604d2e003",
    "/tcp/1234/https": "0604d2bb03",
    "/ip4/127.0.0.1/udp/1234": "047f000001910204d2",
    "/ip4/127.0.0.1/tcp/4321": "047f0000010610e1",
    "/ip4/127.0.0.1/udp/1234/ip4/127.0.0.1/tcp/4321": "047f000001910204d2047f0000010610e1",
    "/ip4/127.0.0.1/udp/1234/quic": "047f000001910204d2cc03",
    "/ip4/127.0.0.1/udp/1234/quic-v1": "047f000001910204d2cd03",
    "/dns/example.com": "350b6578616d706c652e636f6d",
    "/dns4/example.com": "360b6578616d706c652e636f6d",
    "/dns6/example.com": "370b6578616d706c652e636f6d",
    "/dnsaddr/example.com": "380b6578616d706c652e636f6d",
    "/ip4/127.0.0.1/tcp/127/ws": "047f00000106007fdd03",
    "/ip4/127.0.0.1/tcp/127/tls/ws": "047f00000106007fc003dd03",
    "/ip4/127.0.0.1/tcp/127/noise": "047f00000106007fc603",
    "/unix/a/b/c/d/e": "90030a2f612f622f632f642f65",
    "/unix/stdio": "9003062f737464696f",
    f"/p2p/{RELAY}": "a503221220d52ebb89d85b02a284948203a62ff28389c57c9f42beec4ec20db76a68911c0b",
    f"/p2p/{RELAY}/p2p-circuit": "a503221220d52ebb89d85b02a284948203a62ff28389c57c9f42beec4ec20db76a68911c0ba202",
}

NORMALISED = {
    "/ip4/127.0.0.1/tcp/1234/": "/ip4/127.0.0.1/tcp/1234",
    f"/ipfs/{PEER}": f"/p2p/{PEER}",
    "/p2p/k51qzi5uqu5dhb6l8spkdx7yxafegfkee5by8h7lmjh2ehc2sgg34z7c15vzqs": f"/p2p/{PEER}",
    "/ip6/2001:0DB8:0:0:0:0:0:1/tcp/08": "/ip6/2001:db8::1/tcp/8",
    "/ip6/::ffff:1.2.3.4": "/ip6/::ffff:1.2.3.4",
    "/ip6/::ffff:102:304": "/ip6/::ffff:1.2.3.4",
    "/ip4/127.0.0.1/udp/1/quic-v1/webtransport/certhash/b2uaraocy6yrdblb4sfptaddgimjmmpy": (
        "/ip4/127.0.0.1/udp/1/quic-v1/webtransport/certhash/u1QEQOFj2IjCsPJFfMAxmQxLGPw"
    ),
}

REFUSED = [
    "",
    "/",
    "//",
    "ip4/1.2.3.4",
    "/ip4",
    "/ip4/::1",
    "/ip4/fdpsofodsajfdoisa",
    "/ip4/1.2.3",
    "/ip4/1.2.3.256",
    "/ip4/01.2.3.4",
    "/ip4/1.2.3.4//tcp/1",
    "/ip6",
    "/ip6/1.2.3.4",
    "/ip6/fe80::1%eth0",
    "/ip6zone",
    "/ip6zone/",
    "/ip6zone//ip6/fe80::1",
    "/ip4/192.0.2.0/ipcidr/256",
    "/udp",
    "/tcp",
    "/udp/65536",
    "/tcp/65536",
    "/tcp/-1",
    "/tcp/+1",
    "/tcp/ 1",
    "/tcp/1_0",
    "/tcp/\u0661",  # a digit, but not of ASCII
    "/tcp/000001",
    "/quic-v1/65536",
    "/udp/1234/sctp",
    "/ip4/127.0.0.1/tcp",
    "/ip4/127.0.0.1/p2p",
    "/ip4/127.0.0.1/p2p/tcp",
    "/ip4/127.0.0.1/udp/1234/quic-v1/webtransport/certhash",
    "/ip4/127.0.0.1/udp/1234/quic-v1/webtransport/certhash/b2uaraocy6yrdblb4sfptaddgimjmmp",
    "/p2p/QmxoHT6iViN5xAjoz1VZ553cL31U9F94ht3QvWR1FrEbZY",
    "/unix",
    "/ip4/1.2.3.4/tcp/80/unix",
    "/unix/a\nb",
    "/dns4/",
    "/dns4/a b/tcp/1",
    "/dns4/a\x1b[31mb/tcp/1",
    "/dns4/" + "a" * 254,
    "/dns4/\udcff",
    "/onion3/vww6ybal4bd7szmgncyruucpgfkqahzddi37ktceo3ah7ngmcopnpyyd:1234",
    "/nonsense/1",
    "/ip4/1.2.3.4" * (MAX_COMPONENTS + 1),
    "/unix/" + "a" * MAX_BYTES,
]


@pytest.mark.parametrize(("text", "data"), VECTORS.items())
def test_vectors(text, data):
    address = Multiaddr(text)
    assert address.to_bytes().hex() == data
    assert Multiaddr.from_bytes(bytes.fromhex(data)) == address
    assert str(Multiaddr.from_bytes(bytes.fromhex(data))) == text


@pytest.mark.parametrize(("text", "normal"), NORMALISED.items())
def test_texts_are_normalised(text, normal):
    assert str(Multiaddr(text)) == normal
    assert Multiaddr(text) == Multiaddr(normal)
    assert hash(Multiaddr(text)) == hash(Multiaddr(normal))
    assert Multiaddr(text).to_bytes() == Multiaddr(normal).to_bytes()


@pytest.mark.parametrize("text", REFUSED)
def test_texts_that_are_refused(text):
    with pytest.raises(MultiaddrError):
        Multiaddr(text)
    with pytest.raises(InvalidValueError):
        Multiaddr.from_wire(text)


@pytest.mark.parametrize(
    "data",
    [
        "",
        "04",
        "040102",
        "0604",
        "ff",
        "8004",  # /ip4 with a varint that is not the shortest
        "03",  # a code that nobody has
        "3605616263",  # a name that is cut short
        "3600",
        "3603612f62",  # a/b
        "3601ff",
        "3603610a62",
        "2a0100",
        "a503021220",
        "90030161",  # a path without a slash
        "9003012f",
        "9003032f612f",
        "d203010a",
        "d203020a00",
        "d203030a0200",
        "35ffffffffffffffff7f",
        "0401020304" * (MAX_COMPONENTS + 1),
        "04" + "00" * MAX_BYTES,
    ],
)
def test_bytes_that_are_refused(data):
    with pytest.raises(MultiaddrError):
        Multiaddr.from_bytes(bytes.fromhex(data))


names = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"], exclude_characters="/"), min_size=1).filter(
    lambda text: text.isprintable() and len(text) <= 60
)
peers = st.binary(min_size=43, max_size=50).map(lambda data: str(PeerId.from_public_key(data)))
components = st.one_of(
    st.ip_addresses(v=4).map(lambda ip: f"/ip4/{ip}"),
    st.ip_addresses(v=6).map(lambda ip: f"/ip6/{ip}"),
    st.tuples(st.sampled_from(["tcp", "udp", "sctp", "dccp"]), st.integers(0, 65535)).map(lambda p: f"/{p[0]}/{p[1]}"),
    st.tuples(st.sampled_from(["dns", "dns4", "dns6", "dnsaddr", "sni", "ip6zone"]), names).map(
        lambda p: f"/{p[0]}/{p[1]}"
    ),
    st.sampled_from([f"/{p.name}" for p in PROTOCOLS_BY_CODE.values() if p.size == 0]),
    peers.map(lambda peer: f"/p2p/{peer}"),
    st.integers(0, 255).map(lambda bits: f"/ipcidr/{bits}"),
)


@given(st.lists(components, min_size=1, max_size=8).map("".join))
def test_text_and_bytes_come_back(text):
    address = Multiaddr(text)
    assert Multiaddr(str(address)) == address
    assert Multiaddr.from_bytes(address.to_bytes()) == address
    assert str(Multiaddr.from_bytes(address.to_bytes())) == str(address)
    assert Multiaddr.from_wire(address.to_wire()) == address
    assert Multiaddr.from_components(address.components) == address


def test_peer_ids_come_and_go():
    bare = Multiaddr("/ip4/192.0.2.1/tcp/4001")
    peer = PeerId.from_text(PEER)
    full = bare.with_peer_id(peer)
    assert str(full) == f"/ip4/192.0.2.1/tcp/4001/p2p/{PEER}"
    assert full.peer_id == peer
    assert bare.peer_id is None
    assert full.with_peer_id(peer) is full
    assert full.without_peer_id() == bare
    assert bare.without_peer_id() is bare
    with pytest.raises(MultiaddrError, match="another peer"):
        full.with_peer_id(PeerId.from_text(RELAY))
    with pytest.raises(MultiaddrError):
        Multiaddr(f"/p2p/{PEER}").without_peer_id()


def test_relayed_addresses():
    relay = f"/ip4/192.0.2.1/udp/4001/quic-v1/p2p/{RELAY}"
    address = Multiaddr(f"{relay}/p2p-circuit/p2p/{PEER}")
    assert address.is_relayed
    assert address.relay == Multiaddr(relay)
    assert address.peer_id == PeerId.from_text(PEER)
    assert address.transport == "quic-v1"
    own = Multiaddr(f"{relay}/p2p-circuit")
    assert own.peer_id is None
    assert own.with_peer_id(PeerId.from_text(PEER)) == address
    assert not Multiaddr(relay).is_relayed
    assert Multiaddr(relay).relay is None
    assert Multiaddr("/p2p-circuit").relay is None
    assert Multiaddr("/p2p-circuit").is_relayed


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("/dns/a.example/tcp/443/wss", "/dns/a.example/tcp/443/tls/ws"),
        ("/dns/a.example/tcp/443/tls/wss", "/dns/a.example/tcp/443/tls/ws"),
        ("/ip4/1.2.3.4/tcp/443/tls/sni/a.example/wss", "/ip4/1.2.3.4/tcp/443/tls/sni/a.example/ws"),
        (f"/ip4/1.2.3.4/tcp/443/wss/p2p/{PEER}/p2p-circuit", f"/ip4/1.2.3.4/tcp/443/tls/ws/p2p/{PEER}/p2p-circuit"),
        ("/wss", "/tls/ws"),
    ],
)
def test_secure_websocket_has_one_form(text, same):
    assert Multiaddr(text) == Multiaddr(same)
    assert str(Multiaddr(text)) == same
    components = bytes.fromhex("de03")  # /wss
    assert Multiaddr.from_bytes(Multiaddr("/ip4/1.2.3.4/tcp/443").to_bytes() + components) == Multiaddr(
        "/ip4/1.2.3.4/tcp/443/tls/ws"
    )


@pytest.mark.parametrize(
    ("text", "endpoint", "transport"),
    [
        ("/ip4/127.0.0.1/tcp/1", Endpoint("ip4", "127.0.0.1", "tcp", 1), "tcp"),
        (f"/ip4/127.0.0.1/tcp/1/p2p/{PEER}", Endpoint("ip4", "127.0.0.1", "tcp", 1), "tcp"),
        ("/ip6/::1/udp/2/quic-v1", Endpoint("ip6", "::1", "udp", 2), "quic-v1"),
        ("/ip6zone/eth0/ip6/fe80::1/tcp/3", Endpoint("ip6", "fe80::1%eth0", "tcp", 3), "tcp"),
        ("/dns4/a.example/tcp/443/tls/sni/a.example/ws", Endpoint("dns4", "a.example", "tcp", 443), "websocket"),
        ("/dns/a.example/tcp/443/wss", Endpoint("dns", "a.example", "tcp", 443), "websocket"),
        ("/dnsaddr/a.example/tcp/4", Endpoint("dnsaddr", "a.example", "tcp", 4), "tcp"),
        ("/ip4/1.2.3.4/udp/5/quic-v1/webtransport", Endpoint("ip4", "1.2.3.4", "udp", 5), "webtransport"),
        ("/ip4/1.2.3.4/udp/5/quic", Endpoint("ip4", "1.2.3.4", "udp", 5), None),
        ("/ip4/1.2.3.4/udp/5", Endpoint("ip4", "1.2.3.4", "udp", 5), None),
        ("/ip4/1.2.3.4/tcp/5/http", Endpoint("ip4", "1.2.3.4", "tcp", 5), None),
        ("/ip4/1.2.3.4/tcp/5/tls", Endpoint("ip4", "1.2.3.4", "tcp", 5), None),
        ("/ip4/1.2.3.4/tcp/5/quic-v1", Endpoint("ip4", "1.2.3.4", "tcp", 5), None),
        ("/ip4/1.2.3.4", None, None),
        ("/dnsaddr/a.example", None, None),
        ("/unix/a", None, None),
        (f"/p2p/{PEER}", None, None),
        ("/ip6zone/eth0", None, None),
        ("/tcp/1/ip4/1.2.3.4", None, None),
    ],
)
def test_endpoints_and_transports(text, endpoint, transport):
    assert Multiaddr(text).endpoint == endpoint
    assert Multiaddr(text).transport == transport


@pytest.mark.parametrize(
    ("host", "port", "text"),
    [
        ("127.0.0.1", 1, "/ip4/127.0.0.1/tcp/1"),
        ("::1", 2, "/ip6/::1/tcp/2"),
        ("fe80::1%eth0", 3, "/ip6zone/eth0/ip6/fe80::1/tcp/3"),
        ("::ffff:192.0.2.1", 4, "/ip4/192.0.2.1/tcp/4"),
    ],
)
def test_addresses_of_sockets(host, port, text):
    assert str(Multiaddr.from_endpoint(host, port)) == text


@pytest.mark.parametrize(("host", "port"), [("localhost", 1), ("a:b", 1), ("127.0.0.1", 65536), ("127.0.0.1", -1)])
def test_what_is_no_address_of_a_socket(host, port):
    with pytest.raises(MultiaddrError):
        Multiaddr.from_endpoint(host, port)


def test_ip_addresses():
    assert Multiaddr("/ip4/192.0.2.1/tcp/1").ip == ipaddress.ip_address("192.0.2.1")
    assert Multiaddr("/ip6zone/x/ip6/fe80::1/tcp/1").ip == ipaddress.ip_address("fe80::1")
    assert Multiaddr("/dns/a/tcp/1").ip is None
    assert Multiaddr("/dns/a/tcp/1/ip4/1.2.3.4").ip is None
    assert repr(Multiaddr("/dns/a")) == "Multiaddr('/dns/a')"
    assert pickle.loads(pickle.dumps(Multiaddr("/dns/a"))) == Multiaddr("/dns/a")


def test_values_and_immutability():
    address = Multiaddr("/dns4/a.example/tcp/443/tls/sni/b.example")
    assert address.value("sni") == "b.example"
    assert address.value("tls") == ""
    assert address.value("udp") is None
    with pytest.raises(AttributeError):
        address.components = ()
    with pytest.raises(MultiaddrError):
        Multiaddr.from_components(())
    with pytest.raises(MultiaddrError):
        Multiaddr.from_components([Component("tls", "", b"")] * (MAX_COMPONENTS + 1))
    with pytest.raises(InvalidValueError):
        Multiaddr.from_wire(b"")
