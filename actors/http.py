"""A small HTTP/1.1 server for trio: what the control API and the metrics endpoint stand on.

Theory of operation. `h11` is the state machine; this module moves its bytes and sets the bounds. One
connection is one task: read a request (head and body bounded in bytes and in time), call the handler, write
its answer, begin again while both sides keep the connection alive. Three kinds of answers exist:

- :class:`Response` with bytes: sent with a content length;
- :class:`Response` with an asynchronous iterator: sent in chunks as they come. While the handler waits for its
  next chunk the connection is watched, and the iterator is cancelled as soon as the client goes away;
- :class:`Upgrade`: `101 Switching Protocols`, after which the bare stream, and the bytes that the client sent
  too early, belong to the upgrade's own function. The stream is closed when that function returns.

Who waits holds no place. A connection without a request under way (idle, slow in sending one or in taking its answer)
only rests; when there are too many of those, the one that has rested for longest is closed. A request is answered in
one of the places of its kind of work (:class:`Work`), so that those that wait for something outside never keep one from
being answered that does not, and what must always be answered has places of its own.

A handler refuses with :class:`HttpError`. Any other exception is a defect: the client gets status 500 and the
exception goes up to whoever serves. What the client does wrong never reaches the server: it costs the client
its own connection.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import json
import os
import socket
import struct
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any
from urllib.parse import parse_qsl, unquote

import h11
import trio

from protocol.errors import PeerupError

JSON = "application/json"
TEXT = "text/plain; charset=utf-8"
_CHUNK = 64 * 1024
_LINGER_SECONDS = 1.0  # how long a refused client may take to read why
_UCRED = struct.Struct("3i")
_REASONS = {
    101: b"Switching Protocols",
    200: b"OK",
    201: b"Created",
    202: b"Accepted",
    204: b"No Content",
    400: b"Bad Request",
    401: b"Unauthorized",
    403: b"Forbidden",
    404: b"Not Found",
    405: b"Method Not Allowed",
    408: b"Request Timeout",
    409: b"Conflict",
    413: b"Content Too Large",
    415: b"Unsupported Media Type",
    421: b"Misdirected Request",
    422: b"Unprocessable Content",
    426: b"Upgrade Required",
    429: b"Too Many Requests",
    431: b"Request Header Fields Too Large",
    500: b"Internal Server Error",
    501: b"Not Implemented",
    502: b"Bad Gateway",
    503: b"Service Unavailable",
    504: b"Gateway Timeout",
}


@dataclasses.dataclass(frozen=True)
class HttpLimits:
    """What one client may cost.

    Attributes:
        head_bytes: the longest request line plus headers.
        body_bytes: the longest request body.
        request_seconds: from the first byte of a request to its last.
        idle_seconds: how long a kept-alive connection may say nothing.
        write_seconds: how long a single write may be stuck because the client does not read.
        connections: how many may rest, and how many requests of the kind `BRIEF` are answered at once.
        waiting: how many requests of the kind `WAITING` there may be, and how many others may wait for a place. One
            more gets status 503.
        reserved: how many requests of the kind `RESERVED` are answered at once.
    """

    head_bytes: int = 16 * 1024
    body_bytes: int = 1024 * 1024
    request_seconds: float = 10.0
    idle_seconds: float = 60.0
    write_seconds: float = 30.0
    connections: int = 64
    waiting: int = 256
    reserved: int = 16


class Work(enum.Enum):
    """What kind of work a request is, which decides whose place it takes.

    Attributes:
        BRIEF: answered from memory or within seconds. Waits for a place for as long as a request may take.
        WAITING: may wait for something outside, such as another machine, or goes on until the client leaves. Ends when
            the client goes away. One too many is refused at once.
        RESERVED: brief, and in places of its own, because it must always be answered.
        AT_ONCE: takes no time at all, and so no place.
    """

    BRIEF = "brief"
    WAITING = "waiting"
    RESERVED = "reserved"
    AT_ONCE = "at-once"


class HttpError(PeerupError):
    """What a handler raises in order to refuse a request. It becomes a JSON body (see :func:`json_error`).

    Attributes:
        status: the HTTP status, 400 to 599.
        code: a stable word for programs.
        reason: what and why, for people.
        action: what the person can do about it; may be empty.
        headers: additional response headers.
    """

    def __init__(
        self, status: int, code: str, reason: str, action: str = "", headers: Sequence[tuple[str, str]] = ()
    ) -> None:
        super().__init__(f"{reason}; {action}" if action else reason)
        self.status = status
        self.code = code  # type: ignore[misc]  # a class variable in general, this error carries many codes
        self.reason = reason
        self.action = action
        self.headers = tuple(headers)


@dataclasses.dataclass(frozen=True)
class PeerCredentials:
    """Who is at the other end of a Unix socket, as the kernel says (SO_PEERCRED)."""

    pid: int
    uid: int
    gid: int


@dataclasses.dataclass(frozen=True)
class HttpRequest:
    """One request, complete.

    Attributes:
        method: upper case.
        path: as sent, without the query; always begins with `/`.
        segments: the path cut at `/` and each part percent-decoded, so that an encoded slash stays inside its part.
        query: the last value of each parameter.
        headers: by lower-case name; repeated headers joined by `, `.
        body: at most `HttpLimits.body_bytes`.
        credentials: the client's, when it came through a Unix socket.
    """

    method: str
    path: str
    segments: tuple[str, ...]
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes
    credentials: PeerCredentials | None

    def json(self) -> Any:
        """The body as JSON; None when it is empty.

        Raises:
            HttpError: 400, the body is not JSON.
        """
        if not self.body:
            return None
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError) as error:
            raise HttpError(400, "bad-json", f"the request body is not JSON: {error}") from error


@dataclasses.dataclass(frozen=True)
class Response:
    """An answer. An iterator as body is streamed; it is closed in every case, also when the client leaves early."""

    status: int = 200
    body: bytes | AsyncIterator[bytes] = b""
    content_type: str = JSON
    headers: Sequence[tuple[str, str]] = ()


@dataclasses.dataclass(frozen=True)
class Upgrade:
    """Leave HTTP: answer 101 for this protocol and give the bare stream to `run(stream, left_over_bytes)`."""

    protocol: str
    run: Callable[[trio.abc.Stream, bytes], Awaitable[None]]


Handler = Callable[[HttpRequest], Awaitable[Response | Upgrade]]


def json_response(value: Any, status: int = 200) -> Response:
    """A response with this value as JSON."""
    return Response(status, json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode() + b"\n")


def json_error(error: HttpError) -> Response:
    """The response of a refusal: `{"error": {"code": ..., "reason": ..., "action": ...}}`."""
    body = {"error": {"code": error.code, "reason": error.reason, "action": error.action}}
    made = json_response(body, error.status)
    return dataclasses.replace(made, headers=error.headers)


async def serve_http(
    listeners: Sequence[trio.SocketListener],
    handler: Handler,
    *,
    limits: HttpLimits | None = None,
    allowed_uids: frozenset[int] | None = None,
    work_of: Callable[[HttpRequest], Work] | None = None,
    task_status: trio.TaskStatus[list[trio.SocketListener]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve on these listening sockets until cancelled; close them at the end.

    With `allowed_uids` only processes of these users are served (Unix sockets only); others get status 403 before a
    byte of theirs is read. `work_of` tells what kind of work a request is; without it all are brief.
    """
    limits = limits or HttpLimits()
    places = _Places(limits, work_of)

    async def serve(stream: trio.SocketStream) -> None:
        credentials = peer_credentials(stream.socket)
        refusal = None
        if allowed_uids is not None and (credentials is None or credentials.uid not in allowed_uids):
            who = "unknown user" if credentials is None else f"user {credentials.uid}"
            refusal = HttpError(403, "wrong-user", f"this socket does not serve {who}")
        await _serve(_Connection(stream, limits, credentials, places), handler, refusal)

    await trio.serve_listeners(serve, list(listeners), task_status=task_status)


async def serve_connection(
    stream: trio.abc.Stream,
    handler: Handler,
    *,
    limits: HttpLimits | None = None,
    credentials: PeerCredentials | None = None,
    refusal: HttpError | None = None,
) -> None:
    """Serve one connection until it is over, and close it. With `refusal` say only that.

    Raises: what the handler raises, other than :class:`HttpError`.
    """
    limits = limits or HttpLimits()
    await _serve(_Connection(stream, limits, credentials, _Places(limits, None)), handler, refusal)


async def _serve(connection: _Connection, handler: Handler, refusal: HttpError | None) -> None:
    try:
        with trio.CancelScope() as scope:
            connection.places.rest(connection, scope)
            if refusal is None:
                while await connection.serve_one(handler):
                    pass
            else:
                await connection.refuse(refusal)
    except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
        pass  # the client went away or stopped reading; there is nobody left to tell
    finally:
        connection.places.gone(connection)
        await trio.aclose_forcefully(connection.stream)


class _Places:
    """Who rests, and the places in which requests are answered; shared by all connections of a server."""

    def __init__(self, limits: HttpLimits, work_of: Callable[[HttpRequest], Work] | None) -> None:
        self._limits = limits
        self._work_of = work_of
        self._scopes: dict[_Connection, trio.CancelScope] = {}
        self._resting: dict[_Connection, None] = {}  # in the order in which they came to rest
        self._places = {
            Work.BRIEF: trio.CapacityLimiter(limits.connections),
            Work.WAITING: trio.CapacityLimiter(limits.waiting),
            Work.RESERVED: trio.CapacityLimiter(limits.reserved),
        }
        self._queued = 0

    def kind(self, request: HttpRequest) -> Work:
        """What kind of work this request is."""
        return Work.BRIEF if self._work_of is None else self._work_of(request)

    def rest(self, connection: _Connection, scope: trio.CancelScope | None = None) -> None:
        """This connection has no request under way. If too many have none, the one that rests longest is closed."""
        if scope is not None:
            self._scopes[connection] = scope
        self._resting.pop(connection, None)
        self._resting[connection] = None
        if len(self._resting) > self._limits.connections:
            longest = next(iter(self._resting))
            del self._resting[longest]
            self._scopes[longest].cancel()

    def gone(self, connection: _Connection) -> None:
        """This connection is over."""
        self._resting.pop(connection, None)
        self._scopes.pop(connection, None)

    @contextlib.asynccontextmanager
    async def work(self, connection: _Connection, kind: Work) -> AsyncGenerator[None]:
        """Have a place for a request of this connection while the block runs; afterwards it rests again.

        Raises:
            HttpError: 503, there is no place and none gets free in time.
        """
        self._resting.pop(connection, None)
        place = self._places.get(kind)
        try:
            if place is not None:
                await self._enter(place, connection, may_wait=kind is not Work.WAITING)
            try:
                yield
            finally:
                if place is not None:
                    place.release_on_behalf_of(connection)
        finally:
            if connection in self._scopes:
                self.rest(connection)

    async def _enter(self, place: trio.CapacityLimiter, connection: _Connection, *, may_wait: bool) -> None:
        try:
            place.acquire_on_behalf_of_nowait(connection)
        except trio.WouldBlock:
            if not may_wait:
                text = f"{self._limits.waiting} requests are waiting already"
                raise HttpError(503, "too-many-waiting", text, "end one of them, or try again later") from None
        else:
            return
        if self._queued >= self._limits.waiting:
            raise HttpError(503, "too-many-requests", f"{self._queued} requests wait for their turn already")
        self._queued += 1
        try:
            with trio.fail_after(self._limits.request_seconds):
                await place.acquire_on_behalf_of(connection)
        except trio.TooSlowError:
            text = f"no place got free within {self._limits.request_seconds:g} seconds"
            raise HttpError(503, "too-many-requests", text, "try again later") from None
        finally:
            self._queued -= 1


def peer_credentials(sock: trio.socket.SocketType) -> PeerCredentials | None:
    """Who connected to this Unix socket; None for sockets of other families."""
    if sock.family != socket.AF_UNIX:
        return None
    packed = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return PeerCredentials(*_UCRED.unpack(packed))


class _Connection:
    """One client's connection: h11's state machine and the stream that it speaks through."""

    def __init__(
        self, stream: trio.abc.Stream, limits: HttpLimits, credentials: PeerCredentials | None, places: _Places
    ) -> None:
        self.stream = stream
        self.places = places
        self._limits = limits
        self._credentials = credentials
        self._h11 = h11.Connection(h11.SERVER, max_incomplete_event_size=limits.head_bytes)
        self._left = False  # the client went away while it waited for an answer
        self._head_only = False  # the present request takes no body with its answer

    async def refuse(self, error: HttpError) -> None:
        """Answer with a refusal that was decided before anything was read."""
        with trio.move_on_after(self._limits.write_seconds):
            answer = dataclasses.replace(json_error(error), headers=(("connection", "close"),))
            await self._respond(answer, head_only=self._head_only)
            if isinstance(self.stream, trio.abc.HalfCloseableStream):
                # Closing while bytes of the client are unread would reset the connection under the answer.
                await self.stream.send_eof()
                with trio.move_on_after(_LINGER_SECONDS):
                    unread = 0
                    while unread <= self._limits.body_bytes:
                        data = await self.stream.receive_some(_CHUNK)
                        if not data:
                            break
                        unread += len(data)

    async def serve_one(self, handler: Handler) -> bool:
        """Serve one request; whether another may follow."""
        try:
            request = await self._read_request()
        except HttpError as error:
            await self.refuse(error)
            return False
        if request is None:
            return False
        try:
            async with self.places.work(self, kind := self.places.kind(request)):
                answer = await self._answer(handler, request, watch=kind is Work.WAITING)
                if isinstance(answer, Upgrade):
                    if self._h11.their_state not in (h11.DONE, h11.MUST_CLOSE):  # it waits, as the client asked for it
                        await self._upgrade(answer)
                        return False
                    answer = json_error(
                        HttpError(
                            426,
                            "upgrade-required",
                            f"this is only served with the header Upgrade: {answer.protocol}",
                            headers=(("upgrade", answer.protocol), ("connection", "close")),
                        )
                    )
                whole = isinstance(answer.body, bytes)
                if not whole:  # it comes into being while it is sent
                    await self._respond(answer, head_only=self._head_only)
        except HttpError as error:  # there is no place
            answer, whole = json_error(error), True
        if whole:
            await self._respond(answer, head_only=self._head_only)
        if self._h11.our_state is not h11.DONE or self._h11.their_state is not h11.DONE:
            return False
        self._h11.start_next_cycle()
        return True

    async def _answer(self, handler: Handler, request: HttpRequest, *, watch: bool) -> Response | Upgrade:
        """What the handler answers. With `watch` it is cancelled as soon as the client goes away.

        Raises:
            trio.BrokenResourceError: the client has gone away.
            Exception: the handler's, after the client has been told that the node failed.
        """
        answer: Response | Upgrade | None = None
        failure: Exception | None = None
        async with trio.open_nursery() as nursery:
            if watch:
                nursery.start_soon(self._watch_client, nursery.cancel_scope)
            try:
                answer = await handler(request)
            except HttpError as error:
                answer = json_error(error)
            except Exception as error:  # noqa: BLE001  # raised again below, outside of the nursery's exception group
                failure = error
            nursery.cancel_scope.cancel()
        if failure is not None:
            told = HttpError(500, "internal-error", "the node failed to answer", "see the node's log")
            with trio.move_on_after(1, shield=True):
                await self._respond(json_error(told), head_only=self._head_only)
            raise failure
        if answer is None:
            raise trio.BrokenResourceError("the client left before it had its answer")
        return answer

    async def _watch_client(self, scope: trio.CancelScope) -> None:
        """Return and cancel the scope when the client leaves, or sends far more than it should; keep what it sends."""
        early = 0
        while early <= self._limits.head_bytes:
            try:
                data = await self.stream.receive_some(_CHUNK)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                data = b""
            if not data:
                break
            early += len(data)
            self._h11.receive_data(bytes(data))
        self._left = True
        scope.cancel()

    async def _read_request(self) -> HttpRequest | None:
        try:
            # A connection between requests may idle; a request that has begun must come to its end.
            if not self._h11.trailing_data[0]:
                with trio.move_on_after(self._limits.idle_seconds) as idle:
                    await self._receive()
                if idle.cancelled_caught:
                    return None
            with trio.fail_after(self._limits.request_seconds):
                return await self._read_whole()
        except trio.TooSlowError:
            text = f"the request was not complete within {self._limits.request_seconds:g} seconds"
            raise HttpError(408, "too-slow", text) from None
        except h11.RemoteProtocolError as error:
            status = error.error_status_hint if error.error_status_hint in _REASONS else 400
            raise HttpError(status, "bad-request", f"not an HTTP request: {error}") from error

    async def _read_whole(self) -> HttpRequest | None:
        head: h11.Request | None = None
        body = bytearray()
        self._head_only = False
        while True:
            event = self._h11.next_event()
            if event is h11.NEED_DATA:
                if self._h11.they_are_waiting_for_100_continue:
                    await self._send(h11.InformationalResponse(status_code=100, headers=[]))
                await self._receive()
            elif isinstance(event, h11.Request):
                head = event
                self._head_only = head.method == b"HEAD"
                self._check_announced_length(head)
            elif isinstance(event, h11.Data):
                if len(body) + len(event.data) > self._limits.body_bytes:
                    raise self._too_large()
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                assert head is not None
                return self._request(head, bytes(body))
            else:  # the client closed, or h11 is paused: no request follows
                return None

    def _check_announced_length(self, head: h11.Request) -> None:
        for name, value in head.headers:
            if name == b"content-length" and int(value) > self._limits.body_bytes:
                raise self._too_large()

    def _too_large(self) -> HttpError:
        return HttpError(413, "body-too-large", f"the request body is over {self._limits.body_bytes} bytes")

    def _request(self, head: h11.Request, body: bytes) -> HttpRequest:
        target = head.target.decode("ascii", "replace")
        raw_path, _, raw_query = target.partition("?")
        if not raw_path.startswith("/"):
            raise HttpError(400, "bad-target", "the request target is not a path")
        try:
            segments = tuple(unquote(part, errors="strict") for part in raw_path.split("/")[1:])
            query = dict(parse_qsl(raw_query, keep_blank_values=True, errors="strict", max_num_fields=100))
        except ValueError as error:
            raise HttpError(400, "bad-target", f"the request target cannot be read: {error}") from error
        headers: dict[str, str] = {}
        for raw_name, raw_value in head.headers:
            name, value = raw_name.decode("ascii"), raw_value.decode("latin-1")
            headers[name] = f"{headers[name]}, {value}" if name in headers else value
        return HttpRequest(head.method.decode("ascii"), raw_path, segments, query, headers, body, self._credentials)

    async def _receive(self) -> None:
        try:
            self._h11.receive_data(bytes(await self.stream.receive_some(_CHUNK)))
        except trio.BrokenResourceError:
            self._h11.receive_data(b"")  # a reset is an end like another one here

    async def _send(self, event: Any) -> None:
        data = self._h11.send(event)
        if data:
            with trio.fail_after(self._limits.write_seconds):
                await self.stream.send_all(data)

    async def _upgrade(self, answer: Upgrade) -> None:
        headers = [("upgrade", answer.protocol), ("connection", "upgrade")]
        await self._send(h11.InformationalResponse(status_code=101, headers=headers, reason=_REASONS[101]))
        left_over, _ = self._h11.trailing_data
        await answer.run(self.stream, left_over)

    async def _respond(self, response: Response, *, head_only: bool = False) -> None:
        headers = [("content-type", response.content_type), *response.headers]
        reason = _REASONS.get(response.status, b"")
        body = response.body
        if isinstance(body, bytes):
            headers.append(("content-length", str(len(body))))
            await self._send(h11.Response(status_code=response.status, headers=headers, reason=reason))
            if body and not head_only:
                await self._send(h11.Data(data=body))
            await self._send(h11.EndOfMessage())
            return
        try:
            headers.append(("cache-control", "no-store"))
            await self._send(h11.Response(status_code=response.status, headers=headers, reason=reason))
            if not head_only:
                await self._stream_body(body)
            await self._send(h11.EndOfMessage())
        finally:
            close = getattr(body, "aclose", None)
            if close is not None:
                with trio.move_on_after(self._limits.write_seconds, shield=True):
                    await close()

    async def _stream_body(self, body: AsyncIterator[bytes]) -> None:
        """Send the chunks as they come, and stop when the client leaves."""
        gone = False
        failure: Exception | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_client, nursery.cancel_scope)
            try:
                async for chunk in body:
                    if chunk:
                        await self._send(h11.Data(data=chunk))
            except HttpError:
                gone = True  # too late for a status: the answer ends without its last chunk, which the client notices
            except Exception as error:  # noqa: BLE001  # raised again below, outside of the nursery's exception group
                failure = error
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
        if gone or self._left:
            raise trio.BrokenResourceError("the client left before the end of the stream")


def listen_unix(path: str | os.PathLike[str], *, mode: int = 0o600, backlog: int = 1024) -> trio.SocketListener:
    """A listening Unix socket at this path, which must be free, with this mode from its first moment on.

    Raises:
        OSError: the path is taken, too long, or in a directory that cannot be written.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        # The umask belongs to the whole process, and nothing else of it runs between these lines.
        before = os.umask(0o777 & ~mode)
        try:
            sock.bind(os.fspath(path))
        finally:
            os.umask(before)
        sock.listen(backlog)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return trio.SocketListener(trio.socket.from_stdlib_socket(sock))
