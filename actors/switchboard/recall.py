"""What was opened while a path died is tried on the next one, and reaches its service once.

Theory of operation. A connection that is silent may have lost the last things that were sent on it, or only their
answers, and what seems lost may still come out of it minutes later. So before a stream is tried again the peer is
asked, over the connection that has taken the silent one's place, protocol `RECALL`:

    asker  --> 32 bytes: the silent connection (the hash of its handshake, which both ends know)
               4 bytes each, big-endian: the yamux ids of streams that it has opened there, and FIN
    server --> 1 byte each: 1: it has not come, and will be refused if it does; 0: it has, or nobody knows

A stream that was recalled is opened anew with all that was sent on it (`actors.switchboard.ahead` has kept it). One
that has arrived is left where it is: its service may have done what it was told, and its answer may still come. Nobody
says which streams had come over connections of another life of the peer's process, so those are not tried again.

A node that does not speak the protocol is trusted with nothing twice: only streams on which nothing but the proposal
was sent are opened anew, and the old ones reset.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Final

import trio

from actors.switchboard.ahead import RECALL_DEADLINE
from actors.switchboard.channel import Channel, LinkClosedError
from actors.switchboard.connections import Connection
from actors.switchboard.errors import ConnectionLostError, ProtocolNotSupportedError, SwitchboardError
from actors.switchboard.streams import abandoning, open_negotiated
from protocol.errors import PeerupError
from protocol.peer_id import PeerId
from protocol.protocol_ids import RECALL
from protocol.stream_descriptor import ResetCode
from protocol.yamux import TooManyStreamsError

ANSWER_DEADLINE: Final = 6.0
"""Seconds for the peer's answer, over a connection that has just been made."""
PAUSE: Final = 1.0
"""Seconds until the peer is dialled again."""
MOMENT: Final = 0.02
"""Seconds until the next try where the new connection takes no more streams just now."""
MAX_ASKED: Final = 1024
"""Streams in one question."""
MAX_REMEMBERED: Final = 8
"""Connections of one peer that have ended, whose highest stream is remembered."""
MAX_PEERS: Final = 1024
"""Peers for which that is done; the ones that were there last."""

_BINDING: Final = 32
_NUMBER: Final = 4
_RECALLED: Final = 1


class RecallServer:
    """Refuses streams that have not come, for who has opened them.

    Args:
        connections: those to a peer.
    """

    def __init__(self, connections: Callable[[PeerId], Iterable[Connection]]) -> None:
        self._connections = connections
        self._ended: OrderedDict[PeerId, deque[tuple[bytes, int]]] = OrderedDict()  # and the highest stream of each

    def remember(self, connection: Connection) -> None:
        """A connection has ended."""
        ended = self._ended.setdefault(connection.peer, deque(maxlen=MAX_REMEMBERED))
        self._ended.move_to_end(connection.peer)
        ended.append((connection.binding, connection.link.session.newest_inbound))
        if len(self._ended) > MAX_PEERS:
            self._ended.popitem(last=False)

    def serve(self, connection: Connection, channel: Channel, first: bytes) -> None:
        """Take over a stream of `RECALL`."""
        asked = bytearray()

        def on_data(data: bytes) -> None:
            asked.extend(data)
            if len(asked) > _BINDING + MAX_ASKED * _NUMBER:
                channel.reset(ResetCode.PROTOCOL_VIOLATION)

        def on_finish() -> None:
            if len(asked) < _BINDING or (len(asked) - _BINDING) % _NUMBER:
                channel.reset(ResetCode.PROTOCOL_VIOLATION)
                return
            recall = self._recall(connection.peer, bytes(asked[:_BINDING]))
            numbers = [
                int.from_bytes(asked[start : start + _NUMBER], "big") for start in range(_BINDING, len(asked), _NUMBER)
            ]
            channel.send(bytes(map(recall, numbers)))
            channel.finish()

        channel.on_data, channel.on_finish = on_data, on_finish
        if first:
            on_data(first)

    def _recall(self, peer: PeerId, binding: bytes) -> Callable[[int], bool]:
        """What says of a stream of this connection whether it will never come."""
        for connection in self._connections(peer):
            if connection.binding == binding:
                return connection.link.session.recall
        for ended, newest in self._ended.get(peer, ()):
            if ended == binding:
                return lambda number: number > newest
        return lambda _: False


async def ask(connection: Connection, silent: Connection, numbers: Sequence[int]) -> list[bool]:
    """Which of the streams that were opened on a silent connection will never come out of it.

    Raises:
        ProtocolNotSupportedError: the peer does not speak of such things.
        PeerupError: it did not answer.
    """
    _, stream = await open_negotiated(connection, (RECALL,), deadline=ANSWER_DEADLINE)
    with abandoning(stream.channel):
        stream.channel.send(silent.binding + b"".join(number.to_bytes(_NUMBER, "big") for number in numbers))
        stream.channel.finish()
        answer = b""
        with trio.move_on_after(ANSWER_DEADLINE):
            while len(answer) < len(numbers):
                part = await stream.receive()
                if not part:
                    break
                answer += part
        if len(answer) != len(numbers):
            raise ConnectionLostError("the peer does not say which streams have come")
    return [byte == _RECALLED for byte in answer]


class Retries:
    """Moves streams that nobody has answered from connections that are doubted, or have ended, to others.

    Args:
        nursery: runs tasks.
        connect: gives a connection to a peer that takes streams, dialling where needed.
        moved: told of each stream that is on another channel, of another connection, now.
        log: tells a person, in words.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        *,
        connect: Callable[[PeerId], Awaitable[tuple[Connection, object]]],
        moved: Callable[[Channel, Channel, Connection], None],
        log: Callable[[str], None],
    ) -> None:
        self._nursery = nursery
        self._connect = connect
        self._moved = moved
        self._log = log
        self._busy: set[Connection] = set()

    def opened(self, connection: Connection) -> None:
        """A connection is there: what it leaves unanswered when it ends is worth another try."""
        connection.on_unanswered = self.rescue

    def doubted(self, connection: Connection) -> None:
        """A connection is doubted: move what nobody has answered on it, as soon as there is another one."""
        for ahead in list(connection.unanswered.values()):
            ahead.be_patient()
        self.rescue(connection)

    def rescue(self, connection: Connection) -> bool:
        """Try for the unanswered streams of this connection; whether that can be done."""
        if not connection.binding or connection.link.session.local_gone:
            return False
        if connection.unanswered and connection not in self._busy:
            self._busy.add(connection)
            self._nursery.start_soon(self._rescue, connection)
        return True

    async def _rescue(self, connection: Connection) -> None:
        await trio.lowlevel.checkpoint()
        try:
            with trio.move_on_after(RECALL_DEADLINE):
                while connection.unanswered and (
                    connection.doubted_since is not None or connection.link.end is not None
                ):
                    if not await self._try(connection):
                        break
        finally:
            self._busy.discard(connection)
            for ahead in list(connection.unanswered.values()):
                ahead.abandon()

    async def _try(self, connection: Connection) -> bool:
        """One try; whether it is worth another one."""
        try:
            fresh, _ = await self._connect(connection.peer)
        except SwitchboardError:
            if connection.link.end is not None:
                return False
            await trio.sleep(PAUSE)
            return True
        if fresh is connection:
            return False  # it lives
        try:
            await self._recall(connection, fresh)
        except (PeerupError, OSError):
            await trio.sleep(PAUSE)
            return True
        return await self._move(connection, fresh)

    async def _recall(self, connection: Connection, fresh: Connection) -> None:
        asked = [ahead for ahead in connection.unanswered.values() if ahead.movable and not ahead.recalled][:MAX_ASKED]
        if not asked:
            return
        try:
            answers = await ask(fresh, connection, [ahead.channel.id for ahead in asked])
        except ProtocolNotSupportedError:
            for ahead in asked:
                ahead.recalled = ahead.movable and ahead.silent
                if not ahead.recalled:
                    ahead.abandon()
            return
        for ahead, recalled in zip(asked, answers, strict=True):
            if ahead.movable and recalled:
                ahead.recalled = True
            elif ahead.movable:
                ahead.has_arrived()

    async def _move(self, connection: Connection, fresh: Connection) -> bool:
        """Move what was recalled; whether something is left."""
        count = 0
        for ahead in list(connection.unanswered.values()):
            while ahead.recalled and ahead.movable:
                old = ahead.channel
                try:
                    ahead.move(fresh)
                except TooManyStreamsError:
                    await trio.sleep(MOMENT)
                except (PeerupError, LinkClosedError):
                    return True
                else:
                    self._moved(old, ahead.channel, fresh)
                    count += 1
        if count:
            self._log(
                f"{count} streams to {connection.peer} that nobody had answered go another way ({fresh.way} instead of"
                f" {connection.way})"
            )
        return len(connection.unanswered) > MAX_ASKED
