"""The table of connections, with pretended links."""

import pytest
import trio
import trio.testing

from actors.switchboard.connections import LINGER, SIMULTANEOUS, Connection, ConnectionTable
from actors.switchboard.errors import TooManyError
from actors.switchboard.link import LinkEnd
from actors.switchboard.wire import Way
from protocol.multiaddr import Multiaddr

from .support import peer_of

US, THEM = sorted((peer_of("us"), peer_of("them")))
ADDRESS = Multiaddr("/ip4/192.0.2.1/tcp/4001")
END = LinkEnd("remote-close", "the peer closed the connection")


class FakeLink:
    def __init__(self):
        self.sent = self.received = 0
        self.rtt = None
        self.streams = 0
        self.end = None


DIRECT = Way("direct", "tcp", ADDRESS, ADDRESS)


def connection(name, *, outbound, opened=0.0, peer=THEM, via=DIRECT):
    made = Connection(name, peer, outbound, via, opened, 1_000_000.0 + opened)
    made.link = FakeLink()
    return made


def kept(own, order, gap=0.1):
    """Which of two connections a side keeps; `order`: who dialled the first and the second."""
    other = THEM if own == US else US
    table = ConnectionTable(own)
    for number, dialled_by in enumerate(order):
        made = connection(dialled_by, outbound=dialled_by == own, opened=number * gap, peer=other)
        table.add(made, made.opened)
    assert sum(not one.draining for one in table) == 1
    return table.best(other).id


@pytest.mark.parametrize("first", [US, THEM])
@pytest.mark.parametrize("order_there", [True, False])
def test_both_sides_keep_the_same_of_two_simultaneous_connections(first, order_there):
    order = [first, THEM if first == US else US]
    there = order if order_there else order[::-1]  # they may come up in another order on the other side
    assert kept(US, order) == kept(THEM, there) == US


def test_later_the_newer_one_is_kept_on_both_sides():
    gap = SIMULTANEOUS + 1
    assert kept(US, [US, THEM], gap) == kept(THEM, [US, THEM], gap) == THEM
    assert kept(US, [THEM, US], gap) == kept(THEM, [THEM, US], gap) == US


def test_of_two_that_the_same_side_dialled_the_newer_one_is_kept():
    table = ConnectionTable(US)
    old, new = connection("old", outbound=False), connection("new", outbound=False, opened=0.1)
    table.add(old, 0)
    table.add(new, 0.1)
    assert table.best(THEM) is new
    assert table.of(THEM) == (new, old)


def test_a_drained_connection_goes_when_its_streams_have_gone():
    table = ConnectionTable(US)
    loser, winner = connection("loser", outbound=False), connection("winner", outbound=True)
    loser.link.streams = 1
    table.add(loser, 0)
    table.add(winner, 0)
    assert table.drained(100) == []
    loser.link.streams = 0
    assert table.drained(100 + LINGER / 2) == []
    assert table.drained(100 + LINGER) == [loser]
    table.remove(loser, END)
    assert list(table) == [winner]


def test_a_drained_connection_takes_over_when_the_other_one_ends():
    table = ConnectionTable(US)
    loser, winner = connection("loser", outbound=False), connection("winner", outbound=True)
    table.add(loser, 0)
    table.add(winner, 0)
    table.remove(winner, END)
    assert table.best(THEM) is loser
    assert table.drained(100) == []
    assert winner.end is END
    assert winner.ended.is_set()


def test_limits():
    table = ConnectionTable(US, limit=3, limit_per_peer=2)
    for number in range(2):
        table.add(connection(str(number), outbound=False), 0)
    with pytest.raises(TooManyError, match="to this peer"):
        table.check_room(THEM)
    table.check_room(peer_of("other"))
    table.add(connection("2", outbound=False, peer=peer_of("other")), 0)
    with pytest.raises(TooManyError, match="3 connections"):
        table.check_room(peer_of("third"))
    assert len(table) == 3


def test_guests_leave_room_for_others():
    table = ConnectionTable(US, limit=4)
    for number in range(3):
        table.add(connection(str(number), outbound=False, peer=peer_of(f"guest {number}")), 0)
    with pytest.raises(TooManyError, match="3 connections"):
        table.check_room(THEM, guest=True)
    table.check_room(THEM)


def test_removing_twice_is_harmless():
    table = ConnectionTable(US)
    made = connection("1", outbound=False)
    table.add(made, 0)
    table.remove(made, END)
    table.remove(made, END)
    assert len(table) == 0
    assert table.peers() == ()


async def test_waiting_for_a_peer_to_come_and_to_go():
    table = ConnectionTable(US)
    news = []

    async def watch():
        await table.until_found(THEM)
        news.append("found")
        await table.until_lost(THEM)
        news.append("lost")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        await trio.testing.wait_all_tasks_blocked()
        made = connection("1", outbound=False)
        table.add(made, 0)
        await trio.testing.wait_all_tasks_blocked()
        assert news == ["found"]
        table.remove(made, END)
    assert news == ["found", "lost"]
    with trio.move_on_after(0):
        await table.until_found(THEM)
    assert not table._found, "nothing is kept for somebody who no longer waits"


def test_info_and_way():
    made = connection("1-1", outbound=True)
    made.link.received = 10
    info = made.info()
    assert (info.direction, info.agent, info.protocols, info.received) == ("outbound", "", (), 10)
    assert made.heard
    assert made.way == f"direct tcp {ADDRESS}"


def test_a_connection_whose_peer_goes_away_takes_no_new_streams_and_is_closed_when_it_is_unused():
    table = ConnectionTable(US)
    only = connection("only", outbound=True)
    only.link.streams = 2
    table.add(only, 0)
    table.gone_away(only, 5)
    assert table.best(THEM) is None
    assert table.drained(100) == []
    only.link.streams = 0
    assert table.drained(100 + LINGER) == [only]
    table.gone_away(only, 200)  # said twice
    assert table.drained(200) == [only]


def test_another_connection_takes_the_place_of_one_that_goes_away():
    table = ConnectionTable(US)
    loser, winner = connection("loser", outbound=False), connection("winner", outbound=True)
    table.add(loser, 0)
    table.add(winner, 0)
    table.gone_away(winner, 1)
    assert table.best(THEM) is loser
    assert not loser.draining
    table.gone_away(loser, 2)
    assert table.best(THEM) is None
    table.remove(winner, END)
    assert table.best(THEM) is None, "the one that is left does not come back into use"
    new = connection("new", outbound=True, opened=3.0)
    table.add(new, 3)
    assert table.best(THEM) is new
    assert not new.draining


async def test_a_peer_that_has_gone_away_counts_as_lost_until_a_new_connection_is_there(autojump_clock):
    table = ConnectionTable(US)
    old = connection("old", outbound=True)
    table.add(old, 0)
    events = []

    async def follow():
        await table.until_lost(THEM)
        events.append("lost")
        await table.until_found(THEM)
        events.append("found")

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(follow)
            await trio.testing.wait_all_tasks_blocked()
            assert events == []
            table.gone_away(old, 1)
            await trio.testing.wait_all_tasks_blocked()
            assert events == ["lost"]
            table.add(connection("new", outbound=True, opened=2.0), 2)
    assert events == ["lost", "found"]


def test_the_going_away_of_what_is_not_there_is_nothing():
    table = ConnectionTable(US)
    early, ended = connection("early", outbound=True), connection("ended", outbound=True)
    table.gone_away(early, 0)
    table.add(ended, 0)
    table.remove(ended, END)
    table.gone_away(ended, 1)
    assert list(table) == []
