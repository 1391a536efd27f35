"""A whole service of real processes: start, messages, deaths of every kind, stop."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import os
import pathlib
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from thespian.actors import ActorExitRequest, ActorSystem, InvalidActorSpecification
from thespian.system.messages.admin import PendingActor, SystemShutdown

from protocol.messages import encode_body
from protocol.messages.system import (
    ChildSpec,
    Describe,
    InjectProcessFault,
    ProcessFault,
    ReadTree,
    Restart,
    SaveCheckpoint,
    StartChild,
    StopChild,
    Strategy,
    SupervisorSpec,
)
from supervisor import control, thespian_base
from supervisor.boot import Boot
from supervisor.errors import ActorRestartingError, AskError, DeadlineExceededError, NoSuchActorError, RefusedError
from supervisor.estate import CHECKPOINT_BYTES
from supervisor.overseer import FACTORY, supervisor_arguments
from supervisor.port import NameState
from supervisor.registry import RunDirectory
from supervisor.service import FAILED_STARTS
from tests.supervisor.process_harness import ROOT, TOY, ToyService, forked, run_directory, spec, toy
from tests.supervisor.toy_actors import Block, Crash, Echo, Keep, Kept, ReadKept, ReadSeen, Relay, Sleep, Watch
from tests.support.listeners import listeners
from tests.support.processes import descriptors, is_alive, read_process, tree, wait_until

PRINT_STOCK = """
import sys, supervisor.service
print([name for name in sys.modules if name.endswith(("TCPTransport", "UDPTransport", "QueueTransport", "IPBase"))])
"""
"""Prints which of Thespian's stock transports the runtime has loaded."""


def left_in(path: str) -> list[str]:
    """What is still in the run directory."""
    return sorted(entry.name for entry in pathlib.Path(path).iterdir())


Start = Callable[..., ToyService]


@pytest.fixture
def path() -> Iterator[str]:
    with run_directory() as made:
        yield made


@pytest.fixture
def start(path: str) -> Iterator[Start]:
    """Start a service on the run directory; it is ended whatever the test does."""
    with contextlib.ExitStack() as stack:
        yield lambda root, **options: stack.enter_context(ToyService(path, root, **options))


def test_actors_ask_each_other_and_a_stop_leaves_nothing(path: str, start: Start) -> None:
    service = start(spec(toy("a"), toy("b")))
    answer = service.visitor.ask("a", Relay("b", b"text", 5.0))
    assert answer.text == b"text"
    assert answer.pid == service.entry_pid("b")
    names = [child.name for child in service.visitor.ask("root", ReadTree()).children]
    assert names == ["root", "a", "b"]
    pids = service.pids()
    assert len(pids) == 5  # main, admin, root, a, b
    assert service.stop() == 0
    assert not [pid for pid in pids if is_alive(pid)]
    assert left_in(path) == []


def test_interrupting_stops_in_order_too(path: str, start: Start) -> None:
    service = start(spec(toy("a"), toy("b")))
    assert service.stop(signal.SIGINT) == 0
    assert left_in(path) == []


def test_a_stuck_actor_is_killed_at_its_stop_deadline(path: str, start: Start) -> None:
    child = ChildSpec("a", TOY, {}, stop_deadline=0.5, heartbeat=0)
    service = start(spec(child, toy("b")))
    block(service, "a")
    before = time.monotonic()
    assert service.stop() == 0
    assert 0.4 < time.monotonic() - before < 20
    assert left_in(path) == []


def block(service: ToyService, name: str) -> None:
    """Have the actor's event loop stand still."""
    service.echo(name)
    service.visitor.tell(name, Block(60.0))
    with pytest.raises(DeadlineExceededError):
        service.echo(name, timeout=0.2)


def test_a_second_signal_does_not_wait(path: str, start: Start) -> None:
    service = start(spec(ChildSpec("a", TOY, {}, stop_deadline=60.0, heartbeat=0)))
    block(service, "a")
    service.leave()
    service.process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        service.process.wait(0.3)
    assert service.stop(signal.SIGTERM, deadline=5) == 0
    assert left_in(path) == []


def fill(service: ToyService, number: int = 2) -> None:
    """Until nothing more goes into the pipe of this descriptor, which the test does not read."""
    fd = os.open(f"/proc/{service.pid}/fd/{number}", os.O_WRONLY | os.O_NONBLOCK)
    try:
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(fd, b"." * 4096)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(fd, b".")
    finally:
        os.close(fd)


def test_nobody_reads_the_log_and_yet_all_is_supervised_and_stops(path: str, start: Start) -> None:
    service = start(spec(toy("a"), toy("b")))
    fill(service)
    for _ in range(3):
        pid = service.echo("a").pid
        os.kill(pid, signal.SIGKILL)
        service.echo_from_another("a", pid)
    service.visitor.tell("b", Crash("with a traceback"))
    service.echo_from_another("b", service.entry_pid("b"))
    os.kill(service.entry_pid("root"), signal.SIGKILL)
    service.leave()
    service.wait_ready(2)
    errors = service.errors
    wait_until(lambda: "everything is started again" in errors(), within=5, what="what could not be logged then")
    fill(service)
    assert service.stop() == 0
    assert left_in(path) == []


def test_signals_end_a_main_process_that_is_stuck(path: str, start: Start) -> None:
    service = start(spec(toy("a")))
    pids = service.pids()
    service.leave()
    fill(service, 1)  # so that it waits for ever in saying that it stops

    def ended() -> bool:
        service.process.send_signal(signal.SIGTERM)
        return service.process.poll() is not None

    wait_until(ended, within=10, what="the end", every=0.2)
    wait_until(lambda: not [pid for pid in pids if is_alive(pid)], within=5, what="all processes are gone")


def test_a_child_that_is_still_starting_stops_at_once(path: str, start: Start) -> None:
    service = start(spec(toy("a")))
    service.visitor.exchange.ask("root", StartChild(toy("slow", start_delay=30.0)), timeout=30, answer=lambda _: None)
    wait_until(lambda: service.visitor.directory.read("slow"), within=5, what="it is being started")
    before = time.monotonic()
    assert service.stop() == 0
    assert time.monotonic() - before < 20
    assert left_in(path) == []


def test_unknown_names_and_watched_ends(start: Start) -> None:
    service = start(spec(toy("a"), toy("b")))
    with pytest.raises(NoSuchActorError):
        service.visitor.ask("nobody", Echo(b""))
    with pytest.raises(RefusedError) as refused:
        service.visitor.ask("a", Relay("nobody", b"", 1.0))
    assert refused.value.code == "no-such-actor"
    service.visitor.ask("a", Watch("b"))
    os.kill(service.echo("b").pid, signal.SIGKILL)
    service.visitor.wait_for("b")
    wait_until(
        lambda: service.visitor.ask("a", ReadSeen()).events == ("down b", "up b 2"),
        within=5,
        what="the watcher was told of the end and the successor",
    )


def test_a_pending_request_fails_when_its_target_is_killed(start: Start) -> None:
    service = start(spec(toy("a")))
    pid = service.echo("a").pid
    threading.Timer(0.1, os.kill, (pid, signal.SIGKILL)).start()
    before = time.monotonic()
    with pytest.raises(ActorRestartingError):
        service.visitor.ask("a", Sleep(30.0), timeout=30)
    assert time.monotonic() - before < 20


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGTERM])
def test_a_leaf_that_ends_by_a_signal_comes_back(start: Start, number: signal.Signals) -> None:
    service = start(spec(toy("a"), toy("b")))
    a, b = service.echo("a"), service.echo("b")
    os.kill(a.pid, number)
    again = service.echo_from_another("a", a.pid)
    assert again.incarnation == 2
    assert service.echo("b").pid == b.pid
    status = service.status("a")
    assert status.restarts == 1
    if number is not signal.SIGTERM:  # which is a wish to stop, and obeyed
        assert number.name in status.last_failure


def test_an_exception_ends_the_process_and_its_text_is_the_last_failure(start: Start) -> None:
    service = start(spec(toy("a")))
    pid = service.echo("a").pid
    service.visitor.tell("a", Crash("a defect of the toy"))
    service.echo_from_another("a", pid)
    assert "RuntimeError: a defect of the toy" in service.status("a").last_failure
    assert "Traceback" in service.errors()


def test_a_child_that_cannot_start_ends_the_service_with_its_reason(path: str) -> None:
    with pytest.raises(AssertionError, match="no luck today"):
        ToyService(path, spec(toy("a", fail_start="no luck today"), intensity=1))
    assert left_in(path) == []


@pytest.mark.parametrize("factory", ["os:system", "json:JSONDecoder", "tests.supervisor.toy_actors:Echo", "nonsense"])
def test_only_actors_of_the_program_can_be_children(start: Start, factory: str) -> None:
    service = start(spec(toy("a")))
    with pytest.raises(RefusedError):
        service.visitor.ask("root", StartChild(ChildSpec("x", factory, {}, Restart.TEMPORARY)), timeout=10)
    assert service.echo("a").pid


def test_children_can_be_started_and_stopped_while_running(start: Start) -> None:
    service = start(spec(toy("a")))
    started = service.visitor.ask("root", StartChild(toy("proxy/home/ssh")))
    assert started.ready == {"pid": started.pid, "incarnation": 1}
    assert service.echo("proxy/home/ssh").pid == started.pid
    with pytest.raises(RefusedError) as refused:
        service.visitor.ask("root", StartChild(toy("proxy/home/ssh")))
    assert refused.value.code == "already-started"
    os.kill(started.pid, signal.SIGKILL)
    service.echo_from_another("proxy/home/ssh", started.pid)
    service.visitor.ask("root", StopChild("proxy/home/ssh"))
    with pytest.raises(NoSuchActorError):
        service.visitor.ask("proxy/home/ssh", Echo(b""))


def test_eight_siblings_killed_at_once_all_come_back(start: Start) -> None:
    names = [f"toy{number}" for number in range(8)]
    service = start(spec(*(toy(name) for name in names), intensity=100))
    for _ in range(3):
        before = {name: service.echo(name).pid for name in names}
        for pid in before.values():
            os.kill(pid, signal.SIGKILL)
        for name in names:
            service.echo_from_another(name, before[name])
    assert len(tree(service.pid)) == 3 + 8


def test_a_stopped_child_is_found_by_its_heartbeat(start: Start) -> None:
    service = start(spec(toy("a"), toy("b")))
    a, b = service.echo("a"), service.echo("b")
    os.kill(a.pid, signal.SIGSTOP)
    service.echo_from_another("a", a.pid)
    assert not is_alive(a.pid)
    assert service.echo("b").pid == b.pid


def test_a_child_that_hangs_in_a_handler_is_found_too(start: Start) -> None:
    service = start(spec(toy("a")))
    pid = service.echo("a").pid
    service.visitor.tell("a", Block(60.0))
    service.echo_from_another("a", pid)


@pytest.mark.parametrize(
    ("strategy", "restarted"),
    [
        (Strategy.ONE_FOR_ONE, {"b"}),
        (Strategy.REST_FOR_ONE, {"b", "c"}),
        (Strategy.ONE_FOR_ALL, {"a", "b", "c"}),
    ],
)
def test_strategies(start: Start, strategy: Strategy, restarted: set[str]) -> None:
    service = start(spec(toy("a"), toy("b"), toy("c"), strategy=strategy))
    before = {name: service.echo(name).pid for name in "abc"}
    os.kill(before["b"], signal.SIGKILL)
    for name in restarted:
        service.echo_from_another(name, before[name])
    for name, pid in before.items():
        assert (service.echo(name).pid != pid) == (name in restarted)


def nested() -> SupervisorSpec:
    below = spec(toy("c"), toy("d"))
    return spec(toy("a"), ChildSpec("below", FACTORY, supervisor_arguments(below)), toy("z"))


def test_supervisors_nest(start: Start) -> None:
    service = start(nested(), allow_faults=True)
    names = [child.name for child in service.visitor.ask("root", ReadTree()).children]
    assert names == ["root", "a", "below", "c", "d", "z"]
    pid = service.echo("c").pid
    service.visitor.ask("root", InjectProcessFault("c", ProcessFault.KILL))
    service.echo_from_another("c", pid)


def test_a_killed_supervisor_takes_its_children_along_and_they_come_back(start: Start) -> None:
    service = start(nested())
    service.visitor.ask("below", StartChild(toy("dynamic")))
    before = {name: service.echo(name).pid for name in ("a", "c", "d", "z", "dynamic")}
    below = service.entry_pid("below")
    os.kill(below, signal.SIGKILL)
    for name in ("c", "d"):
        again = service.echo_from_another(name, before[name])
        assert again.incarnation == 2
    wait_until(
        lambda: service.visitor.transport.state("dynamic") is NameState.UNKNOWN, within=5, what="nobody has the name"
    )
    assert service.echo("a").pid == before["a"]
    assert service.echo("z").pid == before["z"]
    wait_until(
        lambda: (
            not [pid for pid in (below, before["c"], before["d"], before["dynamic"]) if read_process(pid) is not None]
        ),
        within=5,
        what="the old processes are gone, zombies included",
    )


@pytest.mark.parametrize("victim", ["admin", "root"])
def test_everything_is_rebuilt_when_admin_or_root_dies(start: Start, victim: str) -> None:
    service = start(nested())
    old = service.pids()[1:]
    admin = next(process.pid for process in tree(service.pid) if process.name == "admin")
    incarnation = service.echo("c").incarnation
    pid = service.echo("c").pid
    before = time.monotonic()
    os.kill(admin if victim == "admin" else service.entry_pid("root"), signal.SIGKILL)
    service.leave()  # the registry is made anew
    service.wait_ready(2)
    again = service.echo_from_another("c", pid)
    assert time.monotonic() - before < 20
    assert again.incarnation > incarnation
    assert not [pid for pid in old if read_process(pid) is not None]
    assert len(tree(service.pid)) == 8


@pytest.mark.slow
def test_a_tree_that_was_ready_is_rebuilt_however_often_it_is_lost(start: Start) -> None:
    service = start(spec(toy("a")))
    for life in range(2, FAILED_STARTS + 4):
        root = service.entry_pid("root")
        service.leave()
        os.kill(root, signal.SIGKILL)
        service.wait_ready(life)
    assert service.echo("a").incarnation > FAILED_STARTS


def test_everything_is_rebuilt_when_the_root_stands_still(start: Start) -> None:
    service = start(spec(toy("a")))
    root, pid = service.entry_pid("root"), service.echo("a").pid
    service.leave()
    os.kill(root, signal.SIGSTOP)
    service.wait_ready(2)
    assert service.echo("a").pid != pid
    assert read_process(root) is None


def test_nothing_survives_the_main_process(path: str, start: Start) -> None:
    service = start(nested())
    pids = service.pids()
    service.leave()
    service.process.kill()
    service.process.wait(5)
    wait_until(lambda: not [pid for pid in pids if is_alive(pid)], within=5, what="every process has ended")
    # What it left is recognised as stale and cleared.
    again = start(spec(toy("a")))
    assert again.echo("a").incarnation == 1
    assert again.stop() == 0
    assert left_in(path) == []


def test_a_second_service_is_refused(path: str, start: Start) -> None:
    service = start(spec(toy("a")))
    with pytest.raises(AssertionError, match="already-running: another service runs in"):
        ToyService(path, spec(toy("a")))
    assert service.echo("a").pid


def test_a_listening_socket_in_a_checkpoint_outlives_its_process(start: Start) -> None:
    service = start(spec(toy("a", port=0), intensity=100))
    port = listening_port(service)
    served: set[bytes] = set()
    end = time.monotonic() + 30
    kills = 0
    while kills < 5:
        assert time.monotonic() < end
        # Killed with this connection in its hands: a reset, which may come before connecting has returned.
        with contextlib.suppress(ConnectionResetError), socket.create_connection(("127.0.0.1", port), 5) as client:
            served.add(client.recv(64))
        if len(served - {b""}) > kills:
            os.kill(service.entry_pid("a"), signal.SIGKILL)
            kills += 1
    assert listening_port(service) == port


@pytest.mark.parametrize("victim", ["below", "root"])
def test_a_listening_socket_outlives_the_supervisors_above_its_process(start: Start, victim: str) -> None:
    inner = ChildSpec("below", FACTORY, supervisor_arguments(spec(toy("a", port=0))))
    service = start(spec(inner))
    port = listening_port(service)
    for kills in range(1, 4):
        pid = service.entry_pid("a")
        supervisor = service.entry_pid(victim)
        if victim == "root":
            service.leave()
        os.kill(supervisor, signal.SIGKILL)
        # The kernel takes the connection whoever lives; the old life may still have it in its hands.
        with contextlib.suppress(ConnectionResetError), socket.create_connection(("127.0.0.1", port), 20) as client:
            client.recv(64)
        if victim == "root":
            service.wait_ready(kills + 1)
        wait_until(lambda pid=pid: service.entry_pid("a") not in {0, pid}, within=20, what="the next life")
        with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
            assert client.recv(64)
    assert listening_port(service) == port


@pytest.mark.parametrize("victim", ["below", "root"])
def test_a_checkpoint_of_the_greatest_size_outlives_the_supervisors_above_its_actor(start: Start, victim: str) -> None:
    """On its way up and down again it becomes a little longer with each supervisor."""
    inner = ChildSpec("below", FACTORY, supervisor_arguments(spec(toy("a"))))
    service = start(spec(inner))
    around = len(encode_body(SaveCheckpoint({"kept": bytes(70_000)}, ()))[0]) - 70_000
    size = CHECKPOINT_BYTES - around
    service.visitor.tell("a", Keep(size, 7))
    service.visitor.tell("a", Keep(size + 1, 8))  # one byte too many: refused, and the one before it stays
    pid = service.echo("a").pid
    wait_until(lambda: "a checkpoint of a was not kept" in service.errors(), within=5, what="the refusal")
    service.visitor.ask("root", ReadTree())  # what `below` has answered came to the root after the checkpoint
    for kills in range(1, 3):
        os.kill(service.entry_pid(victim), signal.SIGKILL)
        if victim == "root":
            service.leave()
            service.wait_ready(kills + 1)
        pid = service.echo_from_another("a", pid).pid
        assert service.visitor.ask("a", ReadKept()) == Kept(size, 7)
    assert "starts without what it left" not in service.errors()


def listening_port(service: ToyService) -> int:
    found = [listener.port for listener in listeners(service.pid) if listener.kind == "tcp"]
    assert len(found) == 1
    return found[0]


def test_there_is_no_listener_but_the_sockets_of_the_run_directory(path: str, start: Start) -> None:
    service = start(nested())
    found = listeners(service.pid)
    assert {listener.kind for listener in found} == {"unix"}
    assert len(found) == len(tree(service.pid))


def test_children_have_only_their_own_descriptors(start: Start) -> None:
    """Three directories, the standard ones, the transport, trio: what the parents have open is closed."""
    service = start(nested())
    for child in service.visitor.ask("root", ReadTree()).children:
        assert child.pid is not None
        open_now = descriptors(child.pid)
        assert len(open_now) < 25, open_now
        assert not any("pidfd" in target for target in open_now.values()) or child.factory == FACTORY


def test_descriptors_and_zombies_do_not_pile_up_over_many_restarts(start: Start) -> None:
    service = start(spec(toy("a", port=0), toy("b"), intensity=10_000, window=1.0, backoff=0.0))
    root = service.entry_pid("root")
    pid = service.echo("a").pid
    counts = []
    for number in range(200):
        os.kill(pid, signal.SIGKILL)
        pid = service.echo_from_another("a", pid).pid
        if number in (20, 199):
            counts.append((len(descriptors(root)), len(descriptors(service.pid)), len(descriptors(pid))))
    assert counts[0] == counts[1]
    assert len(tree(service.pid)) == 5


def test_process_faults_need_permission(start: Start) -> None:
    service = start(spec(toy("a")))
    with pytest.raises(RefusedError) as refused:
        service.visitor.ask("root", InjectProcessFault("a", ProcessFault.KILL))
    assert refused.value.code == "faults-not-allowed"


@pytest.mark.parametrize("fault", list(ProcessFault))
def test_process_faults(start: Start, fault: ProcessFault) -> None:
    service = start(spec(toy("a")), allow_faults=True)
    pid = service.echo("a").pid
    service.visitor.ask("root", InjectProcessFault("a", fault))
    service.echo_from_another("a", pid)


def test_an_actor_describes_itself(start: Start) -> None:
    service = start(spec(toy("a")))
    assert service.visitor.ask("a", Describe()).state == {"count": 0}
    assert service.visitor.ask("root", Describe()).state["strategy"] == "one_for_one"


def test_leaves_cannot_be_inspected_or_gain_privileges(start: Start) -> None:
    service = start(spec(toy("a")))
    lines = pathlib.Path(f"/proc/{service.entry_pid('a')}/status").read_text().splitlines()
    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    assert status["NoNewPrivs"] == "1"
    assert status["Name"] == "a"
    assert status["Threads"] == "1"
    if os.geteuid() != 0:
        assert pathlib.Path(f"/proc/{service.entry_pid('a')}/mem").stat().st_uid == 0


def test_actors_may_have_many_descriptors(start: Start) -> None:
    """A thousand tunnelled connections need more than the usual soft limit of 1024."""
    service = start(spec(toy("a")))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, _ = resource.prlimit(service.entry_pid("a"), resource.RLIMIT_NOFILE)
    assert soft >= min(65536, hard)


def test_the_admin_starts_nothing_but_the_root_supervisor(path: str) -> None:
    """Asked by its own parent, so that only the class is wrong."""

    def ask_for_others() -> None:
        directory = RunDirectory(path)
        thespian_base.install()
        boot = Boot(directory, spec(toy("a")))
        system = ActorSystem(thespian_base.NAME, capabilities={thespian_base.BOOT: boot}, transientUnique=True)
        for wanted in ("subprocess.Popen", "supervisor.process.Leaf", "thespian.troupe.ActorTroupe"):
            with pytest.raises(InvalidActorSpecification, match="may not be started"):
                system.createActor(wanted)
        system.shutdown()

    with forked(ask_for_others) as pid:
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0


def test_only_the_parent_gives_orders(start: Start) -> None:
    """Shutting down, starting and ending actors are refused when they come from anybody else of the same user."""
    service = start(spec(toy("a")))
    before = service.pids()
    targets = [pid for pid in before if pid != service.pid]
    for order in (SystemShutdown(), PendingActor(thespian_base.ALLOWED[0], None, 1, None, None), ActorExitRequest()):
        for pid in targets:
            service.visitor.transport.send_control(pid, control.encode(order))
    assert service.echo("a").incarnation == 1
    names = [child.name for child in service.visitor.ask("root", ReadTree()).children]
    assert names == ["root", "a"]
    assert service.pids() == before


def test_another_version_of_thespian_is_refused() -> None:
    from supervisor.thespian_corrections import ThespianVersionError, check_version

    check_version("4.0.1")
    with pytest.raises(ThespianVersionError):
        check_version("4.0.2")


def test_the_corrections_name_the_lines_that_they_correct() -> None:
    """Each `path.py:first-last (`function`)` in them is a function of the installed Thespian at just these lines."""
    installed = pathlib.Path(importlib.util.find_spec("thespian").origin).parent  # type: ignore[union-attr, arg-type]
    cited = set()
    for source in ("thespian_corrections.py", "thespian_base.py"):
        text = (ROOT / "supervisor" / source).read_text()
        found = re.findall(r"((?:system/)?\w[\w/]*\.py):(\d+)-(\d+)\s+\(`(\w+)`\)", text)
        assert len(found) == len(re.findall(r"\.py:\d", text)), "every citation names its function"
        cited.update(found)
    assert len(cited) > 15
    for path, first, last, function in cited:
        nodes = ast.walk(ast.parse((installed / path).read_text()))
        places = [
            (node.lineno, node.end_lineno)
            for node in nodes
            if isinstance(node, ast.FunctionDef) and node.name == function
        ]
        assert (int(first), int(last)) in places, (path, function, places)


def test_the_runtime_does_not_load_the_stock_transports() -> None:
    command = [sys.executable, "-c", PRINT_STOCK]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.strip() == "[]"


def test_a_request_to_a_restarting_actor_says_so(start: Start) -> None:
    service = start(spec(toy("a", start_delay=0.5)))
    pid = service.entry_pid("a")
    service.visitor.exchange.watch("a")
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: service.visitor.transport.state("a") is NameState.STARTING, within=5, what="the end is noticed")
    with pytest.raises(AskError) as failed:
        service.visitor.ask("a", Echo(b""), timeout=0.2)
    assert failed.value.code == "actor-restarting"
    service.visitor.wait_for("a")
    assert service.echo("a").incarnation == 2
