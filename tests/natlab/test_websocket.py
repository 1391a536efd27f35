"""Networks in which only TCP port 443 is open: a node and a relay that pass for a web server there."""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import signal
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.natlab.behaviour import PORT_RESTRICTED, SYMMETRIC, Behaviour, Outbound
from tests.natlab.lab import Lab
from tests.natlab.peerup_nodes import Echo, Pair, Peerup, echoes, relay_address, running, wait_for
from tests.support.certificates import Authority

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

ONLY_443 = Behaviour(mapping=SYMMETRIC.mapping, outbound=Outbound.ONLY_443)
ONE_WAY = 0.02
NAME = "relay.example.org"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    (tmp_path / "authority").mkdir()
    return Authority(tmp_path / "authority")


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


def believe(node: Peerup, authority: Authority) -> None:
    """Have this node believe the authority besides the system's, from the next start on."""
    config = node.home / "config.yaml"
    text = config.read_text()
    assert "  # tls:\n" in text
    text = text.replace("  # tls:\n", f"  tls:\n    trusted_file: {authority.file}\n")
    config.write_text(text)
    assert node("config", "validate")


def certify(node: Peerup, authority: Authority, *names: str) -> None:
    """Put a certificate where the configuration of a new node looks for one."""
    certificate, key = authority.issue(*names)
    (node.home / "tls").mkdir()
    shutil.move(certificate, node.home / "tls" / "fullchain.pem")
    shutil.move(key, node.home / "tls" / "privkey.pem")


@pytest.mark.parametrize("transport", ["/ws", "/tls/ws"])
def test_a_relay_that_passes_for_a_web_server(natlab: Lab, stack, tmp_path, authority, transport) -> None:
    relay = Peerup(
        natlab.host("relay", link=natlab.link(delay=ONE_WAY)), tmp_path / "relay", port=443, transport=transport
    )
    relay.serve_as_relay()
    laptop = Peerup(natlab.host("laptop", behind=natlab.nat("hotel", ONLY_443)), tmp_path / "laptop")
    home = Peerup(natlab.host("home", behind=natlab.nat("router", PORT_RESTRICTED)), tmp_path / "home")
    if "tls" in transport:
        certify(relay, authority, NAME)
        relay.transport = f"/tls/sni/{NAME}/ws"
        believe(laptop, authority)
        believe(home, authority)
    pair = stack.enter_context(running(Pair(laptop, home, [relay])))
    address = laptop.proxy("home", "echo")
    with laptop.connect(address) as sock:
        assert sock.recv(100) == Echo.GREETING
        assert echoes(sock, os.urandom(2_000_000))
    path = laptop.path_to(home)
    assert path is not None
    assert path["path"] == "relayed"
    assert path["remote_address"].startswith(relay_address(pair.relays[0]))
    assert path["transport"] == ("wss" if "tls" in transport else "websocket")
    wait_for(lambda: laptop.path_to(home)["rtt"], "a measured round trip")

    # Whoever looks at it from the hotel sees a web server.
    context = ssl.create_default_context(cafile=str(authority.file))
    with laptop.host.socket(socket.SOCK_STREAM) as sock:
        sock.settimeout(20)
        sock.connect((relay.host.address, 443))
        seen = context.wrap_socket(sock, server_hostname=NAME) if "tls" in transport else sock
        with seen:
            seen.sendall(b"GET / HTTP/1.1\r\nHost: relay.example.org\r\n\r\n")
            answer = http.client.HTTPResponse(seen)
            answer.begin()
            assert (answer.status, answer.read()) == (404, b"404 not found\n")

    # The port stays while the switchboard is killed, and the tunnel heals.
    (pid,) = [actor["pid"] for actor in relay.client.get("/v1/actors") if actor["name"] == "switchboard"]
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: pair.greeting(address, 3), "a tunnel through the relay after its switchboard was killed")


def test_one_port_for_everybody(natlab: Lab, stack, tmp_path, authority) -> None:
    """A node listens on 443 for TCP, WebSocket and TLS at once; each of three others finds its own way to it."""
    server = Peerup(natlab.host("server"), tmp_path / "server", port=443, transport="/tls/ws")
    certify(server, authority, NAME)
    config = server.home / "config.yaml"
    line = '    - "/ip4/0.0.0.0/tcp/443/tls/ws"\n'
    text = config.read_text()
    assert line in text
    config.write_text(text.replace(line, line + line.replace("/tls/ws", "/ws") + line.replace("/tls/ws", "")))
    echo = Echo(server.host)
    stack.callback(echo.close)
    server("service", "add", "echo", echo.address)
    transports = {"": "tcp", "/ws": "websocket", f"/tls/sni/{NAME}/ws": "wss"}
    clients = {}
    hotel = natlab.nat("hotel", ONLY_443)
    for number, suffix in enumerate(transports):
        client = Peerup(natlab.host(f"laptop{number}", behind=hotel), tmp_path / f"laptop{number}")
        believe(client, authority)
        server("auth", "add", client.peer_id)
        client("auth", "add", server.peer_id)
        client("names", "add", "home", server.peer_id, "--address", f"/ip4/{server.host.address}/tcp/443{suffix}")
        clients[suffix] = client
    for node in (server, *clients.values()):
        stack.callback(node.stop)
        node.start()
    for suffix, client in clients.items():
        with client.connect(client.proxy("home", "echo")) as sock:
            assert sock.recv(100) == Echo.GREETING
            assert echoes(sock, os.urandom(500_000))
        path = client.path_to(server)
        assert path is not None
        assert (path["path"], path["transport"]) == ("direct", transports[suffix])
