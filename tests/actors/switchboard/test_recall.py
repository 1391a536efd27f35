"""Streams that nobody has answered move to another connection, with all that was sent, and reach the peer once."""

import contextlib
import functools

import pytest
import trio

from actors.switchboard.connections import Connection
from actors.switchboard.errors import UnreachableError
from actors.switchboard.recall import RecallServer, Retries
from actors.switchboard.socket_end import SocketEnd
from actors.switchboard.streams import open_ahead
from actors.switchboard.wire import Way
from protocol.multiaddr import Multiaddr
from protocol.multistream import Responder
from protocol.protocol_ids import RECALL
from protocol.stream_descriptor import ResetCode, reset_message
from tests.actors.dataplane import (
    Ends,
    receive_data,
    receive_message,
    running,
    send_message,
    tcp_pair,
    until,
)

from .support import peer_of

SERVICE = "/peerup/echo/1.0.0"
HERE = Multiaddr("/ip4/127.0.0.1/tcp/4001")
LOST = reset_message(ResetCode.CONNECTION_LOST)


def connection(name, link, *, outbound):
    peer, way = peer_of("far" if outbound else "near"), Way("direct", "tcp", HERE, HERE)
    made = Connection(name, peer, outbound, way, 0.0, 0.0, binding=name.encode().ljust(32))
    made.link = link
    return made


class World:
    """Two connections between two peers, the old one of which is silent."""

    def __init__(self, reactor, nursery, *, speaks=True):
        self.reactor = reactor
        self.speaks = speaks
        self.served = []
        near, self.on_the_way = tcp_pair()
        self.into_far, far = tcp_pair()
        self.ends = {"old": Ends(reactor, (near, far)), "new": Ends(reactor)}
        self.near = {name: connection(name, ends.client, outbound=True) for name, ends in self.ends.items()}
        self.far = {name: connection(name, ends.server, outbound=False) for name, ends in self.ends.items()}
        self.recalls = RecallServer(lambda _: self.far.values())
        self.fresh = self.near["new"]
        for name, ends in self.ends.items():
            ends.on_stream = functools.partial(self.serve, name)
        self.moved = []
        self.retries = Retries(
            nursery, connect=self.connect, moved=lambda *moved: self.moved.append(moved), log=lambda _: None
        )
        for each in self.near.values():
            self.retries.opened(each)

    async def connect(self, _peer):
        await trio.lowlevel.checkpoint()
        if self.fresh is None:
            raise UnreachableError("nobody is there")
        return self.fresh, ()

    def serve(self, name, channel):
        """Answer in capitals, as far as a service goes."""
        responder = Responder(lambda protocol: protocol == SERVICE or (protocol == RECALL and self.speaks))
        heard = bytearray()

        def on_data(data):
            if responder.result is not None:
                heard.extend(data)
                channel.send(data.upper())
                return
            responder.receive_data(data)
            if reply := responder.data_to_send():
                channel.send(reply)
            if responder.result == RECALL:
                self.recalls.serve(self.far[name], channel, responder.leftover)
            elif responder.result == SERVICE:
                self.served.append((name, heard))
                if responder.leftover:
                    on_data(responder.leftover)

        channel.on_data = on_data

    def open_descriptor(self):
        return open_ahead(
            self.near["old"],
            SERVICE,
            self.reactor.call_later,
            lambda channel, negotiation: channel.hand_over(negotiation=negotiation),
        )

    def open_socket(self):
        client, ours = tcp_pair()

        def take(channel, negotiation):
            SocketEnd(channel, lambda *_: None, negotiation=negotiation).attach(ours)

        open_ahead(self.near["old"], SERVICE, self.reactor.call_later, take)
        return client

    async def sent(self, length):
        """Wait until so much was sent on each stream of the old connection, besides the proposal."""
        ahead = self.near["old"].unanswered.values()
        await until(lambda: all(each.channel.sent_ahead == len(each.proposal) + length for each in ahead), "sending")

    def arrive(self):
        """What was sent on the old connection reaches the peer."""
        with contextlib.suppress(BlockingIOError):
            while data := self.on_the_way.recv(1 << 16):
                self.into_far.sendall(data)

    def doubt(self):
        self.near["old"].doubted_since = 1.0
        self.retries.doubted(self.near["old"])

    async def close(self):
        self.on_the_way.close()
        self.into_far.close()
        for ends in self.ends.values():
            await ends.close()


@contextlib.asynccontextmanager
async def world(**options):
    async with running() as reactor, trio.open_nursery() as nursery:
        made = World(reactor, nursery, **options)
        try:
            yield made
        finally:
            nursery.cancel_scope.cancel()
            with trio.move_on_after(5, shield=True):
                await made.close()


async def test_a_socket_goes_on_over_the_next_connection_and_is_served_once():
    async with world() as there:
        client = there.open_socket()
        client.send(b"buy one")
        await there.sent(7)
        there.doubt()
        await until(lambda: there.moved, "the move")
        there.arrive()  # the old path lives again: its stream was recalled
        client.send(b", please")
        await until(lambda: [bytes(heard) for _, heard in there.served] == [b"buy one, please"], "all of it")
        assert [name for name, _ in there.served] == ["new"]
        await until(lambda: not there.ends["old"].server.streams, "the end of the old stream")
        await until(lambda: there.ends["new"].client.received, "the answer")
        client.close()


async def test_a_descriptor_goes_on_with_its_end():
    async with world() as there:
        stream = there.open_descriptor()
        await send_message(stream, b"Dlast words")
        await send_message(stream, b"F")
        await there.sent(10)
        there.doubt()
        assert await receive_data(stream) == (b"LAST WORDS", b"F")
        assert there.served == [("new", b"last words")]
        stream.close()


async def test_what_has_arrived_is_left_where_it_is():
    async with world() as there:
        stream = there.open_descriptor()
        await send_message(stream, b"Dbuy one")
        await there.sent(7)
        there.arrive()
        await until(lambda: there.served, "the service")
        there.doubt()
        await until(
            lambda: there.ends["new"].client.session.streams == 0 and there.ends["new"].server.received, "asking"
        )
        assert not there.moved
        assert there.served == [("old", b"buy one")]
        assert len(there.near["old"].unanswered) == 1  # nobody has ended it
        stream.close()


async def test_a_connection_that_ended_is_no_end_where_nothing_has_arrived():
    async with world() as there:
        client = there.open_socket()
        client.send(b"buy one")
        await there.sent(7)
        there.on_the_way.close()
        await until(lambda: there.served == [("new", b"buy one")], "the service")
        client.close()


async def test_an_unknown_connection_is_not_tried_again():
    async with world() as there:
        there.far["old"].binding = b"of another life of the process.."
        stream = there.open_descriptor()
        await send_message(stream, b"Dbuy one")
        await there.sent(7)
        there.on_the_way.close()
        assert await receive_message(stream) == LOST
        assert not there.served
        stream.close()


async def test_an_ended_stream_of_a_peer_that_is_gone_ends():
    async with world() as there:
        there.fresh = None
        stream = there.open_descriptor()
        await there.sent(0)
        there.on_the_way.close()
        assert await receive_message(stream) == LOST
        stream.close()


@pytest.mark.parametrize("said", [b"", b"buy one"])
async def test_a_peer_that_cannot_recall_gets_nothing_twice(said):
    async with world(speaks=False) as there:
        stream = there.open_descriptor()
        if said:
            await send_message(stream, b"D" + said)
        await there.sent(len(said))
        there.on_the_way.close()
        if said:
            assert await receive_message(stream) == LOST
            assert not there.served
        else:
            await until(lambda: there.served == [("new", b"")], "the service")
        stream.close()


async def test_ended_connections_are_remembered():
    async with world() as there:
        stream = there.open_descriptor()
        await there.sent(0)
        there.recalls.remember(there.far["old"])
        del there.far["old"]
        there.doubt()
        await until(lambda: there.served == [("new", b"")], "the service")
        stream.close()
