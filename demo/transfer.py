"""Downloads through the tunnel: whole files with their hashes, and a long one that goes on while actors die."""

from __future__ import annotations

import hashlib
import http.client
import socket
import threading
import time

CHUNK = 256 * 1024
PACE = 0.004
"""Seconds between chunks of the long download, so that it lasts through the whole demonstration (about 60 MB/s)."""


def fetch(port: int, name: str, timeout: float = 20.0) -> tuple[str, float]:
    """The SHA-256 of a file fetched from a loopback port, and the seconds that it took.

    Raises:
        OSError, http.client.HTTPException: the tunnel or the server broke.
    """
    began = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request("GET", f"/{name}")
        response = connection.getresponse()
        digest = hashlib.sha256()
        expected = int(response.headers["Content-Length"])
        received = 0
        while chunk := response.read(CHUNK):
            digest.update(chunk)
            received += len(chunk)
        if received != expected:
            raise http.client.IncompleteRead(b"", expected - received)
        return digest.hexdigest(), time.monotonic() - began
    finally:
        connection.close()


class LongDownload:
    """A download that is repeated until stopped, in a thread; each one is checked against the right hash.

    Attributes:
        finished: whole downloads with the right content.
        broken: downloads that ended with an error after they had begun to arrive.
        wrong: downloads whose content was not what it should be. One of these is a defect, always.
        received: bytes so far.
    """

    def __init__(self, port: int, name: str, sha256: str) -> None:
        self.finished = self.broken = self.wrong = self.received = 0
        self._delivers = False
        self._port, self._name, self._sha256 = port, name, sha256
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def is_under_way(self) -> bool:
        """Whether the present connection has delivered something."""
        return self._delivers

    def stop(self) -> None:
        """End after the chunk under way."""
        self._stopping.set()
        self._thread.join(20)

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                whole = self._download()
            except (OSError, http.client.HTTPException):
                self.broken += self._delivers
                self._delivers = False
                self._stopping.wait(0.05)
            else:
                if whole is True:
                    self.finished += 1
                elif whole is False:
                    self.wrong += 1

    def _download(self) -> bool | None:
        self._delivers = False
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=10)
        try:
            connection.connect()
            # Little is buffered on this side, so that a broken tunnel shows soon and not megabytes later.
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, CHUNK)
            connection.request("GET", f"/{self._name}")
            response = connection.getresponse()
            digest = hashlib.sha256()
            left = int(response.headers["Content-Length"])
            while left and not self._stopping.is_set():
                chunk = response.read(min(CHUNK, left))
                if not chunk:
                    raise http.client.IncompleteRead(b"", left)
                left -= len(chunk)
                self.received += len(chunk)
                self._delivers = True
                digest.update(chunk)
                self._stopping.wait(PACE)
            return None if left else digest.hexdigest() == self._sha256
        finally:
            connection.close()
