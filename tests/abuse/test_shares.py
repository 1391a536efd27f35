"""One authorised peer takes what it can; another one is served all the same."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import trio

from tests.abuse.measure_shares import MEBIBYTE, Stubborn, audit_bytes, short_tunnels, take_connections, take_memory
from tests.abuse.world import World
from tests.chaos.load import echo_works

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


@pytest.fixture
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with contextlib.ExitStack() as stack:
        service = Stubborn()
        stack.callback(service.stop)
        world = World(tmp_path_factory.mktemp("s"), stack)
        world.home.run("service", "add", "stubborn", f"127.0.0.1:{service.port}")
        yield world


def test_streams_to_a_service_that_does_not_read_cost_little_of_the_kernels_memory(world: World) -> None:
    taken, left = trio.run(lambda: take_memory(world, streams=60, each=4 * MEBIBYTE))
    assert left == 60
    assert taken < 80 * MEBIBYTE  # four each without a bound
    assert echo_works(world.tunnel, timeout=10)


def test_idle_streams_of_one_peer_leave_connections_of_the_service_for_others(world: World) -> None:
    assert trio.run(take_connections, world) == 10
    assert "has its share of the connections of service/stubborn" in world.log()


def test_short_tunnels_of_one_peer_leave_the_audit_log_to_others(world: World) -> None:
    lines, _ = audit_bytes(world)
    opened, _ = trio.run(short_tunnels, world)
    more, _ = audit_bytes(world)
    assert opened > 600, "too slow a machine to see whether there is a bound"
    assert more - lines < 580  # 512 at once, one in two seconds, one line a minute for the rest
