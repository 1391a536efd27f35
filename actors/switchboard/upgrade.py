"""From a connected pipe to a secured, authenticated, multiplexed connection, in both roles.

Theory of operation. A connection is upgraded in stages, each with its own deadline and all of them within one::

    security    multistream-select agrees on /noise; nothing else is offered, plaintext least of all
    handshake   Noise XX: both sides prove their peer id, and agree on the cipher of what follows
    judgement   (inbound) the policy decides on the proven peer id; who is refused hears nothing more
    muxer       agreed inside the handshake where both sides can, otherwise by multistream-select afterwards

What can be said ahead is said ahead: the dialling side sends its proposal and its first handshake message in one
piece, and its last handshake message together with the proposal of the muxer.

Before the judgement the other side is a stranger: the state machines bound the bytes, the deadlines bound the time,
`actors.switchboard.admission` bounds the number. The work of inbound handshakes is done in turns (see
`actors.switchboard.turns`).

A node that many call at once lets callers wait for their turn before it says the first word. So a dialling side waits
longer for the answer to its first message than for what follows.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import trio
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from actors.switchboard.ciphers import better_ciphers
from actors.switchboard.errors import HandshakeError, NotAuthorisedError, WrongPeerError
from actors.switchboard.turns import Account, Nobody, Turns
from actors.switchboard.wire import Pipe, network_failed
from protocol import noise
from protocol.errors import ProtocolError
from protocol.multistream import HEADER, Initiator, Responder
from protocol.noise import NoiseHandshake, NoiseResult
from protocol.noise_cipher import Cipher, CipherState
from protocol.peer_id import PeerId
from protocol.yamux import Role

NOISE = "/noise"
YAMUX = "/yamux/1.0.0"
MUXERS = (YAMUX,)

UPGRADE_DEADLINE = 10.0
"""Seconds for all stages: three round trips over the worst mobile link, and no more for those who dawdle."""
STAGE_DEADLINE = 6.0
"""Seconds for one stage."""
FIRST_ANSWER_DEADLINE = 10.0
"""Seconds for the answer to a dialling side's first message: a stage, and the time that a crowded node lets it wait."""
DIALLED_DEADLINE = 14.0
"""Seconds for all stages of a dialling side: within a dial's deadline."""

_LENGTH_PREFIX = 2


@dataclasses.dataclass(frozen=True)
class Upgraded:
    """All that a link is made of.

    Attributes:
        received: ciphertext that came behind the upgrade.
        plaintext: muxer bytes that came in the same Noise message as the end of the negotiation.
        streams: how many streams of ours the peer accepts at a time; None if it does not say.
        binding: see `NoiseResult`.
    """

    peer: PeerId
    role: Role
    send: CipherState
    receive: CipherState
    received: bytes
    plaintext: bytes
    streams: int | None = None
    binding: bytes = b""


class RefusedPeerError(HandshakeError):
    """The judgement on an inbound peer was no. `peer` is who it proved to be."""

    code = "not-authorised"

    def __init__(self, peer: PeerId) -> None:
        super().__init__("judgement", f"{peer} may not connect")
        self.peer = peer


class Upgrader:
    """Upgrades pipes in the name of one node.

    Args:
        static_key: this process's Noise key.
        identity: the node's public key and its signature over the static key.
        ciphers: what it would rather use than ChaChaPoly with peers that would too, the best first.
        streams: how many streams of a peer it accepts at a time, which it tells.
        turns: in which inbound handshakes compute.
    """

    def __init__(
        self,
        static_key: X25519PrivateKey,
        identity: noise.Identity,
        ciphers: tuple[Cipher, ...] | None = None,
        streams: int | None = None,
        *,
        turns: Turns | None = None,
    ) -> None:
        self._static_key = static_key
        self._identity = identity
        self._ciphers = better_ciphers() if ciphers is None else ciphers
        self._streams = streams
        self._turns = turns or Turns()

    async def outbound(self, pipe: Pipe, expected: PeerId) -> Upgraded:
        """Upgrade a pipe that we connected; on failure it is left to the caller to close.

        Raises:
            WrongPeerError: somebody else than `expected` answered; they learned nothing about us.
            NotAuthorisedError: the peer hung up when it knew who we are.
            HandshakeError: anything else.
            SwitchboardError: what the pipe itself has to say.
        """
        exchange = _Exchange(pipe)
        with exchange.deadline(DIALLED_DEADLINE):
            handshake = NoiseHandshake(
                initiator=True,
                static_key=self._static_key,
                identity=self._identity,
                muxers=MUXERS,
                ciphers=self._ciphers,
                streams=self._streams,
                expected_peer=expected,
            )
            with exchange.stage("security", FIRST_ANSWER_DEADLINE):
                security = Initiator((NOISE,))
                await exchange.send(security.data_to_send() + handshake.data_to_send())
                while security.result is None:
                    security.receive_data(await exchange.receive_opening())
            with exchange.stage("handshake"):
                if security.leftover:
                    handshake.receive_data(security.leftover)
                while handshake.result is None:
                    handshake.receive_data(await exchange.receive())
            result = handshake.result
            last = handshake.data_to_send()
            if result.muxer is not None:
                with exchange.stage("muxer"):
                    await exchange.send(last)
                return _upgraded(result, Role.CLIENT, result.unread, b"")
            with exchange.stage("muxer"):
                muxer = Initiator(MUXERS)
                secured = _Secured(exchange, result)
                await exchange.send(last + secured.seal(muxer.data_to_send()))
                try:
                    while muxer.result is None:
                        muxer.receive_data(await secured.receive())
                except _HungUpError:
                    if secured.silent:
                        raise not_authorised() from None
                    raise
            return _upgraded(result, Role.CLIENT, secured.unread, muxer.leftover)

    async def inbound(self, pipe: Pipe, judge: Callable[[PeerId], bool], account: Account | None = None) -> Upgraded:
        """Upgrade a pipe that we accepted; on failure it is left to the caller to close.

        `judge` says of the proven peer id whether it may connect. The steps are charged to the account.

        Raises:
            RefusedPeerError: it may not.
            HandshakeError: anything else.
        """
        exchange = _Exchange(pipe)
        account = account or Nobody()
        with exchange.deadline(UPGRADE_DEADLINE):
            with exchange.stage("security"):
                security = Responder((NOISE,), listed=(NOISE,))
                while security.result is None:
                    security.receive_data(await exchange.receive_opening())
                    await exchange.send(security.data_to_send())
            account.progress()
            with exchange.stage("handshake"):
                async with self._turns.turn(account):
                    handshake = NoiseHandshake(
                        initiator=False,
                        static_key=self._static_key,
                        identity=self._identity,
                        muxers=MUXERS,
                        ciphers=self._ciphers,
                        streams=self._streams,
                    )
                    if security.leftover:
                        handshake.receive_data(security.leftover)
                await self._answer(exchange, handshake, account)
                while handshake.result is None:
                    data = await exchange.receive()
                    async with self._turns.turn(account):
                        handshake.receive_data(data)
                    await self._answer(exchange, handshake, account)
            account.progress()
            result = handshake.result
            if not judge(result.peer_id):
                raise RefusedPeerError(result.peer_id)
            if result.muxer is not None:
                return _upgraded(result, Role.SERVER, result.unread, b"")
            with exchange.stage("muxer"):
                muxer = Responder(MUXERS, listed=MUXERS)
                secured = _Secured(exchange, result)
                while muxer.result is None:
                    muxer.receive_data(await secured.receive())
                    if reply := muxer.data_to_send():
                        await exchange.send(secured.seal(reply))
            return _upgraded(result, Role.SERVER, secured.unread, muxer.leftover)

    async def _answer(self, exchange: _Exchange, handshake: NoiseHandshake, account: Account) -> None:
        if answer := handshake.data_to_send():
            await exchange.send(answer)
            account.progress()


def _upgraded(result: NoiseResult, role: Role, received: bytes, plaintext: bytes) -> Upgraded:
    return Upgraded(
        result.peer_id, role, result.send, result.receive, received, plaintext, result.streams, result.binding
    )


def not_authorised() -> NotAuthorisedError:
    """What a peer that hangs up right after the handshake means by it."""
    return NotAuthorisedError(
        "judgement",
        "the peer closed the connection as soon as it knew who we are; most likely it does not authorise this node"
        " (there: peerup auth add, with the id that peerup whoami shows here)",
    )


class _HungUpError(HandshakeError):
    """The other side closed or reset the connection."""


class _Exchange:
    """Reads and writes on the pipe, within the deadline of the present stage."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe
        self._stage = "connection"
        self._opening = b""

    @contextlib.contextmanager
    def deadline(self, seconds: float) -> Iterator[None]:
        """Everything within must be done in time."""
        with trio.move_on_after(seconds) as scope:
            yield
        if scope.cancelled_caught:
            raise HandshakeError(self._stage, f"not complete within {seconds:g} s")

    @contextlib.contextmanager
    def stage(self, name: str, seconds: float | None = None) -> Iterator[None]:
        """Name what fails within, and bound it: by `STAGE_DEADLINE` unless it is told otherwise."""
        self._stage = name
        try:
            with self.deadline(STAGE_DEADLINE if seconds is None else seconds):
                yield
        except noise.WrongPeerError as error:
            raise WrongPeerError(name, str(error)) from error
        except ProtocolError as error:
            raise HandshakeError(name, str(error)) from error

    async def receive_opening(self) -> bytes:
        """As `receive`; what can never become multistream-select's header is refused at its first byte.

        Otherwise the first byte of an HTTP request, say, would be a length, and the rest of it waited for.
        """
        data = await self.receive()
        if len(self._opening) < len(HEADER):
            self._opening += data[: len(HEADER)]
            if not HEADER.startswith(self._opening[: len(HEADER)]):
                raise HandshakeError(self._stage, f"no libp2p peer: it begins with {self._opening[:12]!r}")
        return data

    async def receive(self) -> bytes:
        """The next bytes; never empty."""
        try:
            data = await self._pipe.receive()
        except OSError as error:
            raise self._broken(error) from error
        if not data:
            raise _HungUpError(self._stage, "the other side closed the connection")
        return data

    async def send(self, data: bytes) -> None:
        """Send all of it."""
        if data:
            try:
                await self._pipe.send(data)
            except OSError as error:
                raise self._broken(error) from error

    def _broken(self, error: OSError) -> HandshakeError:
        """Who hangs up says something by it; a network that fails does not."""
        return (HandshakeError if network_failed(error) else _HungUpError)(self._stage, _words(error))


def _words(error: OSError) -> str:
    if error.strerror:
        return error.strerror.lower()
    return str(error) or "the connection broke"


class _Secured:
    """Small messages over the secured channel, before a link takes it over."""

    def __init__(self, exchange: _Exchange, result: NoiseResult) -> None:
        self._exchange = exchange
        self._send = result.send
        self._receive = result.receive
        self.unread = result.unread
        self.silent = True

    def seal(self, data: bytes) -> bytes:
        """The Noise message that carries these bytes."""
        sealed = self._send.encrypt(data)
        return len(sealed).to_bytes(_LENGTH_PREFIX, "big") + sealed

    async def receive(self) -> bytes:
        """The plaintext of the next Noise message; not empty."""
        while True:
            if len(self.unread) >= _LENGTH_PREFIX:
                end = _LENGTH_PREFIX + int.from_bytes(self.unread[:_LENGTH_PREFIX], "big")
                if len(self.unread) >= end:
                    sealed, self.unread = self.unread[_LENGTH_PREFIX:end], self.unread[end:]
                    self.silent = False
                    if plain := self._receive.decrypt(sealed):
                        return plain
                    continue
            self.unread += await self._exchange.receive()
