"""What systemd is told, and above all what it is not told while the node hangs."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from peerup.client import Client
from peerup.systemd import ServiceManager
from protocol.messages.system import Ping, Pong
from supervisor.errors import ActorRestartingError, DeadlineExceededError
from supervisor.watchdog import ADMIN, ROUNDS, Watchdog
from tests.support.processes import is_alive, read_process, tree, wait_until

READY_SECONDS = 60.0
PERIOD = 2.0


# The rounds, without processes


class FakeExchange:
    """Keeps questions and timers; the test answers and lets time pass."""

    def __init__(self) -> None:
        self.time = 100.0
        self.asked: list[tuple[str, Callable]] = []
        self.timers: list[tuple[float, Callable]] = []
        self.restarting: set[str] = set()

    def now(self) -> float:
        return self.time

    def call_at(self, when: float, function: Callable) -> None:
        self.timers.append((when, function))

    def ask(self, target: str, request, *, timeout: float, answer: Callable) -> None:
        assert isinstance(request, Ping)
        assert timeout > 0
        if target in self.restarting:
            raise ActorRestartingError(f"{target} is being restarted")
        self.asked.append((target, answer))

    def answer(self, *names: str) -> None:
        """The questions to these actors get their answer."""
        for target, answer in [entry for entry in self.asked if entry[0] in names]:
            self.asked.remove((target, answer))
            answer(Pong(0, 0))

    def next_round(self) -> None:
        ((self.time, function),) = self.timers
        self.timers.clear()
        function()


class Rounds:
    """A watchdog, who was asked, and how often it was fed."""

    def __init__(self) -> None:
        self.exchange = FakeExchange()
        self.fed = self.admin_asked = 0
        self.watchdog = Watchdog(30.0, ("root", "api"), self.exchange, self._ask_admin, self._feed)
        self.watchdog.begin()

    def _feed(self) -> None:
        self.fed += 1

    def _ask_admin(self) -> None:
        self.admin_asked += 1

    def all_answer(self) -> None:
        self.exchange.answer("root", "api")
        self.watchdog.admin_answered()


def test_a_round_feeds_once_and_only_when_everybody_has_answered():
    rounds = Rounds()
    assert rounds.watchdog.interval == 30.0 / ROUNDS
    rounds.exchange.answer("root")
    rounds.watchdog.admin_answered()
    assert (rounds.fed, rounds.watchdog.silent) == (0, {"api"})
    rounds.exchange.answer("api")
    assert rounds.fed == 1
    rounds.watchdog.admin_answered()  # as one that was hung may do, with all it was asked
    assert rounds.fed == 1
    rounds.exchange.next_round()
    assert rounds.fed == 1
    rounds.all_answer()
    assert rounds.fed == 2


@pytest.mark.parametrize("missing", ["root", "api"])
def test_who_is_silent_being_replaced_or_late_starves_its_round_alone(missing):
    rounds = Rounds()
    other = ({"root", "api"} - {missing}).pop()
    rounds.exchange.answer(other)
    rounds.watchdog.admin_answered()
    late = rounds.exchange.asked.pop()[1]
    rounds.exchange.restarting.add(missing)
    rounds.exchange.next_round()
    rounds.exchange.answer(other)
    rounds.watchdog.admin_answered()
    late(Pong(0, 0))  # to a question of the round before
    late(DeadlineExceededError("too late"))
    assert rounds.fed == 0
    rounds.exchange.restarting.clear()
    rounds.exchange.next_round()
    rounds.all_answer()
    assert rounds.fed == 1


def test_a_hung_admin_is_asked_once():
    rounds = Rounds()
    for _ in range(10):
        rounds.exchange.answer("root", "api")
        rounds.exchange.next_round()
    assert (rounds.fed, rounds.admin_asked) == (0, 1)
    assert ADMIN in rounds.watchdog.silent
    rounds.watchdog.admin_answered()
    rounds.exchange.answer("root", "api")
    assert rounds.fed == 1
    rounds.exchange.next_round()
    assert rounds.admin_asked == 2


def test_a_stop_feeds_by_the_clock_because_actors_leave_one_after_another():
    rounds = Rounds()
    rounds.watchdog.stopping()
    rounds.all_answer()
    assert rounds.fed == 0
    for _ in range(3):
        rounds.exchange.next_round()
    assert rounds.fed == 3
    assert rounds.exchange.asked == []


# The environment


def test_the_environment_says_whom_to_tell_and_children_do_not_see_it():
    environment = {"NOTIFY_SOCKET": "/run/n", "WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "7", "HOME": "/root"}
    assert ServiceManager.take_from(environment, 7) == ServiceManager("/run/n", 30.0)
    assert environment == {"HOME": "/root"}


@pytest.mark.parametrize(
    "environment",
    [
        {"NOTIFY_SOCKET": "@n"},
        {"NOTIFY_SOCKET": "@n", "WATCHDOG_USEC": "0"},
        {"NOTIFY_SOCKET": "@n", "WATCHDOG_USEC": "soon"},
        {"NOTIFY_SOCKET": "@n", "WATCHDOG_USEC": "-5"},
        {"NOTIFY_SOCKET": "@n", "WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "8"},
    ],
)
def test_a_watchdog_that_is_none_of_ours(environment):
    assert ServiceManager.take_from(environment, 7) == ServiceManager("@n", None)


@pytest.mark.parametrize("path", ["", "relative", "vsock:2:1234"])
def test_a_socket_that_is_none(path):
    manager = ServiceManager.take_from({"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "30000000"}, 7)
    assert manager == ServiceManager(None, None)
    manager.tell("READY=1")


def test_telling_reaches_an_abstract_socket_and_never_waits(tmp_path):
    name = f"@peerup-test-{os.getpid()}-{random.randrange(2**60)}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind("\0" + name[1:])
        systemd.settimeout(10)
        manager = ServiceManager(name)
        manager.tell("READY=1", "STATUS=running")
        assert systemd.recv(100) == b"READY=1\nSTATUS=running"
        for _ in range(10_000):  # far more than the socket's queue takes
            manager.tell("WATCHDOG=1")
    manager.tell("WATCHDOG=1")
    ServiceManager(str(tmp_path / "nobody")).tell("WATCHDOG=1")


# Real nodes


class Supervised:
    """A daemon started as systemd would, and what it told."""

    def __init__(self, home, systemd: socket.socket, *options: str, period: float = PERIOD) -> None:
        self.home = home
        self.log = home.with_suffix(".log")
        self.told: list[tuple[float, str]] = []
        self._systemd = systemd
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("PEERUP", "XDG"))}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "peerup", "--home", str(home), "daemon", *options],
                stdout=subprocess.DEVNULL,
                stderr=log,
                env=environment
                | {"NOTIFY_SOCKET": systemd.getsockname(), "WATCHDOG_USEC": str(int(period * 1e6)), "COLUMNS": "80"},
            )

    def listen(self, seconds: float) -> str | None:
        """What it tells next, or None if that is nothing in so many seconds."""
        self._systemd.settimeout(seconds)
        try:
            text = self._systemd.recv(1000).decode()
        except TimeoutError:
            return None
        self.told.append((time.monotonic(), text))
        return text

    def until(self, text: str, seconds: float = READY_SECONDS) -> str:
        """Listen until it tells this; the whole of what it told then."""
        end = time.monotonic() + seconds
        while True:
            told = self.listen(max(0.01, end - time.monotonic()))
            if told is not None and text in told.split("\n"):
                return told
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, f"no {text}; {self.told[-5:]}\n{self.log.read_text()}"

    def until_silent(self, seconds: float) -> None:
        """Listen until it has told nothing for so long."""
        end = time.monotonic() + 20
        while self.listen(seconds) is not None:
            assert time.monotonic() < end, f"it never stops: {self.told[-5:]}"

    def pid_of(self, name: str) -> int:
        actors = Client(self.home / "run" / "control.sock", timeout=10).get("/v1/actors")
        return next(actor["pid"] for actor in actors if actor["name"] == name)

    @property
    def admin(self) -> int:
        return next(process.pid for process in tree(self.process.pid) if process.name == "admin")

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(20) == 0


@pytest.fixture
def systemd(tmp_path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        yield sock


@pytest.fixture
def home(tmp_path):
    made = tmp_path / "node"
    command = [sys.executable, "-m", "peerup", "--home", str(made), "init", "--yes", "--listen", "/ip4/127.0.0.1/tcp/0"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return made


@pytest.fixture
def start(home, systemd) -> Iterator[Callable[..., Supervised]]:
    started: list[Supervised] = []

    def run(*options: str, **more: float) -> Supervised:
        started.append(Supervised(home, systemd, *options, **more))
        return started[-1]

    yield run
    for daemon in started:
        pids = [process.pid for process in tree(daemon.process.pid)]
        daemon.process.kill()
        daemon.process.wait()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        wait_until(lambda pids=pids: not any(map(is_alive, pids)), within=10, what="no process left")


@pytest.mark.slow
def test_ready_then_signs_of_life_at_the_right_pace_then_stopping(start):
    period = 8.0
    daemon = start(period=period)
    assert daemon.until("READY=1") == "READY=1\nSTATUS=running"
    assert [text for _, text in daemon.told] == ["READY=1\nSTATUS=running"], "nothing comes before"
    for _ in range(ROUNDS + 1):
        assert daemon.listen(period) == "WATCHDOG=1"
    signs = [at for at, text in daemon.told if text == "WATCHDOG=1"]
    # Not faster than one a round, but for the delay with which each may have been read.
    assert signs[-1] - signs[0] > (len(signs) - 1) * period / ROUNDS - period / 2
    daemon.process.send_signal(signal.SIGTERM)
    stopping = daemon.until("STOPPING=1")
    assert "EXTEND_TIMEOUT_USEC=40000000" in stopping.split("\n")
    assert daemon.process.wait(20) == 0


@pytest.mark.slow
def test_a_hung_admin_that_nobody_inside_replaces_stops_the_signs_of_life(start):
    daemon = start()
    daemon.until("WATCHDOG=1")
    admin = daemon.admin
    os.kill(admin, signal.SIGSTOP)
    daemon.until_silent(PERIOD)
    assert daemon.pid_of("api"), "all the rest works"
    os.kill(admin, signal.SIGCONT)
    daemon.until("WATCHDOG=1")
    assert daemon.admin == admin
    daemon.stop()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["api", "switchboard", "root"])
def test_signs_of_life_stop_while_an_actor_hangs_and_return_with_its_successor(start, name):
    period = 1.0  # less than it takes to find out that an actor hangs
    daemon = start(period=period)
    daemon.until("WATCHDOG=1")
    pid = daemon.pid_of(name)
    os.kill(pid, signal.SIGSTOP)
    daemon.until_silent(period)
    daemon.until("WATCHDOG=1")
    assert not is_alive(pid)
    assert daemon.pid_of(name) != pid
    daemon.stop()


@pytest.mark.slow
def test_a_fault_that_hangs_the_root_shows(start, home):
    period = 1.0
    daemon = start("--allow-faults", period=period)
    daemon.until("WATCHDOG=1")
    command = [sys.executable, "-m", "peerup", "--home", str(home), "fault", "hang", "root"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    daemon.until_silent(period)
    daemon.until("READY=1")
    daemon.until("WATCHDOG=1")
    daemon.stop()


@pytest.mark.slow
def test_a_stopped_main_process_gives_no_sign_whatever_the_rest_does(start):
    daemon = start()
    daemon.until("WATCHDOG=1")
    os.kill(daemon.process.pid, signal.SIGSTOP)
    daemon.until_silent(PERIOD)
    os.kill(daemon.process.pid, signal.SIGCONT)
    daemon.until("WATCHDOG=1")
    daemon.stop()


@pytest.mark.slow
def test_a_relay_that_cannot_be_reached_is_no_reason_to_restart(start, home):
    peer = "12D3KooWGRUVh9fmKCbmbFWaK2qXNHZq2YXLg3Y1FLQqTZNmvcV9"
    config = home / "config.yaml"
    text = config.read_text()
    assert "  addresses: []\n" in text
    config.write_text(text.replace("  addresses: []\n", f'  addresses: ["/ip4/127.0.0.1/tcp/1/p2p/{peer}"]\n', 1))
    daemon = start(period=8.0)
    daemon.until("READY=1")
    for _ in range(2 * ROUNDS):
        daemon.until("WATCHDOG=1", 8.0)
    daemon.stop()


@pytest.mark.slow
def test_the_signal_that_systemd_ends_a_hung_service_with_leaves_a_trace_and_no_process(start):
    daemon = start()
    daemon.until("WATCHDOG=1")
    pids = [process.pid for process in tree(daemon.process.pid)]
    daemon.process.send_signal(signal.SIGABRT)
    assert daemon.process.wait(20) == -signal.SIGABRT
    wait_until(lambda: not any(map(is_alive, pids)), within=10, what="no process left")
    assert "in run" in daemon.log.read_text()
    assert read_process(daemon.process.pid) is None
