"""`GET /v1/relay` over its real socket, with a switchboard that answers from a table."""

from __future__ import annotations

from protocol.messages.relay import ReadRelay, RelayCircuit, RelayReservation, RelayServiceStatus
from protocol.multiaddr import Multiaddr
from protocol.peer_id import PeerId

HOME, LAPTOP = (PeerId.from_public_key(bytes.fromhex("08011220") + bytes([n] * 32)) for n in (1, 2))
STATUS = RelayServiceStatus(
    serving=True,
    draining=False,
    addresses=(Multiaddr("/dns/relay.example/tcp/443"),),
    reservations=1,
    circuits=1,
    held=(RelayReservation(HOME, 1_900_000_000, renewed=True),),
    open=(RelayCircuit(LAPTOP, HOME, opened=True, age=2.5, to_destination=100, to_source=200),),
    requests={"reserve granted": 3},
    to_destination=1100,
    to_source=1200,
)


async def test_all_of_what_the_relay_does_as_json(serve):
    async with serve() as node:
        node.context.answers[ReadRelay] = lambda target, _: STATUS if target == "switchboard" else None
        told = await node.call(node.client.get, "/v1/relay")
    assert told == {
        "serving": True,
        "draining": False,
        "addresses": ["/dns/relay.example/tcp/443"],
        "reservations": 1,
        "circuits": 1,
        "held": [{"peer_id": str(HOME), "name": "", "expires": 1_900_000_000, "renewed": True}],
        "open": [
            {
                "source": str(LAPTOP),
                "source_name": "",
                "destination": str(HOME),
                "destination_name": "",
                "opened": True,
                "age": 2.5,
                "to_destination": 100,
                "to_source": 200,
            }
        ],
        "requests": {"reserve granted": 3},
        "to_destination": 1100,
        "to_source": 1200,
    }
