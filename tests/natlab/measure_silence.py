"""What survives when a network is away for a while: our streams, and those of `ssh -L` in the same laboratory.

    python -m tests.natlab.measure_silence [--seconds 5,25,60,300] [--ways cable,wifi] [--checkout DIRECTORY]

A laptop behind a NAT has streams to a public host (direct), to a host behind another NAT (relayed), and through
`ssh -L` to the public host; of each kind one that says something five times a second and one that is idle. Then its
network is away for so many seconds. For each stream the table says how long after the return of the network the next
byte came back, or when the stream was ended. `--checkout` runs the nodes of another checkout of this repository.

The ways in which it is away: `cable` (the carrier is gone, the address stays), `interface` (taken down and up again by
its owner), `address` (down, and the address is gone until it is up again), `wifi` (packets are lost, and nobody says
so), `stopped` (the laptop's processes do not run; the network stays).
"""

from __future__ import annotations

import argparse
import contextlib
import getpass
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.natlab import peerup_nodes
from tests.natlab.behaviour import PORT_RESTRICTED, SYMMETRIC
from tests.natlab.lab import Host, Lab
from tests.natlab.peerup_nodes import Echo, Pair, Peerup, relay_address, running, wait_for

BEAT = 0.2
"""Seconds between two words of a busy stream."""

AFTER = 150.0
"""Seconds after the return of the network in which a stream has to go on: TCP waits up to two minutes by itself."""


class Stream:
    """A connection to an echo service that is watched."""

    def __init__(self, kind: str, sock: socket.socket, *, busy: bool) -> None:
        self.kind = kind
        self.busy = busy
        self.returned: float | None = None
        self.ended: str = ""
        self.ended_at = 0.0
        self._sock = sock
        self._mended = threading.Event()
        self._began = time.monotonic()
        self._over = threading.Event()
        assert sock.recv(100) == Echo.GREETING
        sock.settimeout(0.05)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def away(self) -> None:
        """The network goes away now."""
        self._began = time.monotonic()

    def mended(self) -> None:
        """The network is back."""
        self._mended.set()

    def close(self) -> None:
        """Nobody watches it any more."""
        self._sock.close()
        self._thread.join(5)

    def result(self, until: float) -> str:
        """How it went, in a few words."""
        self._over.wait(max(0.0, until - time.monotonic()))
        self._thread.join(5)
        if self.ended:
            return f"ended at {self.ended_at - self._began:.1f} s"
        return "silent" if self.returned is None else f"{self.returned:.1f} s"

    def _watch(self) -> None:
        mended_at: float | None = None
        sent, got = 0, bytearray()
        last = 0.0
        deadline = None
        try:
            while deadline is None or time.monotonic() < deadline:
                now = time.monotonic()
                if mended_at is None and self._mended.is_set():
                    mended_at, deadline = now, now + AFTER
                    wanted = sent + 1
                if (self.busy and now - last >= BEAT) or (mended_at is not None and sent < wanted):
                    self._sock.sendall(sent.to_bytes(8, "big"))
                    sent, last = sent + 1, now
                with contextlib.suppress(TimeoutError):
                    data = self._sock.recv(65536)
                    if not data:
                        raise ConnectionResetError("end of stream")
                    got += data
                if mended_at is not None and len(got) >= 8 * wanted:
                    assert got[8 * wanted - 8 : 8 * wanted] == (wanted - 1).to_bytes(8, "big")
                    self.returned = time.monotonic() - mended_at
                    return
        except OSError as error:
            self.ended, self.ended_at = str(error) or type(error).__name__, time.monotonic()
        finally:
            self._over.set()


@contextlib.contextmanager
def ssh_forward(directory: Path, server: Host, laptop: Host, target: str) -> Iterator[tuple[str, int]]:
    """`ssh -L` from the laptop to the server, and where it listens."""
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(directory / key)], check=True)
    config = directory / "sshd_config"
    config.write_text(
        f"Port 2200\nHostKey {directory}/host\nPidFile none\nStrictModes no\nUsePAM no\n"
        f"AuthorizedKeysFile {directory}/user.pub\nPasswordAuthentication no\n"
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True, mode=0o755)
    server.popen("/usr/sbin/sshd", "-D", "-e", "-f", str(config), stderr=subprocess.DEVNULL)
    options = [
        "-F none", f"-i {directory}/user", "-o BatchMode=yes", "-o StrictHostKeyChecking=no",
        "-o UserKnownHostsFile=/dev/null", "-o ExitOnForwardFailure=yes", "-p 2200", "-N",
        f"-L 127.0.0.1:2300:{target}",
    ]  # fmt: skip
    words = [word for option in options for word in option.split(" ", 1)]

    def reachable() -> bool:
        with contextlib.suppress(OSError), laptop.socket(socket.SOCK_STREAM) as probe:
            probe.settimeout(1)
            probe.connect((server.address, 2200))
            return True
        return False

    wait_for(reachable, "sshd", 30)
    laptop.popen("ssh", *words, f"{getpass.getuser()}@{server.address}", stderr=subprocess.DEVNULL)

    def forwards() -> bool:
        with contextlib.suppress(OSError), laptop.socket(socket.SOCK_STREAM) as probe:
            probe.settimeout(2)
            probe.connect(("127.0.0.1", 2300))
            return probe.recv(100) == Echo.GREETING
        return False

    wait_for(forwards, "ssh -L", 30)
    yield "127.0.0.1", 2300


def processes_of(node: Peerup) -> list[int]:
    """All processes of a node, the daemon's first."""
    assert node.daemon is not None
    found, todo = [], [node.daemon.pid]
    while todo:
        pid = todo.pop()
        found.append(pid)
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{pid}/task").iterdir():
                todo += [int(child) for child in (task / "children").read_text().split()]
    return found


def _signal_all(node: Peerup, number: int) -> None:
    for pid in processes_of(node):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def ways(laptop: Peerup) -> dict[str, tuple[Callable[[], None], Callable[[], None]]]:
    """How the laptop's network goes away, and comes back."""
    uplink = laptop.host.uplink

    def lose_address() -> None:
        uplink.down()
        uplink.node.ns.ip(f"addr flush dev {uplink.interface} scope global")

    link = uplink.link
    assert link is not None
    return {
        "cable": (uplink.unplug, uplink.plug_in),
        "interface": (uplink.down, uplink.up),
        "address": (lose_address, uplink.up),
        "wifi": (link.cut, link.mend),
        "stopped": (
            lambda: _signal_all(laptop, signal.SIGSTOP),
            lambda: _signal_all(laptop, signal.SIGCONT),
        ),
    }


def measure(
    way: str,
    seconds: float,
    directory: Path,
    *,
    ssh: bool = True,
    prepare: Callable[[Pair], None] = lambda _: None,
    finish: Callable[[Pair], None] = lambda _: None,
) -> dict[str, str]:
    """One network, one silence: what became of each stream. Without `ssh` there is none beside ours.

    `prepare` is called before the nodes start, `finish` when all is over.
    """
    with Lab() as lab, contextlib.ExitStack() as stack:
        relay = Peerup(lab.host("relay", link=lab.link(delay=0.02)), directory / "relay")
        relay.serve_as_relay()
        nat = lab.nat("laptop-nat", PORT_RESTRICTED)
        laptop = Peerup(lab.host("laptop", behind=nat, link=lab.link(delay=0.005)), directory / "laptop")
        home = Peerup(lab.host("home", behind=lab.nat("home-nat", SYMMETRIC)), directory / "home")
        made = Pair(laptop, home, [relay])
        prepare(made)
        pair = stack.enter_context(running(made))
        echo = Echo(relay.host)
        stack.callback(echo.close)
        relay("service", "add", "echo", echo.address)
        laptop("names", "add", "office", relay.peer_id, "--address", relay_address(relay))
        addresses = {"direct": laptop.proxy("office", "echo"), "relayed": laptop.proxy("home", "echo")}
        if ssh:
            (directory / "ssh").mkdir()
            forward = ssh_forward(directory / "ssh", relay.host, laptop.host, echo.address)
            addresses["ssh -L"] = stack.enter_context(forward)
        for address in addresses.values():
            wait_for(lambda address=address: pair.greeting(address, 5), "a first connection", 60)  # type: ignore[misc]
        streams = [
            Stream(kind, laptop.connect(address), busy=busy) for kind, address in addresses.items() for busy in (0, 1)
        ]
        for stream in streams:
            stack.callback(stream.close)
        time.sleep(2)
        away, back = ways(laptop)[way]
        away()
        for stream in streams:
            stream.away()
        time.sleep(seconds)
        back()
        for stream in streams:
            stream.mended()
        until = time.monotonic() + AFTER + 5
        result = {f"{each.kind}, {'busy' if each.busy else 'idle'}": each.result(until) for each in streams}
        finish(pair)
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", default="5,25,60,300")
    parser.add_argument("--ways", default="cable,wifi")
    parser.add_argument("--checkout", type=Path, default=None, help="run the nodes of this checkout")
    options = parser.parse_args()
    if options.checkout is not None:
        peerup_nodes.CHECKOUT = options.checkout.resolve()
    jobs = [(way, float(each)) for each in options.seconds.split(",") for way in options.ways.split(",")]
    results: dict[tuple[str, float], dict[str, str]] = {}

    def run(way: str, seconds: float) -> None:
        with tempfile.TemporaryDirectory(prefix="silence") as directory:
            results[way, seconds] = measure(way, seconds, Path(directory))
            print(f"{way} {seconds:g} s: {results[way, seconds]}", file=sys.stderr, flush=True)

    threads = [threading.Thread(target=run, args=job) for job in jobs]
    for thread in threads:
        thread.start()
        time.sleep(3)  # their nodes do not start all at once
    for thread in threads:
        thread.join()
    columns = list(next(iter(results.values())))
    print("| network away | " + " | ".join(columns) + " |")
    print("| --- |" + " --- |" * len(columns))
    for (way, seconds), result in sorted(results.items(), key=lambda item: (item[0][0], item[0][1])):
        print(f"| {way}, {seconds:g} s | " + " | ".join(result[column] for column in columns) + " |")


if __name__ == "__main__":
    main()
