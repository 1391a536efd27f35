"""Three real nodes, two of which reach each other only through the third: what they bear, and what they say of it.

Every actor of all three is killed, stopped or hung under load whose bytes are checked; the relay loses its power in the
middle of a transfer; the relay is full, or does not serve. The nodes behind the relay listen nowhere, so nothing here
can go another way.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from ruamel.yaml import YAML

from demo.node import DemoError
from demo.relayed import Hidden, Relay
from protocol.reservations import MIN_TTL
from tests.chaos.load import CHUNK, EchoLoad, EchoServer, echo_works, pattern
from tests.chaos.test_chaos import LOOK_EVERY, by_name, hurt, is_whole
from tests.support.nodes import Node
from tests.support.processes import descriptors, pids_with_environment, wait_until

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(400)]

SEED = int(os.environ.get("PEERUP_CHAOS_SEED", "1"))
HEALED_WITHIN = 60.0
"""Seconds for what takes a few on a machine that has nothing else to do; hung processes take up to five to be noticed,
and of a relay that was away both nodes must notice it, connect, and reserve anew. Not a test of speed: what it really
took is printed."""
MARK = "RELAYED_CHAOS_NODE"


class Member(Node):
    """A node all of whose processes are known, also those that have lost their parents."""

    def start(self, *options: str) -> float:
        self.mark = uuid.uuid4().hex
        with mock.patch.dict(os.environ, {MARK: self.mark}):
            return super().start(*options)

    def living(self) -> set[int]:
        """Every process that the last start has led to."""
        return set(pids_with_environment(MARK, self.mark))

    def lose_power(self) -> None:
        """SIGKILL for all processes at once. It may be started again."""
        assert self._daemon is not None
        everybody = self.living()
        for pid in sorted(everybody, key=lambda pid: pid != self.daemon_pid):  # who would begin to heal goes first
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._daemon.wait(HEALED_WITHIN)
        assert self._daemon.stdout is not None
        self._daemon.stdout.close()
        wait_until(lambda: not self.living(), within=HEALED_WITHIN, what="no process of it left")


class RelayMember(Member, Relay):
    """The relay."""

    def initialise(self) -> None:
        self.run("relay", "setup", "--yes", "--listen", self.address, "--limit", "drain_time=1s")
        self.peer_id = self.run("whoami").strip()

    def limits(self) -> dict[str, Any]:
        """What it grants now."""
        return dict(self.run_json("actors", "get", "relay/server")["description"]["limits"])

    def has_place(self, node: Node) -> bool:
        """Whether the node has a reservation."""
        told = {peer["peer_id"]: peer for peer in self.run_json("relay", "list-peers")}
        return bool(told[node.peer_id]["reserved"])

    @property
    def config(self) -> Path:
        return self.home / "config.yaml"


class HiddenMember(Member, Hidden):
    """A node that listens nowhere."""


class World:
    """`laptop` has a proxy to `home`'s echo service; both listen nowhere and use `relay`."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.directory = directory
        self.server = EchoServer()
        stack.callback(self.server.stop)
        self.relay = RelayMember("relay", directory)
        self.home, self.laptop = (HiddenMember(name, directory) for name in ("home", "laptop"))
        self.nodes: tuple[Member, ...] = (self.relay, self.home, self.laptop)
        for node in self.nodes:
            node.initialise()
        (self.where,) = self.relay.run_json("relay", "info")["addresses"]
        for node, other in ((self.home, self.laptop), (self.laptop, self.home)):
            self.relay.run("relay", "authorize", node.peer_id, "--comment", node.name)
            node.run("relay", "add", self.where)
            node.run("auth", "add", other.peer_id)
        self.home.run("service", "add", "echo", f"127.0.0.1:{self.server.port}")
        self.laptop.run("names", "add", "home", self.home.peer_id)
        self.laptop.run("names", "add", "relay", self.relay.peer_id)
        for node in self.nodes:
            stack.callback(node.stop)
            node.start("--allow-faults")
        self.port = int(self.laptop.run_json("proxy", "home", "echo", "0")["listen"].rpartition(":")[2])
        self.wait_healed("at the beginning")

    def wait_healed(self, when: str) -> None:
        """Wait until a new tunnel works and both nodes have their places at the relay."""
        wait_until(lambda: echo_works(self.port, timeout=5), within=HEALED_WITHIN, what=f"a tunnel {when}")
        for node in (self.home, self.laptop):
            wait_until(lambda node=node: place(node)["state"] == "held", within=HEALED_WITHIN, what=f"a place {when}")
        paths = [path for path in self.laptop.run_json("paths") if path["peer_id"] == self.home.peer_id]
        assert {path["path"] for path in paths} <= {"relayed"}

    def have_ask_again(self, node: Node) -> None:
        """Have the node ask the relay for a place now. By itself it waits the longer the more often it was refused."""
        node.run("relay", "remove", self.relay.peer_id)
        node.run("relay", "add", self.where)

    def last_end(self, node: Node, actor: str) -> str:
        """How the last tunnel of this actor ended that did not end well."""
        return str(node.run_json("actors", "get", actor)["description"]["last_failure"])

    def log_of(self, node: Node) -> str:
        return (self.directory / f"{node.name}.log").read_text()


def place(node: Node) -> dict[str, Any]:
    """What the node says of its place at the relay."""
    (told,) = node.run_json("relay", "list")
    return dict(told)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with ExitStack() as stack:
        world = World(tmp_path_factory.mktemp("r"), stack)
        yield world
        left = {node.name: node.stop() | node.living() for node in reversed(world.nodes)}
        assert not any(left.values()), f"processes outlived their nodes: {left}"


CLEAN = "an end that looked clean"


class Transfer:
    """One long conversation through the tunnel, in a thread: it sends and checks until it breaks.

    Attributes:
        right: bytes that came back as they were sent.
        end: what ended it: an exception, or words.
    """

    def __init__(self, port: int) -> None:
        self.right = 0
        self.end: Exception | str | None = None
        self._unsent: Exception | None = None
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=HEALED_WITHIN)
        self._threads = [threading.Thread(target=each, daemon=True) for each in (self._send, self._receive)]
        for thread in self._threads:
            thread.start()

    def wait(self) -> Exception | str | None:
        """What ended it."""
        for thread in reversed(self._threads):
            thread.join(2 * HEALED_WITHIN)
            assert not thread.is_alive(), "the transfer neither goes on nor breaks"
        self._socket.close()
        # A reset is told once, to whoever asks first; the other one then sees an end that looks clean.
        return self._unsent if self.end == CLEAN and self._unsent is not None else self.end

    def _send(self) -> None:
        index = 0
        try:
            while self.end is None:
                self._socket.sendall(pattern(77, index))
                index += 1
        except OSError as error:
            self._unsent = error

    def _receive(self) -> None:
        try:
            for index in range(1_000_000):
                expected = pattern(77, index)
                got = 0
                while got < CHUNK:
                    data = self._socket.recv(CHUNK - got)
                    if not data:
                        self.end = CLEAN
                        return
                    if data != expected[got : got + len(data)]:
                        self.end = "a wrong byte came"
                        return
                    got += len(data)
                    self.right += len(data)
        except OSError as error:
            self.end = error


def test_a_relay_that_loses_its_power_during_a_transfer_is_used_again_when_it_is_back(world: World) -> None:
    world.wait_healed("before")
    transfer = Transfer(world.port)
    wait_until(lambda: transfer.right > 4 * CHUNK, within=HEALED_WITHIN, what="a transfer under way")
    lines = {node.name: world.log_of(node).count("ended: the connection to the relay") for node in world.nodes}
    world.relay.lose_power()
    try:
        end = transfer.wait()
        assert isinstance(end, ConnectionResetError), f"the broken transfer ended with {end!r}"
        # Who wonders why is told: which connection, and that it was the one to the relay.
        why = f"the connection to the relay {world.relay.peer_id} ended"
        ends = ((world.laptop, world.home, "proxy/home/echo"), (world.home, world.laptop, "service/echo"))
        for node, other, actor in ends:
            line = f"connection to {other.peer_id} ended: {why}"
            wait_until(
                lambda node=node, line=line: world.log_of(node).count(line) > lines[node.name],
                within=HEALED_WITHIN,
                what=f"{node.name} has written down why the connection ended",
            )
            told = wait_until(
                lambda node=node, actor=actor: why in (said := world.last_end(node, actor)) and said,
                within=HEALED_WITHIN,
                what=f"{node.name} tells how the tunnel ended",
            )
            assert told.startswith("stream-reset: connection-lost")
        assert not echo_works(world.port, timeout=1), "there is no other way"
        assert not [path for path in world.laptop.run_json("paths") if path["peer_id"] == world.home.peer_id]
        with pytest.raises(DemoError, match=f"the relay {world.relay.peer_id} cannot be reached"):
            world.laptop.run("ping", "home", "-c", "1")
        assert place(world.laptop)["last_failure"]
    finally:
        world.relay.start("--allow-faults")
    began = time.monotonic()
    wait_until(lambda: echo_works(world.port, timeout=5), within=HEALED_WITHIN, what="a tunnel after its return")
    print(
        f"\na new tunnel {time.monotonic() - began:.2f} s after the relay was back; {transfer.right} right bytes before"
    )
    world.wait_healed("after its return")


def rounds(rng: random.Random, names: dict[str, set[str]]) -> Iterator[list[tuple[str, str, str]]]:
    """Blows, at each node at most one at a time, until every actor of each has had one."""
    waiting = {node: rng.sample(sorted(names[node]), len(names[node])) for node in sorted(names)}
    while any(waiting.values()):
        yield [(node, left.pop(), rng.choice(["kill", "stop", "hang"])) for node, left in waiting.items() if left]


def counts(node: Node) -> dict[str, int]:
    return {name: len(descriptors(actor["pid"])) for name, actor in by_name(node).items()}


def test_whatever_is_killed_stopped_or_hung_relayed_connections_come_back(world: World) -> None:
    rng = random.Random(SEED)
    print(f"\nseed {SEED}")
    nodes = {node.name: node for node in world.nodes}
    names = {name: set(by_name(node)) for name, node in nodes.items()}
    assert {"root", "switchboard", "keyring", "gate", "config", "relay/server"} <= names["relay"]
    assert all({"relay/keeper", "nat/monitor"} <= names[name] for name in ("home", "laptop"))
    before = {name: counts(node) for name, node in nodes.items()}
    loads = [EchoLoad(world.port, seed) for seed in range(2)]
    slowest = 0.0
    try:
        for number, blows in enumerate(rounds(rng, names)):
            done = ", ".join(f"{action} {node}/{name}" for node, name, action in blows)
            turn = f"round {number} of seed {SEED}: {done}"
            began = time.monotonic()
            hurt_pids = {node: hurt(nodes[node], name, action) for node, name, action in blows}
            assert all(hurt_pids.values()), f"somebody was not there to be hit, {turn}"
            for name, node in nodes.items():
                hurt_here = hurt_pids.get(name, set())
                wait_until(
                    lambda node=node, name=name, hurt_here=hurt_here: is_whole(node, names[name], hurt_here),
                    within=HEALED_WITHIN,
                    what=f"{name} whole, {turn}",
                    every=LOOK_EVERY,
                )
            wait_until(lambda: echo_works(world.port, timeout=5), within=HEALED_WITHIN, what=f"a tunnel, {turn}")
            took = time.monotonic() - began
            slowest = max(slowest, took)
            print(f"{took:5.1f} s  {done}")
            for node in nodes.values():
                # Besides the actors there are the main process, Thespian's admin and what is in front of a relay.
                wait_until(
                    lambda node=node: (
                        len(node.living() - {actor["pid"] for actor in node.actors()})
                        <= (3 if node is world.relay else 2)
                    ),
                    within=HEALED_WITHIN,
                    what=f"no orphans at {node.name}, {turn}",
                )
    finally:
        for load in loads:
            load.stop()
    assert sum(load.wrong for load in loads) == 0, "a wrong byte was delivered"
    assert all(load.good for load in loads), "no connection ever lasted"
    broken = sum(load.broken for load in loads)
    assert broken, "nothing was ever hit, so nothing was tested"
    print(f"slowest {slowest:.1f} s; conversations: {sum(load.good for load in loads)} good, {broken} broken")
    world.wait_healed("in the end")
    for name, node in nodes.items():
        # An actor may by now be linked with every other one. What leaks with streams is far more: there were hundreds.
        most = {actor: count + len(names[name]) for actor, count in before[name].items()}
        wait_until(
            lambda node=node, most=most: (
                (now := counts(node)).keys() == most.keys() and all(now[actor] <= most[actor] for actor in now)
            ),
            within=HEALED_WITHIN,
            what=f"{name} has no more descriptors than {most}",
        )


@contextlib.contextmanager
def limits(world: World, **changed: dict[str, Any] | str) -> Iterator[None]:
    """Have the relay serve by these, without a restart, for a while; return when it serves as before again."""
    before, limits_before = world.relay.config.read_text(), world.relay.limits()
    yaml = YAML()
    config = yaml.load(before)
    for kind, values in changed.items():
        if isinstance(values, dict):
            config["relay_service"][kind].update(values)
        else:
            config["relay_service"][kind] = values
    with world.relay.config.open("w") as file:
        yaml.dump(config, file)
    try:
        yield
    finally:
        world.relay.config.write_text(before)
        wait_until(
            lambda: world.relay.limits() == limits_before, within=HEALED_WITHIN, what="the limits are as they were"
        )


def test_a_full_relay_tells_its_limits_to_those_whom_it_refuses(world: World) -> None:
    world.wait_healed("before")
    home, laptop = world.home, world.laptop
    with limits(world, circuits={"per_peer": 0}, reservations={"total": 1}):
        wait_until(
            lambda: world.relay.limits()["circuits"]["per_peer"] == 0, within=HEALED_WITHIN, what="the new limits"
        )
        laptop.run("disconnect", "home")
        with pytest.raises(DemoError) as caught:
            laptop.run("ping", "home", "-c", "1")
        print(caught.value)
        said = " ".join(str(caught.value).split())
        assert f"the relay {world.relay.peer_id} refuses the circuit" in said
        assert "RESOURCE_LIMIT_EXCEEDED" in said
        assert "the relay's limit of 0 circuits for each peer is reached" in said
        # One place for two: whoever comes later is told, and asks again.
        laptop.run("disconnect", "relay")
        home.run("disconnect", world.relay.peer_id)
        wait_until(
            lambda: sorted(place(node)["state"] for node in (home, laptop)) == ["held", "waiting"],
            within=HEALED_WITHIN,
            what="one place held, one refused",
        )
        loser = next(node for node in (home, laptop) if place(node)["state"] == "waiting")
        said = " ".join(loser.run("relay", "list").split())
        print(said)
        assert "RESERVATION_REFUSED" in said
        assert "the relay's limit of 1 reservations in all is reached" in said
        assert "next attempt in" in said
    for node in (home, laptop):
        world.have_ask_again(node)
    world.wait_healed("after the relay has room again")


def test_a_place_that_expires_ends_no_tunnel_and_is_reserved_again(world: World) -> None:
    world.wait_healed("before")
    lasting = {"reservation_ttl": f"{MIN_TTL}s"}
    with limits(world, **lasting):
        wait_until(lambda: world.relay.limits()["reservation_ttl"] == MIN_TTL, within=HEALED_WITHIN, what="new limits")
        world.home.run("disconnect", world.relay.peer_id)
        wait_until(lambda: echo_works(world.port, timeout=5), within=HEALED_WITHIN, what="a tunnel")
        with socket.create_connection(("127.0.0.1", world.port), timeout=HEALED_WITHIN) as tunnel:
            assert echoes(tunnel)
            # A node renews its place in time. So it expires only where the relay has become full.
            with limits(world, reservations={"per_peer": 0}):
                wait_until(
                    lambda: not world.relay.has_place(world.home), within=HEALED_WITHIN, what="the place expires"
                )
                wait_until(
                    lambda: "limit of 0 reservations" in place(world.home)["last_failure"],
                    within=HEALED_WITHIN,
                    what="home knows why",
                )
                assert echoes(tunnel), "what is open goes on"
    for node in (world.home, world.laptop):
        world.have_ask_again(node)
    world.wait_healed("after the relay grants places again")


def echoes(tunnel: socket.socket) -> bool:
    """Whether a few bytes come back."""
    tunnel.sendall(b"ping")
    got = b""
    while len(got) < 4 and (data := tunnel.recv(4 - len(got))):
        got += data
    return got == b"ping"


def test_a_relay_that_does_not_serve_says_whom(world: World) -> None:
    world.wait_healed("before")
    world.relay.run("relay", "deauthorize", "home")
    wait_until(
        lambda: "does not authorise this node" in place(world.home)["last_failure"],
        within=HEALED_WITHIN,
        what="home knows that it is not served",
    )
    assert place(world.home)["state"] != "held"
    wait_until(lambda: not echo_works(world.port, timeout=1), within=HEALED_WITHIN, what="the end of the circuit")
    with pytest.raises(DemoError) as caught:
        world.laptop.run("ping", "home", "-c", "1")
    print(caught.value)
    print(world.home.run("relay", "list"))
    said = " ".join(str(caught.value).split())
    assert f"the relay {world.relay.peer_id} refuses the circuit" in said
    assert "PERMISSION_DENIED" in said
    assert "this relay does not serve that peer" in said
    world.relay.run("relay", "authorize", world.home.peer_id, "--comment", "home")
    world.have_ask_again(world.home)
    world.wait_healed("after home is served again")
