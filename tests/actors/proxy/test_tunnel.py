"""Whole tunnels: client, proxy, switchboard, network, switchboard, service, server."""

import trio

from ..local_node import echo, tcp_server, two_nodes


async def test_one_byte_comes_back_through_the_tunnel():
    async with tcp_server(echo) as port, two_nodes(services={"echo": None}) as (alice, bob):
        await bob.serve("echo", port)
        address = await alice.proxy("bob", "echo")
        with trio.fail_after(10):
            client = await trio.open_tcp_stream(*address)
            async with client:
                await client.send_all(b"x")
                assert await client.receive_some(10) == b"x"
                await client.send_eof()
                assert await client.receive_some(10) == b""
