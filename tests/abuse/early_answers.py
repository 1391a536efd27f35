"""A service that answers an upload before it has read it, and closes: `413 Content Too Large`, `401 Unauthorized`.

Run as a program it counts clients that get no answer, directly, through socat (where it is installed) and through a
tunnel of two nodes: `python -m tests.abuse.early_answers [CLIENTS]`. It works in a checkout of any age.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.abuse.world import World
from tests.support.ports import own_port

ANSWER = b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 9\r\nConnection: close\r\n\r\ntoo large"
UPLOAD = 4_000_000
"""Bytes: more than the kernel's buffers on the way take."""
REQUEST = b"POST / HTTP/1.1\r\nHost: example\r\nContent-Length: %d\r\n\r\n" % UPLOAD


class EarlyAnswers:
    """An HTTP server on loopback that reads the head of a request, answers, and closes with the body unread."""

    def __init__(self, answer: bytes = ANSWER) -> None:
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def stop(self) -> None:
        """Accept no more."""
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                part = connection.recv(4096)
                if not part:
                    return
                head += part
            connection.sendall(self._answer)


def upload(port: int) -> bytes:
    """What a client gets that uploads and then reads, as most HTTP clients do."""
    answer = b""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        with contextlib.suppress(ConnectionError):
            client.sendall(REQUEST)
            for _ in range(UPLOAD // 40_000):
                client.sendall(bytes(40_000))
        while part := client.recv(65536):
            answer += part
    return answer


def unanswered(port: int, clients: int) -> int:
    """How many of so many clients, eight at a time, get no whole answer."""
    with ThreadPoolExecutor(8) as pool:
        return sum(answer != ANSWER for answer in pool.map(lambda _: upload(port), range(clients)))


def main(clients: int) -> None:
    """Print the table."""
    service = EarlyAnswers()
    print(f"direct TCP: {unanswered(service.port, clients)} of {clients} without an answer")
    if shutil.which("socat"):
        port = own_port()
        with subprocess.Popen(
            ["socat", f"TCP-LISTEN:{port},bind=127.0.0.1,fork,reuseaddr", f"TCP:127.0.0.1:{service.port}"],
            stderr=subprocess.DEVNULL,
        ) as socat:
            time.sleep(1)
            print(f"socat:      {unanswered(port, clients)} of {clients} without an answer")
            socat.terminate()
    with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory() as directory:
        world = World(Path(directory), stack)
        world.home.run("service", "add", "upload", f"127.0.0.1:{service.port}")
        port = int(world.laptop.run_json("proxy", "home", "upload", "0")["listen"].rpartition(":")[2])
        print(f"peerup:     {unanswered(port, clients)} of {clients} without an answer")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
