"""Routes about the relays where this node keeps reservations.

GET /v1/relays   each configured relay with the state of the reservation there
"""

from __future__ import annotations

from actors.api.node import Node
from actors.api.present import plain
from actors.api.routing import Answer, Call, Routes, data_response
from protocol.messages import Data
from protocol.messages.reservations import ReadRelays, RelayStatus
from protocol.multiaddr import Multiaddr
from protocol.peer_id import PeerId
from supervisor.errors import NoSuchActorError

KEEPER = "relay/keeper"
"""The registered name of the keeper. It runs only where relays are configured."""

routes = Routes()


@routes.on("GET", "/v1/relays")
async def relays(node: Node, call: Call) -> Answer:
    """Each configured relay with its health."""
    try:
        found = (await node.ask(KEEPER, ReadRelays())).relays
    except NoSuchActorError:
        found = _not_yet_kept(node)
    return data_response([_relay(node, relay) for relay in found])


def _not_yet_kept(node: Node) -> tuple[RelayStatus, ...]:
    """The relays of the configuration, while the keeper is not there yet."""
    places: dict[PeerId, list[Multiaddr]] = {}
    for address in node.config.relays if node.config is not None else ():
        if address.peer_id is not None:
            places.setdefault(address.peer_id, []).append(address)
    return tuple(
        RelayStatus(peer, tuple(addresses), "starting", (), None, None, None, None, None, None, "", 0, 0)
        for peer, addresses in places.items()
    )


def _relay(node: Node, relay: RelayStatus) -> dict[str, Data]:
    told: dict[str, Data] = {"peer_id": str(relay.peer), "name": node.name_of(relay.peer)}
    told |= plain(relay)
    del told["peer"]
    return told
