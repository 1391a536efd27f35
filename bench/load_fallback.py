"""The load generator where no C compiler is: the same modes, arguments, answers and wire form as `load.c`, in Python.

It costs far more CPU than `load.c`, so that on few cores it takes its share from the tunnel: its results may be
compared with each other only.
"""

from __future__ import annotations

import json
import socket
import struct
import sys
import threading
import time
from typing import Any

BLOCK = 256 * 1024
PERIOD = 524287
STEP = 509
PATIENCE = 60.0
HEADER = struct.Struct("<7scQ")
DIGEST = struct.Struct("<QQ")
MAGIC = b"peerld1"
MASK = (1 << 64) - 1


def make_pattern() -> bytes:
    """The content: `PERIOD` pseudo-random bytes, and its first block once more so that any block is one slice."""
    state = 0x9E3779B97F4A7C15
    content = bytearray(PERIOD)
    for at in range(PERIOD):
        state ^= (state << 13) & MASK
        state ^= state >> 7
        state ^= (state << 17) & MASK
        content[at] = (state >> 32) & 0xFF
    return bytes(content + content[:BLOCK])


PATTERN = make_pattern()
VIEW = memoryview(PATTERN)


class Check:
    """Counts, checks and digests what arrives."""

    def __init__(self) -> None:
        self.count = 0
        self.hash = 0
        self.wrong = False
        self._next = 0

    def update(self, data: memoryview) -> None:
        end = self.count + len(data)
        while self._next < end:
            byte = data[self._next - self.count]
            self.wrong |= byte != PATTERN[self._next % PERIOD]
            self.hash = ((self.hash ^ byte) * 0x100000001B3) & MASK
            self._next += STEP
        self.count = end


def tune(connection: socket.socket) -> socket.socket:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.settimeout(PATIENCE)
    return connection


def receive_all(connection: socket.socket, size: int) -> bytes:
    content = bytearray()
    while len(content) < size:
        part = connection.recv(size - len(content))
        if not part:
            raise ConnectionError("the connection ended early")
        content += part
    return bytes(content)


def send_pattern(connection: socket.socket, length: int) -> None:
    at = 0
    while at < length:
        size = min(BLOCK, length - at)
        connection.sendall(VIEW[at % PERIOD : at % PERIOD + size])
        at += size


def receive_pattern(connection: socket.socket, length: int) -> Check:
    check = Check()
    buffer = bytearray(BLOCK)
    view = memoryview(buffer)
    while check.count < length:
        size = connection.recv_into(view[: min(BLOCK, length - check.count)])
        if not size:
            raise ConnectionError("the connection ended early")
        check.update(view[:size])
    return check


def expected(length: int) -> int:
    digest = 0
    for at in range(0, length, STEP):
        digest = ((digest ^ PATTERN[at % PERIOD]) * 0x100000001B3) & MASK
    return digest


def serve(connection: socket.socket) -> None:
    with tune(connection):
        try:
            magic, operation, length = HEADER.unpack(receive_all(connection, HEADER.size))
            if magic != MAGIC:
                return
            connection.sendall(b"K")
            if operation == b"U":
                check = receive_pattern(connection, length)
                connection.sendall(DIGEST.pack(check.count, check.hash))
            elif operation == b"D":
                send_pattern(connection, length)
            elif operation == b"E":
                connection.settimeout(None)
                while part := connection.recv(16384):
                    connection.sendall(part)
                return
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(1):
                pass
        except OSError:
            return  # the client has gone; it reports that itself


def run_server(port: int) -> None:
    with socket.create_server(("127.0.0.1", port), backlog=4096) as listener:
        print(f"port {listener.getsockname()[1]}", flush=True)
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=serve, args=(connection,), daemon=True).start()


def open_connection(port: int, operation: bytes, length: int = 0) -> socket.socket:
    connection = tune(socket.create_connection(("127.0.0.1", port), timeout=PATIENCE))
    try:
        connection.sendall(HEADER.pack(MAGIC, operation, length))
        if receive_all(connection, 1) != b"K":
            raise ConnectionError("this is not a load server")
    except OSError:
        connection.close()
        raise
    return connection


def round_trip(connection: socket.socket, content: bytes) -> None:
    connection.sendall(content)
    if receive_all(connection, len(content)) != content:
        raise ConnectionError("other bytes came back")


def quantile(ordered: list[float], q: float) -> float:
    return ordered[int(q * (len(ordered) - 1) + 0.5)] if ordered else 0.0


def times(mode: str, seconds: list[float], failures: int) -> dict[str, Any]:
    ordered = sorted(seconds)
    quantiles = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {
        "mode": mode,
        "count": len(ordered),
        "failures": failures,
        **{name: quantile(ordered, q) for name, q in quantiles.items()},
    }


def run_bulk(port: int, size: int, streams: int, direction: str) -> tuple[dict[str, Any], bool]:
    each = size // streams
    digest = expected(each)
    down = direction == "down"
    barrier = threading.Barrier(streams + 1)
    started = time.monotonic()
    results: list[tuple[bool, float]] = []

    def transfer(connection: socket.socket) -> None:
        barrier.wait()
        with connection:
            try:
                if down:
                    check = receive_pattern(connection, each)
                    good = not check.wrong and check.hash == digest
                else:
                    send_pattern(connection, each)
                    good = DIGEST.unpack(receive_all(connection, DIGEST.size)) == (each, digest)
            except OSError:
                good = False
            results.append((good, time.monotonic() - started))

    threads = []
    for _ in range(streams):
        connection = open_connection(port, b"D" if down else b"U", each)
        threads.append(threading.Thread(target=transfer, args=(connection,)))
        threads[-1].start()
    if not down:
        started = time.monotonic()
    barrier.wait()
    for thread in threads:
        thread.join()
    good = all(ok for ok, _ in results)
    seconds = [elapsed for _, elapsed in results]
    return {"mode": "bulk", "ok": good, "bytes": each * streams, "seconds": max(seconds), "each": seconds}, good


def run_echo(port: int, rounds: int) -> dict[str, Any]:
    seconds = []
    with open_connection(port, b"E") as connection:
        for at in range(rounds + 100):
            start = time.perf_counter()
            round_trip(connection, bytes([at & 0xFF]))
            if at >= 100:
                seconds.append(time.perf_counter() - start)
    return times("echo", seconds, 0)


def run_connect(port: int, count: int) -> tuple[dict[str, Any], bool]:
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        try:
            with open_connection(port, b"E"):
                seconds.append(time.perf_counter() - start)
        except OSError:
            continue
    return times("connect", seconds, count - len(seconds)), len(seconds) == count


def run_hold(port: int, count: int) -> bool:
    start = time.monotonic()
    held = []
    for at in range(count):
        try:
            held.append(open_connection(port, b"E"))
            round_trip(held[-1], bytes([at & 0xFF]))
        except OSError:
            break
    opened = {"mode": "held", "asked": count, "open": len(held), "seconds": time.monotonic() - start}
    print(json.dumps(opened), flush=True)
    if not sys.stdin.readline():
        return False
    alive = 0
    for connection in held:
        with connection:
            try:
                round_trip(connection, b"?")
                alive += 1
            except OSError:
                continue
    print(json.dumps({"mode": "hold", "asked": count, "open": len(held), "alive": alive}), flush=True)
    return alive == count


def run_busy(port: int, count: int, seconds: float, size: int) -> tuple[dict[str, Any], bool]:
    barrier = threading.Barrier(count + 1)
    stop = threading.Event()
    results: list[tuple[int, bool, float]] = []

    def talk(at: int) -> None:
        rounds, worst, connection = 0, 0.0, None
        try:
            connection = open_connection(port, b"E")
        except OSError:
            connection = None
        barrier.wait()
        failed = connection is None
        while connection is not None and not failed and not stop.is_set():
            start = time.perf_counter()
            try:
                round_trip(connection, PATTERN[at : at + size])
                rounds += 1
            except OSError:
                failed = True
            worst = max(worst, time.perf_counter() - start)
            at = (at + size) % PERIOD
        if connection is not None:
            connection.close()
        results.append((rounds, failed, worst))

    threads = [threading.Thread(target=talk, args=(at * 997 % PERIOD,)) for at in range(count)]
    for thread in threads:
        thread.start()
    barrier.wait()
    start = time.monotonic()
    stop.wait(seconds)
    stop.set()
    for thread in threads:
        thread.join()
    rounds = sorted(float(each) for each, _, _ in results)
    squares = sum(each * each for each in rounds)
    failures = sum(failed for _, failed, _ in results)
    return {
        "mode": "busy",
        "count": count,
        "failures": failures,
        "seconds": time.monotonic() - start,
        "size": size,
        "round_trips": sum(rounds),
        "least": rounds[0],
        "median": quantile(rounds, 0.5),
        "most": rounds[-1],
        "jain": sum(rounds) ** 2 / (count * squares) if squares else 0.0,
        "worst": max(worst for _, _, worst in results),
    }, not failures


def run_first(port: int, patience: float) -> dict[str, Any]:
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        try:
            with open_connection(port, b"E") as connection:
                round_trip(connection, b"1")
                return {"mode": "first", "at": time.monotonic()}
        except OSError:
            time.sleep(0.001)
    raise SystemExit(f"load: nothing came back within {patience:g} s")


def main(arguments: list[str]) -> int:
    mode, port = arguments[0], int(arguments[1])
    rest = arguments[2:]
    good = True
    answer: dict[str, Any] | None = None
    if mode == "server":
        run_server(port)
    elif mode == "bulk":
        answer, good = run_bulk(port, int(rest[0]), int(rest[1]), rest[2])
    elif mode == "echo":
        answer = run_echo(port, int(rest[0]))
    elif mode == "connect":
        answer, good = run_connect(port, int(rest[0]))
    elif mode == "hold":
        good = run_hold(port, int(rest[0]))
    elif mode == "busy":
        answer, good = run_busy(port, int(rest[0]), float(rest[1]), int(rest[2]))
    elif mode == "first":
        answer = run_first(port, float(rest[0]))
    else:
        return 2
    if answer is not None:
        print(json.dumps(answer))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
