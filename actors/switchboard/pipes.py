"""From an address to a pipe, and from an accepted socket to a pipe: TCP as it is, WebSocket, WebSocket in TLS.

On a pipe libp2p's own handshakes begin. What comes before them for WebSocket has its own stages and deadlines
here; who may begin it is decided as for all callers (`actors.switchboard.admission`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from actors.switchboard.errors import AddressError, HandshakeError
from actors.switchboard.transports import SECURE_WEBSOCKET, TCP, WEBSOCKET, connect_tcp, parse_route
from actors.switchboard.turns import Account, Turns
from actors.switchboard.wire import Pipe, SocketPipe
from protocol.multiaddr import Multiaddr

if TYPE_CHECKING:
    import ssl

    from actors.switchboard.tls import ClientTrust, ServerCertificate

FIRST_BYTE_DEADLINE = 6.0
"""Seconds for a caller's first byte where it decides what the caller speaks."""

_TLS_HANDSHAKE = 0x16
_MULTISTREAM = 0x13


@dataclasses.dataclass(frozen=True)
class TlsFiles:
    """Where the certificates are, in PEM form.

    Attributes:
        certificate, key: the node's own chain and its key; None: it listens on no address with TLS.
        trusted: roots that are believed besides the system's.
    """

    certificate: Path | None = None
    key: Path | None = None
    trusted: Path | None = None


class Pipes:
    """Makes pipes.

    Args:
        files: for TLS. They are read when they are needed.
        wall: seconds since the Unix epoch.
        warn: tells a person, in words.
        random: so many unpredictable bytes.
        turns: in which callers' handshakes compute.
    """

    def __init__(
        self,
        files: TlsFiles,
        *,
        wall: Callable[[], float],
        warn: Callable[[str], None],
        random: Callable[[int], bytes] = secrets.token_bytes,
        turns: Turns | None = None,
    ) -> None:
        self._files = files
        self._wall = wall
        self._warn = warn
        self._random = random
        self._certificate: ServerCertificate | None = None
        self._trust: ClientTrust | None = None
        self._turns = turns or Turns()

    def prepare(self, listen: tuple[Multiaddr, ...]) -> str | None:
        """Get ready to be called at these addresses. Returns whom our certificate is for, if one is needed.

        Raises:
            AddressError: one of them needs a certificate, and there is none that can be used.
        """
        if any(parse_route(address).transport != TCP for address in listen):
            import actors.switchboard.websocket  # noqa: F401  # now, and not while the first caller waits
        secure = next((address for address in listen if parse_route(address).transport == SECURE_WEBSOCKET), None)
        if secure is None:
            return None
        if self._files.certificate is None or self._files.key is None:
            raise AddressError(
                f"cannot listen on {secure}: it needs a certificate; name its files in config.yaml as "
                "network.tls.certificate_file and network.tls.key_file"
            )
        from actors.switchboard.tls import ServerCertificate  # takes memory that others have no use for

        self._certificate = ServerCertificate(
            self._files.certificate, self._files.key, warn=self._warn, wall=self._wall
        )
        return next(iter(self._certificate.names), None)

    async def connect(self, address: Multiaddr) -> Pipe:
        """A pipe to this address (an IP address, see `transports.resolve`).

        Raises:
            AddressError: refused, unreachable, no answer in time, or no such transport.
            HandshakeError: TCP went well, and what comes upon it did not.
        """
        route = parse_route(address)
        pipe: Pipe = SocketPipe(await connect_tcp(address))
        if route.transport == TCP:
            return pipe
        from actors.switchboard.tls import TlsPipe
        from actors.switchboard.websocket import connect_websocket, host_header

        secure = route.transport == SECURE_WEBSOCKET
        try:
            with _named("websocket"):
                if secure:
                    context = await self._trusting()
                    pipe = tls = TlsPipe(pipe, context, server_name=route.server_name or _bare(route.endpoint.host))
                    with _named("tls"):
                        await tls.handshake()
                host = host_header(route.endpoint, route.server_name, secure=secure)
                return await connect_websocket(pipe, address, host=host, random=self._random, secure=secure)
        except ValueError as error:
            pipe.close()
            raise AddressError(f"the name of the server cannot be used: {error}") from error
        except BaseException:
            pipe.close()
            raise

    async def accept(
        self, sock: socket.socket, pipe: SocketPipe, transports: frozenset[str], account: Account | None = None
    ) -> Pipe:
        """The pipe on which libp2p begins, for a caller whose accepted socket is `pipe` and which has sent something.

        On failure that is left to the caller of this function to close. The work is charged to the account.

        Raises:
            HandshakeError: it speaks nothing of that, or was too slow.
        """
        transport = next(iter(transports)) if len(transports) == 1 else await _look(sock, transports)
        if transport == TCP:
            return pipe
        from actors.switchboard.websocket import accept_websocket

        with _named("websocket"):
            if transport == WEBSOCKET:
                return await accept_websocket(pipe, wall=self._wall, secure=False, account=account)
            from actors.switchboard.tls import TlsPipe

            assert self._certificate is not None
            tls = TlsPipe(pipe, self._certificate.context(), server_name=None)
            with _named("tls"):
                await tls.handshake(self._turns, account)
            return await accept_websocket(tls, wall=self._wall, secure=True, account=account)

    async def _trusting(self) -> ssl.SSLContext:
        from actors.switchboard.tls import ClientTrust

        if self._trust is None:
            self._trust = ClientTrust(self._files.trusted)
        return await self._trust.context()


@contextlib.contextmanager
def _named(stage: str) -> Iterator[None]:
    """Name the stage in which a connection broke."""
    try:
        yield
    except OSError as error:
        raise HandshakeError(stage, (error.strerror or "the connection broke").lower()) from error


def _bare(host: str) -> str:
    return host.partition("%")[0]


def first_stage(transports: frozenset[str]) -> str:
    """The name of the stage in which a caller is as long as it has sent nothing."""
    if len(transports) > 1:
        return "transport"
    return {TCP: "security", WEBSOCKET: "websocket", SECURE_WEBSOCKET: "tls"}[next(iter(transports))]


async def _look(sock: socket.socket, transports: frozenset[str]) -> str:
    """What a caller speaks, by its first byte, which stays where it is."""
    with _named("transport"), trio.move_on_after(FIRST_BYTE_DEADLINE):
        while True:
            try:
                first = sock.recv(1, socket.MSG_PEEK)
            except (BlockingIOError, InterruptedError):
                await trio.lowlevel.wait_readable(sock)
                continue
            if not first:
                raise HandshakeError("transport", "the caller hung up")
            transport = {_TLS_HANDSHAKE: SECURE_WEBSOCKET, _MULTISTREAM: TCP}.get(first[0], WEBSOCKET)
            if transport not in transports:
                raise HandshakeError("transport", f"nothing here begins with {first!r}")
            return transport
    raise HandshakeError("transport", f"nothing came within {FIRST_BYTE_DEADLINE:g} s")
