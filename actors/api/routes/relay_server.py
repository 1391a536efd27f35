"""Routes about this node as a relay for others.

GET /v1/relay   what the relay of this node does: reservations, circuits, bytes, requests
"""

from __future__ import annotations

from actors.api.node import Node
from actors.api.present import plain
from actors.api.routing import Answer, Call, Routes, data_response
from protocol.messages import Data
from protocol.messages.relay import ReadRelay, RelayCircuit, RelayReservation

routes = Routes()


@routes.on("GET", "/v1/relay")
async def relay(node: Node, call: Call) -> Answer:
    """What the relay does; `serving` is false where this node is none."""
    status = await node.ask("switchboard", ReadRelay())
    told: dict[str, Data] = plain(status)
    told["held"] = [_reservation(node, reservation) for reservation in status.held]
    told["open"] = [_circuit(node, circuit) for circuit in status.open]
    return data_response(told)


def _reservation(node: Node, reservation: RelayReservation) -> dict[str, Data]:
    return {
        "peer_id": str(reservation.peer),
        "name": node.name_of(reservation.peer),
        "expires": reservation.expires,
        "renewed": reservation.renewed,
    }


def _circuit(node: Node, circuit: RelayCircuit) -> dict[str, Data]:
    told: dict[str, Data] = {
        "source": str(circuit.source),
        "source_name": node.name_of(circuit.source),
        "destination": str(circuit.destination),
        "destination_name": node.name_of(circuit.destination),
    }
    rest: dict[str, Data] = plain(circuit)
    return told | {key: value for key, value in rest.items() if key not in told}
