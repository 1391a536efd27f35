"""Bulk over a path that swallows large packets and tells nobody: how much arrives, and how fast.

    python -m tests.natlab.measure_mtu_hole [--hole 1280] [--checkout DIRECTORY]
    python -m tests.natlab.measure_mtu_hole --sockets

A laptop and a home, each behind a NAT, and a relay. On the laptop's line, of 50 Mbit/s, packets of more than `--hole`
bytes vanish: outwards, inwards or both. The laptop uploads and downloads through tunnels, directly to the relay's host
and relayed to the home; the first line of the table is a path without a hole. `--checkout` runs the nodes of another
checkout of this repository.

`--sockets` instead tries what a plain socket can do about it on this kernel, before and after it hangs.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tests.natlab import peerup_nodes
from tests.natlab.behaviour import PORT_RESTRICTED, SYMMETRIC
from tests.natlab.forwarder import Shape
from tests.natlab.lab import Lab
from tests.natlab.network import Node
from tests.natlab.peerup_nodes import Pair, Peerup, relay_address, running, wait_for

CONTENT = bytes(range(256)) * 8192
"""What goes each way: 2 MiB."""

PATIENCE = 25.0
"""Seconds for it; a path without a hole needs less than one."""

RATE = 50e6


class Bulk:
    """A TCP service in a host: sends `CONTENT`, reads as much, and answers with the digest of what it has read."""

    def __init__(self, host: Node) -> None:
        self._listener = host.socket(socket.SOCK_STREAM)
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(16)
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True, name=f"bulk in {host.name}").start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(sock,), daemon=True, name="bulk").start()

    @staticmethod
    def _serve(sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            if sock.recv(1) == b"d":
                sock.sendall(CONTENT)
                return
            digest, length = hashlib.sha256(), 0
            while length < len(CONTENT):
                data = sock.recv(65536)
                if not data:
                    return
                digest.update(data)
                length += len(data)
            sock.sendall(digest.digest())


def transfer(node: Peerup, address: tuple[str, int], direction: str) -> str:
    """Send or fetch `CONTENT` through a tunnel, in words: seconds, or how far it came."""
    began = time.monotonic()
    got = bytearray()
    wanted = CONTENT if direction == "download" else hashlib.sha256(CONTENT).digest()
    try:
        with node.connect(address, PATIENCE) as sock:
            sock.sendall(direction[:1].encode())
            if direction == "upload":
                sock.sendall(CONTENT)
            while len(got) < len(wanted):
                sock.settimeout(max(0.01, began + PATIENCE - time.monotonic()))
                data = sock.recv(65536)
                if not data:
                    break
                got += data
    except OSError as error:
        return f"{str(error) or type(error).__name__} after {time.monotonic() - began:.0f} s"
    if bytes(got) != wanted:
        return f"ended after {time.monotonic() - began:.0f} s"
    return f"{time.monotonic() - began:.1f} s"


def measure(out: int, back: int, directory: Path, *, finish: Callable[[Pair], None] = lambda _: None) -> dict[str, str]:
    """One network: what became of each transfer. `out` and `back` are the longest packets of the laptop's line; 0: any.

    `finish` is called while the nodes still run.
    """
    with Lab() as lab, contextlib.ExitStack() as stack:
        relay = Peerup(lab.host("relay", link=lab.link(delay=0.005)), directory / "relay")
        relay.serve_as_relay()
        line = lab.link(
            out=Shape(delay=0.005, rate=RATE, black_hole=out), back=Shape(delay=0.005, rate=RATE, black_hole=back)
        )
        laptop = Peerup(
            lab.host("laptop", behind=lab.nat("laptop-nat", PORT_RESTRICTED), link=line), directory / "laptop"
        )
        home = Peerup(lab.host("home", behind=lab.nat("home-nat", SYMMETRIC)), directory / "home")
        pair = stack.enter_context(running(Pair(laptop, home, [relay])))
        for node in (relay, home):
            bulk = Bulk(node.host)
            stack.callback(bulk.close)
            node("service", "add", "bulk", bulk.address)
        laptop("names", "add", "office", relay.peer_id, "--address", relay_address(relay))
        addresses = {"direct": laptop.proxy("office", "bulk"), "relayed": laptop.proxy("home", "bulk")}
        for name in ("office", "home"):
            wait_for(lambda name=name: laptop("ping", name, "-c", "1"), "a first connection", 60)  # type: ignore[misc]
        result = {
            f"{way}, {direction}": transfer(laptop, address, direction)
            for way, address in addresses.items()
            for direction in ("upload", "download")
        }
        finish(pair)
        return result


# ---- what a plain socket can do


def _tcp_info(sock: socket.socket) -> tuple[int, int]:
    """The size of segments that it sends, and bytes that were acknowledged."""
    told = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 128)
    return struct.unpack_from("=I", told, 16)[0], struct.unpack_from("=Q", told, 120)[0]


_IP_MTU_DISCOVER, _IPV6_MTU = 10, 24

SOCKETS: dict[str, dict[str, tuple[int, int, int] | int | bool]] = {
    "nothing": {},
    "TCP_MAXSEG 1180 when it hangs": {"after": (socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1180)},
    "IP_PMTUDISC_DONT (no DF) when it hangs": {"after": (socket.IPPROTO_IP, _IP_MTU_DISCOVER, 0)},
    "IP_PMTUDISC_PROBE when it hangs": {"after": (socket.IPPROTO_IP, _IP_MTU_DISCOVER, 3)},
    "IPv6, nothing": {"ipv6": True},
    "IPV6_MTU 1280 before": {"ipv6": True, "before": (socket.IPPROTO_IPV6, _IPV6_MTU, 1280)},
    "IPV6_MTU 1280 when it hangs": {"ipv6": True, "after": (socket.IPPROTO_IPV6, _IPV6_MTU, 1280)},
    "net.ipv4.tcp_mtu_probing=1": {"probing": 1},
    "TCP_MAXSEG 1220 before, at the sender": {"before": (socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1220)},
    "TCP_MAXSEG 1220 before, at the receiver": {
        "before": (socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1220),
        "receiver": True,
    },
    "IPv6, TCP_MAXSEG 1220 before": {"ipv6": True, "before": (socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1220)},
}


def try_socket(
    hole: int,
    *,
    before: tuple[int, int, int] | None = None,
    after: tuple[int, int, int] | None = None,
    ipv6: bool = False,
    probing: int = 0,
    receiver: bool = False,
) -> str:
    """One connection over a path with a hole, and how it goes."""
    with Lab() as lab, contextlib.ExitStack() as stack:
        server = lab.host("server", ipv6=ipv6)
        host = lab.host("host", ipv6=ipv6, link=lab.link(delay=0.01, black_hole=hole))
        for node in (server, host):
            node.ns.sysctl(ipv4__tcp_mtu_probing=probing)
        family = socket.AF_INET6 if ipv6 else socket.AF_INET
        with server.enter():
            listener = stack.enter_context(socket.socket(family))
        with host.enter():
            client = stack.enter_context(socket.socket(family))
        if before is not None:
            (listener if receiver else client).setsockopt(*before)
        listener.bind((str(server.address6) if ipv6 else server.address, 5000))
        listener.listen()
        client.settimeout(30)
        client.connect(listener.getsockname()[:2])
        accepted = stack.enter_context(listener.accept()[0])
        accepted.settimeout(30)
        began = time.monotonic()
        threading.Thread(target=_send, args=(client,), daemon=True).start()
        if after is not None:
            time.sleep(2)
            client.setsockopt(*after)
        length = 0
        with contextlib.suppress(TimeoutError):
            while length < len(CONTENT):
                length += len(accepted.recv(65536))
        size, _ = _tcp_info(client)
        client.shutdown(socket.SHUT_RDWR)
        if length < len(CONTENT):
            return f"hangs, {length} bytes in 30 s, segments of {size}"
        return f"{time.monotonic() - began:.1f} s, segments of {size}"


def _send(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.sendall(CONTENT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hole", type=int, default=1280, help="bytes of the longest packet that passes")
    parser.add_argument("--sockets", action="store_true", help="try plain sockets instead of nodes")
    parser.add_argument("--checkout", type=Path, default=None, help="run the nodes of this checkout")
    options = parser.parse_args()
    if options.checkout is not None:
        peerup_nodes.CHECKOUT = options.checkout.resolve()
    results: dict[str, dict[str, str]] = {}
    jobs: dict[str, Callable[[Path], dict[str, str]]] = {}
    hole = options.hole
    if options.sockets:
        for name, settings in SOCKETS.items():
            jobs[name] = lambda _, settings=settings: {"2 MiB": try_socket(hole, **settings)}  # type: ignore[misc]
    else:
        for name, out, back in (("none", 0, 0), ("out", hole, 0), ("in", 0, hole), ("both", hole, hole)):
            jobs[name] = lambda directory, out=out, back=back: measure(out, back, directory)  # type: ignore[misc]

    def run(name: str) -> None:
        with tempfile.TemporaryDirectory(prefix="hole") as directory:
            results[name] = jobs[name](Path(directory))

    threads = [threading.Thread(target=run, args=(name,)) for name in jobs]
    for thread in threads:
        thread.start()
        time.sleep(1)
    for thread in threads:
        thread.join()
    columns = list(next(iter(results.values())))
    print(f"| {'means' if options.sockets else f'hole ({hole})'} | " + " | ".join(columns) + " |")
    print("| --- |" + " --- |" * len(columns))
    for name in jobs:
        print(f"| {name} | " + " | ".join(results[name][column] for column in columns) + " |")


if __name__ == "__main__":
    main()
