"""Addresses that lead to this machine, by every spelling: not dialled on somebody else's word."""

import ipaddress

import pytest

from actors.switchboard.errors import AddressError
from actors.switchboard.own_machine import OwnMachine
from actors.switchboard.resolver import Resolver
from protocol.multiaddr import Multiaddr

OWN = [ipaddress.ip_address(text) for text in ("127.0.0.1", "::1", "192.168.1.5", "2001:db8:5::5", "fe80::5")]
ANNOUNCED = [Multiaddr("/ip4/203.0.113.9/tcp/4001"), Multiaddr("/ip4/192.168.1.5/tcp/4001")]
HERE = OwnMachine.of(OWN, ANNOUNCED, [ipaddress.ip_address("198.51.100.7")])


@pytest.mark.parametrize(
    "host",
    [
        "/ip4/127.0.0.1",
        "/ip4/127.200.3.4",
        "/ip4/0.0.0.0",
        "/ip4/0.1.2.3",
        "/ip6/::",
        "/ip6/::1",
        "/ip6/::ffff:127.0.0.1",
        "/ip6/::ffff:0.0.0.0",
        "/ip6/::127.0.0.1",
        "/ip6/::ffff:0:127.0.0.1",
        "/ip6/64:ff9b::127.0.0.1",
        "/ip6/64:ff9b:1::127.0.0.1",
        "/ip6/2002:7f00:1::1",
        "/ip6/2001:0:7f00:1::1",
        "/ip6/fe80::5efe:127.0.0.1",
        "/ip4/192.168.1.5",
        "/ip6/::ffff:192.168.1.5",
        "/ip6/2001:db8:5::5",
        "/ip6/fe80::1",
        "/ip6zone/no-such-zone/ip6/fe80::1",
        "/ip6zone/lo/ip6/fe80::5",
        "/ip4/169.254.169.254",
        "/ip4/224.0.0.1",
        "/ip4/255.255.255.255",
        "/ip6/ff02::1",
    ],
)
def test_an_address_that_leads_here_is_not_dialled_whatever_its_port(host):
    assert HERE.why_not(Multiaddr(f"{host}/tcp/22"))


@pytest.mark.parametrize(
    "address",
    [
        "/ip4/192.168.1.6/tcp/22",
        "/ip6/2001:db8:5::6/tcp/22",
        "/ip4/203.0.113.9/tcp/4002",
        "/ip4/198.51.100.7/tcp/4002",
        "/ip6/64:ff9b::192.0.2.1/tcp/4001",
        "/ip6/2002:c000:201::1/tcp/4001",
        "/ip6zone/lo/ip6/fe80::6/tcp/4001",
        "/dns4/localhost/tcp/22",
    ],
)
def test_any_other_address_may_be_dialled(address):
    assert HERE.why_not(Multiaddr(address)) == ""


@pytest.mark.parametrize("host", ["203.0.113.9", "198.51.100.7"])
def test_where_this_node_is_reached_from_outside_is_not_dialled(host):
    assert HERE.why_not(Multiaddr(f"/ip4/{host}/tcp/4001/ws"))


async def test_what_a_name_leads_to_is_looked_at_after_it_is_resolved():
    typed = {Multiaddr("/dns4/localhost/tcp/22")}
    resolver = Resolver(typed.__contains__, lambda: HERE)
    with pytest.raises(AddressError, match="leads to this machine"):
        await resolver.resolve(Multiaddr("/dns4/localhost/tcp/23"))
    answers = await resolver.resolve(Multiaddr("/dns4/localhost/tcp/22"))
    assert answers == [Multiaddr("/ip4/127.0.0.1/tcp/22")]
    assert await resolver.resolve(answers[0]) == answers, "what the name in the configuration leads to"
    with pytest.raises(AddressError, match="leads to this machine"):
        await resolver.resolve(Multiaddr("/ip4/127.0.0.1/tcp/23"))


async def test_of_several_answers_those_that_lead_elsewhere_are_left():
    here, elsewhere = Multiaddr("/ip4/0.0.0.0/tcp/22"), Multiaddr("/ip4/192.0.2.1/tcp/22")

    async def ask(address):
        return [here, elsewhere]

    resolver = Resolver(lambda _: False, lambda: HERE, ask)
    assert await resolver.resolve(Multiaddr("/dns/evil.example/tcp/22")) == [elsewhere]
