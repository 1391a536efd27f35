"""The opening handshake of WebSocket (RFC 6455, section 4) in both roles, over HTTP/1.1.

A client asks for one thing, an upgrade, and takes one answer. A server answers one request: an upgrade gets 101, any
other what a small web server that has nothing to show would say. Both sides are bounded in bytes here, and in time
by whoever waits for them. No subprotocol and no extension is offered or agreed on; `Origin` and the path are not looked
at, since what connects must prove its peer id afterwards.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterable
from typing import ClassVar, Final

import h11

from protocol.errors import InvalidValueError, ProtocolError

__all__ = ["MAX_REQUEST", "MAX_RESPONSE", "ClientOpening", "OpeningError", "ServerOpening"]

MAX_REQUEST: Final = 8 * 1024
"""Bytes of a request's head, as common web servers take it; browsers with all their cookies stay below."""
MAX_RESPONSE: Final = 16 * 1024
"""Bytes of a response's head; reverse proxies add a few headers of their own."""

_MAGIC: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_VERSION: Final = b"13"

_PAGES: Final = {
    400: b"Bad Request",
    404: b"Not Found",
    426: b"Upgrade Required",
    431: b"Request Header Fields Too Large",
}


class OpeningError(ProtocolError):
    """The other side does not speak WebSocket, or not as it should."""

    code: ClassVar[str] = "websocket-refused"


class ClientOpening:
    """Asks for a WebSocket.

    Args:
        host: the value of the Host header: a name or an address (IPv6 in brackets), with the port where it is not the
            scheme's own.
        nonce: 16 random bytes.

    Attributes:
        request: what to send.

    Raises:
        InvalidValueError: `host` cannot stand in a request.
    """

    def __init__(self, host: str, nonce: bytes) -> None:
        key = base64.b64encode(nonce)
        self._expected = accept_token(key)
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_RESPONSE)
        headers = [
            (b"Upgrade", b"websocket"),
            (b"Connection", b"Upgrade"),
            (b"Sec-WebSocket-Key", key),
            (b"Sec-WebSocket-Version", _VERSION),
        ]
        try:
            request = h11.Request(method="GET", target="/", headers=[(b"Host", host.encode("ascii")), *headers])
        except (h11.LocalProtocolError, UnicodeError) as error:
            raise InvalidValueError(f"{host!r} is not the name of a web server: {error}") from None
        self.request: bytes = (self._http.send(request) or b"") + (self._http.send(h11.EndOfMessage()) or b"")

    def receive_data(self, data: bytes) -> bytes | None:
        """Take bytes of the server's, empty for its end. Once it has agreed: what came behind that; until then None.

        Raises:
            OpeningError: it did not agree.
        """
        if not data:
            raise OpeningError("no WebSocket is here: the other side closed the connection")
        try:
            self._http.receive_data(data)
            while True:
                event = self._http.next_event()
                if event is h11.NEED_DATA:
                    return None
                if isinstance(event, h11.InformationalResponse) and event.status_code != 101:
                    continue
                break
        except h11.RemoteProtocolError as error:
            raise OpeningError(f"no WebSocket is here: {error}") from error
        if isinstance(event, h11.InformationalResponse):
            self._check(event)
            return self._http.trailing_data[0]
        if isinstance(event, h11.Response):
            reason = event.reason.decode("ascii", "replace")
            raise OpeningError(f"no WebSocket is here: the web server answers {event.status_code} {reason}".rstrip())
        raise OpeningError("no WebSocket is here: the answer is none to our request")

    def _check(self, response: h11.InformationalResponse) -> None:
        headers = response.headers
        if b"websocket" not in _tokens(headers, b"upgrade") or b"upgrade" not in _tokens(headers, b"connection"):
            raise OpeningError("the server switched to something else than WebSocket")
        if [value for name, value in headers if name == b"sec-websocket-accept"] != [self._expected]:
            raise OpeningError("the server's answer is not one to our request")
        if any(name in {b"sec-websocket-extensions", b"sec-websocket-protocol"} for name, _ in headers):
            raise OpeningError("the server agreed to something that was not offered")


class ServerOpening:
    """Answers one request.

    Args:
        date: the value of the Date header of answers that refuse (RFC 9110, section 6.6.1).

    Attributes:
        answer: what to send, once the request is complete or cannot become one; empty until then.
        accepted: whether it agrees; with an answer that does not, close the connection.
        rest: what came behind a request that was accepted.
    """

    def __init__(self, date: str) -> None:
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_REQUEST)
        self._date = date
        self.answer = b""
        self.accepted = False
        self.rest = b""

    def receive_data(self, data: bytes) -> None:
        """Take bytes of the client's, until there is an answer.

        Raises:
            OpeningError: it hung up.
        """
        if not data:
            raise OpeningError("the client closed the connection before it had asked for anything")
        self._http.receive_data(data)
        try:
            event = self._http.next_event()
        except h11.RemoteProtocolError as error:
            status = error.error_status_hint
            self._refuse(status if status in _PAGES else 400)
            return
        if isinstance(event, h11.Request):
            self._answer(event)

    def _answer(self, request: h11.Request) -> None:
        headers = request.headers
        upgrade = b"websocket" in _tokens(headers, b"upgrade") and b"upgrade" in _tokens(headers, b"connection")
        if not upgrade or request.method != b"GET":
            self._refuse(404, body=request.method != b"HEAD")
            return
        keys = [value for name, value in headers if name == b"sec-websocket-key"]
        if [value for name, value in headers if name == b"sec-websocket-version"] != [_VERSION]:
            self._refuse(426)
        elif len(keys) != 1 or not _is_key(keys[0]):
            self._refuse(400)
        else:
            self._accept(keys[0])

    def _accept(self, key: bytes) -> None:
        event = self._http.next_event()  # the end of the request, or else it announced a body
        if not isinstance(event, h11.EndOfMessage) or self._http.next_event() is not h11.PAUSED:
            self._refuse(400)
            return
        response = h11.InformationalResponse(
            status_code=101,
            reason=b"Switching Protocols",
            headers=[
                (b"Upgrade", b"websocket"),
                (b"Connection", b"Upgrade"),
                (b"Sec-WebSocket-Accept", accept_token(key)),
            ],
        )
        self.rest = self._http.trailing_data[0]
        self.answer = self._http.send(response) or b""
        self.accepted = True

    def _refuse(self, status: int, *, body: bool = True) -> None:
        reason = _PAGES[status]
        content = b"%d %s\n" % (status, reason.lower())
        lines = [
            b"HTTP/1.1 %d %s" % (status, reason),
            b"Date: " + self._date.encode("ascii"),
            b"Content-Type: text/plain",
            b"Content-Length: %d" % len(content),
        ]
        if status == 426:
            lines += [b"Upgrade: websocket", b"Sec-WebSocket-Version: " + _VERSION]
        lines += [b"Connection: close, Upgrade" if status == 426 else b"Connection: close", b"", b""]
        self.answer = b"\r\n".join(lines) + (content if body else b"")


def accept_token(key: bytes) -> bytes:
    """What a server answers to this key (section 4.2.2)."""
    return base64.b64encode(hashlib.sha1(key + _MAGIC, usedforsecurity=False).digest())


def _is_key(value: bytes) -> bool:
    try:
        return len(base64.b64decode(value, validate=True)) == 16
    except binascii.Error:
        return False


def _tokens(headers: Iterable[tuple[bytes, bytes]], wanted: bytes) -> set[bytes]:
    return {token.strip().lower() for name, value in headers if name == wanted for token in value.split(b",")}
