"""Real nodes that reach each other only through a real relay: its rules, its stop, and the deaths of its actors.

They listen on loopback alone. What a peer says of its loopback addresses leads nowhere unless it is connected directly,
so they have no other way.
"""

import contextlib
import os
import signal
import socket
import threading
import time

from tests.chaos.load import EchoServer, echo_works
from tests.support.nodes import Node
from tests.support.processes import is_alive, wait_until


class Relayed:
    """`laptop` has a proxy to `home`'s echo service, through `relay`."""

    def __init__(self, directory, stack, *, drain="3s", audited=False):
        self.drain = drain
        self.server = EchoServer()
        stack.callback(self.server.stop)
        self.relay, self.home, self.laptop = (Node(name, directory) for name in ("relay", "home", "laptop"))
        for node in (self.relay, self.home, self.laptop):
            node.initialise()
        self.config = self.relay.home / "config.yaml"
        self.template = self.config.read_text()
        if audited:
            enabled = "log/audit.jsonl. Default: false\n    enabled: {}"
            assert enabled.format("false") in self.template
            self.template = self.template.replace(enabled.format("false"), enabled.format("true"))
        self.configure()
        for node in (self.home, self.laptop):
            self.relay.run("auth", "add", node.peer_id)
            node.run("auth", "add", self.relay.peer_id)
            node.run("relay", "add", f"{self.relay.address}/p2p/{self.relay.peer_id}")
        self.home.run("auth", "add", self.laptop.peer_id)
        self.laptop.run("auth", "add", self.home.peer_id)
        self.home.run("service", "add", "echo", f"127.0.0.1:{self.server.port}")
        self.laptop.run("names", "add", "home", self.home.peer_id)
        for node in (self.relay, self.home, self.laptop):
            stack.callback(node.stop)
            node.start("--log-level", "debug")
        self.port = int(self.laptop.run_json("proxy", "home", "echo", "0")["listen"].rpartition(":")[2])
        wait_until(lambda: echo_works(self.port), within=30, what="the tunnel through the relay")

    def configure(self, limits=""):
        served = f"relay_service:\n  enabled: true\n  drain_time: {self.drain}\n"
        self.config.write_text(f"{self.template}\n{served}{limits}")

    def described(self, actor="relay/server"):
        return self.relay.run_json("actors", "get", actor)["description"]

    def pid(self, name):
        return next(actor["pid"] for actor in self.relay.actors() if actor["name"] == name)

    def path(self):
        return self.laptop.run("ping", "home", "--count", "1")

    @contextlib.contextmanager
    def connection(self):
        """A connection through the tunnel that has carried something."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as sock:
            sock.sendall(b"hello")
            assert sock.recv(5) == b"hello"
            yield sock


def echoes(sock):
    sock.sendall(b"ping")
    return sock.recv(4) == b"ping"


def test_a_tunnel_through_a_relay_and_what_the_relay_tells(tmp_path):
    with contextlib.ExitStack() as stack:
        world = Relayed(tmp_path, stack)
        assert "relayed" in world.path()
        wait_until(lambda: world.described()["circuits"], within=20, what="a circuit in the description")
        told = world.described()
        assert told["reservations"] == 2
        assert told["requests"]["connect granted"] >= 1
        assert told["limits"]["circuit"] == {"seconds": "unlimited", "bytes": "unlimited"}
        with world.connection() as sock:
            # the death of relay/server disturbs no circuit, and its successor goes on
            before = world.pid("relay/server")
            os.kill(before, signal.SIGKILL)
            assert echoes(sock)
            wait_until(lambda: world.pid("relay/server") not in (before, None), within=20, what="a successor")
            assert echoes(sock)
            # so does the death of others that the relay uses now and then
            for name in ("gate", "keyring", "config"):
                os.kill(world.pid(name), signal.SIGKILL)
            assert echoes(sock)
        # a new switchboard serves by the same rules, and everybody comes back
        os.kill(world.pid("switchboard"), signal.SIGKILL)
        wait_until(lambda: echo_works(world.port), within=40, what="the tunnel after the switchboard's death")


def test_limits_that_change_apply_without_a_restart_and_an_unlisted_peer_is_cut_off(tmp_path):
    with contextlib.ExitStack() as stack:
        world = Relayed(tmp_path, stack)
        daemon = world.relay.daemon_pid
        world.configure("  circuits: {per_peer: 0}\n  bytes_per_second: {total: 1MB}\n")
        wait_until(lambda: world.described()["limits"]["circuits"]["per_peer"] == 0, within=20, what="the new limits")
        with world.connection() as sock:  # what was granted stays
            assert echoes(sock)
            world.relay.run("auth", "remove", world.laptop.peer_id)
            sock.settimeout(20)
            with contextlib.suppress(ConnectionResetError):
                assert sock.recv(1) == b""
        wait_until(
            lambda: world.described("switchboard")["relay"]["circuits"] == 0, within=20, what="the end of the circuit"
        )
        assert world.relay.daemon_pid == daemon


def test_a_stop_gives_open_circuits_their_time(tmp_path):
    with contextlib.ExitStack() as stack:
        world = Relayed(tmp_path, stack)
        with world.connection() as sock:
            stopping = threading.Thread(target=world.relay.stop)
            began = time.monotonic()
            stopping.start()
            with contextlib.suppress(ConnectionResetError):
                while time.monotonic() - began < 30 and echoes(sock):
                    time.sleep(0.05)
            lasted = time.monotonic() - began
            stopping.join(30)
            assert not stopping.is_alive()
        assert 2.5 < lasted < 15, f"the circuit lasted {lasted} s, of 3 s that it was granted"
        for name in ("laptop", "home"):
            log = tmp_path / f"{name}.log"
            told = f"ended: the relay {world.relay.peer_id} is shutting down"
            wait_until(lambda log=log, told=told: told in log.read_text(), within=20, what=f"the reason at {name}")


def test_an_idle_relay_stops_at_once_and_all_is_well_soon_after_its_return(tmp_path):
    with contextlib.ExitStack() as stack:
        world = Relayed(tmp_path, stack, drain="1000s")
        assert "relayed" in world.path()  # with a circuit that nobody uses any more
        for _ in range(2):
            daemon = world.relay._daemon
            os.kill(daemon.pid, signal.SIGTERM)
            assert daemon.wait(60) == 0, "the end, without its drain time"
            daemon.stdout.close()
            world.relay.start("--log-level", "debug")
            wait_until(lambda: echo_works(world.port), within=30, what="the tunnel through the relay")
        assert "no circuit is left" in (tmp_path / "relay.log").read_text()


def test_a_relay_stops_when_the_last_tunnel_through_it_has_ended(tmp_path):
    with contextlib.ExitStack() as stack:
        world = Relayed(tmp_path, stack, drain="1000s")
        relay = world.relay.run_json("status")["pid"]  # behind the process that was started, which may end before it
        with world.connection() as sock:
            os.kill(world.relay.daemon_pid, signal.SIGTERM)
            log = tmp_path / "laptop.log"
            told = "is shutting down; what is new goes another way"
            wait_until(lambda: told in log.read_text(), within=20, what="that the laptop hears of it")
            assert not echo_works(world.port), "there is no other relay"
            until = time.monotonic() + 2
            while time.monotonic() < until:
                assert echoes(sock)
                time.sleep(0.05)
            assert is_alive(relay)
        wait_until(lambda: not is_alive(relay), within=60, what="the end of the relay")


def test_a_second_signal_ends_a_drain_at_once(tmp_path):
    with contextlib.ExitStack() as stack:
        world = Relayed(tmp_path, stack, drain="100s")
        relay = world.relay.run_json("status")["pid"]
        with world.connection() as sock:
            os.kill(relay, signal.SIGTERM)
            log = tmp_path / "relay.log"
            wait_until(lambda: "nothing new is granted" in log.read_text(), within=20, what="the drain")
            assert echoes(sock)
            os.kill(relay, signal.SIGTERM)
            wait_until(lambda: not is_alive(relay), within=20, what="the end of the relay")
