"""A client of a running node's control API: plain blocking calls over its Unix socket.

Data comes back as the JSON under `data`; refusals are raised as :class:`RefusedByNodeError` with the node's own
code, reason and advice, and a node that is not running as :class:`NotRunningError`.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import io
import json
import os
import socket
import time
from array import array
from collections.abc import Generator
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self
from urllib.parse import quote, urlencode

from protocol.errors import PeerupError

TIMEOUT = 65.0
"""Seconds to wait for an answer: longer than the node's own longest deadline (50 s for the first stream to a peer that
must be connected first), so that the node's explanation comes and not ours."""

UPGRADE = "peerup-descriptor"
"""The upgrade token of the stdio route, see `actors/api/routes/proxies.py`."""

BACKLOG_SECONDS = 10.0
"""Seconds that a crowd of others who connect at the same time may keep us waiting."""

BACKLOG_PAUSE = 0.02

_MAX_DESCRIPTORS = 4
_LONGEST_PATH = 107


class ClientError(PeerupError):
    """A call to the node failed. `action` says what the person can do about it; it may be empty."""

    code: ClassVar[str] = "client-error"

    def __init__(self, reason: str, action: str = "") -> None:
        super().__init__(f"{reason}; {action}" if action else reason)
        self.reason = reason
        self.action = action


class NotRunningError(ClientError):
    """Nobody serves the node's control socket."""

    code: ClassVar[str] = "not-running"


class LostConnectionError(ClientError):
    """The node ended the connection before it had answered, or answered nonsense."""

    code: ClassVar[str] = "lost-connection"


class RefusedByNodeError(ClientError):
    """The node understood and says no. `code`, `reason` and `action` are its own; `status` is the HTTP status."""

    def __init__(self, code: str, reason: str, action: str, status: int) -> None:
        super().__init__(reason, action)
        self.code = code  # type: ignore[misc]  # a class variable in general, this error carries the node's codes
        self.status = status


class Client:
    """Calls to one node. Holds no connection between calls, so it may be kept as long as one likes."""

    def __init__(self, control_socket: Path, *, timeout: float = TIMEOUT) -> None:
        self.control_socket = control_socket
        self.timeout = timeout

    def get(self, path: str, **query: Any) -> Any:
        """The data of a GET. If the API ends meanwhile, it is asked once more: its successor answers at once."""
        try:
            return self._call("GET", path, query, None)
        except LostConnectionError:
            return self._call("GET", path, query, None)

    def post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The data of a POST with this JSON body."""
        return self._call("POST", path, {}, body or {})

    def delete(self, path: str) -> Any:
        """The data of a DELETE."""
        return self._call("DELETE", path, {}, None)

    def is_running(self) -> bool:
        """Whether somebody serves the socket. It is tried: a left-over socket file counts for nothing."""
        try:
            with self._connection() as connection:
                connection.connect()
        except ClientError:
            return False
        return True

    def lines(self, path: str, **query: Any) -> Generator[dict[str, Any]]:
        """The lines of a streaming GET as they come. Close the generator to end the stream early."""
        with self._connection() as connection:
            response = connection.exchange("GET", _target(path, query), None, {})
            # Lines may come far apart; the stream's end is the node's affair.
            connection.settimeout(None)
            while True:
                try:
                    line = response.readline()
                except (OSError, http.client.HTTPException) as error:
                    raise self._lost(error) from error
                if not line:
                    if not response.isclosed() and response.chunked:
                        raise self._lost("the stream broke off")
                    return
                yield json.loads(line)

    def open_stdio(self, peer: str, service: str) -> socket.socket:
        """A connected socket to this service of this peer: what is written to it comes out there, and back."""
        sock, outcome = self.open_tunnel(peer, service, confirm=False)
        os.close(outcome)
        return sock

    def open_tunnel(self, peer: str, service: str, *, confirm: bool = True) -> tuple[socket.socket, int]:
        """As :meth:`open_stdio`, and the read end of a pipe that tells the outcome, see :mod:`peerup.stdio`.

        With `confirm` the outcome says whether every byte arrived at the far service, and the socket has to be shut
        down for writing at the end of what is sent: that it is closed altogether counts as a break.
        """
        headers = {"Upgrade": UPGRADE, "Connection": "Upgrade"}
        with self._connection() as connection:
            target = _target(
                "/v1/stdio", {"peer": peer, "service": service, **({"confirm": "true"} if confirm else {})}
            )
            response = connection.exchange("GET", target, None, headers)
            if response.status != http.client.SWITCHING_PROTOCOLS:
                raise self._lost(f"unexpected status {response.status}")
            sock = socket.socket(fileno=connection.receive_descriptor())
            return sock, connection.receive_descriptor()

    def _call(self, method: str, path: str, query: dict[str, Any], body: dict[str, Any] | None) -> Any:
        with self._connection() as connection:
            encoded = None if body is None else json.dumps(body).encode()
            headers = {} if body is None else {"Content-Type": "application/json"}
            response = connection.exchange(method, _target(path, query), encoded, headers)
            try:
                return json.loads(response.read())["data"]
            except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
                raise self._lost(error) from error

    def _connection(self) -> _Connection:
        return _Connection(self.control_socket, self.timeout)

    def _lost(self, error: object) -> LostConnectionError:
        return LostConnectionError(f"the node ended the connection at {self.control_socket}: {error}")


def segment(text: str) -> str:
    """The text as one segment of a path, slashes quoted."""
    return quote(text, safe="")


def _target(path: str, query: dict[str, Any]) -> str:
    given = {key.rstrip("_"): value for key, value in query.items() if value is not None}
    return f"{path}?{urlencode(given)}" if given else path


class _Connection(http.client.HTTPConnection):
    """HTTP over a Unix socket, which may also bring descriptors."""

    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path
        self._seconds = timeout
        self._incoming: _DescriptorReader | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if self._incoming is not None:
            self._incoming.finish()

    def connect(self) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(self._seconds)
        until = time.monotonic() + min(self._seconds, BACKLOG_SECONDS)
        try:
            while True:
                try:
                    sock.connect(os.fspath(self._path))
                    break
                except BlockingIOError:  # its backlog is full; with a timeout the kernel does not wait for it
                    if time.monotonic() >= until:
                        raise
                    time.sleep(BACKLOG_PAUSE)
        except OSError as error:
            sock.close()
            raise self._not_running(error) from error
        self._incoming = _DescriptorReader(sock)
        self.sock = _Socket(sock, self._incoming)

    def settimeout(self, seconds: float | None) -> None:
        """From now on wait so long for each piece of the answer."""
        if self._incoming is not None:
            self._incoming.sock.settimeout(seconds)

    def exchange(self, method: str, target: str, body: bytes | None, headers: dict[str, str]) -> _Response:
        """The response to this request.

        Raises:
            ClientError: there is none, or it is a refusal.
        """
        try:
            self.request(method, target, body=body, headers=headers)
            response = self.getresponse()
            content = response.read() if response.status >= http.client.BAD_REQUEST else b""
        except TimeoutError as error:
            reason = f"the node did not answer {method} {target} within {self._seconds:g} seconds"
            raise ClientError(reason, "`peerup actors` shows which part hangs") from error
        except (OSError, http.client.HTTPException) as error:
            detail = str(error) or type(error).__name__
            raise LostConnectionError(f"the node ended the connection at {self._path}: {detail}") from error
        if response.status >= http.client.BAD_REQUEST:
            raise _refusal(response.status, content)
        return response

    def receive_descriptor(self) -> int:
        """The descriptor that came beside the bytes, or comes now."""
        assert self._incoming is not None
        try:
            return self._incoming.take_descriptor()
        except OSError as error:
            raise LostConnectionError(f"the node ended the connection at {self._path}: {error}") from error

    def _not_running(self, error: OSError) -> ClientError:
        if error.errno in (errno.ENOENT, errno.ECONNREFUSED, errno.ENOTDIR):
            return NotRunningError(
                f"no node is running in this home (nobody listens at {self._path})",
                "start it with `peerup daemon`, or name its home with --home DIR",
            )
        if error.errno in (errno.EACCES, errno.EPERM):
            return ClientError(f"{self._path} belongs to another user", "run this as the user who runs the node")
        if len(os.fsencode(self._path)) > _LONGEST_PATH:
            return ClientError(f"{self._path} is too long for a socket", "choose a home with a shorter path")
        return ClientError(f"cannot connect to {self._path}: {error.strerror or error}")


_Response = http.client.HTTPResponse


class _Socket:
    """What `http.client` wants of a socket, reading through a reader that keeps descriptors."""

    def __init__(self, sock: socket.socket, reader: _DescriptorReader) -> None:
        self._sock = sock
        self._reader = reader

    def sendall(self, data: bytes) -> None:
        self._sock.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self._reader)

    def close(self) -> None:
        """Nothing: `http.client` closes early and reads on through the file that it made of the socket."""


class _DescriptorReader(io.RawIOBase):
    """Reads a Unix socket and keeps the descriptors that come beside the bytes."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__()
        self.sock = sock
        self._descriptors: list[int] = []

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = socket.CMSG_SPACE(_MAX_DESCRIPTORS * array("i").itemsize)
        count, ancillary, _, _ = self.sock.recvmsg_into([buffer], size, socket.MSG_CMSG_CLOEXEC)
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                numbers = array("i")
                numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
                self._descriptors.extend(numbers)
        return count

    def take_descriptor(self) -> int:
        """The next descriptor, waiting for it; the byte that carries it is dropped."""
        while not self._descriptors:
            if self.readinto(bytearray(1)) == 0:
                raise ConnectionResetError(errno.ECONNRESET, "no descriptor came")
        return self._descriptors.pop(0)

    def finish(self) -> None:
        """Close the socket, and the descriptors that nobody took."""
        self.sock.close()
        while self._descriptors:
            with contextlib.suppress(OSError):
                os.close(self._descriptors.pop())


def _refusal(status: int, content: bytes) -> RefusedByNodeError:
    try:
        error = json.loads(content)["error"]
        return RefusedByNodeError(str(error["code"]), str(error["reason"]), str(error.get("action", "")), status)
    except (ValueError, KeyError, TypeError, AttributeError):
        return RefusedByNodeError("bad-answer", f"the node answered with HTTP status {status}", "", status)
