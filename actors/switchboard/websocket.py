"""WebSocket under a connection: the opening handshake, and binary messages as a pipe and as a wire.

Both roles run over any pipe: a TCP socket, or TLS on one. See `protocol.websocket` for the frames.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from email.utils import formatdate
from typing import Final

import trio

from actors.reactor import Reactor
from actors.switchboard.errors import HandshakeError
from actors.switchboard.layered import LayeredWire
from actors.switchboard.turns import Account
from actors.switchboard.wire import Pipe, Way, Wire
from protocol.errors import PeerupError, ProtocolError
from protocol.multiaddr import Endpoint, Multiaddr
from protocol.websocket import CloseCode, Frames, WebSocketError
from protocol.websocket_opening import ClientOpening, ServerOpening

OPENING_DEADLINE: Final = 6.0
"""Seconds for the opening handshake: one round trip and the other side's time to think."""
DIALLED_DEADLINE: Final = 10.0
"""Seconds for ours: the same, and the time that a crowded server lets callers wait before it answers."""

GOODBYE: Final = 2.0
"""Seconds in which a client that was refused may read why, before the connection is cut."""

_MAX_IGNORED: Final = 64 * 1024
"""Bytes of a refused request's body that are read, so that the answer is not lost in a reset."""

MAX_EMPTY: Final = 8 * 1024
"""Bytes of frames without content that are heard during an upgrade: some hundred pings, which cost more than others."""

STAGE: Final = "websocket"
"""What errors of the opening handshake name as their stage."""

_PLAIN: Final = Multiaddr("/ws")
_SECURE: Final = Multiaddr("/tls/ws")


class NotFoundError(HandshakeError):
    """A client that wanted something else than a WebSocket; it has got an answer."""

    code = "not-websocket"

    def __init__(self) -> None:
        super().__init__(STAGE, "the client asked for something else than a WebSocket")


async def connect_websocket(
    pipe: Pipe, address: Multiaddr, *, host: str, random: Callable[[int], bytes], secure: bool
) -> WebSocketPipe:
    """Ask the other end of a pipe for a WebSocket. The pipe is the result's, or, on failure, the caller's.

    `address` is where it was dialled, `host` what the Host header says, `secure` whether TLS is below; `random` gives
    so many unpredictable bytes.

    Raises:
        HandshakeError: it does not agree, or not in time.
        OSError: the connection broke.
    """
    opening = ClientOpening(host, random(16))
    with _opening(DIALLED_DEADLINE):
        await pipe.send(opening.request)
        while (rest := opening.receive_data(await pipe.receive())) is None:
            await trio.lowlevel.checkpoint()  # see WebSocketPipe.receive
    frames = Frames(client=True, random_key=lambda: random(4))
    return WebSocketPipe(pipe, frames, rest, secure=secure, remote=address.without_peer_id())


async def accept_websocket(
    pipe: Pipe, *, wall: Callable[[], float], secure: bool, account: Account | None = None
) -> WebSocketPipe:
    """Answer the request of a client. The pipe is the result's, or, on failure, the caller's.

    `secure` says whether TLS is below, `wall` gives seconds since the Unix epoch; the account is told of progress.

    Raises:
        NotFoundError: it asked for something else, and has got an answer.
        HandshakeError: it hung up or was too slow.
        OSError: the connection broke.
    """
    opening = ServerOpening(formatdate(wall(), usegmt=True))
    with _opening(OPENING_DEADLINE):
        while not opening.answer:
            opening.receive_data(await pipe.receive())
        await pipe.send(opening.answer)
    if account is not None:
        account.progress()
    if not opening.accepted:
        await _let_read(pipe)
        raise NotFoundError
    return WebSocketPipe(pipe, Frames(client=False), opening.rest, secure=secure, remote=None)


def host_header(endpoint: Endpoint, name: str | None, *, secure: bool) -> str:
    """The Host header for this address; `name` stands for it if given."""
    host = name or endpoint.host.partition("%")[0]
    host = f"[{host}]" if ":" in host else host
    return host if endpoint.port == (443 if secure else 80) else f"{host}:{endpoint.port}"


@contextlib.contextmanager
def _opening(seconds: float) -> Iterator[None]:
    """Within the deadline, and errors named as those of this stage."""
    try:
        with trio.move_on_after(seconds) as scope:
            yield
    except ProtocolError as error:
        raise HandshakeError(STAGE, str(error)) from error
    if scope.cancelled_caught:
        raise HandshakeError(STAGE, f"not complete within {seconds:g} s")


async def _let_read(pipe: Pipe) -> None:
    """Wait until the client hangs up: bytes of its that nobody reads would make the kernel take the answer back."""
    ignored = 0
    with trio.move_on_after(GOODBYE), contextlib.suppress(OSError, PeerupError):
        while ignored < _MAX_IGNORED and (data := await pipe.receive()):
            ignored += len(data)


class WebSocketPipe:
    """The binary messages of a WebSocket as a stream of bytes; see `Pipe`.

    Args:
        received: what came behind the opening handshake.
        remote: where the other end was dialled; None for one that came to us.
    """

    def __init__(self, pipe: Pipe, frames: Frames, received: bytes, *, secure: bool, remote: Multiaddr | None) -> None:
        self._pipe = pipe
        self._frames = frames
        self._received = received
        self._secure = secure
        self._remote = remote
        self._empty = 0

    def __repr__(self) -> str:
        return f"<WebSocketPipe {self._pipe!r}>"

    @property
    def way(self) -> Way:
        """See `Pipe`."""
        below = self._pipe.way
        suffix = _SECURE if self._secure else _PLAIN
        return dataclasses.replace(
            below,
            transport="wss" if self._secure else "websocket",
            local_address=_extended(below.local_address, suffix),
            remote_address=self._remote or _extended(below.remote_address, suffix),
        )

    @property
    def readable(self) -> bool:
        """See `Pipe`."""
        return bool(self._received) or self._pipe.readable

    async def receive(self) -> bytes:
        """See `Pipe`.

        Raises:
            WebSocketError: what came are no frames that we take, or nothing is in them.
        """
        frames = self._frames
        while frames.closed is None:
            raw, self._received = self._received, b""
            if not raw and not (raw := await self._pipe.receive()):
                break
            buffer = memoryview(bytearray(frames.held + raw))
            length = frames.decode(buffer, len(buffer))
            if pong := frames.pong():
                await self._pipe.send(pong)
            if length:
                return bytes(buffer[:length])
            self._empty += len(raw)
            if self._empty > MAX_EMPTY:
                raise WebSocketError("nothing but empty frames")
            # A pipe that always has something does not wait. Whoever sends nothing but empty frames shall keep nobody
            # else waiting meanwhile.
            await trio.lowlevel.checkpoint()
        return b""

    async def send(self, data: bytes) -> None:
        """See `Pipe`."""
        await self._pipe.send(self._frames.encode(data))

    def detach(self, reactor: Reactor) -> Wire:
        """See `Pipe`."""
        return WebSocketWire(reactor, self._pipe.detach(reactor), self._frames, self._received)

    def close(self) -> None:
        """See `Pipe`."""
        self._pipe.close()


class WebSocketWire(LayeredWire):
    """The same for a link. What it sends at once is one message."""

    def __init__(self, reactor: Reactor, below: Wire, frames: Frames, received: bytes) -> None:
        super().__init__(reactor, below)
        self._frames = frames
        self._received = received
        self._close_code = CloseCode.NORMAL

    def __repr__(self) -> str:
        return f"<WebSocketWire {self._below!r}>"

    def recv_into(self, buffer: memoryview, /) -> int:
        """See `Wire`. The buffer has room for some KiB."""
        frames = self._frames
        if frames.closed is not None:
            return 0
        held = len(frames.held)
        buffer[:held] = frames.held
        if self._received:
            taken = self._received[: len(buffer) - held]
            self._received = self._received[len(taken) :]
            length = len(taken)
            buffer[held : held + length] = taken
        else:
            length = self._below.recv_into(buffer[held:])
            if not length:
                return 0
        try:
            length = frames.decode(buffer, held + length)
        except WebSocketError as error:
            self._close_code = error.close_code
            raise
        self._say_idle()
        if self._received or frames.closed is not None:
            self._recall()
        if not length and frames.closed is None:
            raise BlockingIOError
        return length

    def send(self, data: memoryview, /) -> int:
        """See `Wire`."""
        self._accept()
        self._offer(self._frames.encode(data))
        self._say_idle()
        return len(data)

    def _idle(self) -> bytes:
        return self._frames.pong()

    def _last_words(self) -> bytes:
        return self._frames.close(self._close_code)


def _extended(address: Multiaddr, suffix: Multiaddr) -> Multiaddr:
    return Multiaddr.from_components((*address.components, *suffix.components))
