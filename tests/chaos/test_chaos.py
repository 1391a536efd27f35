"""Everything of two running nodes is killed, stopped and hung, alone and in pairs, under load; see the invariants."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from peerup.client import Client, ClientError
from tests.chaos.load import EchoLoad, EchoServer, echo_works
from tests.support.listeners import listeners
from tests.support.nodes import Node
from tests.support.processes import descriptors, tree, wait_until

pytestmark = [pytest.mark.chaos, pytest.mark.slow]

WHOLE_WITHIN = 20.0
"""Seconds in which a tree must be whole again; hung processes alone take up to five to be noticed."""
SERVES_WITHIN = 20.0
LOOK_EVERY = 0.05
"""Seconds; each look asks the node's supervisors, and shall not be what keeps it busy."""
ROUNDS = int(os.environ.get("PEERUP_CHAOS_ROUNDS", "24"))
SEED = int(os.environ.get("PEERUP_CHAOS_SEED", "1"))


class World:
    """Two nodes that trust each other, a stranger that nobody trusts, and an echo service behind `home`."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.server = EchoServer()
        stack.callback(self.server.stop)
        self.laptop, self.home, self.stranger = (Node(name, directory) for name in ("laptop", "home", "stranger"))
        for node in (self.laptop, self.home, self.stranger):
            node.initialise()
        self.laptop.run("auth", "add", self.home.peer_id)
        self.stranger.run("auth", "add", self.home.peer_id)
        self.home.run("auth", "add", self.laptop.peer_id)
        for node in (self.laptop, self.stranger):
            node.run("names", "add", "home", self.home.peer_id, "--address", self.home.address)
        self.home.run("service", "add", "echo", f"127.0.0.1:{self.server.port}")
        for node in (self.laptop, self.home, self.stranger):
            stack.callback(node.stop)
            node.start("--allow-faults")
        self.port = self._proxy(self.laptop)
        self.stranger_port = self._proxy(self.stranger)

    @staticmethod
    def _proxy(node: Node) -> int:
        return int(node.run_json("proxy", "home", "echo", "0")["listen"].rpartition(":")[2])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with ExitStack() as stack:
        yield World(tmp_path_factory.mktemp("c"), stack)


def by_name(node: Node) -> dict[str, dict[str, Any]]:
    return {actor["name"]: actor for actor in node.actors()}


def is_whole(node: Node, names: set[str], hurt_pids: set[int]) -> bool:
    """Whether every actor runs, none of them still in a process that was hurt."""
    present = by_name(node)
    return names <= present.keys() and all(
        present[name]["state"] == "running" and present[name]["pid"] not in hurt_pids for name in names
    )


def hurt(node: Node, name: str, action: str) -> set[int]:
    """Do it to the actor's process; its pid, if it has one just now."""
    pid = by_name(node).get(name, {}).get("pid")
    if pid is None:
        return set()
    if action in {"kill", "stop"}:
        with contextlib.suppress(ProcessLookupError):  # it has just gone with its supervisor, the first victim
            os.kill(pid, signal.SIGKILL if action == "kill" else signal.SIGSTOP)
    else:
        try:
            # The hung control API never answers; everybody else may be slow on a busy machine.
            Client(node.home / "run" / "control.sock", timeout=5 if name == "api" else 30).post(
                f"/v1/actors/{name.replace('/', '%2F')}/fault", {"fault": "hang"}
            )
        except ClientError:
            assert name == "api", f"only the hung control API itself may fail to answer, not {name}"
    return {pid}


def check_invariants(world: World, names: dict[str, set[str]], hurt_pids: set[int], turn: str) -> None:
    for node in (world.laptop, world.home):
        wait_until(
            lambda node=node: is_whole(node, names[node.name], hurt_pids),
            within=WHOLE_WITHIN,
            what=f"{node.name} whole, {turn}",
            every=LOOK_EVERY,
        )
    wait_until(lambda: echo_works(world.port), within=SERVES_WITHIN, what=f"a new connection, {turn}")
    assert not echo_works(world.stranger_port, timeout=0.3), f"a stranger got in after {turn}"
    for node in (world.laptop, world.home):
        expected = {actor["pid"] for actor in node.actors()}
        wait_until(
            lambda node=node: not [process for process in tree(node.daemon_pid) if process.is_zombie],
            within=5.0,
            what=f"no zombies, {turn}",
        )
        living = {process.pid for process in tree(node.daemon_pid)}
        # Besides the actors there are the main process and Thespian's admin.
        assert len(living - expected) <= 2, f"orphans after {turn}: {living - expected}"


def plan(rng: random.Random, names: dict[str, set[str]]) -> Iterator[list[tuple[str, str, str]]]:
    """First each actor alone, killed; then seeded choices of one or two actors and of what happens to them."""
    for node in sorted(names):
        for name in sorted(names[node]):
            yield [(node, name, "kill")]
    everybody = [(node, name) for node in sorted(names) for name in sorted(names[node])]
    for _ in range(ROUNDS):
        victims = rng.sample(everybody, rng.choice([1, 2, 2]))
        yield [(node, name, rng.choice(["kill", "kill", "stop", "hang"])) for node, name in victims]


@pytest.mark.timeout(600)
def test_every_part_may_be_killed_stopped_and_hung_under_load(world: World) -> None:
    rng = random.Random(SEED)
    nodes = {node.name: node for node in (world.laptop, world.home)}
    names = {name: set(by_name(node)) for name, node in nodes.items()}
    assert {"root", "config", "keyring", "gate", "switchboard", "proxies", "api"} <= names["home"] & names["laptop"]
    loads = [EchoLoad(world.port, seed) for seed in range(3)]
    try:
        for step, victims in enumerate(plan(rng, names)):
            done = ", ".join(f"{action} {node}/{name}" for node, name, action in victims)
            turn = f"step {step} of seed {SEED}: {done}"
            # A supervisor takes its children along, so the second victim may be gone already: that is fine too.
            hurt_pids = set[int]().union(*(hurt(nodes[node], name, action) for node, name, action in victims))
            check_invariants(world, names, hurt_pids, turn)
    finally:
        for load in loads:
            load.stop()
    assert sum(load.wrong for load in loads) == 0, "a wrong byte was delivered"
    assert all(load.good > 0 for load in loads), "no connection ever lasted"


def test_a_node_listens_on_what_its_configuration_names_and_on_nothing_else(world: World) -> None:
    for node, ports in ((world.home, set()), (world.laptop, {world.port})):
        expected = {int(node.address.rpartition("/")[2]), *ports}
        found = listeners(node.daemon_pid)
        assert {entry.port for entry in found if entry.kind == "tcp"} == expected
        assert not [entry for entry in found if entry.kind == "udp"]
        assert all(entry.is_loopback for entry in found)


def test_killing_the_same_actor_again_and_again_leaks_no_descriptor(world: World) -> None:
    def counts() -> dict[str, int]:
        return {name: len(descriptors(actor["pid"])) for name, actor in by_name(world.laptop).items()}

    names = {node.name: set(by_name(node)) for node in (world.laptop, world.home)}
    for _ in itertools.repeat(None, 2):
        check_invariants(world, names, hurt(world.laptop, "gate", "kill"), "warming up")
    before = counts()
    for turn in range(8):
        check_invariants(world, names, hurt(world.laptop, "gate", "kill"), f"kill {turn}")
    wait_until(
        lambda: all(count <= before[name] + 2 for name, count in counts().items()),
        within=10.0,
        what=f"no more descriptors than {before}",
    )
