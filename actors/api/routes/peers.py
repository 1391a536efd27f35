"""Routes about other peers: who is connected over which path, and how far they are.

GET    /v1/peers                what the switchboard knows of each peer
GET    /v1/paths?peer=          one object per live connection, each measured
GET    /v1/peers/{peer}/traceroute  the hops to the peer, each measured
POST   /v1/peers/{peer}/connect     be connected
POST   /v1/peers/{peer}/disconnect  close the connections
GET    /v1/peers/{peer}/ping?count=&interval=&timeout=   NDJSON, one line per ping, then the statistics
"""

from __future__ import annotations

from collections.abc import AsyncGenerator

import trio

from actors.api.node import Node
from actors.api.present import plain
from actors.api.routing import Answer, Call, Routes, data_response, error_object, lines_response
from actors.http import Work
from protocol.messages import Data
from protocol.messages.paths import MeasuredPath, MeasurePaths, TracePath
from protocol.messages.switchboard import Connect, ConnectionInfo, Disconnect, PeerStatus, PingPeer, ReadStatus
from protocol.peer_id import PeerId
from supervisor.errors import AskError

CONNECT_DEADLINE = 45.0
"""Seconds for a connection to come up over any path; the switchboard's own dial deadlines are shorter."""

MEASURE_DEADLINE = 15.0
"""Seconds to measure all paths; the switchboard gives each one five, and many run side by side."""

PING_DEADLINE = 20.0
"""Seconds for one ping, the connection that it may need first included."""

routes = Routes()


@routes.on("GET", "/v1/peers")
async def peers(node: Node, call: Call) -> Answer:
    """What the switchboard knows of each peer."""
    status = await node.ask("switchboard", ReadStatus())
    return data_response([_peer(node, peer) for peer in status.peers])


@routes.on("GET", "/v1/paths", Work.WAITING)
async def paths(node: Node, call: Call) -> Answer:
    """One object per live connection, each measured."""
    name = call.optional_text("peer")
    peer = None if name is None else (await node.resolve(name)).peer
    measured = await node.ask("switchboard", MeasurePaths(peer), timeout=MEASURE_DEADLINE)
    return data_response([_measured(node, path) for path in measured.paths])


@routes.on("GET", "/v1/peers/{peer}/traceroute", Work.WAITING)
async def traceroute(node: Node, call: Call) -> Answer:
    """The hops to this peer, each measured."""
    found = await node.resolve(call.text("peer"))
    traced = await node.ask("switchboard", TracePath(found.peer), timeout=CONNECT_DEADLINE)
    hops: list[Data] = [
        {
            "hop": number,
            "role": hop.role,
            "peer_id": str(hop.peer),
            "name": node.name_of(hop.peer),
            "address": plain(hop.address),
            "transport": hop.transport,
            "rtt_ms": _milliseconds(hop.rtt),
            "failure": hop.failure,
        }
        for number, hop in enumerate(traced.hops)
    ]
    return data_response({"path": traced.path, "connected_in_ms": _milliseconds(traced.connected_in), "hops": hops})


@routes.on("POST", "/v1/peers/{peer}/connect", Work.WAITING)
async def connect(node: Node, call: Call) -> Answer:
    """Be connected to this peer."""
    found = await node.resolve(call.text("peer"))
    connected = await node.ask("switchboard", Connect(found.peer), timeout=CONNECT_DEADLINE)
    result = {"connection": _path(node, connected.connection), "elapsed": connected.elapsed}
    return data_response(result | {"tried": plain(connected.tried)})


@routes.on("POST", "/v1/peers/{peer}/disconnect")
async def disconnect(node: Node, call: Call) -> Answer:
    """Close all connections to this peer."""
    found = await node.resolve(call.text("peer"))
    await node.ask("switchboard", Disconnect(found.peer))
    return data_response({"peer_id": str(found.peer), "disconnected": True})


@routes.on("GET", "/v1/peers/{peer}/ping", Work.WAITING)
async def ping(node: Node, call: Call) -> Answer:
    """Measure round trips; `count` 0 goes on until the client leaves."""
    count = call.whole("count", 4, low=0, high=1_000_000)
    interval = call.number("interval", 1.0, low=0.01, high=3600.0)
    timeout = call.number("timeout", PING_DEADLINE, low=0.1, high=120.0)
    found = await node.resolve(call.text("peer"))
    return lines_response(_pings(node, found.peer, count, interval, timeout))


async def _pings(node: Node, peer: PeerId, count: int, interval: float, timeout: float) -> AsyncGenerator[Data]:  # noqa: ASYNC109  # it is the deadline of each ping, passed on
    sent = 0
    times: list[float] = []
    due = trio.current_time()
    while not count or sent < count:
        await trio.sleep_until(due)
        due = max(due + interval, trio.current_time())
        sent += 1
        line: dict[str, Data] = {"seq": sent, "peer_id": str(peer)}
        try:
            pinged = await node.ask("switchboard", PingPeer(peer), timeout=timeout, repeatable=False)
        except AskError as error:
            line |= {"rtt_ms": None, "path": None} | error_object(error)
        else:
            times.append(pinged.rtt * 1000)
            line |= {
                "rtt_ms": round(pinged.rtt * 1000, 3),
                "path": pinged.connection.path,
                "transport": pinged.connection.transport,
                "relay": plain(pinged.connection.relay),
                "relay_name": _relay_name(node, pinged.connection),
                "address": str(pinged.connection.remote_address),
                "protocol": pinged.protocol,
                "connected_in_ms": _milliseconds(pinged.connected_in),
            }
        yield line
    yield {"stats": _statistics(sent, times)}


def _statistics(sent: int, times: list[float]) -> dict[str, Data]:
    lost = sent - len(times)
    return {
        "sent": sent,
        "received": len(times),
        "lost": lost,
        "loss_pct": round(100 * lost / sent, 1) if sent else 0.0,
        "min_ms": round(min(times), 3) if times else None,
        "avg_ms": round(sum(times) / len(times), 3) if times else None,
        "max_ms": round(max(times), 3) if times else None,
    }


def _peer(node: Node, peer: PeerStatus) -> dict[str, Data]:
    result: dict[str, Data] = {"peer_id": str(peer.peer), "name": node.name_of(peer.peer)}
    result["addresses"] = plain(peer.addresses)
    result["connections"] = [_path(node, connection) for connection in peer.connections]
    return result | {
        "needed_by": plain(peer.needed_by),
        "next_dial": peer.next_dial,
        "last_failure": peer.last_failure,
    }


def _path(node: Node, connection: ConnectionInfo) -> dict[str, Data]:
    values: dict[str, Data] = plain(connection)
    del values["peer"]
    identity = {"peer_id": str(connection.peer), "name": node.name_of(connection.peer)}
    return identity | values | {"relay_name": _relay_name(node, connection)}


def _measured(node: Node, path: MeasuredPath) -> dict[str, Data]:
    return _path(node, path.connection) | {
        "rtt": path.rtt,
        "in_use": path.in_use,
        "failure": path.failure,
        "no_direct": path.no_direct,
    }


def _relay_name(node: Node, connection: ConnectionInfo) -> str:
    return "" if connection.relay is None else node.name_of(connection.relay)


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 3)
