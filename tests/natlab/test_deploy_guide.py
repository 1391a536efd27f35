"""What docs/deploy-relay.md tells people to type about firewalls and certificates, done in the laboratory.

The lines come out of the guide, so it cannot say anything else than what is tried here. Installing packages and systemd
units is not repeated here: nothing leaves the laboratory.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import socket
import ssl
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.natlab.behaviour import PORT_RESTRICTED
from tests.natlab.lab import Host, Lab
from tests.natlab.peerup_nodes import Echo, Pair, Peerup, echoes, running, wait_for
from tests.support.certificates import Authority

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

GUIDE = Path(__file__).parents[2] / "docs" / "deploy-relay.md"
NAME = "relay.example.org"
HOOK = "renewal-hooks/deploy/peerup-relay"

RULESET = """\
table inet filter {{
    chain input {{
        type filter hook input priority filter; policy {policy};
        ct state established,related accept
        iif "lo" accept
        meta l4proto ipv6-icmp accept
        tcp dport 22 accept
        {last}
    }}
}}
"""


def block(beginning: str) -> str:
    """The one shell block of the guide that begins so."""
    (found,) = [
        text for text in re.findall(r"```sh\n(.*?)```", GUIDE.read_text(), re.DOTALL) if text.startswith(beginning)
    ]
    return found


def answers(client: Host, server: Host, port: int) -> bool:
    """Whether a connection to this port comes about."""
    with client.socket(socket.SOCK_STREAM) as sock:
        sock.settimeout(0.5)
        try:
            sock.connect((server.address, port))
        except OSError:
            return False
    return True


@pytest.mark.parametrize(
    ("policy", "last"), [("drop", ""), ("drop", "counter reject with icmpx admin-prohibited"), ("accept", "reject")]
)
def test_the_rule_for_nftables_opens_the_port_and_no_other(natlab: Lab, policy, last) -> None:
    relay, laptop = natlab.host("relay"), natlab.host("laptop")
    with contextlib.ExitStack() as stack:
        for port in (22, 80, 443, 4001):
            listener = stack.enter_context(relay.socket(socket.SOCK_STREAM))
            listener.bind(("0.0.0.0", port))
            listener.listen()
        relay.run("nft", "-f", "-", text_in=RULESET.format(policy=policy, last=last))
        assert [port for port in (22, 80, 443, 4001) if answers(laptop, relay, port)] == [22]
        words = shlex.split(block("sudo nft "))
        assert words[0] == "sudo"
        relay.run(*words[1:])
        assert [port for port in (22, 80, 443, 4001) if answers(laptop, relay, port)] == [22, 443]


class Names:
    """A name server in a host that knows one address, and tells it to whoever asks for whatever name.

    It speaks TCP alone, as pebble does with the server that it is given.
    """

    def __init__(self, host: Host, address: str) -> None:
        self._address = socket.inet_aton(address)
        self._listener = host.socket(socket.SOCK_STREAM)
        self._listener.bind((host.address, 53))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                asker, _ = self._listener.accept()
            except OSError:
                return  # closed
            with asker, contextlib.suppress(OSError, struct.error):
                asker.settimeout(10)
                while True:
                    (length,) = struct.unpack("!H", asker.recv(2, socket.MSG_WAITALL))
                    answer = self._answer(asker.recv(length, socket.MSG_WAITALL))
                    asker.sendall(struct.pack("!H", len(answer)) + answer)

    def _answer(self, message: bytes) -> bytes:
        end = message.index(b"\0", 12) + 5  # the name, its type and its class
        (kind,) = struct.unpack_from("!H", message, end - 4)
        record = b"\xc0\x0c" + struct.pack("!HHIH", 1, 1, 60, 4) + self._address if kind == 1 else b""
        return message[:2] + struct.pack("!HHHHH", 0x8580, 1, bool(record), 0, 0) + message[12:end] + record

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


@pytest.fixture
def acme(natlab: Lab, tmp_path: Path) -> Iterator[Host]:
    """A host with an ACME authority, pebble, that asks for files at port 80 of the host `relay`."""
    for program, where in (("certbot", "apt install certbot"), ("pebble", "go install of letsencrypt/pebble")):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is missing ({where})")
    host, relay = natlab.host("acme"), natlab.host("relay")
    (tmp_path / "acme").mkdir()
    authority = Authority(tmp_path / "acme")
    certificate, key = authority.issue(host.address)
    settings = {
        "listenAddress": f"{host.address}:14000",
        "managementListenAddress": f"{host.address}:15000",
        "certificate": str(certificate),
        "privateKey": str(key),
        "httpPort": 80,
        "tlsPort": 443,
    }
    (tmp_path / "acme" / "pebble.json").write_text(json.dumps({"pebble": settings}))
    names = Names(host, relay.address)
    try:
        with (tmp_path / "acme" / "log").open("wb") as log:
            host.popen(
                "pebble", "-config", str(tmp_path / "acme" / "pebble.json"), "-dnsserver", f"{host.address}:53",
                env=os.environ | {"PEBBLE_VA_NOSLEEP": "1", "PEBBLE_WFE_NONCEREJECT": "0"},
                stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        wait_for(lambda: answers(relay, host, 15000) and answers(relay, host, 14000), "pebble")
        yield host
    finally:
        names.close()


class Certbot:
    """certbot in the host `relay`, with directories of its own and this authority in the place of Let's Encrypt."""

    def __init__(self, relay: Host, acme: Host, directory: Path) -> None:
        self.relay = relay
        self.acme = acme
        self.directory = directory
        self.trusted = directory.parent / "acme" / "test-authority.pem"
        directory.mkdir()

    def __call__(self, *words: str, status: int = 0) -> str:
        places = [f"--{name}-dir={self.directory / name}" for name in ("config", "work", "logs")]
        with self.relay.enter():
            done = subprocess.run(
                ["certbot", *words, *places, "--non-interactive"],
                env=os.environ | {"REQUESTS_CA_BUNDLE": str(self.trusted)},
                capture_output=True, text=True, timeout=120, check=False,
            )  # fmt: skip
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    def first(self, *, status: int = 0) -> str:
        """The guide's line for the first certificate."""
        words = shlex.split(next(line for line in GUIDE.read_text().splitlines() if "certbot certonly" in line))
        assert words[:2] == ["sudo", "certbot"]
        return self(
            *words[2:], "--agree-tos", "-m", "me@example.org", "--server", f"https://{self.acme.address}:14000/dir",
            status=status,
        )  # fmt: skip

    def put_hook(self, home: Path) -> Path:
        """The guide's hook, for a relay that runs as this user in this home."""
        text = block("#!/bin/sh")
        for theirs, ours, count in (
            ("/etc/letsencrypt", str(self.directory / "config"), 1),
            ("/var/lib/peerup-relay", str(home), 1),
            ("-o peerup -g peerup", f"-o {os.geteuid()} -g {os.getegid()}", 2),
        ):
            assert text.count(theirs) == count
            text = text.replace(theirs, ours)
        hook = self.directory / "config" / HOOK
        assert f"/etc/letsencrypt/{HOOK}" in GUIDE.read_text()
        hook.write_text(text)
        hook.chmod(0o755)
        return hook


def served(client: Host, relay: Host, roots: Path) -> str:
    """The number of the certificate that the relay shows for its name; it must be one that a web client accepts."""
    context = ssl.create_default_context(cafile=str(roots))
    with client.socket(socket.SOCK_STREAM) as sock:
        sock.settimeout(10)
        sock.connect((relay.address, 443))
        with context.wrap_socket(sock, server_hostname=NAME) as secure:
            told = secure.getpeercert()
            assert told is not None
            return str(told["serialNumber"])


def test_a_certificate_of_certbots_is_served_and_its_renewal_too(natlab: Lab, acme: Host, tmp_path: Path) -> None:
    machine = natlab["relay"]
    assert isinstance(machine, Host)
    laptop = Peerup(natlab.host("laptop", behind=natlab.nat("hotel", PORT_RESTRICTED)), tmp_path / "laptop")
    home = Peerup(natlab.host("home", behind=natlab.nat("router", PORT_RESTRICTED)), tmp_path / "home")
    relay = Peerup(machine, tmp_path / "relay", port=443, transport="/tls/ws")
    relay.serve_as_relay()
    certbot = Certbot(machine, acme, tmp_path / "letsencrypt")

    # Port 80 has to be open for the authority, as the guide says.
    machine.run("nft", "-f", "-", text_in=RULESET.format(policy="drop", last=""))
    machine.run(*shlex.split(block("sudo nft "))[1:])
    assert "exceeded" in certbot.first(status=1)  # a time
    assert "sudo ufw allow 80/tcp" in GUIDE.read_text()
    machine.run(*shlex.split(block("sudo nft ").replace("443", "80"))[1:])
    certbot.first()
    hook = certbot.put_hook(relay.home)
    subprocess.run([hook], check=True, timeout=30)
    tls = relay.home / "tls"
    assert [(path.name, path.stat().st_mode & 0o777) for path in sorted(tls.iterdir())] == [
        ("fullchain.pem", 0o600),
        ("privkey.pem", 0o600),
    ]
    roots = tmp_path / "roots.pem"
    with machine.enter():  # pebble makes its root anew at each start and tells it where it is managed
        roots.write_bytes(
            subprocess.run(
                ["curl", "-sS", "--cacert", certbot.trusted, f"https://{acme.address}:15000/roots/0"],
                capture_output=True, check=True, timeout=30,
            ).stdout
        )  # fmt: skip

    for node in (laptop, home):
        config = node.home / "config.yaml"
        text = config.read_text()
        assert "  # tls:\n" in text
        config.write_text(text.replace("  # tls:\n", f"  tls:\n    trusted_file: {roots}\n"))
    relay.transport = f"/tls/sni/{NAME}/ws"
    with running(Pair(laptop, home, [relay])):
        stranger = natlab.host("stranger")
        first = served(stranger, machine, roots)
        with laptop.connect(laptop.proxy("home", "echo")) as sock:
            assert sock.recv(100) == Echo.GREETING
            path = laptop.path_to(home)
            assert path is not None
            assert (path["path"], path["transport"]) == ("relayed", "wss")
            before = {actor["name"]: actor["pid"] for actor in relay.client.get("/v1/actors")}
            certbot("renew", "--force-renewal", "--no-random-sleep-on-renew")
            wait_for(lambda: served(stranger, machine, roots) != first, "the renewed certificate")
            assert {actor["name"]: actor["pid"] for actor in relay.client.get("/v1/actors")} == before
            assert echoes(sock, os.urandom(500_000))
