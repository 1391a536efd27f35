"""Requests of the control API, what may answer them, and the table that brings the two together.

Every answer is one JSON object: `{"data": …}`, or `{"error": {"code", "reason", "action"}}` with an HTTP status
of 400 and above. A stream is newline-delimited JSON: each line is an object of its own, and a failure on the way comes
as a last line `{"error": …}`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from actors.http import HttpError, HttpRequest, Response, Upgrade, Work, json_response
from protocol.errors import PeerupError
from protocol.messages import Data
from supervisor.errors import RefusedError

if TYPE_CHECKING:
    from actors.api.node import Node

NDJSON = "application/x-ndjson"

STATUS_OF_CODE = {
    "bad-request": 400,
    "bad-name": 400,
    "invalid-value": 400,
    "faults-not-allowed": 403,
    "no-such-actor": 404,
    "no-such-route": 404,
    "not-found": 404,
    "unknown-peer": 404,
    "method-not-allowed": 405,
    "already-exists": 409,
    "already-started": 409,
    "port-in-use": 409,
    "limit-exceeded": 429,
    "no-addresses": 502,
    "protocol-not-supported": 502,
    "unreachable": 502,
    "wrong-peer": 502,
    "actor-restarting": 503,
    "not-delivered": 503,
    "deadline-exceeded": 504,
}
"""The HTTP status that goes with an error code. Any other refusal is 422: understood, and not possible."""


def http_error(error: PeerupError) -> HttpError:
    """The refusal that a client sees for this error."""
    if isinstance(error, HttpError):
        return error
    status = STATUS_OF_CODE.get(error.code, 422)
    if isinstance(error, RefusedError):
        return HttpError(status, error.code, error.reason, error.action)
    return HttpError(status, error.code, str(error) or error.code)


def error_object(error: PeerupError) -> dict[str, Data]:
    """The `{"error": …}` object for this error."""
    seen = http_error(error)
    return {"error": {"code": seen.code, "reason": seen.reason, "action": seen.action}}


def data_response(value: Data) -> Response:
    """An answer in one piece: `{"data": value}`."""
    return json_response({"data": value})


def lines_response(values: AsyncGenerator[Data]) -> Response:
    """An answer line by line. The generator is closed when the client leaves."""
    return Response(body=_encode_lines(values), content_type=NDJSON)


async def _encode_lines(values: AsyncGenerator[Data]) -> AsyncGenerator[bytes]:
    try:
        async for value in values:
            yield _encode_line(value)
    except PeerupError as error:
        yield _encode_line(error_object(error))
    finally:
        await values.aclose()


def _encode_line(value: Data) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"


class ParthianBody(AsyncIterator[bytes]):
    """A body in one piece, and an act that follows once the client has all of it.

    For what the answer itself would not survive, such as ending the process that writes it.
    """

    def __init__(self, body: bytes, act: Callable[[], Awaitable[None]]) -> None:
        self._body: bytes | None = body
        self._act: Callable[[], Awaitable[None]] | None = act

    async def __anext__(self) -> bytes:
        body, self._body = self._body, None
        if body is None:
            raise StopAsyncIteration
        return body

    async def aclose(self) -> None:
        """Act; the server calls this when the answer is written or cannot be."""
        act, self._act = self._act, None
        if act is not None:
            await act()


def data_then(value: Data, act: Callable[[], Awaitable[None]]) -> Response:
    """Answer `{"data": value}`, and then do `act`."""
    return Response(body=ParthianBody(_encode_line({"data": value}), act))


@dataclasses.dataclass(frozen=True)
class Call:
    """One request, taken apart: the path's placeholders, the query, and the JSON object that came with it."""

    request: HttpRequest
    captured: Mapping[str, str]
    body: Mapping[str, Data]

    def _value(self, key: str) -> Data:
        for source in (self.captured, self.body, self.request.query):
            if source.get(key) is not None:
                return source[key]
        return None

    def text(self, key: str, default: str | None = None) -> str:
        """The text under this key.

        Raises:
            HttpError: it is missing and there is no default, or it is not text.
        """
        value = self.optional_text(key)
        if value is None:
            value = default
        if value is None:
            raise HttpError(400, "bad-request", f"{key!r} is missing")
        return value

    def optional_text(self, key: str) -> str | None:
        """The text under this key, or None if there is none."""
        value = self._value(key)
        if value is not None and (not isinstance(value, str) or len(value) > 1000):
            raise HttpError(400, "bad-request", f"{key!r} must be a short text")
        return value

    def flag(self, key: str) -> bool:
        """Whether this switch is on."""
        value = self._value(key)
        if value in (None, False, "", "0", "false"):
            return False
        if value in (True, "1", "true"):
            return True
        raise HttpError(400, "bad-request", f"{key!r} must be true or false, not {value!r}")

    def number(self, key: str, default: float, *, low: float, high: float) -> float:
        """The number under this key, which must lie between `low` and `high`.

        Raises:
            HttpError: it is not a number in that range.
        """
        value = self._value(key)
        if value is None:
            return default
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            raise HttpError(400, "bad-request", f"{key!r} must be a number, not {value!r}") from None
        if not low <= number <= high:  # also refuses NaN
            raise HttpError(400, "bad-request", f"{key!r} must be from {low:g} to {high:g}, not {number:g}")
        return number

    def whole(self, key: str, default: int, *, low: int, high: int) -> int:
        """The whole number under this key, which must lie between `low` and `high`."""
        number = self.number(key, default, low=low, high=high)
        if number != int(number):
            raise HttpError(400, "bad-request", f"{key!r} must be a whole number, not {number:g}")
        return int(number)


Answer = Response | Upgrade
RouteHandler = Callable[["Node", Call], Awaitable[Answer]]


@dataclasses.dataclass(frozen=True)
class Route:
    """One method and path.

    A segment of the pattern in braces is a placeholder. Actor names hold slashes, so clients quote them (`%2F`).
    """

    method: str
    pattern: str
    handler: RouteHandler
    work: Work = Work.BRIEF

    def match(self, segments: tuple[str, ...]) -> dict[str, str] | None:
        """What the placeholders hold if this path is the route's, else None."""
        expected = self.pattern.strip("/").split("/")
        if len(expected) != len(segments):
            return None
        captured = {}
        for pattern, segment in zip(expected, segments, strict=True):
            if pattern.startswith("{"):
                captured[pattern[1:-1]] = segment
            elif pattern != segment:
                return None
        return captured


class Routes:
    """A table of routes."""

    def __init__(self, *parts: Routes) -> None:
        self._routes: list[Route] = [route for part in parts for route in part]

    def __iter__(self) -> Iterator[Route]:
        return iter(self._routes)

    def on(self, method: str, pattern: str, work: Work = Work.BRIEF) -> Callable[[RouteHandler], RouteHandler]:
        """Mark a function as the handler of this method and path, which is this kind of work."""

        def mark(function: RouteHandler) -> RouteHandler:
            self._routes.append(Route(method, pattern, function, work))
            return function

        return mark

    def work_of(self, request: HttpRequest) -> Work:
        """What kind of work a request is; to refuse one that nothing answers is brief."""
        for route in self._routes:
            if route.method == request.method and route.match(request.segments) is not None:
                return route.work
        return Work.BRIEF

    def find(self, request: HttpRequest) -> tuple[Route, Call]:
        """The route for this request, and the call to hand to it.

        Raises:
            HttpError: `no-such-route`, `method-not-allowed` where only other methods are served, or a bad body.
        """
        allowed: set[str] = set()
        for route in self._routes:
            captured = route.match(request.segments)
            if captured is None:
                continue
            if route.method == request.method:
                return route, Call(request, captured, _body_object(request))
            allowed.add(route.method)
        if allowed:
            methods = ", ".join(sorted(allowed))
            raise HttpError(
                405, "method-not-allowed", f"{request.path} answers {methods} only", headers=(("allow", methods),)
            )
        raise HttpError(404, "no-such-route", f"there is nothing at {request.path}")


def _body_object(request: HttpRequest) -> dict[str, Data]:
    value = request.json()
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise HttpError(400, "bad-request", "the request body must be a JSON object")
    return value
