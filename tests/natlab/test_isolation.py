"""Nothing gets out of a laboratory, nothing of it stays behind, and laboratories do not know each other."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from tests.natlab import namespaces
from tests.natlab.behaviour import SYMMETRIC
from tests.natlab.lab import Lab
from tests.natlab.namespaces import LabError, Namespace
from tests.natlab.probes import Servers, connects, exchange, probe_udp
from tests.support.processes import is_alive, tree, wait_until

ROOT = Path(__file__).resolve().parents[2]
KINDS_OF_INTERFACE = {"lo", "eth0", "eth1", "wan", "lan"}

# Starts a daemon in a host that nobody waits for and that ignores polite requests, then tells us and waits.
VICTIM = """
import json, os, subprocess, sys
from tests.natlab.lab import Lab
lab = Lab()
home = lab.nat("home", link=lab.link(delay=0.001))
host = lab.host("laptop", behind=home)
daemon = "trap '' TERM HUP INT; sleep 1000 & echo $$ $!; wait"
with host.enter():
    shell = subprocess.Popen(["setsid", "sh", "-c", daemon], stdout=subprocess.PIPE, text=True)
pids = [int(pid) for pid in shell.stdout.readline().split()]
inodes = [node.ns.inode for node in lab.nodes]
print(json.dumps({"inside": pids, "attendant": lab.attendant_pid, "inodes": inodes}), flush=True)
sys.stdin.read()
"""


def members_of(inodes: set[int]) -> list[int]:
    """Processes in these network namespaces."""
    found = []
    for pid in (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()):
        try:
            inode = Path(f"/proc/{pid}/ns/net").stat().st_ino
        except OSError:
            continue
        if inode in inodes:
            found.append(pid)
    return found


def test_nothing_connects_a_laboratory_with_where_it_was_made(natlab_factory: Callable[..., Lab]) -> None:
    """Made in a namespace of ours instead of the machine's own, so that all that it could connect to is in sight."""
    outside = Namespace("outside")
    outside.ip("link add name d0 type veth peer name d1", "addr add 128.66.200.1/24 dev d0", "link set d0 up")
    own = outside.interfaces()
    try:
        with outside.enter():
            lab = natlab_factory()
            packets = natlab_factory(device="packet")
        assert outside.inode not in {node.ns.inode for each in (lab, packets) for node in each.nodes}
        with outside.socket(kind=socket.SOCK_STREAM) as listener:
            listener.bind(("0.0.0.0", 5000))
            listener.listen()
            for each in (lab, packets):
                home, cafe = each.nat("home", ipv6=True), each.nat("cafe")
                host = each.host("laptop", behind=home, link=each.link(delay=0.001), ipv6=True)
                each.host("server", link=each.link(loss=0.1))
                host.add_uplink(cafe)
                host.move(cafe)
                home.reboot()
                home.new_address()
                assert outside.interfaces() == own
                for node in each.nodes:
                    names = set(node.ns.interfaces().values())
                    assert {name for name in names if name not in KINDS_OF_INTERFACE and name[0] != "p"} == set()
                    assert not connects_from(node.ns, ("128.66.200.1", 5000))
                    assert not connects_from(node.ns, ("127.0.0.1", 5000))
            listener.settimeout(0.01)
            with pytest.raises(TimeoutError):
                listener.accept()
    finally:
        outside.close()


def connects_from(namespace: Namespace, to: tuple[str, int]) -> bool:
    with namespace.socket(socket.AF_INET, socket.SOCK_STREAM) as client:
        client.settimeout(1)
        try:
            client.connect(to)
        except OSError:
            return False
    return True


def test_the_core_knows_no_way_to_other_addresses(natlab: Lab) -> None:
    servers = Servers(natlab)
    host = natlab.host("laptop", behind=natlab.nat("home", ipv6=True), ipv6=True)
    assert probe_udp(host, servers)
    for address in ("1.1.1.1", "192.0.2.1", "10.1.2.3", "169.254.169.254", "2606:4700:4700::1111"):
        tried = connects(host, (address, 80))
        assert not tried.ok
        assert tried.error
        assert tried.error.errno in {errno.ENETUNREACH, errno.EHOSTUNREACH}, address
    for route in natlab.core.run("ip", "route").splitlines():
        assert not route.startswith("default")
    assert "default" not in natlab.core.run("ip", "-6", "route")


def test_nothing_stays_when_the_test_itself_is_killed(natlab: Lab) -> None:
    """Not even a daemon of its own session that ignores signals."""
    killed = subprocess.Popen(
        [sys.executable, "-c", VICTIM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        assert killed.stdin
        assert killed.stdout
        with killed.stdin, killed.stdout:
            told = json.loads(killed.stdout.readline())
            inodes = set(told["inodes"])
            assert len(inodes) == 3
            assert set(told["inside"]) <= set(members_of(inodes))
            killed.kill()
            killed.wait()
    finally:
        killed.kill()
        killed.wait()
    wait_until(lambda: not is_alive(told["attendant"]), within=10, what="the attendant has ended")
    assert not any(is_alive(pid) for pid in told["inside"])
    assert not members_of(inodes)


def test_closing_ends_what_runs_inside(natlab_factory: Callable[..., Lab]) -> None:
    lab = natlab_factory()
    host = lab.host("laptop")
    shell = host.popen("sh", "-c", "trap '' TERM; setsid sleep 1000 & echo $!; wait", stdout=subprocess.PIPE, text=True)
    assert shell.stdout
    daemon = int(shell.stdout.readline())
    inodes = {node.ns.inode for node in lab.nodes}
    assert set(members_of(inodes)) == {shell.pid, daemon}
    started = time.monotonic()
    lab.close()
    assert time.monotonic() - started < 30
    assert shell.returncode == -signal.SIGKILL
    assert not is_alive(daemon)
    assert not members_of(inodes)
    assert not is_alive(lab.attendant_pid)
    lab.close()  # once more does nothing
    with pytest.raises(LabError, match="closed"), host.enter():
        pass


def test_closing_from_inside_spares_the_test(natlab_factory: Callable[..., Lab]) -> None:
    lab = natlab_factory()
    host = lab.host("laptop")
    with host.enter():
        lab.close()
    assert is_alive(os.getpid())


def test_nothing_is_named_on_the_machine(natlab: Lab) -> None:
    natlab.host("laptop-of-the-lab", behind=natlab.nat("home"), link=natlab.link(delay=0.001))
    inodes = {node.ns.inode for node in natlab.nodes}
    for entry in Path("/run/netns").glob("*"):  # where `ip netns add` would have left a name for ever
        assert entry.stat().st_ino not in inodes


def test_laboratories_with_the_same_addresses_side_by_side(natlab_factory: Callable[..., Lab]) -> None:
    pairs = []
    for _ in range(3):
        lab = natlab_factory()
        pairs.append((Servers(lab), lab.host("laptop", behind=lab.nat("home", SYMMETRIC))))
    assert len({servers.host.address for servers, _ in pairs}) == 1
    with pairs[0][0].udp() as ends, pairs[1][0].udp() as others, pairs[0][1].udp() as client:
        exchange(client, ends[0])
        others[0].settimeout(0.02)
        with pytest.raises(TimeoutError):
            others[0].recv(10)
    for servers, host in pairs:
        assert probe_udp(host, servers).mapping is SYMMETRIC.mapping


def test_entering_is_of_one_thread_and_may_be_nested(natlab: Lab) -> None:
    one, other = natlab.host("one"), natlab.host("other")
    here = namespaces._inode_here()
    elsewhere: list[int] = []
    with one.enter():
        assert namespaces._inode_here() == one.ns.inode
        with other.enter():
            assert namespaces._inode_here() == other.ns.inode
            child = int(subprocess.check_output(["stat", "-Lc", "%i", "/proc/self/ns/net"]))
            assert child == other.ns.inode
        assert namespaces._inode_here() == one.ns.inode
        thread = threading.Thread(target=lambda: elsewhere.append(namespaces._inode_here()))
        thread.start()
        thread.join()
    assert elsewhere == [one.ns.inode]  # threads begin where they are started
    assert namespaces._inode_here() == here
    with pytest.raises(ZeroDivisionError), one.enter():
        _ = 1 / 0
    assert namespaces._inode_here() == here


async def test_awaiting_inside_is_found_out(natlab: Lab) -> None:
    one, other = natlab.host("one"), natlab.host("other")
    here = namespaces._inode_here()
    entered = trio.Event()

    async def careless() -> None:
        with one.enter():
            entered.set()
            await trio.testing.wait_all_tasks_blocked()

    async def bystander() -> None:
        await entered.wait()
        with other.enter():
            await trio.testing.wait_all_tasks_blocked(0.01)

    async def both() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(careless)
            nursery.start_soon(bystander)

    with pytest.raises(ExceptionGroup) as raised:
        await both()
    found, _ = raised.value.split(LabError)
    assert found
    assert "did it await" in str(found.exceptions[0])
    assert namespaces._inode_here() == here  # and the thread of the tests is not lost there


async def test_one_trio_program_with_endpoints_in_many_hosts(natlab: Lab) -> None:
    server = natlab.host("server", link=natlab.link(delay=0.005))
    hosts = [natlab.host(f"host{n}", behind=natlab.nat(f"nat{n}")) for n in range(3)]
    with server.enter():
        listener = trio.socket.socket()
    seen: list[str] = []

    async def serve() -> None:
        for _ in hosts:
            accepted, source = await listener.accept()
            seen.append(source[0])
            await accepted.send(b"hello")
            accepted.close()

    async def greet(number: int) -> None:
        with hosts[number].enter():
            client = trio.socket.socket()
        with client:
            await client.connect((server.address, 5000))
            assert await client.recv(100) == b"hello"

    with listener, trio.fail_after(10):
        await listener.bind((server.address, 5000))
        listener.listen()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            for number in range(len(hosts)):
                nursery.start_soon(greet, number)
    assert sorted(seen) == sorted(node.address for node in natlab.nodes if node.name.startswith("nat"))


def test_errors_of_programs_say_what_and_where(natlab: Lab) -> None:
    host = natlab.host("laptop")
    with pytest.raises(LabError, match=r"in laptop: ip -batch .* ended with"):
        host.ns.ip("link set nonsense up")
    with pytest.raises(LabError, match="not installed"):
        host.run("no-such-program-anywhere")
    with pytest.raises(subprocess.TimeoutExpired):
        host.run("sleep", "30", timeout=0.1)
    assert host.run("sh", "-c", "echo no; exit 3", check=False) == "no\n"


def test_description_shows_who_is_where(natlab: Lab) -> None:
    carrier = natlab.carrier_nat("isp")
    natlab.host("laptop", behind=natlab.nat("home", behind=carrier), link=natlab.link(delay=0.25))
    lines = natlab.describe().splitlines()
    assert [line.split()[:2] for line in lines] == [["isp", "wan"], ["home", "wan"], ["laptop", "eth0"]]
    assert [len(line) - len(line.lstrip()) for line in lines] == [0, 4, 8]
    assert "delay=0.25" in lines[2]
    assert natlab["laptop"].address == "192.168.1.2"
    assert tree(natlab.attendant_pid)
