"""The helpers that read /proc see what is really there: otherwise the tests that rely on them could not fail."""

import os
import signal
import socket
import subprocess
import sys

import pytest

from tests.support.listeners import Listener, listeners
from tests.support.processes import (
    ConditionNotMetError,
    cpu_seconds,
    descriptor_count,
    is_alive,
    pids_with_environment,
    pss_bytes,
    read_process,
    tree,
    wait_until,
)

LISTENING_CHILD = """
import socket, subprocess, sys
tcp = socket.create_server(("127.0.0.1", 0))
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); udp.bind(("127.0.0.1", 0))
connected = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); connected.connect(("127.0.0.1", 9))
unix = socket.socket(socket.AF_UNIX); unix.bind(sys.argv[1]); unix.listen()
quiet = socket.socket(socket.AF_UNIX); quiet.bind(sys.argv[1] + ".not-listening")
print(tcp.getsockname()[1], udp.getsockname()[1], flush=True)
sys.stdin.read()
"""


def start(*arguments: str, code: str = "import sys; sys.stdin.read()", **extra: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **extra},
    )


def test_every_listener_of_a_process_tree_is_found(tmp_path):
    path = str(tmp_path / "socket")
    shell = f"{sys.executable} -c '{LISTENING_CHILD}' {path}; true"
    with subprocess.Popen(["/bin/sh", "-c", shell], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        tcp, udp = (int(word) for word in parent.stdout.readline().split())
        (child,) = (process.pid for process in tree(parent.pid) if process.pid != parent.pid)
        assert listeners(parent.pid) == [
            Listener("tcp", "127.0.0.1", tcp, (child,)),
            Listener("udp", "127.0.0.1", udp, (child,)),
            Listener("unix", path, 0, (child,)),
        ]
        parent.stdin.close()
    assert listeners(parent.pid) == []


def test_only_loopback_addresses_count_as_loopback():
    reach = {"127.0.0.1": True, "127.9.9.9": True, "::1": True, "0.0.0.0": False, "::": False, "192.0.2.1": False}
    assert {address: Listener("tcp", address, 1, ()).is_loopback for address in reach} == reach


def test_an_ipv6_listener_is_found():
    try:
        six = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError as error:
        pytest.skip(f"no IPv6 on loopback here: {error}")
    with six:
        found = [each.address for each in listeners(os.getpid()) if each.port == six.getsockname()[1]]
        assert found == ["::1"]


def test_a_tree_has_parents_first_and_shows_zombies():
    code = "import subprocess, sys; child = subprocess.Popen(['/bin/true']); print('up', flush=True); sys.stdin.read()"
    with start(code=code) as parent:
        assert parent.stdout.readline() == "up\n"
        wait_until(
            lambda: [each.is_zombie for each in tree(parent.pid)] == [False, True], within=5, what="an unwaited child"
        )
        assert tree(parent.pid)[1].parent == parent.pid
        parent.stdin.close()


def test_cost_of_a_tree_grows_with_work():
    with start(code="import sys\nfor line in sys.stdin:\n sum(range(20_000_000)); print('done', flush=True)") as worker:
        worker.stdin.write("go\n")
        worker.stdin.flush()
        assert worker.stdout.readline() == "done\n"
        assert cpu_seconds(worker.pid) > 0.05
        assert pss_bytes([worker.pid]) > 1_000_000
        assert descriptor_count(worker.pid) >= 3
        worker.stdin.close()


def test_an_orphan_is_found_by_its_environment():
    child = "[sys.executable, '-c', 'import sys; sys.stdin.read()']"
    code = f"import subprocess, sys; print(subprocess.Popen({child}).pid)"
    marker = f"{os.getpid()}-orphan"
    with start(code=code, PEERUP_TEST_MARK=marker) as parent:
        orphan = int(parent.stdout.readline())
        wait_until(lambda: not is_alive(parent.pid), within=5, what="the parent's end")
        assert pids_with_environment("PEERUP_TEST_MARK", marker) == [orphan]
        started = read_process(orphan).started
        assert is_alive(orphan, started)
        assert not is_alive(orphan, started + 1)
        os.kill(orphan, signal.SIGKILL)
        wait_until(lambda: not is_alive(orphan), within=5, what="the orphan's end")


def test_a_condition_that_never_holds_is_an_error_that_names_it():
    with pytest.raises(ConditionNotMetError, match=r"not within 0\.05 s: the moon \(last seen: 0\)"):
        wait_until(lambda: 0, within=0.05, what="the moon")
