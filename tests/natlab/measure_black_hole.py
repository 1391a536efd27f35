"""What becomes of connections that are opened while the direct path to a peer has died, though a relay is there.

    python -m tests.natlab.measure_black_hole [--checkout DIRECTORY]

A laptop is connected directly to a home node, which has a reservation at a relay. Then the public network drops all
packets between the two. After so many seconds a client connects through the laptop's proxy and sends a request that is
its own. The table says how long each has waited for its answer, from its connect on; then the direct path comes back,
and each request must have reached the service once. `--checkout` runs the nodes of another checkout.
"""

from __future__ import annotations

import argparse
import contextlib
import socket
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

from tests.natlab import peerup_nodes
from tests.natlab.lab import Lab
from tests.natlab.network import Node
from tests.natlab.peerup_nodes import Pair, Peerup, relay_address, running, wait_for

OFFSETS = (0.5, 1.0, 2.0, 3.0, 4.0)
"""Seconds after the death of the path at which clients connect."""
PATIENCE = 30.0
"""Seconds that a client waits for its answer."""
LENGTH = 16


class Counting:
    """A service that answers each request of `LENGTH` bytes, and counts which have come."""

    def __init__(self, host: Node) -> None:
        self.requests: Counter[bytes] = Counter()
        self._listener = host.socket(socket.SOCK_STREAM)
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(64)
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

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
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            request = sock.recv(LENGTH, socket.MSG_WAITALL)
            if request:
                self.requests[request] += 1
                sock.sendall(request.upper())
                sock.recv(1)


class Client:
    """One connection through the proxy, with one request."""

    def __init__(self, pair: Pair, address: tuple[str, int], name: str) -> None:
        self.request = name.encode().ljust(LENGTH, b".")
        self.seconds = 0.0
        self.outcome = "no answer"
        self._began = time.monotonic()
        self._sock = pair.laptop.connect(address, PATIENCE)
        self._thread = threading.Thread(target=self._talk, daemon=True)
        self._thread.start()

    def wait(self) -> str:
        self._thread.join(PATIENCE + 5)
        return f"{self.outcome} after {self.seconds:.1f} s"

    def close(self) -> None:
        self._sock.close()

    def _talk(self) -> None:
        try:
            self._sock.sendall(self.request)
            answer = self._sock.recv(LENGTH, socket.MSG_WAITALL)
            self.outcome = "answer" if answer == self.request.upper() else f"closed ({answer!r})"
        except OSError as error:
            self.outcome = type(error).__name__
        self.seconds = time.monotonic() - self._began


def measure(directory: Path) -> tuple[dict[float, Client], Counter[bytes]]:
    """One network: the clients by their offset, and which requests the service has got, how often."""
    with Lab() as lab, contextlib.ExitStack() as stack:
        relay = Peerup(lab.host("relay", link=lab.link(delay=0.02)), directory / "relay")
        relay.serve_as_relay()
        laptop = Peerup(lab.host("laptop", link=lab.link(delay=0.005)), directory / "laptop")
        home = Peerup(lab.host("home", link=lab.link(delay=0.005)), directory / "home")
        pair = Pair(laptop, home, [relay])
        laptop("names", "add", "house", home.peer_id, "--address", relay_address(home))
        service = Counting(home.host)
        stack.callback(service.close)
        home("service", "add", "count", service.address)
        stack.enter_context(running(pair))
        address = laptop.proxy("home", "count")

        def is_direct() -> bool:
            with contextlib.closing(Client(pair, address, "first")) as client:
                client.wait()
                path = laptop.path_to(home)
                return client.outcome == "answer" and path is not None and path["path"] == "direct"

        wait_for(is_direct, "a direct path")
        time.sleep(1)
        one, other = laptop.host.address, home.host.address
        lab.core.ns.nft(
            "table ip hole {\nchain forward {\ntype filter hook forward priority -200\n"
            f"ip saddr {one} ip daddr {other} drop\nip saddr {other} ip daddr {one} drop\n}}\n}}\n"
        )
        began = time.monotonic()
        clients = {}
        for offset in OFFSETS:
            time.sleep(max(0.0, began + offset - time.monotonic()))
            clients[offset] = client = Client(pair, address, f"at {offset}")
            stack.callback(client.close)
        for client in clients.values():
            client.wait()
        lab.core.ns.nft("delete table ip hole\n")
        time.sleep(10)  # the kernel sends again what it has kept all the time
        requests = Counter(service.requests)
        del requests[b"first".ljust(LENGTH, b".")]
        return clients, requests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, default=None, help="run the nodes of this checkout")
    options = parser.parse_args()
    if options.checkout is not None:
        peerup_nodes.CHECKOUT = options.checkout.resolve()
    with tempfile.TemporaryDirectory(prefix="hole") as directory:
        clients, requests = measure(Path(directory))
    print("| connected | outcome | times at the service |\n| --- | --- | --- |")
    for offset, client in clients.items():
        print(f"| {offset:g} s after | {client.wait()} | {requests[client.request]} |")


if __name__ == "__main__":
    main()
