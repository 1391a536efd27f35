"""What a stranger sees who asks a relay's WebSocket port with curl or a browser: a web server with nothing to show."""

from __future__ import annotations

import email.utils
import re
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.certificates import Authority
from tests.support.nodes import Node

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("curl") is None, reason="curl is missing (apt install curl)"),
]

NAME = "relay.example.org"
HANDSHAKE = b"\x13/multistream/1.0.0\n"

BROWSER = (
    "Connection: keep-alive, Upgrade",
    "Upgrade: websocket",
    "Origin: https://relay.example.org",
    "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits",
    "Accept-Language: en-GB,en;q=0.5",
    "Accept-Encoding: gzip, deflate, br",
    "Cookie: seen=1",
    "Pragma: no-cache",
    "Cache-Control: no-cache",
)
"""What browsers send with `new WebSocket(…)`; the key and its answer are those of RFC 6455, section 1.3."""


class Relay(Node):
    """A relay that listens on one port for these transports, named as in addresses: `/tls/ws`, or nothing for TCP."""

    serve = ("relay", "serve")

    def __init__(self, directory: Path, authority: Authority, *transports: str) -> None:
        super().__init__("relay", directory)
        self.port = int(self.address.rpartition("/")[2])
        self.authority = authority
        listen = [word for transport in transports for word in ("--listen", self.address + transport)]
        self.run("relay", "setup", "--yes", *listen)
        certificate, key = authority.issue(NAME)
        (self.home / "tls").mkdir(mode=0o700)
        shutil.move(certificate, self.home / "tls" / "fullchain.pem")
        shutil.move(key, self.home / "tls" / "privkey.pem")

    def curl(self, scheme: str, *words: str, path: str = "/", status: int = 0) -> str:
        """What curl prints, with the headers; it ends by itself after three seconds."""
        done = subprocess.run(
            [
                "curl", "-q", "-sS", "-i", "--noproxy", "*", "--max-time", "3", "--cacert", str(self.authority.file),
                "--resolve", f"{NAME}:{self.port}:127.0.0.1", *words, f"{scheme}://{NAME}:{self.port}{path}",
            ],
            capture_output=True, timeout=30, check=False,
        )  # fmt: skip
        assert done.returncode == status, done.stderr
        return done.stdout.decode("latin-1")


@pytest.fixture(scope="module")
def authority(tmp_path_factory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def relay(tmp_path_factory, authority) -> Iterator[Relay]:
    """One for all tests that only ask it something."""
    relay = Relay(tmp_path_factory.mktemp("relay"), authority, "", "/ws", "/tls/ws")
    relay.start()
    yield relay
    relay.stop()


def parts(answer: str) -> tuple[str, dict[str, str], str]:
    """The status line, the headers by their names in lower case, and the body of what curl printed."""
    head, _, body = answer.partition("\r\n\r\n")
    first, *lines = head.split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    assert len(headers) == len(lines)
    return first, headers, body


both = pytest.mark.parametrize("scheme", ["http", "https"])


@both
@pytest.mark.parametrize(
    ("words", "path"),
    [
        ((), "/"),
        ((), "/index.html?a=b"),
        ((), "/" + "x" * 3000),
        (("-H", "Connection: Upgrade"), "/"),
        (("--http1.1", "-H", "Connection: Upgrade", "-H", "Upgrade: h2c"), "/"),
        (("-X", "POST", "-d", "user=root&password=1234"), "/login"),
        (("-X", "OPTIONS"), "/"),
        (("--http1.0",), "/"),
        (("--compressed", "-A", "Mozilla/5.0", "-H", "Range: bytes=0-9"), "/robots.txt"),
    ],
)
def test_whoever_asks_for_a_page_gets_an_ordinary_404(relay, scheme, words, path):
    answer = relay.curl(scheme, *words, path=path)
    first, headers, body = parts(answer)
    assert first == "HTTP/1.1 404 Not Found"
    assert set(headers) == {"date", "content-type", "content-length", "connection"}  # and no `Server`
    assert (headers["content-type"], headers["connection"]) == ("text/plain", "close")
    assert abs(email.utils.parsedate_to_datetime(headers["date"]).timestamp() - time.time()) < 60
    assert body == "404 not found\n"
    assert int(headers["content-length"]) == len(body)
    assert not re.search(r"peer|p2p|relay|multistream|noise|python|h11", answer, re.IGNORECASE)


@both
def test_head_and_nonsense_are_answered_as_by_a_web_server(relay, scheme):
    assert parts(relay.curl(scheme, "--head"))[::2] == ("HTTP/1.1 404 Not Found", "")
    assert parts(relay.curl(scheme, "-H", "Host:"))[0] == "HTTP/1.1 400 Bad Request"
    assert parts(relay.curl(scheme, "-H", "X: " + "y" * 100_000))[0].startswith("HTTP/1.1 4")


def test_tls_is_that_of_a_web_server_with_one_certificate(relay):
    told = relay.curl("https", "-o", "/dev/null", "-w", "%{http_code} %{http_version} %{ssl_verify_result}\n")
    assert told.splitlines()[-1] == "404 1.1 0"
    assert relay.curl("https", "--tls-max", "1.1", "--ciphers", "ALL@SECLEVEL=0", status=35) == ""


@both
def test_a_browser_that_opens_a_websocket_gets_one_that_stays_silent(relay, scheme):
    words = [word for line in BROWSER for word in ("-H", line)]
    answer = relay.curl(
        scheme, "--http1.1", "-N", *words, path="/chat", status=28
    )  # 28: nothing came until the time was over
    first, headers, body = parts(answer)
    assert first == "HTTP/1.1 101 Switching Protocols"
    assert headers == {
        "upgrade": "websocket",
        "connection": "Upgrade",
        "sec-websocket-accept": "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=",
    }
    assert body == ""


@both
def test_a_websocket_of_another_version_is_told_the_right_one(relay, scheme):
    words = [word for line in BROWSER for word in ("-H", line.replace("Version: 13", "Version: 8"))]
    first, headers, _ = parts(relay.curl(scheme, "--http1.1", *words))
    assert first == "HTTP/1.1 426 Upgrade Required"
    assert headers["sec-websocket-version"] == "13"


def test_without_a_plain_address_nobody_finds_another_protocol_at_the_port(tmp_path, authority):
    """As the guide says: who wants to be taken for a web server listens for WebSocket in TLS alone."""
    relay = Relay(tmp_path, authority, "/tls/ws")
    relay.start()
    try:
        assert parts(relay.curl("https"))[0] == "HTTP/1.1 404 Not Found"
        for said in (HANDSHAKE, b"GET / HTTP/1.1\r\nHost: relay.example.org\r\n\r\n"):
            with socket.create_connection(("127.0.0.1", relay.port), timeout=10) as sock:
                sock.sendall(said)
                assert received(sock) == b""
        context = ssl.create_default_context(cafile=str(authority.file))
        plain = socket.create_connection(("127.0.0.1", relay.port), timeout=10)
        with context.wrap_socket(plain, server_hostname=NAME) as sock:
            sock.sendall(HANDSHAKE)
            assert received(sock).startswith(b"HTTP/1.1 400 Bad Request\r\n")
    finally:
        relay.stop()


def received(sock: socket.socket) -> bytes:
    """All that comes until the other side ends or resets the connection."""
    found = b""
    try:
        while data := sock.recv(4096):
            found += data
    except ConnectionError:
        pass
    return found
