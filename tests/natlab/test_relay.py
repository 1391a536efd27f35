"""Two nodes, each behind its own NAT, that reach each other only through a relay, whatever the NATs and the faults."""

from __future__ import annotations

import contextlib
import getpass
import os
import shlex
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.natlab.behaviour import PORT_RESTRICTED, SYMMETRIC, Behaviour, Outbound
from tests.natlab.lab import Lab
from tests.natlab.network import Network
from tests.natlab.peerup_nodes import Echo, Pair, Peerup, echoes, relay_address, running, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

ONE_WAY = 0.02
"""Seconds to the relay, so a round trip takes 40 ms."""

SOON = 20.0
"""Seconds for what takes a few on a machine that has nothing else to do."""

CGNAT = "carrier"


@pytest.fixture
def network(natlab: Lab) -> Callable[[str, object], Network]:
    """Makes a network with a NAT of this kind."""

    def make(name: str, kind: object) -> Network:
        if kind is CGNAT:
            return natlab.nat(name, behind=natlab.carrier_nat(f"{name}-isp", SYMMETRIC))
        assert isinstance(kind, Behaviour)
        return natlab.nat(name, kind)

    return make


@pytest.fixture
def pair_behind(
    natlab: Lab, network: Callable[[str, object], Network], tmp_path: Path
) -> Iterator[Callable[..., Pair]]:
    """Makes a pair of nodes behind NATs of these kinds, with so many relays on the public side."""
    with contextlib.ExitStack() as stack:

        def make(laptop: object, home: object, *, relays: int = 1, one_way: float = ONE_WAY, port: int = 4001) -> Pair:
            made = []
            for n in range(relays):
                host = natlab.host(f"relay{n or ''}", link=natlab.link(delay=one_way))
                relay = Peerup(host, tmp_path / host.name, port=port)
                relay.serve_as_relay()
                made.append(relay)
            hosts = (
                natlab.host(name, behind=network(f"{name}-nat", kind))
                for name, kind in (("laptop", laptop), ("home", home))
            )
            nodes = [Peerup(host, tmp_path / host.name) for host in hosts]
            return stack.enter_context(running(Pair(*nodes, made)))

        yield make


KINDS = {
    "port-restricted": PORT_RESTRICTED,
    "symmetric": SYMMETRIC,
    "carrier": CGNAT,
    "no-udp": Behaviour(outbound=Outbound.NO_UDP),
    "only-443": Behaviour(mapping=SYMMETRIC.mapping, outbound=Outbound.ONLY_443),
}


@pytest.mark.parametrize(
    ("laptop", "home"),
    [
        ("port-restricted", "port-restricted"),
        ("symmetric", "symmetric"),
        ("carrier", "symmetric"),
        ("no-udp", "carrier"),
        ("only-443", "only-443"),
    ],
)
def test_a_tunnel_works_between_nodes_behind_nats(pair_behind, laptop, home):
    port = 443 if "only-443" in (laptop, home) else 4001
    pair = pair_behind(KINDS[laptop], KINDS[home], port=port)
    address = pair.laptop.proxy("home", "echo")
    content = os.urandom(2_000_000)
    with pair.laptop.connect(address) as sock:
        assert sock.recv(100) == Echo.GREETING
        assert echoes(sock, content)
    path = pair.laptop.path_to(pair.home)
    assert path is not None
    assert path["path"] == "relayed"
    assert path["remote_address"].startswith(relay_address(pair.relays[0]))
    wait_for(lambda: pair.laptop.path_to(pair.home)["rtt"], "a measured round trip", SOON)
    assert pair.laptop.path_to(pair.home)["rtt"] >= 4 * ONE_WAY


SSHD = shutil.which("sshd", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")


def test_openssh_works_through_the_relay(pair_behind, natlab_program, tmp_path):
    natlab_program("sshd", "ssh", "ssh-keygen")
    pair = pair_behind(SYMMETRIC, CGNAT)
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / key)], check=True)
    config = tmp_path / "sshd_config"
    config.write_text(
        f"Port 2200\nListenAddress 127.0.0.1\nHostKey {tmp_path}/host\nPidFile none\nStrictModes no\n"
        f"AuthorizedKeysFile {tmp_path}/user.pub\nPasswordAuthentication no\n"
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True, mode=0o755)
    with pair.home.host.enter():
        server = subprocess.Popen([SSHD, "-D", "-e", "-f", str(config)], stderr=subprocess.DEVNULL)
    try:
        pair.home("service", "add", "ssh", "127.0.0.1:2200")
        command = shlex.join(pair.laptop.command("proxy", "home", "ssh", "--stdio"))
        ssh = [
            "ssh",
            "-F",
            "none",
            "-i",
            str(tmp_path / "user"),
            "-o",
            f"ProxyCommand={command}",
            "-o",
            "BatchMode=yes",
        ]
        ssh += ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]
        content = os.urandom(500_000)

        def transfers() -> bool:
            done = subprocess.run(
                [*ssh, f"{getpass.getuser()}@home", "cat"], input=content, capture_output=True, timeout=60, check=False
            )
            return done.returncode == 0 and done.stdout == content

        # The service, and sshd, may need a moment to be there.
        wait_for(transfers, "500 kB through ssh", 60)
        assert pair.laptop.path_to(pair.home)["path"] == "relayed"
    finally:
        server.terminate()
        server.wait(10)


@pytest.mark.parametrize("who", ["home", "laptop"])
def test_a_host_that_moves_to_another_network_is_reachable_again_within_seconds(pair_behind, natlab, who):
    pair = pair_behind(PORT_RESTRICTED, PORT_RESTRICTED)
    address = pair.laptop.proxy("home", "echo")
    assert pair.greeting(address)
    cafe = natlab.nat("cafe", SYMMETRIC, lan="10.7.0.0/24")
    node = pair.home if who == "home" else pair.laptop
    node.host.move(cafe)
    took = seconds_until(lambda: pair.greeting(address, 3))
    assert took < SOON
    node.host.move(natlab[f"{who}-nat"])
    back = seconds_until(lambda: pair.greeting(address, 3))
    assert back < SOON
    print(f"\nmoved {who}: reachable again after {took:.2f} s, after moving back {back:.2f} s")


def test_a_dial_that_is_under_way_while_the_network_changes_does_not_keep_us_waiting(pair_behind, natlab):
    pair = pair_behind(PORT_RESTRICTED, PORT_RESTRICTED)
    address = pair.laptop.proxy("home", "echo")
    assert pair.greeting(address)
    pair.laptop.host.uplink.unplug()  # the routes stay: dials are not even refused
    client = threading.Thread(target=pair.greeting, args=(address, 30), daemon=True)
    client.start()
    wait_for(lambda: pair.laptop.dialing, "a dial into the void", SOON)
    pair.laptop.host.uplink.plug_in()
    pair.laptop.host.move(natlab.nat("cafe", SYMMETRIC, lan="10.7.0.0/24"))
    took = seconds_until(lambda: pair.greeting(address, 3))
    print(f"\nreachable again after {took:.2f} s")
    assert took < 10
    client.join(30)


def test_a_move_between_networks_with_the_same_addresses_is_noticed(pair_behind, natlab):
    pair = pair_behind(PORT_RESTRICTED, SYMMETRIC)
    address = pair.laptop.proxy("home", "echo")
    assert pair.greeting(address)
    before = pair.home.host.address
    pair.home.host.move(natlab.nat("cafe", SYMMETRIC))
    assert pair.home.host.address == before
    took = seconds_until(lambda: pair.greeting(address, 3))
    print(f"\nreachable again after {took:.2f} s")
    assert took < SOON


@pytest.mark.parametrize("loose", [True, False], ids=["connections survive", "connections are forgotten"])
def test_a_reboot_of_the_nat_heals(pair_behind, natlab, loose):
    pair = pair_behind(PORT_RESTRICTED, Behaviour(tcp_loose=loose))
    address = pair.laptop.proxy("home", "echo")
    assert pair.greeting(address)
    natlab["home-nat"].reboot()
    took = seconds_until(lambda: pair.greeting(address, 3), within=90)
    print(f"\nreachable again after {took:.2f} s")
    # Nobody tells a host behind it: it sends something within 15 s, and is not answered for as long as it has patience.
    assert took < 60
    wait_for(lambda: pair.home.held() == 1, "the reservation", 60)


def test_of_two_relays_one_swallows_packets(pair_behind, natlab):
    pair = pair_behind(SYMMETRIC, SYMMETRIC, relays=2)
    address = pair.laptop.proxy("home", "echo")
    assert pair.greeting(address)
    used = pair.laptop.path_to(pair.home)["remote_address"]
    hole, other = sorted(pair.relays, key=lambda relay: relay.peer_id not in used)
    hole.host.uplink.link.cut()
    took = seconds_until(lambda: pair.greeting(address, 3), within=90)
    print(f"\na tunnel over the other relay after {took:.2f} s")
    assert other.peer_id in pair.laptop.path_to(pair.home)["remote_address"]
    # New tunnels do not suffer from it any more.
    assert seconds_until(lambda: pair.greeting(address, 10)) < 3
    wait_for(lambda: pair.home.held() == 1, "the keeper notices", 90)
    hole.host.uplink.link.mend()
    wait_for(lambda: pair.home.held() == 2, "both reservations", 90)


def test_a_relay_that_is_killed_during_a_transfer_is_used_again_when_it_is_back(pair_behind):
    pair = pair_behind(PORT_RESTRICTED, SYMMETRIC)
    [relay] = pair.relays
    address = pair.laptop.proxy("home", "echo")
    with pair.laptop.connect(address) as sock:
        assert sock.recv(100) == Echo.GREETING
        assert echoes(sock, os.urandom(100_000))
        relay.kill()
        with pytest.raises(ConnectionResetError):
            sock.recv(65536)
    told = wait_for(lambda: last_end(pair.laptop), "the end of the tunnel is told", SOON)
    print(f"\nthe broken tunnel: {told}")
    assert "connection" in told
    relay.start()
    began = time.monotonic()
    wait_for(lambda: pair.greeting(address, 3), "a tunnel after the restart", SOON)
    took = time.monotonic() - began
    print(f"a new tunnel {took:.2f} s after the relay was back")
    assert took < 10


def test_a_relay_that_no_longer_lists_us_is_told_and_one_that_does_again_is_used(pair_behind):
    pair = pair_behind(PORT_RESTRICTED, SYMMETRIC)
    [relay] = pair.relays
    address = pair.laptop.proxy("home", "echo")
    assert pair.greeting(address)
    relay("auth", "remove", pair.home.peer_id)
    wait_for(lambda: pair.home.held() == 0, "the reservation is lost", SOON)
    assert pair.home.reservations[0]["relayed_addresses"] == []
    wait_for(lambda: "does not authorise this node" in pair.home("relay", "list"), "what a person is told", SOON)
    assert not pair.greeting(address, 5)
    relay("auth", "add", pair.home.peer_id)
    took = seconds_until(lambda: pair.home.held() == 1)
    print(f"\nreservation {took:.2f} s after being listed again")
    assert seconds_until(lambda: pair.greeting(address, 3)) < SOON


def test_whatever_is_killed_under_relayed_load_heals(pair_behind):
    pair = pair_behind(PORT_RESTRICTED, SYMMETRIC)
    pair.laptop("relay", "add", relay_address(pair.relays[0]))
    address = pair.laptop.proxy("home", "echo")
    assert pair.greeting(address)
    found = {}
    for node in pair.nodes:
        for actor in ("relay/keeper", "relay/server", "nat/monitor", "switchboard", "keyring", "proxies"):
            if (pid := node.actor_pid(actor)) is None:
                continue
            with pair.laptop.connect(address) as sock:
                assert sock.recv(100) == Echo.GREETING
                sock.sendall(os.urandom(1_000_000))  # on its way while the process dies
                os.kill(pid, signal.SIGKILL)
                found[node.host.name, actor] = seconds_until(lambda: pair.greeting(address, 3))
            wait_for(lambda node=node, actor=actor, old=pid: node.actor_pid(actor) not in (None, old), actor, SOON)
    assert len(found) >= 14
    assert max(found.values()) < SOON, found
    slowest = sorted(found.items(), key=lambda item: -item[1])[:5]
    print("\n" + "; ".join(f"{actor} of {host}: {took:.2f} s" for (host, actor), took in slowest))
    wait_for(lambda: pair.home.held() == pair.laptop.held() == 1, "all reservations", SOON)


@pytest.mark.parametrize("connected", [True, False], ids=["connected to the relay", "cold"])
def test_round_trips_to_the_first_byte(pair_behind, connected):
    """From the wish for a proxy to the first byte of the service, counted in round trips to the relay.

    A round trip is long here, so that what a busy machine takes for its work is little beside it; where it was not, the
    attempt is repeated: fewer round trips than are needed are never seen, however often one looks.
    """
    one_way = 0.4
    pair = pair_behind(PORT_RESTRICTED, SYMMETRIC, one_way=one_way)
    [relay], laptop, home = pair.relays, pair.laptop, pair.home
    if connected:
        laptop("relay", "add", relay_address(relay))
    else:
        laptop("connect", "home")  # what the laptop knows of the relay it has learned before
    wait_for(lambda: (laptop.path_to(relay) or {}).get("agent"), "the relay has said what it is", SOON)
    taken, warm = [], []
    while len(taken) < 5:
        for peer in (home, *([] if connected else [relay])):
            laptop.client.post(f"/v1/peers/{peer.peer_id}/disconnect")
            wait_for(lambda peer=peer: laptop.path_to(peer) is None, "disconnected", SOON)
        assert (laptop.path_to(relay) is not None) == connected
        began = time.monotonic()
        address = laptop.proxy("home", "echo")
        with laptop.connect(address) as sock:
            assert sock.recv(100) == Echo.GREETING
        taken.append((time.monotonic() - began) / (2 * one_way))
        wait_for(lambda: (laptop.path_to(home) or {}).get("agent"), "home has said what it is", SOON)
        began = time.monotonic()
        with laptop.connect(address) as sock:
            assert sock.recv(100) == Echo.GREETING
        warm.append((time.monotonic() - began) / (2 * one_way))
        if min(taken) < (6 if connected else 8) and min(warm) < 3:  # to the peer and back is two
            break
        laptop("proxy", "stop", "home", "echo")
    print(f"\n{taken} round trips to the relay; {warm} for the next tunnel")
    assert min(taken) < (6 if connected else 8)
    assert min(warm) < 3


def seconds_until(condition: Callable[[], bool], within: float = 60.0) -> float:
    began = time.monotonic()
    wait_for(condition, "it works again", within)
    return time.monotonic() - began


def last_end(node: Peerup) -> str:
    """How the last tunnel of the echo proxy ended, in words."""
    told = node.client.get("/v1/actors/proxy%2Fhome%2Fecho")["description"]
    return str(told.get("last_failure") or "")
