"""The SEQPACKET transport between real processes: delivery, order, bounds, and what it refuses."""

from __future__ import annotations

import array
import contextlib
import dataclasses
import gc
import os
import pathlib
import random
import resource
import signal
import socket
import struct
import time
from collections.abc import Iterator

import pytest

from protocol.messages import Descriptor, Envelope, Message, encode_body
from protocol.messages.system import (
    CollectMetrics,
    EdgeFilter,
    FaultAction,
    FaultRule,
    Ok,
    ReadDeadLetters,
    SetFaults,
)
from supervisor import linux
from supervisor.authority import Authority
from supervisor.errors import ActorNotReadyError, AskError, RefusedError
from supervisor.port import NameState, NotDeliveredError
from supervisor.registry import Entry, RunDirectory
from supervisor.transport import INLINE_LIMIT, QUEUE_BYTES, QUEUE_LIMIT, Transport
from supervisor.visitor import Visitor
from tests.supervisor.process_harness import forked, run_directory, visitor_ready
from tests.supervisor.toy_actors import Counted, Echo, Echoed, Numbered, ReadCount, TakeDescriptor
from tests.support.processes import descriptors, wait_until


@pytest.fixture
def path() -> Iterator[str]:
    with run_directory() as made:
        yield made


def serve(path: str, name: str) -> None:
    """A plain process that answers Echo, counts Numbered and writes to descriptors, until it is killed."""
    with Visitor(path, name) as visitor:
        seen: list[int] = []
        exchange = visitor.exchange
        exchange.on(Echo, lambda ask, envelope: exchange.answer(envelope, Echoed(ask.text, os.getpid(), 1)))
        exchange.on(Numbered, lambda told, _: seen.append(told.number))
        exchange.on(
            ReadCount,
            lambda _, envelope: exchange.answer(envelope, Counted(len(seen), seen == list(range(len(seen))))),
        )

        def take(told: TakeDescriptor, envelope: Envelope) -> None:
            fd = told.descriptor.detach()
            os.write(fd, told.text)
            os.close(fd)
            exchange.answer(envelope, Ok())

        exchange.on(TakeDescriptor, take)
        with contextlib.suppress(KeyboardInterrupt):
            visitor.run(lambda: False, timeout=60)


@contextlib.contextmanager
def server(path: str, name: str = "server") -> Iterator[int]:
    with forked(lambda: serve(path, name)) as pid:
        wait_until(visitor_ready(path, name), within=10, what=f"{name} is registered")
        yield pid


@pytest.fixture
def visitor(path: str) -> Iterator[Visitor]:
    with Visitor(path, "tester") as made:
        yield made


def envelope(sender: str, target: str, text: bytes = b"x") -> Envelope:
    body, _ = encode_body(Echo(text))
    return Envelope(f"{sender}:1:1", None, None, sender, target, Echo.KIND, None, body)  # type: ignore[arg-type]


def connect(path: str, pid: int) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(5)
    sock.connect(f"{path}/sockets/{pid}")
    return sock


def test_a_request_is_answered(path: str, visitor: Visitor) -> None:
    with server(path) as pid:
        assert visitor.ask("server", Echo(b"hello")) == Echoed(b"hello", pid, 1)


@pytest.mark.parametrize("size", [INLINE_LIMIT - 200, INLINE_LIMIT + 1, 1_000_000, 8_000_000])
def test_large_messages_cross_whole(path: str, visitor: Visitor, size: int) -> None:
    content = random.Random(size).randbytes(size)
    with server(path) as pid:
        before = len(descriptors(pid))
        for _ in range(3):
            assert visitor.ask("server", Echo(content)).text == content
        # Only the link itself is more; the server closes the last answer's memory just after it was sent.
        wait_until(lambda: len(descriptors(pid)) <= before + 1, within=5, what="no memory is left open")


def test_a_long_path_of_the_run_directory_works(path: str) -> None:
    deep = f"{path}/{'a' * 100}/{'b' * 100}"
    pathlib.Path(deep).mkdir(parents=True, mode=0o700)
    with server(deep) as pid, Visitor(deep, "tester") as visitor:
        assert visitor.ask("server", Echo(b"")).pid == pid


def test_order_is_kept_when_the_kernel_buffer_is_full(path: str, visitor: Visitor) -> None:
    with server(path) as pid:
        visitor.ask("server", Echo(b""))
        os.kill(pid, signal.SIGSTOP)
        for number in range(QUEUE_LIMIT):
            visitor.tell("server", Numbered(number))
        assert not visitor.exchange.dead_letters().letters
        os.kill(pid, signal.SIGCONT)
        assert visitor.ask("server", ReadCount()) == Counted(QUEUE_LIMIT, in_order=True)


def test_a_process_that_does_not_read_holds_up_nobody_else(path: str, visitor: Visitor) -> None:
    with server(path, "stuck") as pid, server(path, "well") as other:
        visitor.ask("stuck", Echo(b""))
        os.kill(pid, signal.SIGSTOP)
        for number in range(3 * QUEUE_LIMIT):
            visitor.tell("stuck", Numbered(number))
        assert visitor.exchange.dead_letters().letters[-1].reason.startswith("stuck does not read")
        before = time.monotonic()
        assert visitor.ask("well", Echo(b"")).pid == other
        assert time.monotonic() - before < 10
        os.kill(pid, signal.SIGCONT)


def test_what_was_queued_for_a_process_that_ends_is_reported(path: str, visitor: Visitor) -> None:
    with server(path) as pid:
        visitor.ask("server", Echo(b""))
        os.kill(pid, signal.SIGSTOP)
        for number in range(QUEUE_LIMIT):
            visitor.tell("server", Numbered(number))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        visitor.run(lambda: bool(visitor.exchange.dead_letters().letters), timeout=5)
        assert "the process ended" in visitor.exchange.dead_letters().letters[0].reason


def test_descriptors_cross_and_none_is_left_behind(path: str, visitor: Visitor) -> None:
    with server(path) as pid:
        visitor.ask("server", Echo(b""))
        here, there = len(descriptors(os.getpid())), len(descriptors(pid))
        for number in range(200):
            read, write = os.pipe()
            text = f"through {number}".encode()
            visitor.ask("server", TakeDescriptor(Descriptor(write), text))
            assert os.read(read, 100) == text
            assert os.read(read, 100) == b""  # no copy of the writing end is open anywhere
            os.close(read)
        assert len(descriptors(os.getpid())) == here
        assert len(descriptors(pid)) == there


def test_too_many_descriptors_are_refused_by_the_sender(path: str, visitor: Visitor) -> None:
    with server(path):
        copies = [Descriptor(os.dup(0)) for _ in range(17)]
        with pytest.raises(NotDeliveredError, match="17 descriptors"):
            visitor.transport.send(envelope("tester", "server"), copies)


def test_unknown_and_starting_names(path: str, visitor: Visitor) -> None:
    with pytest.raises(NotDeliveredError, match="no actor called nobody"):
        visitor.transport.send(envelope("tester", "nobody"), ())
    assert visitor.transport.state("nobody") is NameState.UNKNOWN
    visitor.directory.write("slow", Entry(NameState.STARTING, 3, 0, "root"))
    with pytest.raises(NotDeliveredError, match="is being restarted"):
        visitor.transport.send(envelope("tester", "slow"), ())
    assert visitor.transport.state("slow") is NameState.STARTING


def test_a_ready_name_without_a_process_is_not_delivered_to(path: str, visitor: Visitor) -> None:
    with forked(lambda: None) as pid:
        os.waitpid(pid, 0)
    visitor.directory.write("gone", Entry(NameState.READY, 1, pid, "root"))
    with pytest.raises(NotDeliveredError, match="has ended"):
        visitor.transport.send(envelope("tester", "gone"), ())


def test_the_end_of_a_process_is_noticed_and_its_successor_found(path: str, visitor: Visitor) -> None:
    downs: list[str] = []
    ups: list[tuple[str, int]] = []
    visitor.exchange.name_down = lambda name, _: downs.append(name)  # type: ignore[method-assign]
    visitor.exchange.name_up = lambda name, incarnation: ups.append((name, incarnation))  # type: ignore[method-assign]
    visitor.transport.watch("server")
    with server(path) as pid:
        visitor.run(lambda: len(ups) == 1, timeout=5)
        visitor.ask("server", Echo(b""))
        os.kill(pid, signal.SIGKILL)
        visitor.run(lambda: len(downs) == 1, timeout=5)
        visitor.directory.write("server", Entry(NameState.STARTING, 1, 0, "tester"))
    visitor.directory.remove("server")
    with server(path) as successor:
        visitor.run(lambda: len(ups) == 2, timeout=5)
        assert visitor.ask("server", Echo(b"")).pid == successor
    assert downs == ["server"]


def refusals_of(path: str, attack: socket.socket | None, visitor: Visitor, reason: str) -> int:
    """Handle what arrived until a refusal of this kind is counted."""
    visitor.run(lambda: visitor.transport.refusals[reason] > 0, timeout=5)
    return visitor.transport.refusals[reason]


def test_nobody_can_speak_for_another(path: str, visitor: Visitor) -> None:
    with server(path):
        # This very process is not `server`, so what it says in that name is refused.
        with connect(path, os.getpid()) as sock:
            sock.send(b"E" + envelope("server", "tester").to_bytes())
            assert refusals_of(path, sock, visitor, "forged-sender") == 1
        # Nor can it change its name once it is known.
        with connect(path, os.getpid()) as sock:
            sock.send(b"E" + envelope("tester", "tester").to_bytes())
            sock.send(b"E" + envelope("server", "tester").to_bytes())
            visitor.run(lambda: visitor.transport.refusals["forged-sender"] == 2, timeout=5)


def test_messages_for_somebody_else_are_refused(path: str, visitor: Visitor) -> None:
    with connect(path, os.getpid()) as sock:
        sock.send(b"E" + envelope("tester", "server").to_bytes())
        assert refusals_of(path, sock, visitor, "misaddressed") == 1


def test_a_false_listener_is_refused(path: str, visitor: Visitor) -> None:
    """Somebody who binds the socket of another process's number does not get its messages."""
    with forked(signal.pause) as pid:
        false = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        false.bind(f"{path}/sockets/{pid}")
        false.listen()
        visitor.directory.write("victim", Entry(NameState.READY, 1, pid, "root"))
        with pytest.raises(NotDeliveredError, match="belongs to process"):
            visitor.transport.send(envelope("tester", "victim"), ())
        false.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_another_user_is_refused(path: str, visitor: Visitor) -> None:
    """Even where the directory's permissions have been loosened."""
    pathlib.Path(path).chmod(0o755)
    pathlib.Path(f"{path}/sockets").chmod(0o755)
    pathlib.Path(f"{path}/sockets/{os.getpid()}").chmod(0o777)
    parent = os.getpid()

    def attack() -> None:
        os.setgid(65534)
        os.setuid(65534)
        sock = connect(path, parent)
        with contextlib.suppress(OSError):
            sock.send(b"E" + envelope("tester", "tester").to_bytes())
            sock.recv(1)

    with forked(attack):
        assert refusals_of(path, None, visitor, "foreign-user") == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_another_user_cannot_even_connect(path: str, visitor: Visitor) -> None:
    parent = os.getpid()

    def attack() -> None:
        os.setgid(65534)
        os.setuid(65534)
        with contextlib.suppress(PermissionError):
            connect(path, parent)
            os._exit(7)

    with forked(attack) as pid:
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0


@pytest.mark.parametrize("seed", range(4))
def test_garbage_is_counted_and_harms_nobody(path: str, visitor: Visitor, seed: int) -> None:
    source = random.Random(seed)
    valid = b"E" + envelope("tester", "tester").to_bytes()
    with server(path) as pid:
        visitor.ask("server", Echo(b""))
        open_before = len(descriptors(pid))
        with connect(path, pid) as sock:
            for number in range(300):
                if number % 3 == 0:
                    frame = source.randbytes(source.randrange(1, 2000))
                elif number % 3 == 1:
                    damaged = bytearray(valid)
                    damaged[source.randrange(len(damaged))] ^= 1 << source.randrange(8)
                    frame = bytes(damaged[: source.randrange(1, len(damaged) + 1)])
                else:
                    frame = source.choice([b"T", b"M", b"E"]) + source.randbytes(source.randrange(64))
                rights = array.array("i", [0] * source.randrange(3))
                ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if rights else []
                sock.sendmsg([frame], ancillary)
            assert visitor.ask("server", Echo(b"alive")).text == b"alive"
            wait_until(lambda: len(descriptors(pid)) <= open_before + 1, within=5, what="no descriptor is left open")


def test_a_frame_over_the_limit_and_unsealed_memory_are_refused(path: str, visitor: Visitor) -> None:
    with connect(path, os.getpid()) as sock:
        sock.send(b"E" * (INLINE_LIMIT + 100))
        assert refusals_of(path, sock, visitor, "truncated") == 1
        unsealed = os.memfd_create("x", os.MFD_ALLOW_SEALING)
        os.write(unsealed, envelope("tester", "tester").body)
        head = b"M" + dataclasses.replace(envelope("tester", "tester"), body=b"").to_bytes()
        sock.sendmsg([head], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [unsealed]))])
        assert refusals_of(path, sock, visitor, "malformed") == 1
        os.close(unsealed)
        pipe = os.pipe()
        sock.sendmsg([head], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [pipe[0]]))])
        visitor.run(lambda: visitor.transport.refusals["malformed"] == 2, timeout=5)
        for fd in pipe:
            os.close(fd)


def test_more_descriptors_than_a_message_may_have_are_closed(path: str, visitor: Visitor) -> None:
    here = len(descriptors(os.getpid()))
    with connect(path, os.getpid()) as sock:
        rights = array.array("i", [0] * 100)
        frame = b"E" + envelope("tester", "tester").to_bytes()
        sock.sendmsg([frame], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        assert refusals_of(path, sock, visitor, "descriptors-cut") == 1
    visitor.transport.pump()
    assert len(descriptors(os.getpid())) == here


def test_a_process_that_is_dead_and_not_yet_waited_for_is_being_restarted(path: str, visitor: Visitor) -> None:
    """The registry calls it ready until its supervisor has noticed."""
    with server(path) as pid:
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert RunDirectory(path).read("server").state is NameState.READY  # type: ignore[union-attr]
        for _ in range(2):
            with pytest.raises(ActorNotReadyError):
                visitor.ask("server", Echo(b"anybody"))


@pytest.mark.parametrize("action", [FaultAction.DUPLICATE, FaultAction.CORRUPT, FaultAction.REORDER])
def test_nobody_is_answered_before_it_has_asked(path: str, visitor: Visitor, action: FaultAction) -> None:
    """Also where a fault is in force, and it turns out only then that the request cannot be delivered."""
    rule = FaultRule("f", EdgeFilter(target="server"), action, 1.0, None, 1, time.monotonic() + 60, 0.1)

    def boss() -> None:
        with Visitor(path, "boss") as own:
            own.tell("tester", SetFaults((rule,)))
            own.run(lambda: False, timeout=60)

    visitor.exchange.allow_faults, visitor.exchange.authority = True, Authority("boss")
    with server(path) as pid, forked(boss):
        visitor.run(lambda: bool(visitor.exchange.faults), timeout=10)
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        order: list[object] = []
        for _ in range(2):  # the second one lets go of what a reordering has held back
            visitor.exchange.ask("server", Echo(b"anybody"), timeout=30, answer=order.append)
            order.append("asked")
        assert order == ["asked", "asked"]
        visitor.run(lambda: len(order) == 4, timeout=10)
        assert [type(one) for one in order[2:]] == [ActorNotReadyError, ActorNotReadyError]


def starve() -> None:
    """Let this process have no further descriptor, nor one that garbage of the parent's gives up later."""
    gc.collect()
    limit = os.dup(0)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit + 1, 4096))


def feed() -> None:
    """Let it have some again."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 4096))


def test_who_connects_to_a_process_without_descriptors_waits_and_is_served_later(path: str, visitor: Visitor) -> None:
    """Nobody takes it for dead, nothing is lost, and its loop does not run hot meanwhile."""

    def starved() -> None:
        with Visitor(path, "starved") as own:
            own.exchange.on(Echo, lambda ask, envelope: own.exchange.answer(envelope, Echoed(ask.text, os.getpid(), 1)))
            starve()
            own.run(lambda: own.transport.refusals["no-descriptors"] > 0, timeout=20)
            before, end = time.process_time(), time.monotonic() + 1.0
            while time.monotonic() < end:
                own.transport.wait(end - time.monotonic())
            assert time.process_time() - before < 0.5
            feed()
            own.run(lambda: False, timeout=20)

    answers: list[Message | AskError] = []
    downs: list[str] = []
    visitor.exchange.name_down = lambda name, _: downs.append(name)  # type: ignore[method-assign]
    with forked(starved):
        wait_until(visitor_ready(path, "starved"), within=5, what="it is there")
        visitor.exchange.watch("starved")
        visitor.exchange.ask("starved", Echo(b"patient"), timeout=15, answer=answers.append)
        visitor.run(lambda: bool(answers), timeout=15)
        assert isinstance(answers[0], Echoed), answers
        assert downs == []
        assert visitor.ask("starved", Echo(b"again")).text == b"again"


def test_an_end_that_is_noticed_without_descriptors_ends_nobody_else(path: str, visitor: Visitor) -> None:
    """Not even the descriptor that is spared for looking whether it is one can be had again."""

    def starved() -> None:
        with Visitor(path, "starved") as own:
            assert own.ask("victim", Echo(b"")).text == b""
            limits = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
            own.directory.write("starved", Entry(NameState.READY, 2, os.getpid(), "starved"))
            own.run(lambda: own.transport.refusals["link-lost"] > 0, timeout=20)
            with pytest.raises(AskError):
                own.ask("victim", Echo(b""))
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            own.exchange.on(Echo, lambda ask, envelope: own.exchange.answer(envelope, Echoed(ask.text, os.getpid(), 1)))
            assert own.ask("successor", Echo(b"")).text == b""
            own.run(lambda: False, timeout=60)

    with server(path, "successor"), server(path, "victim") as victim, forked(starved):
        wait_until(
            lambda: (entry := visitor.directory.read("starved")) is not None and entry.incarnation == 2,
            within=10,
            what="it has no descriptors left",
        )
        os.kill(victim, signal.SIGKILL)
        assert visitor.ask("starved", Echo(b"alive")).text == b"alive"


def test_a_message_whose_descriptor_does_not_arrive_is_refused_at_once(path: str, visitor: Visitor) -> None:
    """Also where the body itself comes in a descriptor."""

    def starved() -> None:
        with Visitor(path, "starved") as own:

            def starve_and_answer(ask: Echo, envelope: Envelope) -> None:
                starve()  # before the answer: the tester sends the next message as soon as it has it
                own.exchange.answer(envelope, Echoed(ask.text, os.getpid(), 1))

            own.exchange.on(Echo, starve_and_answer)
            own.exchange.on(TakeDescriptor, lambda _, envelope: own.exchange.answer(envelope, Ok()))
            own.run(lambda: False, timeout=60)

    with forked(starved):
        wait_until(visitor_ready(path, "starved"), within=5, what="it is there")
        assert visitor.ask("starved", Echo(b"first")).text == b"first"
        for request in (Echo(b"x" * (2 * INLINE_LIMIT)), TakeDescriptor(Descriptor(os.dup(0)), b"")):
            before = time.monotonic()
            with pytest.raises(RefusedError, match="no descriptor left") as refused:
                visitor.ask("starved", request, timeout=30)
            assert refused.value.code == "no-descriptors"
            assert time.monotonic() - before < 15
        letters = visitor.ask("starved", ReadDeadLetters())
        assert [letter.entry.kind for letter in letters.letters] == [Echo.KIND, TakeDescriptor.KIND]
        assert letters.refused == {"descriptors-cut": 2}
        samples = visitor.ask("starved", CollectMetrics()).samples
        [sample] = [sample for sample in samples if sample.name == "peerup_transport_refusals_total"]
        assert (sample.labels, sample.value) == ({"reason": "descriptors-cut"}, 2.0)


def test_a_link_that_a_living_process_closes_is_not_its_end(path: str, visitor: Visitor) -> None:
    downs: list[str] = []
    visitor.exchange.name_down = lambda name, _: downs.append(name)  # type: ignore[method-assign]

    def rude() -> None:
        with Visitor(path, "rude") as own:
            own.exchange.on(Echo, lambda ask, envelope: own.exchange.answer(envelope, Echoed(ask.text, os.getpid(), 1)))
            own.exchange.on(ReadCount, lambda *_: None)
            own.transport.control = lambda pid, _: own.transport.drain(pid)  # closes the link to it
            own.run(lambda: False, timeout=60)

    with forked(rude) as pid:
        wait_until(visitor_ready(path, "rude"), within=5, what="it is there")
        assert visitor.ask("rude", Echo(b"one")).text == b"one"
        answers: list[Message | AskError] = []
        visitor.exchange.ask("rude", ReadCount(), timeout=30, answer=answers.append)
        visitor.transport.send_control(pid, b"hang up")
        visitor.run(lambda: bool(answers), timeout=5)
        assert isinstance(answers[0], RefusedError)
        assert "its process goes on" in str(answers[0])
        assert visitor.ask("rude", Echo(b"two")).text == b"two"
        assert visitor.transport.state("rude") is NameState.READY
        assert downs == []
        os.kill(pid, signal.SIGKILL)
        visitor.run(lambda: bool(downs), timeout=5)


def test_what_waits_in_sealed_memory_counts(path: str, visitor: Visitor) -> None:
    """Nobody can make another process hold gigabytes by not reading."""

    def deaf() -> None:
        with Visitor(path, "deaf"):
            signal.pause()

    with forked(deaf):
        wait_until(visitor_ready(path, "deaf"), within=5, what="it is there")
        body, sent = b"x" * (900 * 1024), 0

        def send() -> int:
            visitor.transport.send(envelope("tester", "deaf", body), ())
            return len(body)

        with contextlib.suppress(NotDeliveredError):
            while sent < 20 * QUEUE_BYTES:
                sent += send()
        assert sent <= QUEUE_BYTES
        with pytest.raises(NotDeliveredError, match="does not read"):
            send()
    with server(path):  # one that reads takes as much as there is
        for _ in range(30):
            assert visitor.ask("server", Echo(body)).text == body


def test_control_frames_come_only_from_where_they_may(path: str) -> None:
    from thespian.actors import ActorExitRequest
    from thespian.system.messages.admin import PendingActor, SystemShutdown
    from thespian.system.messages.multiproc import EndpointConnected

    from protocol.messages import MessageError
    from supervisor import control

    for message in (ActorExitRequest(), SystemShutdown(), PendingActor("os.system", None, 1, None, None)):
        body = control.encode(message)
        assert type(control.decode(body, from_parent=True, from_child=False)) is type(message)
        with pytest.raises(MessageError, match="must come from a parent"):
            control.decode(body, from_parent=False, from_child=True)
    body = control.encode(EndpointConnected(3))
    assert control.decode(body, from_parent=False, from_child=True).childInstance == 3
    with pytest.raises(MessageError, match="must come from a child"):
        control.decode(body, from_parent=True, from_child=False)
    for message in (object(), Echo(b""), struct.Struct("i")):
        with pytest.raises(MessageError, match="may not leave"):
            control.encode(message)
    for body in (b"", b"\xc1", b"\x90", b"\x91\x01", b"\x92\xb1EndpointConnected\xa1x"):
        with pytest.raises(MessageError):
            control.decode(body, from_parent=True, from_child=True)


def test_open_run_directories_are_refused(path: str) -> None:
    from supervisor.registry import RunDirectoryError

    pathlib.Path(path).chmod(0o750)
    with pytest.raises(RunDirectoryError, match="chmod 700"):
        RunDirectory(path)
    with pytest.raises(RunDirectoryError, match="cannot be opened"):
        RunDirectory(path + "/missing")


def test_closing_a_transport_leaves_no_descriptor(path: str) -> None:
    before = len(descriptors(os.getpid()))
    with server(path):
        with Visitor(path, "tester") as visitor:
            visitor.transport.watch("server")
            visitor.ask("server", Echo(b""))
        assert len(descriptors(os.getpid())) == before


def test_sealed_memory_cannot_be_changed() -> None:
    fd = linux.sealed_memory(b"content")
    with pytest.raises(PermissionError):
        os.pwrite(fd, b"x", 0)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 0)
    assert linux.read_sealed_memory(fd, 100) == b"content"
    with pytest.raises(OSError, match="over the limit"):
        linux.read_sealed_memory(fd, 3)
    os.close(fd)


def test_transports_of_one_process_number_replace_a_stale_socket(path: str) -> None:
    """A socket file left by an earlier process of this number is in nobody's way."""
    directory = RunDirectory(path)
    pathlib.Path(f"{path}/sockets/{os.getpid()}").touch()
    Transport(directory).close()
    directory.close()


@pytest.mark.parametrize("name", ["gate", "proxy/home/ssh", ".", "..", ".hidden", "ü:%2F~" * 5, "/" * 200, "a" * 200])
def test_any_name_can_be_registered(path: str, name: str) -> None:
    directory = RunDirectory(path)
    entry = Entry(NameState.READY, 7, 4711, "proxies/" + name)
    directory.write(name, entry)
    directory.write("other", entry)
    assert directory.read(name) == entry
    assert directory.names() == {name: entry, "other": entry}
    directory.remove(name)
    assert directory.read(name) is None
    directory.close()


def test_all_that_a_dead_supervisor_had_is_starting(path: str) -> None:
    directory = RunDirectory(path)
    for name, owner in (("top", "root"), ("below", "top"), ("deep", "below"), ("beside", "root")):
        directory.write(name, Entry(NameState.READY, 2, 10, owner))
    assert sorted(directory.orphan("top")) == ["below", "deep"]
    assert directory.read("deep") == Entry(NameState.STARTING, 2, 0, "below")
    assert directory.read("beside") == Entry(NameState.READY, 2, 10, "root")
    directory.close()
