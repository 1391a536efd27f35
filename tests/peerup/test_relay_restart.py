"""A relay that is restarted while a connection runs through it: real processes, real signals."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct

import pytest

from tests.chaos.load import echo_works
from tests.peerup.test_relay_daemons import Relayed, echoes
from tests.support.nodes import Node
from tests.support.processes import is_alive, wait_until


@pytest.fixture
def stack():
    with contextlib.ExitStack() as made:
        yield made


def main_process(world):
    """The pid of the relay behind the process that was started."""
    status = world.relay.run_json("status")
    assert status["main_pid"] == world.relay.daemon_pid != status["pid"]
    return status["pid"]


def terminate(world):
    """What `systemctl restart` does before it starts the new one."""
    daemon = world.relay._daemon
    daemon.send_signal(signal.SIGTERM)
    assert daemon.wait(30) == 0
    daemon.stdout.close()


def moved(world):
    return sorted(path.name for path in world.relay.home.glob("run.*"))


def log_of(world):
    return (world.relay.home.parent / "relay.log").read_text()


def test_a_successor_serves_while_an_open_connection_runs_on(tmp_path, stack):
    world = Relayed(tmp_path, stack, drain="1000s", audited=True)
    old = main_process(world)
    with world.connection() as terminal:
        terminate(world)
        assert is_alive(old)
        assert moved(world) == [f"run.{old}"]
        world.relay.start("--log-level", "debug")
        wait_until(lambda: echo_works(world.port), within=30, what="a new connection through the new relay")
        assert echoes(terminal)
        assert is_alive(old)
        new = main_process(world)
        assert new != old
        assert world.relay.run_json("status")["actors_not_running"] == []
    wait_until(lambda: not is_alive(old), within=30, what="the end of the old relay")
    assert moved(world) == []
    assert echo_works(world.port)
    assert is_alive(new)
    audited = [json.loads(line) for line in (world.relay.home / "log" / "audit.jsonl").read_text().splitlines()]
    assert len(audited) >= 2
    assert "events-lost" not in {line["event"] for line in audited}


def test_what_is_left_ends_with_its_time(tmp_path, stack):
    world = Relayed(tmp_path, stack, drain="4s")
    old = main_process(world)
    with world.connection() as terminal:
        terminate(world)
        assert echoes(terminal)
        wait_until(lambda: not is_alive(old), within=30, what="the end of the old relay")
    assert "circuits are still open after 4 s" in log_of(world)
    assert moved(world) == []


def test_a_relay_that_was_killed_leaves_nothing_that_its_successor_does_not_remove(tmp_path, stack):
    world = Relayed(tmp_path, stack, drain="1000s")
    old = main_process(world)
    (world.relay.home / "run.backup").mkdir()
    (world.relay.home / "run.1").mkdir()
    with world.connection():
        terminate(world)
        os.kill(old, signal.SIGKILL)
        wait_until(lambda: not is_alive(old), within=20, what="its end")
    assert f"run.{old}" in moved(world)
    world.relay.start()
    assert moved(world) == ["run.1", "run.backup"], "nothing that is no run directory"


def test_the_relay_ends_with_the_process_that_was_started(tmp_path, stack):
    world = Relayed(tmp_path, stack, drain="1000s")
    everybody = world.relay.process_ids()
    with world.connection():
        os.kill(world.relay.daemon_pid, signal.SIGKILL)
        wait_until(lambda: not any(map(is_alive, everybody)), within=20, what="the end of all")


def test_the_process_that_was_started_ends_as_the_relay_did(tmp_path, stack):
    world = Relayed(tmp_path, stack)
    os.kill(main_process(world), signal.SIGKILL)
    assert world.relay._daemon.wait(20) == -signal.SIGKILL


def test_a_watchdogs_signal_reaches_the_relay_and_leaves_its_trace(tmp_path, stack, monkeypatch):
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    world = Relayed(tmp_path, stack)
    everybody = world.relay.process_ids()
    world.relay._daemon.send_signal(signal.SIGABRT)
    assert world.relay._daemon.wait(20) == -signal.SIGABRT
    wait_until(lambda: not any(map(is_alive, everybody)), within=20, what="the end of all")
    assert "Fatal Python error: Aborted" in log_of(world)


def test_ctrl_c_waits_for_the_circuits_and_the_second_one_does_not(tmp_path, stack):
    world = Relayed(tmp_path, stack, drain="1000s")
    everybody = world.relay.process_ids()
    group = os.getpgid(world.relay.daemon_pid)
    with world.connection() as terminal:
        os.killpg(group, signal.SIGINT)
        wait_until(lambda: "another relay may be started" in log_of(world), within=20, what="the offer")
        assert echoes(terminal)
        assert moved(world) == []
        assert world.relay._daemon.poll() is None
        os.killpg(group, signal.SIGINT)
        world.relay._daemon.wait(20)
    wait_until(lambda: not any(map(is_alive, everybody)), within=20, what="the end of all")


def test_systemd_hears_all_from_the_process_that_it_started(tmp_path, stack, monkeypatch):
    told = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
    told.bind(str(tmp_path / "notify"))
    told.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    told.settimeout(20)
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    node = Node("relay", tmp_path)
    node.initialise()
    config = node.home / "config.yaml"
    config.write_text(config.read_text() + "\nrelay_service:\n  enabled: true\n")
    stack.callback(node.stop)
    node.start()

    def heard():
        message, ancillary, _, _ = told.recvmsg(4096, socket.CMSG_SPACE(12))
        (pid, _, _) = struct.unpack("3i", ancillary[0][2])
        assert pid == node.daemon_pid
        return message.decode().split("\n")

    assert "READY=1" in heard()
    node._daemon.send_signal(signal.SIGTERM)
    assert "STOPPING=1" in heard()
    assert node._daemon.wait(30) == 0
