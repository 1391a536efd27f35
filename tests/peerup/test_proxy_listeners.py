"""Listeners of a proxy that other users of the machine cannot use: a Unix socket, and a port for one user."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from demo.node import DemoError
from tests.chaos.load import EchoServer
from tests.support.nodes import Node
from tests.support.processes import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

NOBODY = 65534


@pytest.fixture(scope="module")
def laptop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    directory = tmp_path_factory.mktemp("p")
    with contextlib.ExitStack() as stack:
        server = EchoServer()
        stack.callback(server.stop)
        laptop, home = (Node(name, directory) for name in ("laptop", "home"))
        for node in (laptop, home):
            node.initialise()
        laptop.run("auth", "add", home.peer_id)
        home.run("auth", "add", laptop.peer_id)
        laptop.run("names", "add", "home", home.peer_id, "--address", home.address)
        home.run("service", "add", "echo", f"127.0.0.1:{server.port}")
        for node in (home, laptop):
            stack.callback(node.stop)
            node.start()
        yield laptop


def echoes(family: socket.AddressFamily, address: str | tuple[str, int]) -> bool:
    """Whether a connection there is answered as the echo service does."""
    with socket.socket(family) as sock:
        sock.settimeout(20)
        try:
            sock.connect(address)
            sock.sendall(b"hello\n")
            return sock.recv(6, socket.MSG_WAITALL) == b"hello\n"
        except OSError:
            return False


def echoes_for(user: int, address: tuple[str, int]) -> bool:
    """The same, asked by another user of this machine."""
    child = os.fork()
    if not child:
        try:
            os.setgid(user)
            os.setuid(user)
            os._exit(0 if echoes(socket.AF_INET, address) else 1)
        finally:
            os._exit(2)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, 1)
    return code == 0


def test_a_unix_socket_is_for_its_owner_and_goes_with_the_proxy(laptop: Node, tmp_path: Path) -> None:
    path = tmp_path / "echo.sock"
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()
    made = laptop.run_json("proxy", "home", "echo", "--unix", str(path))
    assert made["listen"] == f"unix:{path}"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert echoes(socket.AF_UNIX, str(path)), "the file that nobody listened at was replaced"
    (listed,) = laptop.run_json("proxy", "list")
    assert listed["listen"] == f"unix:{path}"
    assert f"unix:{path}" in (laptop.home / "state/proxies.yaml").read_text()
    (proxy,) = (actor for actor in laptop.actors() if actor["name"] == "proxy/home/echo")
    os.kill(proxy["pid"], signal.SIGKILL)
    assert echoes(socket.AF_UNIX, str(path)), "the successor has the socket, and whoever waits at it"
    laptop.run("proxy", "stop", "home", "echo")
    assert not path.exists()


def test_no_file_but_a_stale_socket_is_replaced_and_long_paths_are_refused(laptop: Node, tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("keep me")
    with pytest.raises(DemoError, match="no socket"):
        laptop.run("proxy", "home", "echo", "--unix", str(path))
    assert path.read_text() == "keep me"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "used"))
        other.listen()
        with pytest.raises(DemoError, match="another program does"):
            laptop.run("proxy", "home", "echo", "--unix", str(tmp_path / "used"))
    with pytest.raises(DemoError, match="at most 107"):
        laptop.run("proxy", "home", "echo", "--unix", str(tmp_path / ("x" * 200)))


def test_a_port_for_one_user_refuses_all_others(laptop: Node) -> None:
    made = laptop.run_json("proxy", "home", "echo", "0", "--only-me")
    assert made["only_me"]
    address = ("127.0.0.1", int(made["listen"].rpartition(":")[2]))
    try:
        wait_until(lambda: echoes(socket.AF_INET, address), within=20, what="its own user is served")
        assert "only you" in laptop.run("proxy", "list")
        if os.geteuid() == 0:
            assert not echoes_for(NOBODY, address)
            assert echoes(socket.AF_INET, address)
    finally:
        laptop.run("proxy", "stop", "home", "echo")


def test_a_port_that_other_machines_reach_cannot_be_for_one_user(laptop: Node) -> None:
    with pytest.raises(DemoError, match="other machines"):
        laptop.run("proxy", "home", "echo", "0.0.0.0:0", "--only-me")
