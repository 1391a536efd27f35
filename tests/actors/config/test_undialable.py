"""Addresses that nobody can dial are refused where they are typed, with the reason."""

import pytest

from actors.config.schema import why_undialable
from protocol.multiaddr import Multiaddr

RELAY = "/p2p/12D3KooWRkZhiRhsqmrQ28rt73K7V3aCBpqKrLGSXmZ99PTcTZby"


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("/ip4/192.0.2.1/udp/4001/quic-v1", "neither TCP nor WebSocket"),
        ("/ip4/192.0.2.1/tcp/4001/http", "neither TCP nor WebSocket"),
        ("/ip4/192.0.2.1", "no port"),
        ("/p2p-circuit", "which relay"),
        ("/ip4/192.0.2.1/tcp/4001/p2p-circuit", "which relay"),
        (f"/ip4/192.0.2.1/tcp/1{RELAY}/p2p-circuit{RELAY}/p2p-circuit", "more than one relay"),
        ("/dnsaddr/bootstrap.example/tcp/4001", "which is not read"),
        (f"/ip4/192.0.2.1/udp/1/quic-v1{RELAY}/p2p-circuit", "neither TCP nor WebSocket"),
    ],
)
def test_an_address_that_nobody_can_dial_has_a_reason(address, reason):
    assert reason in why_undialable(Multiaddr(address))


@pytest.mark.parametrize(
    "address",
    ["/ip4/192.0.2.1/tcp/1", "/dns/a.example/tcp/443/tls/ws", f"/dns4/a.example/tcp/1/ws{RELAY}/p2p-circuit"],
)
def test_what_can_be_dialled_has_none(address):
    assert why_undialable(Multiaddr(address)) == ""
