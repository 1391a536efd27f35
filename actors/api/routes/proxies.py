"""Routes about local listeners that lead to a peer's service.

    GET    /v1/proxies          all of them
    POST   /v1/proxies          {peer, service, listen, only_me} -> the address it listens on
    DELETE /v1/proxies/{actor}  stop and forget one
    GET    /v1/stdio?peer=&service=&confirm=   one tunnelled connection, handed over as a descriptor (below)

The stdio route wants `Upgrade: peerup-descriptor`. When the stream to the service is open, the answer is
`101 Switching Protocols`, followed by one byte that carries (`SCM_RIGHTS`) two descriptors: one end of a socket pair,
whose other end is with the proxy actor, and the read end of a pipe in which the proxy says at the end what came of the
tunnel. So the tunnelled bytes pass through no process of the API, and nothing that either side says early can be taken
for a part of the HTTP exchange. If the stream cannot be opened, the answer is an ordinary error.

With `confirm` the outcome `finished` means that every byte arrived at the far service, and a client that means to end
shuts its socket down for writing: closing it altogether, as the kernel does for one that is killed, is a break.
"""

from __future__ import annotations

import os
import socket
from array import array

import trio

from actors.api.node import Node
from actors.api.routing import Answer, Call, Routes, data_response
from actors.http import HttpError, Upgrade, Work
from protocol.messages import Data, Descriptor
from protocol.messages.config import AddProxy, ProxyEntry, ReadProxies, RemoveProxy
from protocol.messages.proxy import Attach

START_DEADLINE = 20.0
"""Seconds for a proxy actor to start and listen."""

ATTACH_DEADLINE = 50.0
"""Seconds for the stream to the service, the connection to the peer that it may need first included."""

HAND_OVER_DEADLINE = 10.0
"""Seconds for the client to take one byte."""

UPGRADE = "peerup-descriptor"

routes = Routes()


def present_proxy(proxy: ProxyEntry) -> dict[str, Data]:
    """A proxy as JSON: `peer` is the name that was asked for."""
    return {
        "name": proxy.actor,
        "peer": proxy.peer_name,
        "peer_id": str(proxy.peer),
        "service": proxy.service,
        "listen": proxy.listen,
        "state": proxy.state,
        "only_me": proxy.only_me,
    }


@routes.on("GET", "/v1/proxies")
async def list_proxies(node: Node, call: Call) -> Answer:
    """All proxies."""
    answer = await node.ask("config", ReadProxies())
    return data_response([present_proxy(proxy) for proxy in answer.proxies])


@routes.on("POST", "/v1/proxies", Work.WAITING)
async def add_proxy(node: Node, call: Call) -> Answer:
    """Have a proxy, now and after restarts."""
    request = AddProxy(call.text("peer"), call.text("service"), call.text("listen"), call.flag("only_me"))
    added = await node.ask("config", request, timeout=START_DEADLINE)
    return data_response(present_proxy(added.proxy) | {"created": added.created})


@routes.on("DELETE", "/v1/proxies/{actor}", Work.WAITING)
async def remove_proxy(node: Node, call: Call) -> Answer:
    """Stop and forget a proxy."""
    actor = call.text("actor")
    await node.ask("config", RemoveProxy(actor), timeout=START_DEADLINE, repeatable=False)
    return data_response({"name": actor, "removed": True})


@routes.on("GET", "/v1/stdio", Work.WAITING)
async def stdio(node: Node, call: Call) -> Answer:
    """One tunnelled connection to a peer's service, handed to the client as a descriptor."""
    if call.request.headers.get("upgrade", "").lower() != UPGRADE:
        reason = f"this is only served with the header Upgrade: {UPGRADE}"
        raise HttpError(426, "upgrade-required", reason, headers=(("upgrade", UPGRADE), ("connection", "close")))
    request = AddProxy(call.text("peer"), call.text("service"), None)
    proxy = (await node.ask("config", request, timeout=START_DEADLINE)).proxy
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    told, telling = (Descriptor(fd) for fd in os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK))
    with near:
        attach = Attach(Descriptor(far.detach()), telling, confirm=call.flag("confirm"))
        await node.context.ask(proxy.actor, attach, timeout=ATTACH_DEADLINE)
        kept = Descriptor(near.detach())

    async def hand_over(stream: trio.abc.Stream, early: bytes) -> None:
        try:
            assert isinstance(stream, trio.SocketStream)
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [kept.fileno(), told.fileno()]))]
            with trio.fail_after(HAND_OVER_DEADLINE):
                await stream.socket.sendmsg([b"\0"], rights)
        except OSError as error:
            raise trio.BrokenResourceError("the client has left") from error
        finally:
            kept.close()
            told.close()

    return Upgrade(UPGRADE, hand_over)
