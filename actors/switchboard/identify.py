"""Identify and identify-push: tells peers about us, and keeps what they say of themselves.

Each side asks the other when a connection comes up. When what we say changes (addresses, protocols), every connected
peer is sent a push. What a peer says is its own word, except for its signed record; an observed address counts only as
what this one peer has seen.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable

import trio

from actors.switchboard.connections import Connection
from actors.switchboard.link import Channel
from actors.switchboard.protocols import CancellableTimer
from actors.switchboard.streams import abandoning, open_negotiated
from protocol.errors import LimitExceededError, PeerupError, ProtocolError
from protocol.identify import Identification, IdentifyReader, encode_identification
from protocol.multiaddr import Multiaddr
from protocol.protocol_ids import IDENTIFY, IDENTIFY_PUSH
from protocol.stream_descriptor import ResetCode

IDENTIFY_DEADLINE = 10.0
"""Seconds for a peer to tell all about itself."""
MAX_PUSHES = 4
"""Pushes of one connection at a time: each may make us keep 32 KiB until it is complete."""


@dataclasses.dataclass(frozen=True)
class OwnDescription:
    """What we say of ourselves to everybody."""

    public_key: bytes
    agent: str
    listen_addresses: tuple[Multiaddr, ...]
    signed_record: bytes | None


class IdentifyRoom:
    """Both sides of identify and of its push.

    Args:
        describe: what we say now.
        protocols_for: the protocols that the peer of a connection may be told of.
        learned: called when a peer has told something new; `connection.identification` has it.
        call_later: the reactor's timer.
    """

    def __init__(
        self,
        describe: Callable[[], OwnDescription],
        protocols_for: Callable[[Connection], tuple[str, ...]],
        learned: Callable[[Connection], None],
        call_later: Callable[[float, Callable[[], None]], CancellableTimer],
    ) -> None:
        self._describe = describe
        self._protocols_for = protocols_for
        self._learned = learned
        self._call_later = call_later
        self._pushes: Counter[Connection] = Counter()  # under way

    def serve_identify(self, connection: Connection, channel: Channel, first: bytes) -> None:
        """Take over a stream of `/ipfs/id/1.0.0`: tell, and finish."""
        channel.on_data, channel.on_finish, channel.on_reset = _ignore_data, _ignore, _ignore_reset
        try:
            channel.send(self._encode(connection))
        except (
            LimitExceededError
        ):  # so many services that no peer takes them all; it is no reason to end the connection
            channel.reset(ResetCode.LIMIT_EXCEEDED)
            return
        channel.finish()

    def serve_push(self, connection: Connection, channel: Channel, first: bytes) -> None:
        """Take over a stream of `/ipfs/id/push/1.0.0`: listen to its end."""
        if self._pushes[connection] >= MAX_PUSHES:
            channel.reset(ResetCode.LIMIT_EXCEEDED)
            return
        self._pushes[connection] += 1
        reader = IdentifyReader()
        over = False

        def end() -> None:
            nonlocal over
            if not over:
                over = True
                deadline.cancel()
                self._pushes[connection] -= 1
                if not self._pushes[connection]:
                    del self._pushes[connection]

        def on_data(data: bytes) -> None:
            try:
                reader.receive_data(data)
            except ProtocolError:
                give_up()

        def on_finish() -> None:
            try:
                push = reader.finish(connection.peer)
            except ProtocolError:
                give_up()
                return
            end()
            channel.finish()
            self._keep(connection, push)

        def on_reset(_: int) -> None:
            end()

        def give_up() -> None:
            if not over:
                end()
                channel.reset(ResetCode.PROTOCOL_VIOLATION)

        channel.on_data, channel.on_finish, channel.on_reset = on_data, on_finish, on_reset
        deadline = self._call_later(IDENTIFY_DEADLINE, give_up)
        if first:
            on_data(first)

    async def identify(self, connection: Connection) -> None:
        """Ask the peer who it is; in the end `connection.identified` is set, whether it told us or not."""
        try:
            with trio.move_on_after(IDENTIFY_DEADLINE):
                _, stream = await open_negotiated(connection, (IDENTIFY,))
                with abandoning(stream.channel):
                    stream.channel.finish()
                    reader = IdentifyReader()
                    while data := await stream.receive():
                        reader.receive_data(data)
                    self._keep(connection, reader.finish(connection.peer))
        except PeerupError as error:
            connection.identify_failure = str(error)
        finally:
            connection.identified.set()

    async def push(self, connection: Connection) -> None:
        """Tell the peer what has changed. A peer that does not take pushes asks when it wants to know."""
        try:
            with trio.move_on_after(IDENTIFY_DEADLINE):
                _, stream = await open_negotiated(connection, (IDENTIFY_PUSH,))
                with abandoning(stream.channel):
                    stream.channel.send(self._encode(connection))
                    stream.channel.finish()
                    while await stream.receive():
                        pass
        except PeerupError as error:
            connection.identify_failure = str(error)

    def _encode(self, connection: Connection) -> bytes:
        own = self._describe()
        return encode_identification(
            public_key=own.public_key,
            agent_version=own.agent,
            protocol_version="ipfs/0.1.0",
            protocols=self._protocols_for(connection),
            listen_addresses=own.listen_addresses,
            observed_address=connection.remote_address if not connection.relayed else None,
            signed_peer_record=own.signed_record,
        )

    def _keep(self, connection: Connection, told: Identification) -> None:
        known = connection.identification
        connection.identification = told if known is None else known.updated_by(told)
        self._learned(connection)


def _ignore_data(_: bytes) -> None:
    pass


def _ignore() -> None:
    pass


def _ignore_reset(_: int) -> None:
    pass
