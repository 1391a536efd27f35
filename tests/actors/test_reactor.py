import contextlib
import socket
import time

import pytest
import trio
import trio.testing

from actors import reactor as module
from actors.reactor import HANG_UP, READ, WRITE, Reactor
from protocol.errors import ProtocolError
from tests.actors.dataplane import no_leaks, running, until


@pytest.fixture(params=[True, False], ids=["direct", "task"])
def direct(request):
    return request.param


def ignore(_):
    raise AssertionError("not expected")


async def test_the_shortcut_is_taken_with_the_trio_that_is_installed():
    assert module._trio_sleeps_on() is not None


async def test_no_shortcut_under_virtual_time(autojump_clock):
    assert module._trio_sleeps_on() is None


async def test_readable_writable_and_hang_up(direct):
    async with no_leaks(), running(direct=direct) as reactor:
        near, far = socket.socketpair()
        near.setblocking(False)
        seen = []

        def ready(events):
            seen.append(events)
            if events & READ and near.recv(10) == b"":
                reactor.unregister(near.fileno())

        reactor.register(near.fileno(), READ, ready, ignore)
        far.send(b"x")
        await until(lambda: seen == [READ])
        reactor.modify(near.fileno(), READ | WRITE)
        await until(lambda: seen[-1] == WRITE)
        reactor.modify(near.fileno(), READ)
        far.close()
        await until(lambda: seen[-1] & HANG_UP)
        count = len(seen)
        await trio.testing.wait_all_tasks_blocked()
        assert len(seen) == count
        near.close()


async def test_an_event_is_never_told_to_what_has_the_number_of_a_closed_descriptor(direct):
    async with no_leaks(), running(direct=direct) as reactor:
        pairs = [socket.socketpair() for _ in range(2)]
        newcomers, told = [], []

        def close_the_other(mine, other):
            """Both have hung up at once; who is told first closes the other, whose number a new socket gets."""
            for sock in (mine, other):
                reactor.unregister(sock.fileno())
            number = other.fileno()
            other.close()
            newcomers.extend(socket.socketpair())
            fresh = next(sock for sock in newcomers if sock.fileno() == number)
            reactor.register(number, READ, told.append, ignore)
            assert fresh.fileno() == number

        (one, far_one), (two, far_two) = pairs
        reactor.register(one.fileno(), READ, lambda _: close_the_other(one, two), ignore)
        reactor.register(two.fileno(), READ, lambda _: close_the_other(two, one), ignore)
        far_one.close()
        far_two.close()
        await until(lambda: newcomers)
        await trio.testing.wait_all_tasks_blocked()
        assert told == []
        for sock in newcomers:
            reactor.unregister(sock.fileno())
        for sock in (one, two, *newcomers):
            sock.close()


async def test_timers_run_in_order_and_can_be_cancelled(direct):
    async with running(direct=direct) as reactor:
        calls = []
        started = time.monotonic()
        reactor.call_later(0.03, lambda: calls.append("late"))
        reactor.call_later(0.01, lambda: calls.append("early"))
        reactor.call_later(0.02, lambda: calls.append("never")).cancel()
        reactor.call_soon(lambda: calls.append("soon"))
        await until(lambda: len(calls) == 3)
        assert calls == ["soon", "early", "late"]
        assert time.monotonic() - started >= 0.03


async def test_calls_made_from_callbacks_wait_for_the_end_of_the_round(direct):
    async with running(direct=direct) as reactor:
        calls = []

        def first():
            reactor.call_soon(lambda: calls.append("second"))
            calls.append("first")

        reactor.call_soon(first)
        await until(lambda: calls == ["first", "second"])


async def test_tasks_wake_when_a_callback_wakes_them(direct):
    async with running(direct=direct) as reactor:
        event = trio.Event()
        reactor.call_later(0.01, event.set)
        with trio.fail_after(5):
            await event.wait()


async def test_tasks_keep_their_own_time_and_sockets_beside_a_busy_reactor(direct):
    async with running(direct=direct) as reactor:
        near, far = socket.socketpair()
        rounds = 0

        def ready(_):
            nonlocal rounds
            rounds += 1  # and leaves it readable: the loop never rests

        far.send(b"x")
        reactor.register(near.fileno(), READ, ready, ignore)
        one, other = trio.socket.socketpair()
        with trio.fail_after(5):
            for _ in range(20):
                await trio.sleep(0.001)
                await one.send(b"x")
                assert await other.recv(1) == b"x"
                assert await trio.to_thread.run_sync(lambda: 1) == 1
        assert rounds > 20
        reactor.unregister(near.fileno())
        for sock in (near, far, one, other):
            sock.close()


async def test_many_descriptors_each_get_their_turn(direct):
    async with no_leaks(), running(direct=direct) as reactor, contextlib.AsyncExitStack() as stack:
        counts = [0] * 200

        def count(index):
            counts[index] += 1

        for index in range(200):
            near, far = socket.socketpair()
            stack.callback(near.close)
            stack.callback(far.close)
            far.send(b"x")
            reactor.register(near.fileno(), READ, lambda _, index=index: count(index), ignore)
            stack.callback(reactor.unregister, near.fileno())
        await until(lambda: min(counts) >= 5)
        assert max(counts) <= min(counts) + 2


@pytest.mark.parametrize("error", [OSError(5, "bad"), ProtocolError("bad")])
async def test_foreseen_errors_go_to_their_owner(direct, error):
    async with running(direct=direct) as reactor:
        near, far = socket.socketpair()
        told = []

        def ready(_):
            raise error

        def failed(error):
            told.append(error)
            reactor.unregister(near.fileno())

        far.send(b"x")
        reactor.register(near.fileno(), READ, ready, failed)
        await until(lambda: told == [error])
        near.close()
        far.close()


@pytest.mark.parametrize("how", ["callback", "on_error", "soon", "timer"])
async def test_defects_end_the_run(direct, how):
    near, far = socket.socketpair()
    far.send(b"x")

    def defect(*_):
        raise ZeroDivisionError

    def foreseen(_):
        raise OSError

    with contextlib.closing(Reactor(time.monotonic, direct=direct)) as reactor:
        if how == "soon":
            reactor.call_soon(defect)
        elif how == "timer":
            reactor.call_later(0.001, defect)
        else:
            reactor.register(near.fileno(), READ, defect if how == "callback" else foreseen, defect)
        with trio.fail_after(5), pytest.raises(ZeroDivisionError):
            await reactor.run()
        reactor.unregister(near.fileno())
    near.close()
    far.close()


async def test_unregistering_within_the_same_round(direct):
    async with running(direct=direct) as reactor:
        pairs = [socket.socketpair() for _ in range(2)]
        calls = []

        def ready(index):
            calls.append(index)
            for near, _ in pairs:
                reactor.unregister(near.fileno())

        for index, (near, far) in enumerate(pairs):
            reactor.register(near.fileno(), READ, lambda _, index=index: ready(index), ignore)
            far.send(b"x")
        await until(lambda: calls)
        await trio.testing.wait_all_tasks_blocked()
        assert len(calls) == 1
        for sock in (*pairs[0], *pairs[1]):
            sock.close()


async def test_an_idle_reactor_does_not_turn(direct):
    async with running(direct=direct) as reactor:
        before = reactor.rounds
        await trio.sleep(0.2)
        assert reactor.rounds - before <= 4


async def test_deadlines_of_trio_are_kept(direct):
    """Trio sleeps for as long as it has decided before the reactor began to sleep for it: it must be told to look."""
    late = []
    async with running(direct=direct):
        for _ in range(3):
            with trio.move_on_after(0.2):
                await trio.sleep_forever()
            began = time.monotonic()
            await trio.sleep(0.3)
            late.append(time.monotonic() - began - 0.3)
    assert min(late) < 0.15, late  # the other two may be the machine's fault


async def test_running_again_after_a_cancel(direct):
    calls = []
    with contextlib.closing(Reactor(time.monotonic, direct=direct)) as reactor:
        for count in (1, 2):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(reactor.run)
                reactor.call_later(0.001, lambda: calls.append(1))
                await until(lambda count=count: len(calls) == count)
                nursery.cancel_scope.cancel()
