"""A relay that does not know its public address, as on cloud machines: a 1:1 NAT is in front of it."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from tests.natlab.behaviour import PORT_RESTRICTED
from tests.natlab.lab import Lab
from tests.natlab.peerup_nodes import Peerup, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

ONE_TO_ONE = """
table ip one_to_one {
 chain prerouting {
  type nat hook prerouting priority dstnat - 10
  iifname "wan" ip daddr %s meta l4proto { tcp, udp } dnat to %s
 }
}
"""


def test_a_relay_behind_a_one_to_one_nat_finds_out_where_it_is(natlab: Lab, tmp_path: Path) -> None:
    nat = natlab.nat("cloud", PORT_RESTRICTED)
    machine = natlab.host("relay", behind=nat)
    nat.ns.nft(ONE_TO_ONE % (nat.address, machine.address))
    relay = Peerup(machine, tmp_path / "relay")
    relay.serve_as_relay()
    clients = [
        Peerup(natlab.host(name, address=address), tmp_path / name)
        for name, address in (("home", "128.66.7.5"), ("laptop", "128.66.9.5"))
    ]
    public = f"/ip4/{nat.address}/tcp/{relay.port}"
    for client in clients:
        relay("auth", "add", client.peer_id)
        client("auth", "add", relay.peer_id)
        client("relay", "add", f"{public}/p2p/{relay.peer_id}")

    def described() -> dict[str, object]:
        told: dict[str, object] = relay.client.get("/v1/actors/relay%2Fserver")["description"]
        return told

    with contextlib.ExitStack() as stack:
        for node in (relay, clients[0]):
            stack.callback(node.stop)
            node.start()
        home, laptop = clients
        wait_for(home.held, "the first reservation")
        # nobody has told the relay yet; so the client goes by what it has dialled, and not by a private address
        (kept,) = home.reservations
        assert [address.partition("/p2p/")[0] for address in kept["relayed_addresses"]] == [public]
        assert described()["announced"] == []
        stack.callback(laptop.stop)
        laptop.start()
        wait_for(lambda: described()["announced"] == [public], "what both see, said by the relay")
        assert described()["announced_from"] == "what peers see"
        wait_for(lambda: public in str(described()["addresses"]), "what clients are told")
