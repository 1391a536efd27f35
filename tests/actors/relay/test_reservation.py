"""Which of a relay's addresses are announced."""

import pytest

from actors.relay.reservation import MAX_ADDRESSES, usable_addresses
from protocol.circuit.addresses import circuit_address
from protocol.circuit.hop_client import Grant
from protocol.multiaddr import Multiaddr
from tests.actors.relay.pretended import US, key_of

RELAY = key_of("relay").peer_id

LOOPBACK = "/ip4/127.0.0.1/tcp/4001"
LINK = "/ip6/fe80::1/tcp/4001"
LAN = "/ip4/192.168.1.9/tcp/4001"
CLOUD = "/ip4/10.0.0.4/tcp/4001"
PUBLIC = "/ip4/8.8.8.8/tcp/4001"
PUBLIC6 = "/ip6/2600::1/tcp/4001"
NAME = "/dns/relay.example/tcp/443"


@pytest.mark.parametrize(
    ("granted", "dialled", "announced"),
    [
        ([PUBLIC], PUBLIC, [PUBLIC]),
        ([LOOPBACK, LAN, PUBLIC, PUBLIC6], PUBLIC, [PUBLIC, PUBLIC6, LAN]),
        ([LAN, NAME], PUBLIC, [NAME, LAN]),
        # A relay behind a cloud's 1:1 NAT knows its inner address only.
        ([LOOPBACK, CLOUD], PUBLIC, [PUBLIC, CLOUD]),
        ([], PUBLIC, [PUBLIC]),
        # One in the same LAN, which knows its public address.
        ([PUBLIC], LAN, [PUBLIC]),
        ([LOOPBACK], LAN, [LAN]),
        # On one machine.
        ([LOOPBACK], LOOPBACK, [LOOPBACK]),
        ([LOOPBACK, LAN], LOOPBACK, [LAN, LOOPBACK]),
        ([LINK, LOOPBACK], LINK, [LINK]),
        # It dialled us: from where says nothing.
        ([LOOPBACK, LAN, PUBLIC], None, [PUBLIC, LAN, LOOPBACK]),
        ([], None, []),
    ],
)
def test_which_addresses_are_announced(granted, dialled, announced):
    def through(addresses):
        return tuple(circuit_address(Multiaddr(address).with_peer_id(RELAY), US) for address in addresses)

    grant = Grant(RELAY, 0, through(granted), None, None)
    assert usable_addresses(grant, US, dialled and Multiaddr(dialled)) == through(announced)


def test_their_number_is_bounded():
    many = tuple(
        circuit_address(Multiaddr(f"/ip4/8.8.8.8/tcp/{port}").with_peer_id(RELAY), US) for port in range(1, 100)
    )
    assert len(usable_addresses(Grant(RELAY, 0, many, None, None), US, None)) == MAX_ADDRESSES
