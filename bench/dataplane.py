"""The data plane by itself: client, entry, link, TCP, link, exit, server, each a process; no actor runtime.

    python -m bench.dataplane [--rounds N] [--megabytes N] [--seam] [--references]

Entry and exit give their sockets to the links, as proxies do; with `--seam` they keep them, get stream descriptors and
pump. Prints one line for each measurement; with `--references` each round also measures ssh and socat, in the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import socket
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import trio
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from actors.pump import Pump
from actors.reactor import READ, Reactor
from actors.switchboard.link import Channel, Link, LinkEnd
from actors.switchboard.socket_end import SocketEnd
from actors.switchboard.wire import SocketWire
from bench.load import Load
from bench.references import AbsentError, Tunnel, socat, ssh
from protocol import yamux
from protocol.keys import PrivateKey
from protocol.noise import SIGNATURE_PREFIX, Identity, NoiseHandshake, NoiseResult
from protocol.yamux import Role


@dataclasses.dataclass(frozen=True)
class Way:
    """How bytes go: with the reactor's shortcut (`direct`), and over stream descriptors (`seam`)."""

    direct: bool
    seam: bool

    @property
    def name(self) -> str:
        return "dataplane" + ("-seam" if self.seam else "") + ("" if self.direct else "-task")

    def options(self) -> list[str]:
        return [*(["--seam"] if self.seam else []), *([] if self.direct else ["--task"])]


def handshake(sock: socket.socket, role: Role) -> NoiseResult:
    """A real handshake with fresh keys, on a blocking socket."""
    static, identity = X25519PrivateKey.generate(), PrivateKey.from_seed(os.urandom(32))
    proof = identity.sign(SIGNATURE_PREFIX + static.public_key().public_bytes_raw())
    noise = NoiseHandshake(
        initiator=role is Role.CLIENT,
        static_key=static,
        identity=Identity(identity.public_key.to_protobuf(), proof),
        muxers=(yamux.PROTOCOL_ID,),
    )
    while True:
        sock.sendall(noise.data_to_send())
        if noise.result is not None:
            return noise.result
        noise.receive_data(sock.recv(4096))


def run_link(role: Role, connection: socket.socket, control: socket.socket, way: Way) -> None:
    """A process with one link. The other end of `control` is an entry or an exit.

    An entry sends a socket, or with seams asks for a stream; an exit is asked for a socket, or is sent a stream.
    """
    secured = handshake(connection, role)
    reactor = Reactor(time.monotonic, direct=way.direct)
    offered: deque[SocketEnd] = deque()

    def opened(channel: Channel) -> None:
        if way.seam:
            stream = channel.hand_over()
            socket.send_fds(control, [b"s"], [stream.fileno()])
            stream.close()
        else:
            offered.append(SocketEnd(channel, lambda *_: None))
            control.send(b"o")

    def told(_ready: int) -> None:
        message, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not message:
            raise SystemExit
        if not descriptors:
            opened(link.open_stream())
            return
        end = offered.popleft() if role is Role.SERVER else SocketEnd(link.open_stream(), lambda *_: None)
        end.attach(socket.socket(fileno=descriptors[0]))

    def ended(end: LinkEnd) -> None:
        raise SystemExit(0 if end.code == "remote-close" else f"link: {end.reason}")

    link = Link(
        reactor,
        SocketWire(reactor, connection),
        role=role,
        send_cipher=secured.send,
        receive_cipher=secured.receive,
        received=secured.unread,
        on_stream=opened,
        on_end=ended,
    )
    reactor.register(control.fileno(), READ, told, fail)
    trio.run(reactor.run)


def run_entry(listener: socket.socket, control: socket.socket, way: Way) -> None:
    """A process that accepts connections and gives each to the link, or pumps it through a stream."""
    reactor = Reactor(time.monotonic, direct=way.direct)
    waiting: list[socket.socket] = []

    def accept(_ready: int) -> None:
        with contextlib.suppress(BlockingIOError):
            accepted = listener.accept()[0]
            if way.seam:
                waiting.append(accepted)
                control.send(b"o")
            else:
                give(control, accepted)

    def got_stream(_ready: int) -> None:
        Pump(reactor, waiting.pop(0), receive_stream(control), lambda _: None)

    listener.setblocking(False)
    reactor.register(listener.fileno(), READ, accept, fail)
    reactor.register(control.fileno(), READ, got_stream, fail)
    trio.run(reactor.run)


def run_exit(port: int, control: socket.socket, way: Way) -> None:
    """A process that connects each stream to the server."""
    reactor = Reactor(time.monotonic, direct=way.direct)

    def got_stream(_ready: int) -> None:
        if way.seam:
            stream = receive_stream(control)
            Pump(reactor, socket.create_connection(("127.0.0.1", port)), stream, lambda _: None)
        elif control.recv(1):
            give(control, socket.create_connection(("127.0.0.1", port)))
        else:
            raise SystemExit

    reactor.register(control.fileno(), READ, got_stream, fail)
    trio.run(reactor.run)


def give(control: socket.socket, sock: socket.socket) -> None:
    socket.send_fds(control, [b"a"], [sock.fileno()])
    sock.close()


def receive_stream(control: socket.socket) -> socket.socket:
    message, descriptors, _, _ = socket.recv_fds(control, 1, 1)
    if not message:
        raise SystemExit
    return socket.socket(fileno=descriptors[0])


def fail(error: Exception) -> None:
    raise error


@contextlib.contextmanager
def tunnel(target: int, way: Way) -> Iterator[Tunnel]:
    """The whole way, as the references are given."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    middle = socket.create_server(("127.0.0.1", 0))
    near = socket.create_connection(middle.getsockname())
    far = middle.accept()[0]
    middle.close()
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)]
    stages: list[tuple[str, list[socket.socket], list[str]]] = [
        ("link-client", [near, pairs[0][0]], []),
        ("link-server", [far, pairs[1][0]], []),
        ("entry", [listener, pairs[0][1]], []),
        ("exit", [pairs[1][1]], [str(target)]),
    ]
    started = time.monotonic()
    processes = []
    for name, sockets, extra in stages:
        fds = [sock.fileno() for sock in sockets]
        profile = ["-m", "cProfile", "-o", f"{os.environ['PROFILE']}.{name}"] if "PROFILE" in os.environ else []
        command = [sys.executable, *profile, "-m", "bench.dataplane", "--stage", name, *map(str, fds), *extra]
        processes.append(subprocess.Popen([*command, *way.options()], pass_fds=fds))
    port = listener.getsockname()[1]
    for sock in (near, far, listener, *pairs[0], *pairs[1]):
        sock.close()
    try:
        yield Tunnel(way.name, port, tuple(p.pid for p in processes), started)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()


def run_stage(name: str, arguments: list[int], way: Way) -> None:
    import signal

    # nothing to clean up; a profiler, though, writes its file at a regular exit
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0) if "PROFILE" in os.environ else os._exit(0))
    if name == "entry":
        run_entry(socket.socket(fileno=arguments[0]), socket.socket(fileno=arguments[1]), way)
    elif name == "exit":
        run_exit(arguments[1], socket.socket(fileno=arguments[0]), way)
    else:
        role = Role.CLIENT if name == "link-client" else Role.SERVER
        run_link(role, socket.socket(fileno=arguments[0]), socket.socket(fileno=arguments[1]), way)


def cpu_seconds(pids: tuple[int, ...]) -> float:
    """User and system time of these processes and of their children that have ended or live."""
    ticks = 0
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parents[int(entry.name)] = int(_stat(int(entry.name))[1])
    wanted = set(pids)
    while more := {pid for pid, parent in parents.items() if parent in wanted} - wanted:
        wanted |= more
    for pid in wanted:
        with contextlib.suppress(OSError):
            ticks += sum(int(value) for value in _stat(pid)[11:15])
    return ticks / os.sysconf("SC_CLK_TCK")


def _stat(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def pss(pids: tuple[int, ...]) -> float:
    """MiB of these processes together, shared pages divided."""
    total = 0
    for pid in pids:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


def measure(load: Load, way: Tunnel, megabytes: int, *, quick: bool) -> dict[str, float]:
    """One round."""
    result = {}
    load.first(way.port, 10.0)
    if way.name.startswith("dataplane") and not quick:
        result["PSS MiB"] = before = pss(way.roots)  # before bulk: buffers that it leaves behind would hide the rest
        with load.hold(way.port, 500):
            result["KiB per idle connection"] = (pss(way.roots) - before) * 1024 / 500
    for streams in (1, 8):
        for direction in ("up",) if quick else ("up", "down"):
            before = cpu_seconds(way.roots)
            bulk = load.bulk(way.port, megabytes * 1_000_000, streams=streams, direction=direction)
            spent = cpu_seconds(way.roots) - before
            result[f"{streams} {direction} MB/s"] = bulk.megabytes_per_second
            result[f"{streams} {direction} CPU s/GB"] = spent / megabytes * 1000
    echo = load.echo(way.port, 3000)
    result["echo p50 us"], result["echo p99 us"] = echo.p50 * 1e6, echo.p99 * 1e6
    connect = load.connect(way.port, 300)
    result["connect p50 us"], result["connect p99 us"] = connect.p50 * 1e6, connect.p99 * 1e6
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--references", action="store_true")
    parser.add_argument("--task", action="store_true", help="without the reactor's shortcut")
    parser.add_argument("--seam", action="store_true", help="with stream descriptors and pumps")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--stage", nargs="+")
    options = parser.parse_args()
    ours = Way(direct=not options.task, seam=options.seam)
    if options.stage:
        run_stage(options.stage[0], [int(word) for word in options.stage[1:]], ours)
        return
    load = Load()
    ways = [lambda target: tunnel(target, ours)]
    if options.references:
        ways += [ssh(), socat]
    results: dict[str, dict[str, list[float]]] = {}
    for _ in range(options.rounds):
        for way in ways:
            with contextlib.suppress(AbsentError), load.server() as server, way(server.port) as opened:
                for name, value in measure(load, opened, options.megabytes, quick=options.quick).items():
                    results.setdefault(opened.name, {}).setdefault(name, []).append(value)
    for name, rows in results.items():
        for what, values in rows.items():
            print(f"{name:16} {what:24} {statistics.median(values):9.2f}  ({min(values):.2f}-{max(values):.2f})")


if __name__ == "__main__":
    main()
