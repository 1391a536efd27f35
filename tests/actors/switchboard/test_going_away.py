"""A peer that says that it takes no more streams: what runs goes on, what is new goes over a new connection."""

import trio

from protocol.messages.switchboard import Connect, NeedPeer
from protocol.yamux import GoAwayCode
from tests.actors.local_node import echo, tcp_server, two_nodes, until


def say_go_away(node, other):
    """Have this node tell the other that it goes away, without closing anything."""
    (connection,) = node.connections(other)
    connection.link._say_go_away(GoAwayCode.NORMAL)
    return connection


async def test_what_runs_goes_on_and_what_is_new_goes_over_a_new_connection():
    async with tcp_server(echo) as port, two_nodes(services={"echo": None}) as (alice, bob):
        await bob.serve("echo", port)
        address = await alice.proxy("bob", "echo")
        with trio.fail_after(20):
            old = await trio.open_tcp_stream(*address)
            async with old:
                await old.send_all(b"x")
                assert await old.receive_some(1) == b"x"
                say_go_away(bob, "alice")
                (first,) = alice.connections("bob")
                await until(lambda: first.gone_away)
                new = await trio.open_tcp_stream(*address)
                async with new:
                    await new.send_all(b"y")
                    assert await new.receive_some(1) == b"y"
                    assert len(alice.connections("bob")) == 2
                    await old.send_all(b"z")
                    assert await old.receive_some(1) == b"z"
                    await old.send_eof()
                    assert await old.receive_some(1) == b""
                    await until(lambda: first.end is not None)
                    assert first.end.code == "superseded"
                    await new.send_all(b"w")
                    assert await new.receive_some(1) == b"w"


async def test_a_needed_peer_that_goes_away_is_dialled_anew():
    async with two_nodes() as (alice, bob):
        alice.tell("switchboard", NeedPeer(bob.peer))
        with trio.fail_after(20):
            await until(lambda: alice.connections("bob") and bob.connections("alice"))
            (first,) = alice.connections("bob")
            say_go_away(bob, "alice")
            await until(lambda: first.end is not None)
            await until(lambda: any(one is not first and not one.draining for one in alice.connections("bob")))
        connected = await alice.ask("switchboard", Connect(bob.peer))
        assert connected.connection.id != first.id
