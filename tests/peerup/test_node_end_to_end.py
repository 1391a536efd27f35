"""Whole nodes as a person runs them: `peerup daemon` as processes, `peerup …` as commands, real bytes."""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import http.server
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from peerup.client import Client, ClientError

pytestmark = pytest.mark.slow

READY_SECONDS = 30.0
STOP_SECONDS = 20.0


def wait_for(condition: Callable[[], object], what: str, seconds: float = 15.0) -> object:
    """The first true value of the condition."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        select_nothing()


def select_nothing() -> None:
    """Let other processes run for a moment between two looks."""
    threading.Event().wait(0.01)


class Node:
    """One node in a directory of its own."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.port = free_port()
        self.address = f"/ip4/127.0.0.1/tcp/{self.port}"
        self.log = home.with_suffix(".log")
        self.daemon: subprocess.Popen[bytes] | None = None
        self.run("init", "--yes", "--listen", self.address)
        self.peer_id = self.run("whoami").stdout.strip()
        self.client = Client(home / "run" / "control.sock", timeout=20)

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "peerup", "--home", str(self.home), *arguments]

    def run(self, *arguments: str, status: int = 0, **options) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self.command(*arguments),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env=environment(),
            **options,
        )
        assert done.returncode == status, f"{arguments} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
        return done

    def json(self, *arguments: str, status: int = 0):
        return json.loads(self.run(*arguments, "--json", status=status).stdout)

    def start(self, *options: str) -> None:
        with self.log.open("ab") as log:
            self.daemon = subprocess.Popen(
                self.command("daemon", *options), stdout=subprocess.PIPE, stderr=log, env=environment()
            )
        assert self.daemon.stdout is not None
        os.set_blocking(self.daemon.stdout.fileno(), False)
        said = b""

        def ready() -> bool:
            nonlocal said
            assert self.daemon.poll() is None, self.log.read_text()
            said += self.daemon.stdout.read() or b""
            return said == b"ready\n"

        wait_for(ready, "ready", READY_SECONDS)

    def pids(self) -> set[int]:
        """The daemon's process and all below it."""
        assert self.daemon is not None
        return {self.daemon.pid} | descendants(self.daemon.pid)

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Stop it in order, and check that nothing is left."""
        daemon, self.daemon = self.daemon, None
        if daemon is None:
            return
        pids = {daemon.pid} | descendants(daemon.pid)
        daemon.send_signal(number)
        try:
            assert daemon.wait(STOP_SECONDS) == 0, self.log.read_text()[-3000:]
        finally:
            daemon.kill()
            daemon.wait()
            daemon.stdout.close()
        wait_for(lambda: not any(alive(pid) for pid in pids), "no process left")
        assert list((self.home / "run").iterdir()) == []

    def actors(self) -> dict[str, dict]:
        return {actor["name"]: actor for actor in self.client.get("/v1/actors")}


def environment() -> dict[str, str]:
    keep = {key: value for key, value in os.environ.items() if not key.startswith(("PEERUP", "XDG"))}
    return keep | {"COLUMNS": "80"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def descendants(pid: int) -> set[int]:
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found = {pid}
    while grown := {child for child, parent in parents.items() if parent in found} - found:
        found |= grown
    return found - {pid}


class _Content(http.server.BaseHTTPRequestHandler):
    body = os.urandom(3_000_000)

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *args: object) -> None:
        pass


@contextlib.contextmanager
def web_server() -> Iterator[int]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Content)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def echo_server() -> Iterator[int]:
    """Sends back what comes, and ends its side when the client has ended its own."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve(connection: socket.socket) -> None:
            with connection, contextlib.suppress(OSError):
                while data := connection.recv(65536):
                    connection.sendall(data)

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def fetch(listen: str) -> str:
    with urllib.request.urlopen(f"http://{listen}/", timeout=15) as response:
        return hashlib.sha256(response.read()).hexdigest()


WANTED = hashlib.sha256(_Content.body).hexdigest()


@pytest.fixture
def node(tmp_path):
    made: list[Node] = []

    def make(name: str) -> Node:
        made.append(Node(tmp_path / name))
        return made[-1]

    yield make
    for one in made:
        one.stop()


@pytest.fixture
def pair(node):
    """`laptop`, which may inject faults, and `home`; both running, authorised to each other."""
    laptop, home = node("laptop"), node("home")
    laptop.run("auth", "add", home.peer_id, "--comment", "home")
    home.run("auth", "add", laptop.peer_id, "--comment", "laptop")
    laptop.run("names", "add", "home", home.peer_id, "--address", home.address)
    laptop.start("--allow-faults")
    home.start()
    return laptop, home


def test_the_main_job_and_every_look_at_it(pair):
    laptop, home = pair
    with web_server() as port:
        assert home.json("service", "add", "web", f"127.0.0.1:{port}")["node"]["reloaded"] is True
        assert laptop.json("names", "list")[0]["name"] == "home"
        pings = [
            json.loads(line)
            for line in laptop.run("ping", "home", "-c", "2", "--interval", "50ms", "--json").stdout.splitlines()
        ]
        assert [line.get("seq") for line in pings] == [1, 2, None]
        assert pings[2]["stats"]["received"] == 2
        made = laptop.json("proxy", "home", "web", "0")
        listen = made["listen"]
        assert made["created"] is True
        assert laptop.json("proxy", "home", "web", "0")["listen"] == listen
        assert fetch(listen) == WANTED

        tree = laptop.json("actors")
        assert {"name", "pid", "state", "restarts", "mailbox"} <= tree[0].keys()
        assert [actor["name"] for actor in tree] == [
            "root",
            "config",
            "keyring",
            "gate",
            "switchboard",
            "nat/monitor",
            "proxies",
            "proxy/home/web",
            "api",
        ]
        assert {actor["state"] for actor in tree} == {"running"}
        assert {actor["pid"] for actor in tree} <= laptop.pids()
        assert max(map(len, laptop.run("actors").stdout.splitlines())) <= 80
        assert laptop.json("status")["problems"] == []
        (path,) = laptop.json("paths")
        assert (path["name"], path["peer_id"], path["direction"]) == ("home", home.peer_id, "outbound")
        assert path["received"] > len(_Content.body)
        for name in ("config", "keyring", "gate", "switchboard", "proxy/home/web", "api", "root", "proxies"):
            assert laptop.json("actors", "get", name)["status"]["name"] == name

        # A tap sees the end of the next tunnelled connection, and `why` knows what told of it.
        tap = subprocess.Popen(
            laptop.command("tap", "--kind", "gate.tunnel-ended", "--limit", "1", "--for", "20s", "--json"),
            stdout=subprocess.PIPE,
            env=environment(),
        )
        wait_for(lambda: laptop.client.get("/v1/actors/api")["description"]["taps"], "the tap")
        assert fetch(listen) == WANTED
        (seen,) = [json.loads(line) for line in tap.communicate(timeout=20)[0].splitlines()]
        assert (seen["sender"], seen["target"]) == ("proxy/home/web", "gate")
        body = seen["body"]
        assert (body["peer"], body["service"], body["role"], body["outcome"]) == (
            home.peer_id,
            "web",
            "client",
            "finished",
        )
        chain = laptop.json("why", seen["id"])["chain"]
        assert [entry["id"] for entry in chain[:1]] == [seen["id"]]
        assert (chain[1]["sender"], chain[1]["kind"]) == ("switchboard", "switchboard.stream-report")
        assert laptop.run("why", "nobody:1:1", status=1).stderr.startswith("error: no actor remembers")
        assert isinstance(laptop.json("deadletters")["letters"], list)
        laptop.run("log", "switchboard", "debug", "--for", "1s")
        assert "did you mean" in laptop.run("log", "switch", "debug", status=1).stderr

    # The service behind it is gone: told by a closed connection, and the tunnel's own port stays.
    with pytest.raises(OSError):  # noqa: PT011 - which one depends on who notices first
        fetch(listen)
    laptop.run("proxy", "stop", "home", "web")
    assert laptop.json("proxy", "list") == []
    assert "proxy/home/web" not in laptop.actors()
    with pytest.raises(urllib.error.URLError, match="refused"):
        fetch(listen)


def test_every_actor_is_killed_and_the_tunnel_serves_again(pair):
    laptop, home = pair
    with web_server() as port:
        home.run("service", "add", "web", f"127.0.0.1:{port}")
        listen = laptop.json("proxy", "home", "web", "0")["listen"]
        assert fetch(listen) == WANTED
        for name in laptop.actors():
            if name == "root":
                continue
            before = laptop.actors()[name]  # killing a supervisor gives its children new processes, too
            assert laptop.json("fault", "kill", name)["pid"] == before["pid"]
            wait_for(lambda name=name, before=before: again(laptop, name, before["pid"]), f"{name} back")
            wait_for(lambda: succeeds(listen), f"a tunnelled connection after {name} was killed", 5.0)
    refused = home.run("fault", "kill", "gate", status=1)
    assert "--allow-faults" in refused.stderr
    assert home.actors()["gate"]["restarts"] == 0
    home.run("fault", "drop", "--to", "gate", status=1)


def again(node: Node, name: str, old_pid: int) -> bool:
    with contextlib.suppress(ClientError):
        actor = node.actors().get(name)
        return actor is not None and actor["state"] == "running" and actor["pid"] != old_pid
    return False


def succeeds(listen: str) -> bool:
    try:
        return fetch(listen) == WANTED
    except OSError:
        return False


@pytest.mark.parametrize("fault", ["kill", "stop", "hang"])
def test_the_loss_of_the_root_and_with_it_of_the_whole_tree_is_survived(pair, fault):
    laptop, home = pair
    with web_server() as port:
        home.run("service", "add", "web", f"127.0.0.1:{port}")
        listen = laptop.json("proxy", "home", "web", "0")["listen"]
        root = laptop.actors()["root"]["pid"]
        assert laptop.json("fault", fault, "root")["pid"] == root
        wait_for(lambda: again(laptop, "api", -1) and laptop.actors()["root"]["pid"] != root, "a new tree")
        wait_for(lambda: succeeds(listen), "the same proxy at the same port")


def test_message_faults_hit_are_listed_and_end(pair):
    laptop, _ = pair
    laptop.run("ping", "home", "-c", "1")
    made = laptop.json(
        "fault", "delay", "--to", "switchboard", "--kind", "switchboard.ping-peer", "--delay", "300ms", "--ttl", "1m"
    )
    assert [fault["id"] for fault in laptop.json("fault", "list")] == [made["id"]]
    began = time.monotonic()
    laptop.client.get("/v1/faults")
    for _line in laptop.client.lines(f"/v1/peers/{laptop.json('resolve', 'home')['peer_id']}/ping", count=1):
        pass
    assert time.monotonic() - began >= 0.3
    laptop.run("fault", "kill", "api")
    wait_for(lambda: again(laptop, "api", -1), "api back")
    assert [fault["id"] for fault in laptop.json("fault", "list")] == [made["id"]], "faults outlive the API"
    assert laptop.json("fault", "clear")["cleared"] == 1
    assert laptop.json("fault", "list") == []


@pytest.mark.parametrize("edge", [("--from", "api"), ("--to", "api"), ("--kind", "*")])
def test_no_fault_prevents_its_own_end(pair, edge):
    laptop, _ = pair
    laptop.run("fault", "drop", *edge, "--ttl", "1h")
    [listed] = laptop.json("fault", "list")
    assert listed["actors"]
    assert laptop.json("fault", "clear") == {"cleared": 1, "remaining": {}}
    assert laptop.json("fault", "list") == []
    wait_for(lambda: laptop.json("status")["actors"], "it answers as before")


def test_removing_a_peer_cuts_its_live_tunnel(pair):
    laptop, home = pair
    with echo_server() as port:
        home.run("service", "add", "echo", f"127.0.0.1:{port}")
        listen = laptop.json("proxy", "home", "echo", "0")["listen"]
        host, _, number = listen.rpartition(":")
        with socket.create_connection((host, int(number)), timeout=10) as tunnel:
            tunnel.sendall(b"hello")
            assert tunnel.recv(100) == b"hello"
            assert home.json("auth", "remove", laptop.peer_id)["node"]["reloaded"] is True
            with contextlib.suppress(ConnectionResetError):
                assert tunnel.recv(100) == b""
        with pytest.raises(AssertionError, match="ended with 1"):
            laptop.run("ping", "home", "-c", "1")
        home.run("auth", "add", laptop.peer_id)
        laptop.run("ping", "home", "-c", "1")


def test_stdio_carries_bytes_and_half_close_both_ways(pair):
    laptop, home = pair
    content = os.urandom(2_000_000)
    with echo_server() as port:
        home.run("service", "add", "echo", f"127.0.0.1:{port}")
        done = subprocess.run(
            laptop.command("proxy", "home", "echo", "--stdio"),
            input=content,
            capture_output=True,
            timeout=30,
            check=True,
            env=environment(),
        )
        assert hashlib.sha256(done.stdout).digest() == hashlib.sha256(content).digest()
    assert "no such" in (failed := laptop.run("proxy", "home", "nothing", "--stdio", status=1).stderr) or failed
    assert laptop.run("proxy", "stranger", "echo", "--stdio", status=1).stderr.startswith("error: ")


SSHD = shutil.which("sshd", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")


@pytest.mark.skipif(not (SSHD and shutil.which("ssh")), reason="needs OpenSSH: sshd, ssh and ssh-keygen")
def test_ssh_by_proxy_command_and_by_descriptor(pair, tmp_path):
    laptop, home = pair
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / key)], check=True)
    port = free_port()
    config = tmp_path / "sshd_config"
    config.write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {tmp_path}/host\nPidFile none\nStrictModes no\n"
        f"AuthorizedKeysFile {tmp_path}/user.pub\nPasswordAuthentication no\n"
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True, mode=0o755)
    with home.log.open("ab") as log:
        server = subprocess.Popen([SSHD, "-D", "-e", "-f", str(config)], stderr=log)
    try:
        wait_for(lambda: reachable(port), "sshd")
        home.run("service", "add", "ssh", f"127.0.0.1:{port}")
        for extra, option in (([], "--stdio"), (["-o", "ProxyUseFdpass=yes"], "--fdpass")):
            command = shlex.join(laptop.command("proxy", "home", "ssh", option))
            ssh = ["ssh", "-F", "none", "-i", str(tmp_path / "user"), "-o", f"ProxyCommand={command}", *extra]
            ssh += ["-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]
            content = os.urandom(300_000)
            done = subprocess.run(
                [*ssh, f"{getpass.getuser()}@home", "cat"], input=content, capture_output=True, timeout=40, check=False
            )
            assert done.returncode == 0, done.stderr
            assert done.stdout == content, option
    finally:
        server.terminate()
        server.wait(10)


def reachable(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def test_proxies_come_back_after_a_restart_at_the_same_port(pair):
    laptop, home = pair
    with web_server() as port:
        home.run("service", "add", "web", f"127.0.0.1:{port}")
        listen = laptop.json("proxy", "home", "web", "0")["listen"]
        laptop.stop(signal.SIGINT)
        with pytest.raises(urllib.error.URLError, match="refused"):
            fetch(listen)
        laptop.start()
        wait_for(lambda: succeeds(listen), "the proxy after the restart")
        assert [proxy["listen"] for proxy in laptop.json("proxy", "list")] == [listen]


def test_errors_of_a_person_are_told(pair):
    laptop, home = pair
    assert "stranger" in laptop.run("ping", "stranger", status=1).stderr
    home.stop()
    assert laptop.run("ping", "home", "-c", "1", "--timeout", "10s", status=1).stdout
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        failed = laptop.run("proxy", "home", "web", str(port), status=1).stderr
        assert str(port) in failed
    with laptop.home.joinpath("config.yaml").open("a") as config:
        config.write("\nnames: [\n")
    assert "line" in laptop.run("config", "reload", status=1).stderr
    assert laptop.run("service", "add", "x", "127.0.0.1:1", status=1).stderr
    assert laptop.client.get("/v1/status")["problems"] == []


def test_a_second_daemon_in_the_same_home_is_refused(node):
    first = node("one")
    first.start()
    failed = first.run("daemon", status=1)
    assert "runs in this home already" in failed.stderr
    assert first.actors()


@pytest.mark.parametrize("what", ["no-home", "bad-config", "no-key", "loose-key", "broken-key", "port-in-use"])
def test_a_daemon_that_cannot_start_says_why_in_a_few_lines(node, what):
    one = node("one")
    home = one.home
    with contextlib.ExitStack() as stack:
        if what == "no-home":
            (home / "config.yaml").unlink()
        elif what == "bad-config":
            (home / "config.yaml").write_text("network:\n  listen_addresses: nonsense\n")
        elif what == "no-key":
            (home / "identity.key").unlink()
        elif what == "loose-key":
            (home / "identity.key").chmod(0o644)
        elif what == "broken-key":
            (home / "identity.key").write_bytes(b"nonsense")
        else:
            stack.enter_context(socket.create_server(("127.0.0.1", one.port)))
        began = time.monotonic()
        failed = one.run("daemon", status=1)
        assert time.monotonic() - began < 20
    expected = {
        "no-home": "peerup init",
        "bad-config": "listen_addresses",
        "no-key": "peerup init",
        "loose-key": "chmod 600",
        "broken-key": "not an identity key",
        "port-in-use": str(one.port),
    }[what]
    last = failed.stderr[failed.stderr.rindex("error: ") :]
    assert expected in last
    assert "Traceback" not in failed.stderr
    assert failed.stdout == ""


def test_only_configured_ports_are_listened_on(pair):
    laptop, _ = pair
    listening = set()
    inodes = set()
    for pid in laptop.pids():
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                inodes.add(str(entry.readlink()))
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if f"socket:[{fields[9]}]" in inodes and (fields[3] == "0A" or table.startswith("udp")):
                listening.add((table, int(fields[1].rpartition(":")[2], 16)))
    assert listening == {("tcp", laptop.port)}


def test_the_daemon_tells_systemd_and_a_descriptor(node, tmp_path):
    one = node("one")
    path = tmp_path / "notify.sock"
    read, write = os.pipe()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd, one.log.open("ab") as log:
        systemd.bind(str(path))
        systemd.settimeout(READY_SECONDS)
        daemon = subprocess.Popen(
            [*one.command("daemon", "--log-format", "json", "--ready-fd", str(write))],
            stdout=subprocess.DEVNULL,
            stderr=log,
            env=environment() | {"NOTIFY_SOCKET": str(path), "WATCHDOG_USEC": "8000000"},
            pass_fds=(write,),
        )
        os.close(write)
        assert "READY=1" in systemd.recv(1000).decode().splitlines()
        assert os.read(read, 100) == b"ready\n"
        os.close(read)
        assert systemd.recv(1000) == b"WATCHDOG=1"
        daemon.send_signal(signal.SIGTERM)
        wait_for(lambda: systemd.recv(1000).startswith(b"STOPPING=1\n"), "STOPPING=1")
        assert daemon.wait(STOP_SECONDS) == 0
    for line in one.log.read_text().splitlines():
        assert json.loads(line)
