"""Requests that cost a relay more than the peer that sends them end the connection; honest ones do not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import trio

from protocol.circuit.hop_client import ReserveClient
from protocol.multistream import HEADER, encode_message
from protocol.peer_id import PeerId
from protocol.protocol_ids import CIRCUIT_HOP
from protocol.stream_descriptor import ResetCode
from tests.abuse.attacker import FIN, SYN, Attacker, data, new_key
from tests.abuse.measure_cost_per_byte import RESERVE, relay_kinds
from tests.abuse.relay_world import RelayWorld
from tests.abuse.world import Witness
from tests.support.processes import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

MOST = 60.0
"""Seconds in which an attack must have been ended on the slowest machine."""

KINDS = tuple(relay_kinds(new_key().peer_id))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RelayWorld]:
    with contextlib.ExitStack() as stack:
        yield RelayWorld(tmp_path_factory.mktemp("r"), stack)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_flood_ends_the_connection_with_a_reason_and_others_go_on(world: RelayWorld, kind: str) -> None:
    insider = world.another_insider()
    portions = relay_kinds(PeerId.from_text(world.home.peer_id))[kind]()
    with Witness(world.tunnel) as witness:
        async with Attacker.connect(world.port, insider) as attacker:
            await attacker.secure()
            code = await attacker.flood(portions, MOST)
        assert code == ResetCode.RATE_LIMITED, "the peer was not told why"
        wait_until(lambda: len(witness.times) > 3, within=20, what="others to be served")
    said = f"connection to {insider.peer_id} ended: the peer makes this node work for nothing"
    wait_until(lambda: said in world.log(), within=20, what="a line that says why")
    assert witness.failed == 0


async def test_a_client_that_asks_as_often_as_it_may_is_not_ended(world: RelayWorld) -> None:
    """All requests of a minute at once, each on a stream of its own, and some more, which are refused."""
    insider = world.another_insider()
    async with Attacker.connect(world.port, insider) as attacker:
        await attacker.secure()
        answers = set()
        for number in range(150):
            stream = 1 + 2 * number
            await attacker.say(data(stream, HEADER + encode_message(CIRCUIT_HOP) + RESERVE, SYN | FIN))
            said = b""
            with trio.fail_after(20):
                while not (heard := await attacker.hear_on(stream)).flags & FIN:
                    said += heard.body
            machine = ReserveClient(PeerId.from_text(world.relay.peer_id), insider.peer_id)
            machine.receive_data((said + heard.body).removeprefix(HEADER + encode_message(CIRCUIT_HOP)))
            answers.add(machine.state)
        assert answers == {"granted", "refused"}
