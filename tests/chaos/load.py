"""Load through a tunnel whose every byte is checked: what comes back must be what was sent, up to where it breaks."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import threading

CHUNK = 32 * 1024
REQUESTS = 64
"""Chunks in one connection, so that connections are both long enough to be hit and renewed often."""


class EchoServer:
    """A TCP server on loopback that sends everything back, one thread for each connection."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self._stopping = False
        threading.Thread(target=self._accept, daemon=True).start()

    def stop(self) -> None:
        self._stopping = True
        self._listener.close()

    def _accept(self) -> None:
        while not self._stopping:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._echo, args=(connection,), daemon=True).start()

    @staticmethod
    def _echo(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while data := connection.recv(CHUNK):
                connection.sendall(data)


def pattern(seed: int, index: int) -> bytes:
    """The chunk that connection `seed` sends as its `index`-th: told apart from every other by its content."""
    return hashlib.shake_128(f"{seed}:{index}".encode()).digest(CHUNK)


class EchoLoad:
    """Connections to an echo server through the tunnel, one after another, in a thread, until stopped.

    Attributes:
        good: connections whose whole conversation was right.
        broken: connections that ended with an error or too early.
        wrong: replies that differed from what was sent. Any is a defect.
    """

    def __init__(self, port: int, seed: int) -> None:
        self.good = self.broken = self.wrong = 0
        self._port = port
        self._seed = seed
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(30)
        assert not self._thread.is_alive(), "a connection neither goes on nor breaks"

    def _run(self) -> None:
        turn = 0
        while not self._stopping.is_set():
            turn += 1
            try:
                self._converse(self._seed * 1_000_000 + turn)
            except OSError:
                self.broken += 1
                self._stopping.wait(0.02)

    def _converse(self, seed: int) -> None:
        with socket.create_connection(("127.0.0.1", self._port), timeout=15) as connection:
            for index in range(REQUESTS):
                sent = pattern(seed, index)
                connection.sendall(sent)
                received = b""
                while len(received) < len(sent):
                    data = connection.recv(len(sent) - len(received))
                    if not data:
                        self._judge(sent, received)
                        raise ConnectionResetError("ended early")
                    received += data
                self._judge(sent, received)
                if self._stopping.is_set():
                    return
        self.good += 1

    def _judge(self, sent: bytes, received: bytes) -> None:
        if received != sent[: len(received)]:
            self.wrong += 1


def echo_works(port: int, timeout: float = 1.0) -> bool:
    """Whether a new connection through the tunnel brings a few bytes back within `timeout` seconds."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=timeout) as connection:
            connection.sendall(b"are you there?")
            received = b""
            while len(received) < 14:
                data = connection.recv(14)
                if not data:
                    return False
                received += data
            return received == b"are you there?"
    except OSError:
        return False
