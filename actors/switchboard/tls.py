"""TLS below a WebSocket, so that what it carries passes for HTTPS.

TLS proves nothing about peers here: that is Noise's task, inside. A server has a certificate so that those who look at
the connection see a web server's; a client verifies it, since that is what a web client does (decision 12).

The state machine is the standard library's over memory buffers, so it runs over any pipe and never waits by itself:

    pipe or wire below -> incoming -> SSLObject -> plaintext
    plaintext -> SSLObject -> outgoing -> pipe or wire below
"""

from __future__ import annotations

import contextlib
import os
import ssl
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar, Final, NoReturn, cast

import trio
from cryptography import x509

from actors.files import PermissionsError, read_limited
from actors.reactor import Reactor
from actors.switchboard.errors import AddressError, HandshakeError
from actors.switchboard.layered import LayeredWire
from actors.switchboard.turns import Account, Nobody, Turns
from actors.switchboard.wire import Pipe, Way, Wire
from protocol.errors import PeerupError

HANDSHAKE_DEADLINE: Final = 6.0
"""Seconds for the TLS handshake of a caller: two round trips and its time to compute."""
DIALLED_DEADLINE: Final = 10.0
"""Seconds for ours: the same, and the time that a crowded server lets callers wait before it answers."""

STAGE: Final = "tls"
"""What errors of the handshake name as their stage."""

_ALPN: Final = "http/1.1"
_READ_SIZE: Final = 4096
_MAX_FILE: Final = 256 * 1024
_WEEK: Final = 7 * 86400.0


class CertificateError(AddressError):
    """The files of a certificate cannot be used. The text says which, why, and what to do."""

    code: ClassVar[str] = "bad-certificate"


class ServerCertificate:
    """A certificate with its key, in PEM files as ACME clients leave them; read anew when they have changed.

    Files that cannot be used stop nothing once good ones have been read: those stay in force, and `warn` says why.

    Args:
        certificate: the chain, the server's own certificate first.
        key: its private key, not encrypted, which nobody but this user and a group may read.
        warn: tells a person, in words.
        wall: seconds since the Unix epoch.

    Raises:
        CertificateError: they cannot be used.
    """

    def __init__(self, certificate: Path, key: Path, *, warn: Callable[[str], None], wall: Callable[[], float]) -> None:
        self._certificate = certificate
        self._key = key
        self._warn = warn
        self._wall = wall
        self._seen = self._signature()
        self._context, self.names = self._load()

    def context(self) -> ssl.SSLContext:
        """What a connection that begins now uses."""
        signature = self._signature()
        if signature != self._seen:
            self._seen = signature
            try:
                self._context, self.names = self._load()
            except CertificateError as error:
                self._warn(f"the certificate that was loaded before stays in use: {error}")
        return self._context

    def _signature(self) -> tuple[object, ...]:
        return _signature(self._certificate), _signature(self._key)

    def _load(self) -> tuple[ssl.SSLContext, tuple[str, ...]]:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        _harden(context)
        try:
            chain, _ = read_limited(self._certificate, _MAX_FILE)
            key, status = read_limited(self._key, _MAX_FILE)
            _check_key(self._key, status)
            leaf = x509.load_pem_x509_certificates(chain)[0]
            names = _names(leaf)
            with _in_memory(chain) as certificate, _in_memory(key) as private:
                context.load_cert_chain(certificate, private, password=_refuse_password)
        except ssl.SSLError as error:
            what = "is not the key of" if error.reason == "KEY_VALUES_MISMATCH" else "cannot be used with"
            raise CertificateError(
                f"the key {self._key} {what} the certificate {self._certificate} ({error.reason or error})"
            ) from error
        except ValueError as error:
            raise CertificateError(f"{self._certificate} holds no certificate in PEM form") from error
        except (PeerupError, OSError) as error:
            raise CertificateError(
                f"{error} (network.tls in config.yaml names the certificate for listen addresses with /tls/ws)"
            ) from error
        left = leaf.not_valid_after_utc.timestamp() - self._wall()
        if left < _WEEK:
            when = f"{leaf.not_valid_after_utc:%Y-%m-%d}"
            self._warn(f"the certificate {self._certificate} {'expires' if left > 0 else 'has expired'} on {when}")
        return context, names


class ClientTrust:
    """Whose certificates a client believes: the system's roots and those of one more file. Read when first needed.

    Args:
        extra: a file of further roots in PEM form, read anew when it has changed.
    """

    def __init__(self, extra: Path | None = None) -> None:
        self._extra = extra
        self._seen: object = None
        self._context: ssl.SSLContext | None = None

    async def context(self) -> ssl.SSLContext:
        """What a connection that begins now uses.

        Raises:
            CertificateError: the file cannot be used.
        """
        seen = None if self._extra is None else _signature(self._extra)
        if self._context is None or seen != self._seen:
            # The system's roots are some hundred KiB of text, which takes tens of milliseconds.
            self._context = await trio.to_thread.run_sync(self._load)
            self._seen = seen
        return self._context

    def _load(self) -> ssl.SSLContext:
        context = ssl.create_default_context()
        _harden(context)
        if self._extra is not None:
            try:
                context.load_verify_locations(cadata=read_limited(self._extra, 16 * _MAX_FILE)[0].decode("ascii"))
            except (PeerupError, OSError, ValueError) as error:
                raise CertificateError(f"the trusted certificates in {self._extra} cannot be used: {error}") from error
        return context


class TlsPipe:
    """A pipe within TLS; see `Pipe`. Do the `handshake` before anything else.

    `server_name` is whose certificate a client expects, a name or an IP address; None makes it the server's side.
    """

    def __init__(self, pipe: Pipe, context: ssl.SSLContext, *, server_name: str | None) -> None:
        self._pipe = pipe
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._incoming, self._outgoing, server_side=server_name is None, server_hostname=server_name
        )

    def __repr__(self) -> str:
        return f"<TlsPipe {self._pipe!r}>"

    async def handshake(self, turns: Turns | None = None, account: Account | None = None) -> None:
        """Agree with the other side on keys; a client believes the server's certificate, or raises.

        `turns` are those in which callers' handshakes compute; the steps are charged to the account.

        Raises:
            HandshakeError: it came to nothing.
            OSError: the connection broke.
        """
        turns, account = turns or Turns(), account or Nobody()
        seconds = HANDSHAKE_DEADLINE if self._tls.server_side else DIALLED_DEADLINE
        with trio.move_on_after(seconds) as scope:
            while not await self._step(turns, account):
                data = await self._pipe.receive()
                if not data:
                    raise HandshakeError(STAGE, "the other side closed the connection")
                self._incoming.write(data)
        if scope.cancelled_caught:
            raise HandshakeError(STAGE, f"not complete within {seconds:g} s")

    async def _step(self, turns: Turns, account: Account) -> bool:
        done = False
        try:
            async with turns.turn(account):
                with contextlib.suppress(ssl.SSLWantReadError):
                    self._tls.do_handshake()
                    done = True
        except ssl.SSLError as error:
            with trio.move_on_after(0.1), contextlib.suppress(OSError, PeerupError):
                await self._send_outgoing()  # the alert, which says it to the other side
            raise HandshakeError(STAGE, _words(error)) from error
        if await self._send_outgoing() or done:
            account.progress()  # what came was a complete flight
        return done

    @property
    def way(self) -> Way:
        """See `Pipe`."""
        return self._pipe.way

    @property
    def readable(self) -> bool:
        """See `Pipe`."""
        return self._tls.pending() > 0 or self._pipe.readable

    async def receive(self) -> bytes:
        """See `Pipe`."""
        while True:
            try:
                return self._tls.read(_READ_SIZE)
            except ssl.SSLWantReadError:
                await self._send_outgoing()
            await trio.lowlevel.checkpoint()  # there may always be something, and never anything in it
            data = await self._pipe.receive()
            if not data:
                return b""  # cut off, perhaps by an attacker; what is inside notices that by itself
            self._incoming.write(data)

    async def send(self, data: bytes) -> None:
        """See `Pipe`."""
        view = memoryview(data)
        while view:
            view = view[self._tls.write(view) :]
        await self._send_outgoing()

    def detach(self, reactor: Reactor) -> Wire:
        """See `Pipe`."""
        return TlsWire(reactor, self._pipe.detach(reactor), self._tls, self._incoming, self._outgoing)

    def close(self) -> None:
        """See `Pipe`."""
        self._pipe.close()

    async def _send_outgoing(self) -> bool:
        """Send what there is to send; whether there was anything."""
        data = self._outgoing.read()
        if data:
            await self._pipe.send(data)
        return bool(data)


class TlsWire(LayeredWire):
    """A wire within TLS."""

    def __init__(
        self, reactor: Reactor, below: Wire, tls: ssl.SSLObject, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO
    ) -> None:
        super().__init__(reactor, below)
        self._tls = tls
        self._incoming = incoming
        self._outgoing = outgoing
        self._ended = False

    def __repr__(self) -> str:
        return f"<TlsWire {self._below!r}>"

    def recv_into(self, buffer: memoryview, /) -> int:
        """See `Wire`."""
        length = self._decrypt(buffer)
        if not length and not self._ended:
            received = self._below.recv_into(buffer)
            if not received:
                return 0
            self._incoming.write(buffer[:received])
            length = self._decrypt(buffer)
            if not length and not self._ended:
                raise BlockingIOError
        if length == len(buffer) or (length and self._ended):
            self._recall()
        return length

    def _decrypt(self, buffer: memoryview) -> int:
        length = 0
        try:
            while length < len(buffer) and not self._ended:
                taken = cast("int", self._tls.read(len(buffer) - length, buffer[length:]))  # the stubs forget this
                length += taken
                self._ended = not taken  # the other side has said goodbye
        except ssl.SSLWantReadError:
            self._say_idle()
        return length

    def send(self, data: memoryview, /) -> int:
        """See `Wire`."""
        self._accept()
        view = data
        while view:
            view = view[self._tls.write(view) :]
        self._offer(self._outgoing.read())
        return len(data)

    def _idle(self) -> bytes:
        return self._outgoing.read()

    def _last_words(self) -> bytes:
        with contextlib.suppress(ssl.SSLError):
            self._tls.unwrap()  # says goodbye; does not wait for the other side's
        return self._outgoing.read()


def _harden(context: ssl.SSLContext) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    context.set_alpn_protocols([_ALPN])


def _signature(path: Path) -> tuple[int, ...]:
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@contextlib.contextmanager
def _in_memory(content: bytes) -> Iterator[str]:
    """The path of a file in memory with this content.

    OpenSSL only reads by path, and a confined process gets the content of the real file but has no right to its path.
    """
    fd = os.memfd_create("certificate", os.MFD_CLOEXEC)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(content)
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


def _check_key(path: Path, status: os.stat_result) -> None:
    """Anybody may follow a link to a key; only this user, root and a group may read it."""
    if status.st_uid not in (os.geteuid(), 0):
        raise PermissionsError(f"the key {path} belongs to another user ({status.st_uid}), who decides what it is")
    if status.st_mode & 0o027:
        raise PermissionsError(
            f"others may read or change the key {path} (mode {stat.S_IMODE(status.st_mode):04o}); "
            f"repair it: chmod 600 {path}"
        )


def _refuse_password() -> NoReturn:
    raise CertificateError("the key is encrypted, and there is nobody to ask for the password; store it without one")


def _names(certificate: x509.Certificate) -> tuple[str, ...]:
    """The DNS names that it is good for, wildcards left out."""
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return ()
    names = extension.value.get_values_for_type(x509.DNSName)
    return tuple(name for name in names if not name.startswith("*"))


def _words(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the server's certificate is not believed: {error.verify_message}"
    return (error.reason or str(error)).lower().replace("_", " ")
