"""What a person or a machine can get wrong: told in words, with a status, nothing half-written, nothing lost.

Each case runs the real commands and the real daemon. No case may show a traceback, leave a process, or change a file
that it did not mean to change.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from demo.node import Node
from peerup.client import Client
from tests.abuse.attacker import new_key
from tests.abuse.world import fails
from tests.chaos.load import EchoServer, echo_works
from tests.support.ports import own_port
from tests.support.processes import descriptors, is_alive, pids_with_environment, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

STATUS_FAILED = 1
STATUS_USAGE = 2
STATUS_NOT_RUNNING = 3
REFUSES_WITHIN = 20.0
MARK = "PEERUP_TEST_BAD_INPUT"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Node:
    """A node as `peerup init` makes it, to be copied."""
    made = Node("template", tmp_path_factory.mktemp("t"))
    made.initialise()
    made.stop()
    return made


@pytest.fixture
def node(tmp_path: Path, template: Node) -> Iterator[Node]:
    """A node that was initialised and does not run."""
    made = Node("n", tmp_path)
    shutil.copytree(template.home, made.home)
    config = made.home / "config.yaml"
    config.write_text(config.read_text().replace(template.address, made.address))
    made.peer_id = template.peer_id
    yield made
    assert made.stop() == set()


def snapshot(home: Path) -> dict[str, bytes]:
    """The content of every file that a person or the node keeps there; locks and the run directory are neither."""
    return {
        str(path.relative_to(home)): path.read_bytes()
        for path in sorted(home.rglob("*"))
        if path.is_file() and path.relative_to(home).parts[0] != "run" and not path.name.endswith(".lock")
    }


def without_privileges() -> None:
    """In the child: root, too, is held to the modes of files."""
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


def refuses_to_start(node: Node, *, home: Path | None = None, **options: Any) -> str:
    """What `peerup daemon` says that must not come up. It ends by itself with status 1 and leaves nothing running."""
    mark = f"{os.getpid()}-{time.monotonic_ns()}"
    command = node.command("daemon")
    if home is not None:
        command[command.index(str(node.home))] = str(home)
    environment = {**options.pop("env", os.environ), MARK: mark}
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=REFUSES_WITHIN, env=environment, **options
    )
    said = done.stdout + done.stderr
    assert done.returncode == STATUS_FAILED, f"it ended with {done.returncode}: {said}"
    assert "Traceback" not in said, said
    assert "ready" not in done.stdout
    assert "error:" in done.stderr, said
    wait_until(lambda: not pids_with_environment(MARK, mark), within=5, what="no process of it left")
    return done.stderr


# ---- the configuration


BROKEN_CONFIGS = {
    "broken YAML": ("services: {}", "services: {ssh: [", ["line", "column"]),
    "a tab": ("services: {}", "services:\n\tssh: 1", ["line", "column", "\\t"]),
    "the same key twice": ("services: {}", "services: {}\nservices: {}", ["line", "services"]),
    "a list at the top": (None, "- a\n- b\n", ["line 1"]),
    "a number of the wrong kind": ("version: 1", "version: one", ["line", "version"]),
    "a later version": ("version: 1", "version: 99", ["99", "update"]),
    "a multiaddr that is none": ('"/ip4/127.0.0.1', '"/ip4/127.0.0.999', ["listen_addresses", "127.0.0.999"]),
    "an unknown transport": ('"/ip4/127.0.0.1', '"/carrier-pigeon/1/ip4/127.0.0.1', ["carrier-pigeon"]),
    "a service without address": ("services: {}", "services:\n  ssh:\n    enabled: true", ["local_address"]),
    "a service at no port": (
        "services: {}",
        'services:\n  ssh:\n    enabled: true\n    local_address: "localhost:99999"',
        ["line", "99999"],
    ),
    "a service with an impossible name": (
        "services: {}",
        'services:\n  "no/such":\n    enabled: true\n    local_address: "localhost:22"',
        ["line", "no/such"],
    ),
    "a peer id that is none": ("names: {}", "names:\n  home: 12D3KooWnonsense", ["line", "12D3KooWnonsense"]),
    "a binary file": (None, "\x00\x01\x02\x03", ["config.yaml"]),
}


@pytest.mark.parametrize("name", BROKEN_CONFIGS)
def test_a_broken_configuration_is_explained_by_every_command_and_by_the_daemon(node: Node, name: str) -> None:
    old, new, wanted = BROKEN_CONFIGS[name]
    config = node.home / "config.yaml"
    text = config.read_text()
    assert old is None or old in text
    config.write_text(new if old is None else text.replace(old, new, 1))
    before = snapshot(node.home)
    for said in (
        refuses_to_start(node),
        fails(node, "config", "validate"),
        fails(node, "service", "add", "web", "127.0.0.1:80"),
    ):
        assert "config.yaml" in said
        for word in wanted:
            assert word in said, said
    assert snapshot(node.home) == before


def test_a_configuration_that_breaks_while_the_node_runs_changes_nothing(node: Node) -> None:
    node.start()
    config = node.home / "config.yaml"
    good = config.read_text()
    before = [(actor["name"], actor["pid"]) for actor in node.actors()]
    config.write_text(good.replace("services: {}", "services: {ssh: ["))
    answer = Client(node.home / "run/control.sock").post("/v1/config/reload")
    assert "line" in str(answer["problems"])
    assert [(actor["name"], actor["pid"]) for actor in node.actors()] == before
    fails(node, "service", "add", "web", "127.0.0.1:80")
    config.write_text(good)
    assert Client(node.home / "run/control.sock").post("/v1/config/reload")["problems"] == []
    node.run("service", "add", "web", "127.0.0.1:80")


# ---- files that are missing, open to others, or closed to us


def test_a_missing_home_is_explained(node: Node, tmp_path: Path) -> None:
    assert "peerup init" in refuses_to_start(node, home=tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_a_missing_key_is_explained_and_not_made_anew(node: Node) -> None:
    (node.home / "identity.key").unlink()
    assert "identity.key" in refuses_to_start(node)
    assert "identity.key" in fails(node, "whoami")
    assert not (node.home / "identity.key").exists(), "a new key is a new identity, which nobody asked for"


@pytest.mark.parametrize("mode", [0o644, 0o620])
def test_a_key_open_to_others_is_refused_with_the_command_that_repairs_it(node: Node, mode: int) -> None:
    key = node.home / "identity.key"
    key.chmod(mode)
    for said in (refuses_to_start(node), fails(node, "whoami")):
        assert f"chmod 600 {key}" in said
    assert key.stat().st_mode & 0o777 == mode, "modes are for the owner to change"
    key.chmod(0o600)
    node.start()


@pytest.mark.parametrize(
    "content",
    [b"", b"nonsense", b"\xa5" * 68, bytes(68), b"\x08\x01\x12\x40" + bytes(64)],
    ids=["empty", "text", "noise", "zeros", "halves that do not match"],
)
def test_a_key_that_is_none_is_refused_and_kept(node: Node, content: bytes) -> None:
    key = node.home / "identity.key"
    key.write_bytes(content)
    assert "identity.key" in refuses_to_start(node)
    assert "identity.key" in fails(node, "whoami")
    assert key.read_bytes() == content


def test_files_that_may_not_be_read_are_named(node: Node) -> None:
    for name in ("identity.key", "config.yaml"):
        (node.home / name).chmod(0)
        said = refuses_to_start(node, preexec_fn=without_privileges)
        assert name in said
        assert "ermission" in said or "may not be read" in said
        (node.home / name).chmod(0o600)


def test_authorized_keys_that_may_not_be_read_let_nobody_in_and_are_named(node: Node) -> None:
    keys = node.home / "authorized_keys"
    node.run("auth", "add", str(new_key().peer_id))
    keys.chmod(0)
    for arguments in (["auth", "list"], ["auth", "validate"], ["auth", "add", str(new_key().peer_id)]):
        said = fails(node, *arguments, preexec_fn=without_privileges)
        assert "authorized_keys" in said
        assert "ermission" in said
    with privileges_dropped():
        node.start()
    described = node.run_json("actors", "get", "gate")["description"]
    assert described["peers"] == 0
    assert "ermission" in str(described["problems"])
    keys.chmod(0o600)
    Client(node.home / "run/control.sock").post("/v1/auth/reload")
    assert node.run_json("actors", "get", "gate")["description"]["peers"] == 1


@contextlib.contextmanager
def privileges_dropped() -> Iterator[None]:
    """Every process started within is held to the modes of files."""
    start = subprocess.Popen.__init__

    def patched(self: Any, *arguments: Any, **options: Any) -> None:
        start(self, *arguments, preexec_fn=without_privileges, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess.Popen, "__init__", patched)
        yield


def test_a_home_that_may_not_be_written_is_named(node: Node) -> None:
    before = snapshot(node.home)
    node.home.chmod(0o500)
    try:
        for arguments in (
            ["auth", "add", str(new_key().peer_id)],
            ["service", "add", "web", "127.0.0.1:80"],
            ["names", "add", "x", str(new_key().peer_id)],
        ):
            assert str(node.home) in fails(node, *arguments, preexec_fn=without_privileges)
        (node.home / "run").rmdir() if (node.home / "run").exists() else None
        assert str(node.home) in refuses_to_start(node, preexec_fn=without_privileges)
    finally:
        node.home.chmod(0o700)
    assert snapshot(node.home) == before


def test_a_home_that_belongs_to_everybody_is_refused(node: Node) -> None:
    node.home.chmod(0o777)
    assert "chmod 700" in refuses_to_start(node)


def test_init_where_nothing_may_be_written_leaves_nothing(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    fresh = Node("home", closed.parent)
    fresh.home = closed / "home"
    said = fails(fresh, "init", "--yes", preexec_fn=without_privileges)
    assert str(closed) in said
    assert list(closed.iterdir()) == []
    fresh.stop()


def test_init_over_a_node_changes_nothing(node: Node) -> None:
    before = snapshot(node.home)
    fails(node, "init", "--yes")
    assert snapshot(node.home) == before


def test_a_home_whose_path_is_too_long_for_sockets_is_refused(node: Node, tmp_path: Path) -> None:
    far = tmp_path / ("d" * 60) / ("e" * 60)
    far.parent.mkdir()
    node.home.rename(far)
    node.home = far
    said = refuses_to_start(node)
    assert "shorter" in said
    fresh = Node("x", far)
    assert "shorter" in fails(fresh, "init", "--yes")
    assert not fresh.home.exists()
    fresh.stop()


# ---- a full disk


def no_file_longer_than(length: int) -> Callable[[], None]:
    """In the child: a write beyond fails, as on a full disk."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (length, length))

    return limit


def test_a_full_disk_harms_no_file(node: Node) -> None:
    node.run("auth", "add", str(new_key().peer_id), "--comment", "first")
    before = snapshot(node.home)
    for arguments in (
        ["auth", "add", str(new_key().peer_id)],
        ["service", "add", "web", "127.0.0.1:80"],
        ["names", "add", "x", str(new_key().peer_id), "--address", "/ip4/127.0.0.1/tcp/1"],
    ):
        said = fails(node, *arguments, preexec_fn=no_file_longer_than(16))
        assert "othing was changed" in said
        assert "room" in said
    assert snapshot(node.home) == before


def test_init_on_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    fresh = Node("f", tmp_path)
    fails(fresh, "init", "--yes", preexec_fn=no_file_longer_than(16))
    assert snapshot(fresh.home) == {} if fresh.home.exists() else True
    fresh.initialise()
    fresh.stop()


def test_a_really_full_file_system_is_told_and_harms_nothing(tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k,mode=700", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("only root may mount the small file system that this test fills")
    node = Node("n", tmp_path)
    node.home = place / "n"
    try:
        node.initialise()
        before = snapshot(node.home)
        ballast = os.open(place / "ballast", os.O_WRONLY | os.O_CREAT)
        with contextlib.suppress(OSError):
            while True:
                os.write(ballast, bytes(4096))
        os.close(ballast)
        said = fails(node, "service", "add", "web", "127.0.0.1:80")
        assert "room" in said
        assert snapshot(node.home) == before
        (place / "ballast").unlink()
        node.run("service", "add", "web", "127.0.0.1:80")
    finally:
        node.stop()
        subprocess.run(["umount", str(place)], check=True)


# ---- the network


def test_a_port_in_use_is_named(node: Node) -> None:
    host, port = node.address.split("/")[2], int(node.address.rpartition("/")[2])
    with socket.create_server((host, port)):
        said = refuses_to_start(node)
        assert "in use" in said
        assert str(port) in said
    node.start()


def test_an_address_that_is_not_ours_is_named(node: Node) -> None:
    config = node.home / "config.yaml"
    config.write_text(config.read_text().replace(node.address, "/ip4/192.0.2.1/tcp/4001"))
    assert "192.0.2.1" in refuses_to_start(node)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Node, Node]]:
    """Two running nodes that trust each other; `laptop` knows where `home` is."""
    directory = tmp_path_factory.mktemp("p")
    laptop, home = Node("laptop", directory), Node("home", directory)
    for node in (laptop, home):
        node.initialise()
    laptop.run("auth", "add", home.peer_id)
    home.run("auth", "add", laptop.peer_id)
    laptop.run("names", "add", "home", home.peer_id, "--address", home.address)
    for node in (laptop, home):
        node.start()
    yield laptop, home
    assert laptop.stop() == set()
    assert home.stop() == set()


def test_a_service_that_is_down_closes_the_connection_and_is_told(pair: tuple[Node, Node]) -> None:
    laptop, home = pair
    closed = own_port()
    home.run("service", "add", "down", f"127.0.0.1:{closed}")
    port = int(laptop.run_json("proxy", "home", "down", "0")["listen"].rpartition(":")[2])
    # The reset may come so soon that connecting itself reports it.
    with contextlib.suppress(ConnectionError), socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        assert connection.recv(100) == b""
    log = home.home.parent / "home.log"
    wait_until(lambda: "refused" in log.read_text(), within=10, what="the reason in the log")
    done = subprocess.run(
        laptop.command("proxy", "home", "down", "--stdio"), input=b"hello", capture_output=True, timeout=30, check=False
    )
    assert done.returncode == 1
    assert b"broke off" in done.stderr
    assert b"service" in done.stderr
    # As soon as it is up, the same proxy serves.
    server = EchoServer()
    try:
        home.run("service", "remove", "down")
        home.run("service", "add", "down", f"127.0.0.1:{server.port}")
        wait_until(lambda: echo_works(port), within=10, what="the service through the same proxy")
    finally:
        server.stop()


def test_a_service_that_does_not_exist_and_one_that_is_disabled_look_alike(pair: tuple[Node, Node]) -> None:
    laptop, home = pair
    home.run("service", "add", "zzz-2", "127.0.0.1:9")
    home.run("service", "disable", "zzz-2")
    said = []
    for name in ("zzz-1", "zzz-2"):
        done = subprocess.run(
            laptop.command("proxy", "home", name, "--stdio"), input=b"", capture_output=True, timeout=30, check=False
        )
        assert done.returncode == STATUS_FAILED
        said.append(done.stderr.replace(name.encode(), b"NAME"))
    assert said[0] == said[1]
    assert b"no such service" in said[0]


UNREACHABLE = {
    "a name that nobody gave": ("nobody", "peerup names add"),
    "a peer without addresses": ("12D3KooWGqffFyMxCsLyU7UhCKhzCMD3eGZG62EBbVN7owKqadQs", "peerup names add"),
}


@pytest.mark.parametrize("case", UNREACHABLE)
def test_an_unknown_peer_is_told_with_what_to_do(pair: tuple[Node, Node], case: str) -> None:
    peer, advice = UNREACHABLE[case]
    for arguments in (["ping", peer, "-c", "1"], ["connect", peer], ["proxy", peer, "ssh", "--stdio"]):
        said = fails(pair[0], *arguments, stdin=subprocess.DEVNULL)
        assert advice in said, said


def test_a_peer_that_is_offline_is_told_with_each_address(pair: tuple[Node, Node]) -> None:
    laptop, _ = pair
    port = own_port()
    laptop.run("names", "add", "gone", str(new_key().peer_id), "--address", f"/ip4/127.0.0.1/tcp/{port}")
    for arguments in (["ping", "gone", "-c", "1"], ["connect", "gone"], ["proxy", "gone", "ssh", "--stdio"]):
        said = fails(laptop, *arguments, stdin=subprocess.DEVNULL)
        assert f"/ip4/127.0.0.1/tcp/{port}" in said
        assert "refused" in said


def test_a_local_port_in_use_is_told_and_no_proxy_is_left(pair: tuple[Node, Node]) -> None:
    laptop, _ = pair
    before = laptop.run_json("proxy", "list")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        said = fails(laptop, "proxy", "home", "taken", str(taken.getsockname()[1]))
        assert "another program" in said
    assert laptop.run_json("proxy", "list") == before
    assert not [actor for actor in laptop.actors() if "taken" in actor["name"]]


def test_what_cannot_be_is_refused_before_anything_is_done(pair: tuple[Node, Node]) -> None:
    laptop, _ = pair
    before = snapshot(laptop.home)
    peer = str(new_key().peer_id)
    cases = [
        ["service", "add", "ping", "127.0.0.1:80"],
        ["service", "add", "relay-pair", "127.0.0.1:80"],
        ["service", "add", "UPPER case", "127.0.0.1:80"],
        ["service", "add", "a/b", "127.0.0.1:80"],
        ["service", "add", "../../etc", "127.0.0.1:80"],
        ["service", "add", "x" * 200, "127.0.0.1:80"],
        ["service", "add", "web", "127.0.0.1"],
        ["service", "add", "web", "127.0.0.1:0"],
        ["service", "add", "web", "127.0.0.1:65536"],
        ["service", "add", "web", "127.0.0.1:http"],
        ["service", "remove", "none"],
        ["service", "enable", "none"],
        ["names", "add", "x", "12D3KooWnonsense"],
        ["names", "add", "x", "12D3KooWnope"],
        ["names", "add", "x", peer[:-1]],
        ["names", "add", "x", peer, "--address", "127.0.0.1:4001"],
        ["names", "add", "x", peer, "--address", "/ip4/127.0.0.1/tcp/99999"],
        ["names", "add", "x", peer, "--address", "/ip4/127.0.0.1"],
        ["names", "add", "no\nnewlines", peer],
        ["names", "remove", "none"],
        ["auth", "add", "12D3KooWnonsense"],
        ["auth", "add", peer, "--comment", "two\nlines"],
        ["auth", "remove", peer],
        ["proxy", "home", "ssh", "65536"],
        ["proxy", "home", "ssh", "-1"],
        ["proxy", "home", "no/such", "0"],
        ["proxy", "stop", "home", "none"],
        ["log", "nobody", "debug"],
        ["actors", "get", "nobody"],
        ["actors", "get", "../../../etc/passwd"],
        ["why", "not-an-id"],
    ]
    wrong = []
    for arguments in cases:
        done = subprocess.run(laptop.command(*arguments), capture_output=True, text=True, timeout=30, check=False)
        refused = done.returncode in (STATUS_FAILED, STATUS_USAGE) and "rror" in done.stderr
        if not refused or "Traceback" in done.stderr or done.stdout:
            wrong.append(f"{arguments} ended with {done.returncode}: {done.stdout}{done.stderr}")
    assert wrong == []
    assert snapshot(laptop.home) == before


# ---- the daemon


def test_commands_that_need_the_node_say_that_it_does_not_run(node: Node) -> None:
    for arguments in (["status"], ["actors"], ["ping", "home"], ["proxy", "home", "ssh", "0"], ["paths"], ["tap"]):
        said = fails(node, *arguments, status=STATUS_NOT_RUNNING)
        assert "peerup daemon" in said
    (node.home / "run").mkdir(mode=0o700, exist_ok=True)
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(node.home / "run/control.sock"))
    fails(node, "status", status=STATUS_NOT_RUNNING)
    assert json.loads(fails(node, "status", "--json", status=STATUS_NOT_RUNNING))["error"]["code"] == "not-running"
    node.start()  # over the stale socket


def test_of_two_daemons_in_one_home_one_runs(node: Node) -> None:
    node.start()
    pid = node.daemon_pid
    said = refuses_to_start(node)
    assert str(pid) in said
    assert node.run_json("status")["pid"] == pid
    assert {actor["state"] for actor in node.actors()} == {"running"}


def test_of_two_daemons_started_at_once_one_runs(node: Node) -> None:
    daemons = [
        subprocess.Popen(node.command("daemon"), stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(3)
    ]
    said: dict[int, bytes] = {}

    def collect(daemon: subprocess.Popen[bytes]) -> None:
        said[daemon.pid] = daemon.communicate(timeout=60)[1]

    collectors = [threading.Thread(target=collect, args=(daemon,)) for daemon in daemons]
    for collector in collectors:
        collector.start()
    try:
        wait_until(
            lambda: sum(daemon.poll() is not None for daemon in daemons) == 2, within=30, what="two that gave up"
        )
        (winner,) = (daemon for daemon in daemons if daemon.poll() is None)
        wait_until(lambda: len(node.actors()) >= 7, within=20, what="the one that runs")
        assert node.run_json("status")["pid"] == winner.pid
    finally:
        for daemon in daemons:
            if daemon.poll() is None:
                daemon.send_signal(signal.SIGTERM)
        for collector in collectors:
            collector.join(30)
    for daemon in daemons:
        assert daemon.returncode == (0 if daemon is winner else STATUS_FAILED)
        assert b"Traceback" not in said[daemon.pid]
        if daemon is not winner:
            assert b"error:" in said[daemon.pid], said[daemon.pid]


def test_after_a_kill_of_everything_the_next_start_is_clean(node: Node) -> None:
    node.run("service", "add", "web", "127.0.0.1:80")
    node.start()
    names = {actor["name"] for actor in node.actors()}
    victims = node.process_ids()
    for pid in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not any(is_alive(pid) for pid in victims - {node.daemon_pid}), within=10, what="the end of all")
    assert node.stop() == set()
    assert any((node.home / "run").iterdir()), "nothing was left behind, so this test shows nothing"
    fails(node, "status", status=STATUS_NOT_RUNNING)
    again = Node("n", node.home.parent)
    again.address = node.address
    again.start()
    try:
        assert {actor["name"] for actor in again.actors()} == names
    finally:
        assert again.stop() == set()
    assert list((node.home / "run").iterdir()) == []


@pytest.mark.parametrize(
    "content",
    [b"", b"proxies: [", b"\x00\xff\xfe", b"proxies: 7\n", b"- x\n" * 10, b"version: 99\nproxies: []\n"],
    ids=["empty", "cut", "binary", "wrong", "list", "later"],
)
def test_a_broken_state_file_does_not_keep_the_node_down_and_is_not_lost(node: Node, content: bytes) -> None:
    state = node.home / "state/proxies.yaml"
    state.parent.mkdir(mode=0o700, exist_ok=True)
    state.write_bytes(content)
    state.chmod(0o600)
    node.start()
    log = (node.home.parent / "n.log").read_text()
    assert "Traceback" not in log
    if content:
        assert "proxies.yaml" in log
    # A new proxy must not silently replace what a person could still repair.
    done = subprocess.run(
        node.command("proxy", str(new_key().peer_id), "ssh", "0"),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    kept = [path.read_bytes() for path in state.parent.iterdir() if path.is_file()]
    assert not content or content in kept, f"{done.returncode} {done.stdout}{done.stderr}"


def test_nonsense_in_the_run_directory_is_cleared_or_named(node: Node) -> None:
    run = node.home / "run"
    (run / "names").mkdir(mode=0o700, parents=True, exist_ok=True)
    run.chmod(0o700)
    (run / "names" / "gate").symlink_to("/etc/passwd")
    (run / "names" / "config").write_text("no link")
    content = Path("/etc/passwd").read_bytes()
    (run / "control.sock").write_text("no socket, so perhaps somebody's")
    said = refuses_to_start(node)
    assert "control.sock is in the way" in said
    assert "remove it" in said
    (run / "control.sock").unlink()
    node.start()
    assert {actor["state"] for actor in node.actors()} == {"running"}
    assert Path("/etc/passwd").read_bytes() == content


def test_nobody_reads_the_nodes_output_any_more(node: Node) -> None:
    """The log's reader ends: the node runs on."""
    daemon = subprocess.Popen(node.command("daemon"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert daemon.stdout is not None
        assert daemon.stderr is not None
        assert daemon.stdout.readline() == b"ready\n"
        daemon.stdout.close()
        daemon.stderr.close()
        node.run("service", "add", "web", "127.0.0.1:80")
        wait_until(lambda: "service/web" in {actor["name"] for actor in node.actors()}, within=10, what="the service")
        assert {actor["state"] for actor in node.actors()} == {"running"}
    finally:
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(20) == 0


def test_nonsense_on_the_control_socket_leaks_nothing(node: Node) -> None:
    node.start()
    api = next(actor["pid"] for actor in node.actors() if actor["name"] == "api")
    before = len(descriptors(api))
    path = str(node.home / "run/control.sock")
    for content in (b"", b"\0" * 1000, b"GET\r\n\r\n", os.urandom(5000), b"GET / HTTP/9.9\r\n\r\n", b"A" * 200_000):
        with socket.socket(socket.AF_UNIX) as caller:
            caller.settimeout(10)
            caller.connect(path)
            with contextlib.suppress(OSError):
                caller.sendall(content)
                caller.shutdown(socket.SHUT_WR)
                while caller.recv(65536):
                    pass
    wait_until(lambda: len(descriptors(api)) <= before + 1, within=10, what="no descriptor kept")
    assert node.run_json("status")["pid"] == node.daemon_pid
