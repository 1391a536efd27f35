"""How long an authorised peer waits for its connection while strangers crowd the door.

    python -m tests.abuse.measure_silent_callers [--sources 500] [--seconds 12] [--kinds silent,dawdle]

Starts one node, has a crowd call it from many loopback addresses in a process of its own, and meanwhile connects as an
authorised peer, with the product's own client and its patience: from an address that has authenticated before (`known`)
and each time from an address that has never called (`new`). Prints, for each kind of crowd, how many attempts were
served and how long they took. The file also runs in an older checkout when it and tests/support/certificates.py are
copied there.

Kinds of callers:
    silent    connect and send nothing
    byte      send the first byte of a handshake and nothing more
    dawdle    send the whole first message and never answer
    drip      send the first message a byte at a time, five a second
    tls       send a ClientHello, 250 a second from 20 addresses, and hang up after the answer
    tls-hold  the same, and never answer

`--rsa-bits 4096` gives the node a certificate with which one ClientHello costs several milliseconds.

`--ipv6`: the crowd has one /48 for each source, all of one provider's /32; honest peers have other providers. That
wants a network namespace in which all addresses are local:

    unshare -n sh -c 'ip link set lo up; ip -6 route add local 2000::/3 dev lo;
                      python -m tests.abuse.measure_silent_callers --ipv6'
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import select
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path

import trio
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from actors.switchboard.tls import TlsPipe
from actors.switchboard.upgrade import Upgrader
from actors.switchboard.websocket import connect_websocket
from actors.switchboard.wire import Pipe, SocketPipe
from protocol.errors import PeerupError
from protocol.keys import PrivateKey
from protocol.multiaddr import Multiaddr
from protocol.multistream import HEADER, encode_message
from protocol.noise import SIGNATURE_PREFIX, Identity
from protocol.peer_id import PeerId
from tests.abuse.attacker import new_key
from tests.support.certificates import Authority
from tests.support.nodes import Node

KINDS = ("silent", "byte", "dawdle", "drip", "tls", "tls-hold")
TLS_SOURCES = 20
TLS_RATE = 250.0
LEAD = 2.0
"""Seconds that the crowd is there before the first honest attempt."""
KNOWN = "127.0.0.9"
KNOWN_IPV6 = "2400:9::9"
IP_FREEBIND = 15
PATIENCE = 15.0
"""Seconds after which an attempt is given up, as a dial is."""


# ---- the crowd, in a process of its own


def sources(count: int, *, ipv6: bool = False) -> list[str]:
    """So many loopback addresses, or IPv6 addresses of as many /48s."""
    if ipv6:
        return [f"2001:db8:{number:x}::1" for number in range(count)]
    return [f"127.{10 + number // 62500}.{number // 250 % 250}.{number % 250 + 1}" for number in range(count)]


def socket_from(source: str) -> socket.socket:
    """A socket that will call from this address."""
    ipv6 = ":" in source
    sock = socket.socket(socket.AF_INET6 if ipv6 else socket.AF_INET)
    sock.setblocking(False)
    if ipv6:
        sock.setsockopt(socket.IPPROTO_IP, IP_FREEBIND, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IP, 24, 1)  # IP_BIND_ADDRESS_NO_PORT
    sock.bind((source, 0))
    return sock


def client_hello() -> bytes:
    """What a TLS client says first."""
    outgoing = ssl.MemoryBIO()
    context = ssl.create_default_context()
    client = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="127.0.0.1")
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


def crowd(kind: str, host: str, port: int, count: int, seconds: float) -> None:
    """Call from each source, and again as soon as it is hung up on, until the time is over."""
    tls = kind.startswith("tls")
    opening = HEADER + encode_message("/noise") + (32).to_bytes(2, "big") + os.urandom(32)
    says = {"silent": b"", "byte": b"\x13", "dawdle": opening, "drip": opening[:1]}.get(kind, b"")
    if tls:
        says = client_hello()
    epoll = select.epoll()
    open_now: dict[int, tuple[socket.socket, str]] = {}
    dripped: dict[int, int] = {}
    left = deque(sources(TLS_SOURCES if tls else count, ipv6=":" in host))
    calls = 0
    began = last_drip = time.monotonic()
    end = began + seconds

    def call(source: str) -> None:
        nonlocal calls
        sock = socket_from(source)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        if sock.connect_ex((host, port)) not in (0, errno.EINPROGRESS):
            sock.close()
            left.append(source)
            return
        calls += 1
        if says:
            with contextlib.suppress(OSError):
                sock.send(says)
        open_now[sock.fileno()] = sock, source
        dripped[sock.fileno()] = 1
        epoll.register(sock.fileno(), select.EPOLLIN)

    def hang_up(number: int) -> None:
        sock, source = open_now.pop(number)
        epoll.unregister(number)
        sock.close()
        if not tls:
            left.append(source)

    while time.monotonic() < end:
        if tls:
            due = int((time.monotonic() - began) * TLS_RATE) - calls
            for _ in range(due):
                call(left[0])
                left.rotate()
        else:
            for _ in range(min(len(left), 200)):
                call(left.popleft())
        if kind == "drip" and time.monotonic() - last_drip > 0.2:
            last_drip = time.monotonic()
            for number, (sock, _) in open_now.items():
                at = dripped[number]
                with contextlib.suppress(OSError):
                    sock.send(opening[at : at + 1])
                dripped[number] = at + 1
        for number, _ in epoll.poll(0.005):
            sock = open_now[number][0]
            try:
                data = sock.recv(65536)
            except OSError:
                data = b""
            if not data or kind == "tls":
                hang_up(number)
    print(calls)


# ---- the honest peer


class Honest:
    """An authorised peer with the product's own client."""

    def __init__(self, key: PrivateKey, home: PeerId, trust: ssl.SSLContext) -> None:
        static = X25519PrivateKey.generate()
        proof = Identity(
            key.public_key.to_protobuf(), key.sign(SIGNATURE_PREFIX + static.public_key().public_bytes_raw())
        )
        self._upgrader = Upgrader(static, proof)
        self._home = home
        self._trust = trust

    async def connect(self, address: Multiaddr, port: int, source: str) -> float | None:
        """Seconds until the connection was agreed on and the node had said something on it; None: it was refused."""
        began = time.monotonic()
        sock = socket_from(source)
        pipe: Pipe | None = None
        try:
            with trio.fail_after(PATIENCE):
                if sock.connect_ex((address.components[0].value, port)) == errno.EINPROGRESS:
                    await trio.lowlevel.wait_writable(sock)
                pipe = SocketPipe(sock)
                if address.components[-1].name == "ws":
                    pipe = tls = TlsPipe(pipe, self._trust, server_name="127.0.0.1")
                    await tls.handshake()
                    pipe = await connect_websocket(pipe, address, host="127.0.0.1", random=os.urandom, secure=True)
                upgraded = await self._upgrader.outbound(pipe, self._home)
                # Identify is opened by the node as soon as it has accepted us.
                if not (upgraded.received or upgraded.plaintext):
                    await pipe.receive()
                return time.monotonic() - began
        except (PeerupError, OSError, trio.TooSlowError):
            return None
        finally:
            (pipe or sock).close()


async def attempts(honest: Honest, address: Multiaddr, port: int, seconds: float) -> dict[str, list[float | None]]:
    """Try again and again, known and new in turn, for so long."""
    ipv6 = address.components[0].name == "ip6"
    fresh = (
        f"2401:{number:x}::1" if ipv6 else f"127.250.{number // 250}.{number % 250 + 1}" for number in range(60_000)
    )
    known = KNOWN_IPV6 if ipv6 else KNOWN
    found: dict[str, list[float | None]] = {"known": [], "new": []}

    async def each(name: str, end: float) -> None:
        while trio.current_time() < end:
            found[name].append(await honest.connect(address, port, known if name == "known" else next(fresh)))
            await trio.sleep(0.25)

    async with trio.open_nursery() as nursery:
        for name in found:
            nursery.start_soon(each, name, trio.current_time() + seconds)
    return found


def words(results: list[float | None]) -> str:
    """Attempts in one cell."""
    served = sorted(each for each in results if each is not None)
    if not served:
        return f"0 of {len(results)}"
    typical, longest = statistics.median(served), served[-1]
    return f"{len(served)} of {len(results)}, p50 {typical * 1000:.0f} ms, max {longest * 1000:.0f} ms"


def measure(
    kinds: list[str], count: int, seconds: float, rsa_bits: int, *, ipv6: bool = False
) -> dict[str, dict[str, list[float | None]]]:
    """Each kind of crowd in front of one node."""
    table: dict[str, dict[str, list[float | None]]] = {}
    with tempfile.TemporaryDirectory(prefix="crowd") as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        home = Node("home", directory)
        home.initialise()
        authority = Authority(directory)
        for made, path in zip(
            authority.issue("127.0.0.1", rsa_bits=rsa_bits), ("fullchain.pem", "privkey.pem"), strict=True
        ):
            (home.home / "tls").mkdir(exist_ok=True)
            made.rename(home.home / "tls" / path)
        config = home.home / "config.yaml"
        line = f'    - "{home.address}"\n'
        both = line + line.replace('"\n', '/tls/ws"\n')
        if ipv6:
            both += line.replace("/ip4/127.0.0.1", "/ip6/::1")
        text = config.read_text().replace(line, both)
        text = text.replace("  # tls:\n  #   certificate_file", "  tls:\n    certificate_file")
        text = text.replace("  # tls:\n  #  ", "  tls:\n   ").replace("\n  #   key_file", "\n    key_file")
        config.write_text(text)
        key = new_key()
        home.run("auth", "add", str(key.peer_id), "--comment", "insider")
        stack.callback(home.stop)
        home.start()
        port = int(home.address.rpartition("/")[2])
        trust = ssl.create_default_context(cafile=str(authority.file))
        honest = Honest(key, PeerId.from_text(home.peer_id), trust)
        for kind in ["none", *kinds]:
            address = Multiaddr(f"{home.address}{'/tls/ws' if kind.startswith('tls') else ''}")
            if ipv6:
                address = Multiaddr(f"/ip6/::1/tcp/{port}")
            trio.run(honest.connect, address, port, KNOWN_IPV6 if ipv6 else KNOWN)
            command = [sys.executable, "-m", "tests.abuse.measure_silent_callers", "--crowd", kind]
            options = ["--port", str(port), "--sources", str(count), "--seconds", str(seconds + LEAD + PATIENCE)]
            options += ["--ipv6"] if ipv6 else []
            attack = subprocess.Popen([*command, *options]) if kind != "none" else None
            try:
                time.sleep(LEAD)
                found = trio.run(attempts, honest, address, port, seconds if attack is not None else 2.0)
            finally:
                if attack is not None:
                    attack.kill()
                    attack.wait()
            table[kind] = found
            print(f"{kind:9} known: {words(found['known']):45} new: {words(found['new'])}", flush=True)
            time.sleep(LEAD)
    return table


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description="Time to connect while strangers crowd the door.")
    parser.add_argument("--sources", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=12.0)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--rsa-bits", type=int, default=0, help="an RSA certificate of this size instead of P-256")
    parser.add_argument("--ipv6", action="store_true", help="callers from many /48s; no TLS")
    parser.add_argument("--json", type=Path, help="also write all figures here")
    parser.add_argument("--crowd", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.crowd:
        host = "::1" if arguments.ipv6 else "127.0.0.1"
        crowd(arguments.crowd, host, arguments.port, arguments.sources, arguments.seconds)
        return
    kinds = [kind for kind in arguments.kinds.split(",") if not (arguments.ipv6 and kind.startswith("tls"))]
    table = measure(kinds, arguments.sources, arguments.seconds, arguments.rsa_bits, ipv6=arguments.ipv6)
    if arguments.json:
        arguments.json.write_text(json.dumps(table))


if __name__ == "__main__":
    main()
