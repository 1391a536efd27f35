"""A TCP forwarder on loopback that passes bytes on no faster than it is told, as a slow line does."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

_PIECE = 4096
_BUFFER = 16 * 1024  # of the kernel; so that what is under way waits at its sender


class SlowWay:
    """Forwards what connects to `port` to `target`, a port on loopback.

    Attributes:
        rate: bytes a second, each way of each connection; 0 stops them all. May be changed at any time.
    """

    def __init__(self, target: int, rate: float = 1e9) -> None:
        self.rate = rate
        self._target = target
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(16)
        self.port: int = self._listener.getsockname()[1]
        self._ends: list[socket.socket] = []
        self._stopped = False
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def stop(self) -> None:
        """Cut everything."""
        self._stopped = True
        for end in (self._listener, *self._ends):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        for thread in self._threads:
            thread.join(10)

    def _accept(self) -> None:
        while not self._stopped:
            try:
                near, _ = self._listener.accept()
                far = socket.socket()
                far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
                far.connect(("127.0.0.1", self._target))
            except OSError:
                continue
            self._ends += (near, far)
            for pair in ((near, far), (far, near)):
                self._threads.append(threading.Thread(target=self._pass_on, args=pair, daemon=True))
                self._threads[-1].start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        """Pass on what comes, its end, and a reset as a reset."""
        try:
            while data := source.recv(_PIECE):
                target.sendall(data)
                began, given = time.monotonic(), 0.0
                while given < len(data) and not self._stopped:
                    time.sleep(0.002)
                    given += (time.monotonic() - began) * self.rate
                    began = time.monotonic()
            target.shutdown(socket.SHUT_WR)
        except OSError:
            for end in (source, target):
                with contextlib.suppress(OSError):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                    end.shutdown(socket.SHUT_RDWR)
