"""The keeper of reservations in a simulated tree: hours of faults under virtual time, the real actor throughout."""

import loguru
import pytest
import trio

from protocol.keeper import MAX_RELAYS
from protocol.messages.reachability import ConnectionLeaving
from protocol.messages.reservations import ReadRelays
from protocol.messages.system import Describe
from protocol.multiaddr import Multiaddr
from tests.actors.relay.pretended import ROUND_TRIP, US, Relay, Surroundings, key_of

KEEPER = "relay/keeper"


@pytest.fixture(autouse=True)
def quiet():
    loguru.logger.remove()


@pytest.fixture
def around():
    return Surroundings()


async def status_of(world, relay):
    answer = await world.ask(KEEPER, ReadRelays())
    return next(one for one in answer.relays if one.peer == relay.peer)


async def test_reservations_at_several_relays_are_made_and_announced_together(around, autojump_clock):
    near, far = Relay(around, "near"), Relay(around, "far", limit=None)
    async with around.run(near, far) as world:
        took = await around.until(lambda: set(around.announces) == {near.relayed, far.relayed}, 2)
        assert took < 10 * ROUND_TRIP
        assert around.needed == {near.peer, far.peer}
        status = await status_of(world, near)
        assert (status.state, status.relayed_addresses, status.last_failure) == ("held", (near.relayed,), "")
        assert (status.limit_seconds, status.limit_bytes, status.rtt) == (120, 131072, ROUND_TRIP)
        assert 3590 < status.expires_in <= 3600
        assert 1700 < status.next_attempt < 2700
        status = await status_of(world, far)
        assert (status.limit_seconds, status.limit_bytes) == (None, None)
        told = (await world.ask(KEEPER, Describe())).state
        assert told["announced"] == [str(address) for address in around.announces]
        assert told["relays"][0]["state"] == "held"


async def test_without_relays_it_asks_for_nothing(around, autojump_clock):
    around.tracing = True
    async with around.run() as world:
        await trio.sleep(600)
        assert (await world.ask(KEEPER, ReadRelays())).relays == ()
        assert any("send relay/keeper" in line and "to config" in line for line in world.trace)
        assert not any("send relay/keeper" in line and "to switchboard" in line for line in world.trace)


async def test_a_day_passes_without_a_gap(around, autojump_clock):
    relay = Relay(around, "relay")
    async with around.run(relay) as world:
        await around.until(lambda: around.announces, 2)
        before = len(around.announced)
        await trio.sleep(86400)
        status = await status_of(world, relay)
        assert 86390 < status.held_for < 86401
        # An hour's reservation is renewed every half hour to three quarters.
        assert 86400 / 2700 <= relay.granted <= 86400 / 1800 + 2
        assert len(around.announced) == before
        assert len(relay.dialled) == 1


async def test_several_addresses_of_one_relay_are_one_relay(around, autojump_clock):
    relay = Relay(around, "relay")
    async with around.run(relay) as world:
        around.configure(relay, Multiaddr(f"/dns/relay.example/tcp/443/p2p/{relay.peer}"))
        await around.until(lambda: around.announces, 2)
        [status] = (await world.ask(KEEPER, ReadRelays())).relays
        assert len(status.addresses) == 2
        assert relay.granted == 1


async def test_relays_beyond_those_that_are_used_are_named(around, autojump_clock):
    relays = [Relay(around, f"relay {number}") for number in range(MAX_RELAYS + 1)]
    said = []
    loguru.logger.add(said.append, level="WARNING", format="{message}")
    async with around.run(*relays) as world:
        await around.until(lambda: len(around.announces) == MAX_RELAYS, 5)
        assert len((await world.ask(KEEPER, ReadRelays())).relays) == MAX_RELAYS
        told = (await world.ask(KEEPER, Describe())).state
        assert told["ignored"] == [f"{relays[-1].address}: more than {MAX_RELAYS} relays"]
        assert [str(relays[-1].address) in line for line in said] == [True]
        around.configure(*relays[1:])
        await around.until(lambda: relays[-1].relayed in around.announces, 5)
        assert (await world.ask(KEEPER, Describe())).state["ignored"] == []


async def test_a_relay_that_restarts_has_us_again_at_once(around, autojump_clock):
    relay = Relay(around, "relay")
    async with around.run(relay) as world:
        await around.until(lambda: around.announces, 2)
        await trio.sleep(100)
        for outage in (0.5, 3, 60):
            around.stop(relay)
            await around.until(lambda: not around.announces, 1)
            await trio.sleep(outage)
            assert "down" in (await status_of(world, relay)).last_failure
            relay.mode = "fine"
            assert await around.until(lambda: around.announces, 10) < max(2.0, outage / 15)
            await trio.sleep(100)
        relay.mode = "fine"
        assert (await status_of(world, relay)).last_failure == ""


@pytest.mark.parametrize("drain", [0.2, 25, 300])
async def test_a_relay_that_is_stopped_is_announced_no_more_at_once_and_again_when_it_is_back(
    around, autojump_clock, drain
):
    stays, leaves = Relay(around, "stays"), Relay(around, "leaves")
    async with around.run(stays, leaves) as world:
        await around.until(lambda: len(around.announces) == 2, 2)
        await trio.sleep(100)
        around.leave(leaves)
        assert await around.until(lambda: around.announces == (stays.relayed,), 1) < ROUND_TRIP
        asked = len(leaves.asked)
        await trio.sleep(drain)
        assert len(leaves.asked) - asked <= drain / 30, "it has said that it grants nothing"
        status = await status_of(world, leaves)
        assert (status.state, status.last_failure) == ("waiting", "the relay is shutting down")
        assert status.failed == 0
        around.stop(leaves)
        await trio.sleep(3)  # until systemd, say, has it running again
        leaves.mode = "fine"
        assert await around.until(lambda: len(around.announces) == 2, 10) < 2.0
        assert stays.granted == 1


async def test_a_relay_that_leaves_on_one_of_two_connections_is_asked_over_the_other(around, autojump_clock):
    relay = Relay(around, "relay")
    async with around.run(relay):
        await around.until(lambda: around.announces, 2)
        await trio.sleep(100)
        board = around.simulated.actor("switchboard")
        old = board.connections[relay.peer]
        board._open(relay.peer)
        await around.until(lambda: relay.granted == 2, 1)
        before = len(around.announced)
        board._tell(relay.peer, ConnectionLeaving(board.connections[relay.peer]))
        await around.until(lambda: relay.granted == 3, 1)
        board._tell(relay.peer, ConnectionLeaving(old))  # which has no reservation
        await trio.sleep(10)
        assert (relay.granted, len(around.announced)) == (3, before)


async def test_a_relay_that_was_away_for_a_day_is_asked_ever_less_often_and_found_again(around, autojump_clock):
    relay = Relay(around, "relay")
    async with around.run(relay):
        await around.until(lambda: around.announces, 2)
        around.stop(relay)
        dialled = len(relay.dialled)
        await trio.sleep(86400)
        assert len(relay.dialled) - dialled < 700
        relay.mode = "fine"
        await around.until(lambda: around.announces, 310)


async def test_a_black_hole_is_noticed_and_the_other_relay_stays(around, autojump_clock):
    good, bad = Relay(around, "good"), Relay(around, "bad", lifetime=120)
    async with around.run(good, bad) as world:
        await around.until(lambda: len(around.announces) == 2, 2)
        around.stop(bad, "hole")  # nothing tells of it but that the renewal is not answered
        await around.until(lambda: around.announces == (good.relayed,), 120)
        around.doubt(bad)
        assert around.disconnects == 0  # whether a connection lives is for the switchboard to judge
        status = await status_of(world, bad)
        assert status.state in ("connecting", "waiting")
        await trio.sleep(60)
        assert "no connection to the relay in time" in (await status_of(world, bad)).last_failure
        assert around.announces == (good.relayed,)
        bad.mode = "fine"
        await around.until(lambda: len(around.announces) == 2, 60)
        assert good.granted == 1


async def test_a_full_relay_is_asked_with_long_pauses_until_it_has_room(around, autojump_clock):
    relay = Relay(around, "relay")
    relay.mode = "full"
    async with around.run(relay) as world:
        await trio.sleep(600)
        assert 3 < len(relay.asked) < 12
        status = await status_of(world, relay)
        assert status.state == "waiting"
        assert "all 2 places are taken" in status.last_failure
        assert 0 < status.next_attempt <= 300
        assert around.announces == ()
        relay.mode = "fine"
        await around.until(lambda: around.announces, 301)


async def test_a_relay_that_does_not_serve_us_is_asked_seldom_and_at_once_when_the_configuration_changes(
    around, autojump_clock
):
    relay, other = Relay(around, "relay"), Relay(around, "other")
    relay.mode = "denied"
    async with around.run(relay) as world:
        await trio.sleep(3600)
        assert len(relay.asked) < 25
        assert "you are not on the list" in (await status_of(world, relay)).last_failure
        relay.mode = "fine"  # somebody has authorised us there, and touches our configuration
        around.configure(relay, other)
        assert await around.until(lambda: len(around.announces) == 2, 5) < 1


async def test_who_is_not_authorised_at_the_relay_is_told_what_to_do_there(around, autojump_clock):
    relay = Relay(around, "relay")
    relay.mode = "stranger"
    async with around.run(relay) as world:
        await trio.sleep(60)
        told = (await status_of(world, relay)).last_failure
        assert told == f"the relay does not authorise this node (there: peerup relay authorize {US})"


async def test_a_relay_that_hangs_up_on_us_is_asked_ever_more_rarely(around, autojump_clock):
    """Each attempt makes a connection for a moment. That is no news for which to try again at once."""
    relay = Relay(around, "relay")
    relay.mode = "stranger"
    async with around.run(relay):
        await trio.sleep(3600)
        first, last = (sum(begin <= at < begin + 600 for at in relay.dialled) for begin in (0, 3000))
        assert 20 < first < 150
        assert 3 <= last < 10
        relay.mode = "fine"
        assert await around.until(lambda: around.announces, 200) < 181  # a twentieth of the hour


async def test_a_reservation_that_is_denied_later_ends_at_once(around, autojump_clock):
    relay = Relay(around, "relay", lifetime=120)
    async with around.run(relay):
        await around.until(lambda: around.announces, 2)
        relay.mode = "denied"
        await around.until(lambda: not around.announces, 91)


async def test_a_full_relay_does_not_take_a_reservation_that_it_has_granted(around, autojump_clock):
    relay = Relay(around, "relay", lifetime=120)
    async with around.run(relay):
        await around.until(lambda: around.announces, 2)
        relay.mode = "full"
        await trio.sleep(110)
        assert around.announces
        await around.until(lambda: not around.announces, 11)


async def test_relays_come_and_go_with_the_configuration(around, autojump_clock):
    one, two = Relay(around, "one"), Relay(around, "two")
    async with around.run(one) as world:
        await around.until(lambda: around.announces == (one.relayed,), 2)
        around.configure(one, two)
        await around.until(lambda: set(around.announces) == {one.relayed, two.relayed}, 1)
        around.configure(two)
        await around.until(lambda: around.announces == (two.relayed,), 1)
        assert around.needed == {two.peer}
        asked = len(one.asked)
        around.configure()
        await around.until(lambda: around.announces == (), 1)
        await trio.sleep(7200)
        assert len(one.asked) == asked
        assert around.needed == set()
        assert (await world.ask(KEEPER, ReadRelays())).relays == ()


async def test_addresses_that_are_no_relays_are_left_out_and_told(around, autojump_clock):
    relay = Relay(around, "relay")
    async with around.run(relay) as world:
        around.configure(
            relay,
            Multiaddr(f"/ip4/198.51.100.9/tcp/1/p2p/{US}"),
            Multiaddr("/ip4/198.51.100.9/tcp/1"),
            Multiaddr(f"{relay.address}/p2p-circuit/p2p/{key_of('someone').peer_id}"),
        )
        await around.until(lambda: around.announces == (relay.relayed,), 2)
        told = (await world.ask(KEEPER, Describe())).state
        assert len(told["ignored"]) == 3


async def test_an_hour_of_killing_the_keeper_never_withdraws_the_addresses_for_long(around, autojump_clock):
    relay, other = Relay(around, "relay"), Relay(around, "other")
    async with around.run(relay, other) as world:
        await around.until(lambda: len(around.announces) == 2, 2)
        await trio.sleep(5)
        for _ in range(5):
            world.kill(KEEPER)
            await around.until(lambda: not around.announces, 1)
            assert await around.until(lambda: len(around.announces) == 2, 1) < 0.2
            await trio.sleep(700)
        assert relay.dialled == relay.dialled[:1]  # the connections were there all the time
        assert relay.granted >= 6  # each successor has proved the reservation


async def test_a_successor_does_not_announce_what_ended_while_it_started(around, autojump_clock):
    relay = Relay(around, "relay")
    async with around.run(relay) as world:
        await around.until(lambda: around.announces, 2)
        await trio.sleep(5)
        world.kill(KEEPER)
        await around.until(lambda: not around.announces, 1)
        around.stop(relay)
        await world.wait_for(KEEPER, incarnation=2)
        await trio.sleep(60)
        assert around.announced[-1][1] == ()
        assert all(not addresses for when, addresses in around.announced if when > world.now() - 55)


async def test_after_the_death_of_the_switchboard_everything_is_made_again(around, autojump_clock):
    relay, other = Relay(around, "relay"), Relay(around, "other")
    async with around.run(relay, other) as world:
        await around.until(lambda: len(around.announces) == 2, 2)
        for _ in range(3):
            await trio.sleep(100)
            world.kill("switchboard")
            await around.until(lambda: not around.announces, 1)
            assert await around.until(lambda: len(around.announces) == 2, 2) < 0.5
            assert around.needed == {relay.peer, other.peer}
        assert relay.granted == 4


async def test_the_deaths_of_config_and_monitor_change_nothing(around, autojump_clock):
    relay, other = Relay(around, "relay"), Relay(around, "other")
    async with around.run(relay) as world:
        await around.until(lambda: around.announces, 2)
        world.kill("config")
        world.kill("nat/monitor")
        await world.whole()
        await trio.sleep(1)
        assert around.announces == (relay.relayed,)
        around.configure(relay, other)
        await around.until(lambda: len(around.announces) == 2, 2)
        asked = len(relay.asked)
        around.network_changes()
        await around.until(lambda: len(relay.asked) > asked, 1)


async def test_a_relay_that_is_silent_for_a_while_is_announced_again_as_soon_as_it_answers(around, autojump_clock):
    relay = Relay(around, "relay")
    async with around.run(relay) as world:
        await around.until(lambda: around.announces, 2)
        await trio.sleep(100)
        for outage in (0.5, 5, 60, 300):
            around.stop(relay, "hole")
            around.network_changes()
            await trio.sleep(4)
            around.doubt(relay)
            await around.until(lambda: not around.announces, 1)
            status = await status_of(world, relay)
            assert (status.state, status.rtt) == ("connecting", None)
            assert "does not answer" in status.last_failure
            await trio.sleep(outage)
            assert (await status_of(world, relay)).state in ("connecting", "waiting")
            relay.mode = "fine"
            around.trust(relay)
            await around.until(lambda: around.announces, 1)
            assert (await status_of(world, relay)).state == "held"
            await trio.sleep(60)
        assert around.disconnects == 0  # no stream over that connection was ended
        assert (await status_of(world, relay)).last_failure == ""


async def test_when_the_network_has_changed_a_dead_connection_is_replaced_within_seconds(around, autojump_clock):
    relay = Relay(around, "relay")
    async with around.run(relay):
        await around.until(lambda: around.announces, 2)
        await trio.sleep(100)
        around.stop(relay, "hole")
        await trio.sleep(1)
        around.network_changes()
        await trio.sleep(1)
        relay.mode = "fine"  # the way is good again, for new connections: what was sent is lost
        dialled = len(relay.dialled)
        around.doubt(relay)
        await around.until(lambda: len(relay.dialled) > dialled, 1)
        await around.until(lambda: around.announces, 1)
        assert around.disconnects == 0


async def test_when_the_network_has_changed_and_all_is_well_nobody_notices(around, autojump_clock):
    relay = Relay(around, "relay")
    async with around.run(relay):
        await around.until(lambda: around.announces, 2)
        await trio.sleep(100)
        before = len(around.announced)
        for _ in range(5):
            around.network_changes()
            await trio.sleep(20)
        assert relay.granted == 6
        assert len(around.announced) == before
        assert around.disconnects == 0


async def test_waiting_ends_when_the_network_has_changed(around, autojump_clock):
    relay = Relay(around, "relay")
    relay.mode = "down"
    async with around.run(relay):
        await trio.sleep(3600)
        relay.mode = "fine"
        around.network_changes()
        assert await around.until(lambda: around.announces, 5) < 1


@pytest.mark.parametrize("jump", [-86400, 7, 3600, 10 * 365 * 86400])
async def test_a_clock_that_jumps_costs_a_renewal_and_nothing_else(around, autojump_clock, jump):
    relay = Relay(around, "relay")
    async with around.run(relay) as world:
        await around.until(lambda: around.announces, 2)
        await trio.sleep(100)
        before = len(around.announced)
        around.wall_jump = jump
        await around.until(lambda: relay.granted == 2, 31)
        await trio.sleep(7200)
        assert len(around.announced) == before
        assert relay.granted < 10
        assert (await status_of(world, relay)).state == "held"


@pytest.mark.parametrize("error", [-7200, 30 * 365 * 86400])
async def test_a_relay_whose_clock_is_wrong_is_used_all_the_same(around, autojump_clock, error):
    relay = Relay(around, "relay")
    relay.clock_error = error
    async with around.run(relay) as world:
        await around.until(lambda: around.announces, 2)
        await trio.sleep(3600)
        assert around.announces == (relay.relayed,)
        assert 1 <= relay.granted < 300
        assert "clock of the relay or of this machine is wrong" in (await status_of(world, relay)).warning


@pytest.mark.parametrize("lifetime", [11, 30, 7200])
async def test_reservations_of_any_length_are_renewed_in_time(around, autojump_clock, lifetime):
    relay = Relay(around, "relay", lifetime=lifetime)
    async with around.run(relay) as world:
        await around.until(lambda: around.announces, 2)
        before = len(around.announced)
        for _ in range(3600):
            await trio.sleep(1)
            assert around.now() - relay.asked[-1] < lifetime
        assert len(around.announced) == before
        assert (await status_of(world, relay)).warning == ""


async def test_a_relay_with_reservations_too_short_to_be_kept_is_told_of_and_not_burdened(around, autojump_clock):
    relay = Relay(around, "relay", lifetime=3)
    async with around.run(relay) as world:
        await around.until(lambda: around.announces, 2)
        await trio.sleep(600)
        assert relay.granted <= 600 / 5 + 1
        status = await status_of(world, relay)
        assert (status.state, status.last_failure) == ("held", "")
        assert "one of less than 10 s cannot be kept" in status.warning
        relay.lifetime = 3600
        await trio.sleep(10)
        assert (await status_of(world, relay)).warning == ""


async def test_another_connection_to_the_relay_takes_over_without_a_gap(around, autojump_clock):
    relay = Relay(around, "relay")
    async with around.run(relay) as world:
        await around.until(lambda: around.announces, 2)
        await trio.sleep(100)
        before = len(around.announced)
        world.actor("switchboard").replace(relay.peer)
        await around.until(lambda: relay.granted == 2, 1)
        assert len(around.announced) == before


async def test_a_relay_that_cannot_be_dialled_but_connects_to_us_is_used_at_once(around, autojump_clock):
    relay = Relay(around, "relay")
    relay.mode = "down"
    async with around.run(relay) as world:
        await trio.sleep(3600)
        relay.mode = "fine"
        world.actor("switchboard")._open(relay.peer)
        assert await around.until(lambda: around.announces, 5) < 0.5


@pytest.mark.parametrize("seed", range(20))
async def test_whatever_dies_in_whatever_order_it_heals(around, autojump_clock, seed):
    relays = [Relay(around, f"relay {n}", lifetime=120) for n in range(3)]
    async with around.run(*relays, seed=seed) as world:
        chance = world._random
        for _ in range(40):
            await trio.sleep(chance.expovariate(1 / 5))
            match chance.randrange(6):
                case 0:
                    world.kill(KEEPER)
                case 1:
                    world.kill("switchboard")
                case 2:
                    await world.wait_for("switchboard")
                    around.stop(chance.choice(relays), chance.choice(["down", "hole", "full", "denied"]))
                case 3:
                    chance.choice(relays).mode = "fine"
                case 4:
                    await world.wait_for("nat/monitor")
                    around.network_changes()
                case 5:
                    around.wall_jump += chance.uniform(-1000, 1000)
        for relay in relays:
            relay.mode = "fine"
        await world.whole()
        await trio.sleep(5)  # what happened last has been noticed
        await around.until(lambda: set(around.announces) == {relay.relayed for relay in relays}, 600)
        assert {one.state for one in (await world.ask(KEEPER, ReadRelays())).relays} <= {"held", "renewing"}
