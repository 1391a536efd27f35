"""Routes about the relays where this node keeps reservations.

GET /v1/relays   each configured relay with the state of the reservation there
"""

from __future__ import annotations

from actors.api.node import ANSWER_DEADLINE, Node
from actors.api.present import plain
from actors.api.routing import Answer, Call, Routes, data_response
from protocol.messages import Data
from protocol.messages.reservations import ReadRelays, RelayStatus
from supervisor.errors import NoSuchActorError

KEEPER = "relay/keeper"
"""The registered name of the keeper. It runs only where relays are configured."""

routes = Routes()


@routes.on("GET", "/v1/relays")
async def relays(node: Node, call: Call) -> Answer:
    """Each configured relay with its health."""
    try:
        answer = await node.context.ask(KEEPER, ReadRelays(), timeout=ANSWER_DEADLINE)
    except NoSuchActorError:
        return data_response([])
    return data_response([_relay(node, relay) for relay in answer.relays])


def _relay(node: Node, relay: RelayStatus) -> dict[str, Data]:
    told: dict[str, Data] = {"peer_id": str(relay.peer), "name": node.name_of(relay.peer)}
    told |= plain(relay)
    del told["peer"]
    return told
