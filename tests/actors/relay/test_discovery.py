"""What peers say of this machine's address, and what is believed of it."""

import ipaddress

from actors.relay.discovery import AddressDiscovery
from protocol.keys import PrivateKey
from protocol.multiaddr import Multiaddr

A, B, C = (PrivateKey.from_seed(bytes((number,)) * 32).peer_id for number in (1, 2, 3))
HOME, OFFICE, CAFE = (ipaddress.ip_address(text) for text in ("51.15.1.1", "8.8.4.4", "93.184.216.34"))
LISTENING = (Multiaddr("/ip4/10.0.0.5/tcp/4001"), Multiaddr("/ip4/0.0.0.0/tcp/443/ws"), Multiaddr("/ip6/::/tcp/4001"))
PUBLIC = "5.6.7.8"


def seen(at=PUBLIC, port=4001):
    return Multiaddr(f"/ip4/{at}/tcp/{port}")


def texts(found):
    return [str(address) for address in found]


def test_what_peers_in_two_networks_say_is_combined_with_our_ports():
    discovery = AddressDiscovery()
    assert not discovery.observed("1", A, HOME, seen(port=50000), dialled=False)
    assert discovery.addresses(LISTENING) == ()
    assert discovery.observed("2", B, OFFICE, seen(port=50001), dialled=False)
    assert texts(discovery.addresses(LISTENING)) == ["/ip4/5.6.7.8/tcp/4001", "/ip4/5.6.7.8/tcp/443/ws"]


def test_one_network_or_one_peer_is_not_enough():
    discovery = AddressDiscovery()
    discovery.observed("1", A, HOME, seen(), dialled=False)
    discovery.observed("2", B, ipaddress.ip_address("51.15.1.99"), seen(), dialled=False)
    assert discovery.addresses(LISTENING) == ()
    discovery = AddressDiscovery()
    discovery.observed("1", A, HOME, seen(), dialled=False)
    discovery.observed("2", A, OFFICE, seen(), dialled=False)
    assert discovery.addresses(LISTENING) == ()


def test_what_was_dialled_is_told_with_its_port():
    discovery = AddressDiscovery()
    discovery.observed("1", A, HOME, seen(port=8443), dialled=True)
    assert discovery.observed("2", B, OFFICE, seen(port=8443), dialled=True)
    assert "/ip4/5.6.7.8/tcp/8443" in texts(discovery.addresses(LISTENING))
    discovery.forget("1")
    assert discovery.forget("2")
    assert "/ip4/5.6.7.8/tcp/8443" not in texts(discovery.addresses(LISTENING))
    assert "/ip4/5.6.7.8/tcp/4001" in texts(discovery.addresses(LISTENING))  # still believed


def test_private_and_relayed_addresses_do_not_count():
    discovery = AddressDiscovery()
    for number, where in enumerate((HOME, OFFICE, CAFE)):
        peer = (A, B, C)[number]
        assert not discovery.observed(str(number), peer, where, seen("192.168.1.4"), dialled=True)
    circuit = Multiaddr(f"/ip4/5.6.7.8/tcp/1/p2p/{C}/p2p-circuit")
    assert not discovery.observed("1", A, HOME, circuit, dialled=False)
    assert discovery.observations == ()


def test_the_many_are_believed_and_a_new_address_takes_over_when_others_agree_on_it():
    discovery = AddressDiscovery(["5.6.7.8"])
    assert texts(discovery.addresses(LISTENING[:1])) == ["/ip4/5.6.7.8/tcp/4001"]
    discovery.observed("1", A, HOME, seen("9.9.9.9"), dialled=False)
    assert discovery.observed("2", B, OFFICE, seen("9.9.9.9"), dialled=False)
    assert texts(discovery.addresses(LISTENING[:1])) == ["/ip4/9.9.9.9/tcp/4001"]


def test_an_address_of_this_machines_own_and_other_versions_are_left_alone():
    discovery = AddressDiscovery(["5.6.7.8"])
    assert discovery.addresses((Multiaddr("/ip4/5.6.7.8/tcp/4001"),)) == ()
    assert discovery.addresses((Multiaddr("/ip6/::/tcp/4001"), Multiaddr("/ip4/127.0.0.1/tcp/1"))) == ()
