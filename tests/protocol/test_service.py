from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import InvalidValueError
from protocol.service import (
    RESERVED_NAMES,
    ServiceAddress,
    ServiceAddressError,
    ServiceName,
    ServiceNameError,
    service_of_protocol,
    service_protocol,
)

names = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", fullmatch=True).filter(lambda n: n not in RESERVED_NAMES)


@given(names)
def test_names_become_protocols_and_come_back(name):
    assert ServiceName(name) == name
    assert service_protocol(name) == f"/peerup/{name}/1.0.0"
    assert service_of_protocol(service_protocol(name)) == name
    assert ServiceName.from_wire(ServiceName(name).to_wire()) == name
    assert type(ServiceName(name).to_wire()) is str


@pytest.mark.parametrize(
    "name",
    ["", "-", "-a", "a-", "A", "a_b", "a.b", "a/b", "a b", "a\n", "ä", "\u0661", "a" * 64, *sorted(RESERVED_NAMES)],
)
def test_names_that_are_refused(name):
    with pytest.raises(ServiceNameError):
        ServiceName(name)
    with pytest.raises(InvalidValueError):
        service_protocol(name)
    assert service_of_protocol(f"/peerup/{name}/1.0.0") is None


def test_reserved_names_are_at_least_those_of_peer_up():
    assert {"invite", "relay-pair", "peer-notify", "rtt-probe", "kad", "ping"} <= RESERVED_NAMES


def test_the_wire_form_is_a_text():
    with pytest.raises(ServiceNameError):
        ServiceName.from_wire(b"ssh")


@pytest.mark.parametrize(
    "protocol", ["", "/peerup/", "/peerup/1.0.0", "/1.0.0", "/peerup/ssh", "/peerup/ssh/2.0.0", "/ipfs/id/1.0.0", "ssh"]
)
def test_protocols_of_no_service(protocol):
    assert service_of_protocol(protocol) is None


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:22", "127.0.0.1", 22),
        ("0.0.0.0:1", "0.0.0.0", 1),
        ("[::1]:22", "::1", 22),
        ("[2001:DB8:0:0::1]:65535", "2001:db8::1", 65535),
        ("[fe80::1%eth0]:22", "fe80::1%eth0", 22),
        ("localhost:8080", "localhost", 8080),
        ("nas.lan:80", "nas.lan", 80),
        ("my_host-1.example.org.:80", "my_host-1.example.org.", 80),
        ("1host:80", "1host", 80),
    ],
)
def test_addresses(text, host, port):
    address = ServiceAddress.parse(text)
    assert (address.host, address.port) == (host, port)
    assert ServiceAddress.parse(str(address)) == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "22",
        ":22",
        "host",
        "host:",
        "host:0",
        "host:65536",
        "host:-1",
        "host:+1",
        "host: 1",
        "host:1 ",
        "host:\u0661",
        "host:000022",
        "::1:22",
        "[::1]",
        "[::1]22",
        "[::1:22",
        "[]:22",
        "[127.0.0.1]:22",
        "1.2.3.4.5:1",
        "1.2.3.256:1",
        "1.2.3:1",
        "a..b:1",
        "-a:1",
        "a b:1",
        "a/b:1",
        "http://a:1",
        "ä:1",
        "a" * 64 + ":1",
        "a." * 130 + "a:1",
        "a\n:1",
    ],
)
def test_addresses_that_are_refused(text):
    with pytest.raises(ServiceAddressError):
        ServiceAddress.parse(text)


@given(st.ip_addresses(), st.integers(1, 65535))
def test_every_ip_address_comes_back(ip, port):
    address = ServiceAddress(str(ip), port)
    assert ServiceAddress.parse(str(address)) == address
