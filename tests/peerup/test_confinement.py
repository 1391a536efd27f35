"""What each actor of a running node can reach, tried from inside of each actor's own process."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from actors.config.file import load_config
from actors.config.paths import node_home
from peerup.confinement import CHILDREN_OF_PROXIES
from peerup.tree import Options, build_tree
from supervisor import confinement, landlock, seccomp
from supervisor.overseer import FACTORY
from tests.support.certificates import Authority
from tests.support.nodes import Node
from tests.support.ports import own_port
from tests.support.processes import wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        landlock.version() < landlock.SCOPE_VERSION or not seccomp.is_available(),
        reason="this kernel cannot confine processes in full",
    ),
]

RELAY = "12D3KooWBUL67MAKrieZ3hpdhTgfY7tuS2WfehuctBmcE4kELjCx"
ROOT = Path(__file__).parents[2]

MAY = {
    "keyring": {"read-key"},
    "config": {"create-in-state"},
    "gate": {"create-in-log", "write-audit"},
    "switchboard": {"inet", "inet6", "udp", "netlink-route", "connect-tcp"},
    "nat/monitor": {"netlink-route"},
    "relay/server": set(),
    "relay/keeper": set(),
    "proxy/*": {"inet", "inet6", "udp", "bind-any-tcp"},
    "service/*": {"inet", "inet6", "udp", "netlink-route", "connect-tcp"},
    "metrics": {"inet", "inet6", "udp", "proc-cmdline"},
    # It makes and removes the control socket, in the directory where the others are.
    "api": {"control-socket", "stranger-socket", "unix-datagrams", "remove-name", "remove-socket"},
}
"""What the table of docs/confinement.md allows, of what is tried. Everything else must fail."""


class ProbedNode(Node):
    """A node with every kind of actor, whose actors try what they must not be able to do."""

    def __init__(self, directory: Path, confinement_mode: str) -> None:
        super().__init__("node", directory)
        self._mode = confinement_mode
        self._stack = contextlib.ExitStack()
        self._directory = directory

    def prepare(self) -> None:
        self.initialise()
        directory = self._directory
        certificate, key = Authority(directory).issue("localhost")
        stranger = directory / "stranger"
        stranger.write_text("what is none of the node's business\n")
        (directory / "elsewhere").mkdir()
        tcp = self._stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        unix = self._listen(socket.SOCK_STREAM, str(directory / "unix"))
        abstract = self._listen(socket.SOCK_STREAM, f"\0peerup-test-{os.getpid()}-{self._mode}")
        packets = self._listen(socket.SOCK_SEQPACKET, f"\0peerup-test-packets-{os.getpid()}-{self._mode}")
        free = own_port()
        config = self.home / "config.yaml"
        text = config.read_text()
        off = 'enabled: false\n    listen_address: "127.0.0.1:9091"'
        assert off in text
        text = text.replace(off, f'enabled: true\n    listen_address: "127.0.0.1:{own_port()}"')
        audit = "log/audit.jsonl. Default: false\n    enabled: false"
        assert audit in text
        text = text.replace(audit, audit.replace("enabled: false", "enabled: true"))
        relay = "relay:\n  # [live] Relays"
        assert relay in text
        text = text.replace("  addresses: []\n", f"  addresses: [/ip4/127.0.0.1/tcp/{own_port()}/p2p/{RELAY}]\n", 1)
        text = text.replace("services: {}\n", "services: {web: {enabled: true, local_address: 'localhost:9'}}\n")
        text = text.replace("security:\n", f"security:\n  confinement: {self._mode}\n")
        text = text.replace("network:\n", f"network:\n  tls: {{certificate_file: {certificate}, key_file: {key}}}\n", 1)
        text += "relay_service: {enabled: true, drain_time: 1s}\n"
        config.write_text(text)
        (self.home / "log" / "audit.jsonl").touch(mode=0o600)
        (self.home / "state" / "proxies.yaml").write_text(
            f"proxies:\n  proxy/home/ssh: {{peer: {RELAY}, peer_name: home, service: ssh, listen: '127.0.0.1:0'}}\n"
        )
        self.places = {
            "home": str(self.home),
            "key": str(self.home / "identity.key"),
            "authorized_keys": str(self.home / "authorized_keys"),
            "tls_key": str(key),
            "stranger": str(stranger),
            "elsewhere": str(directory / "elsewhere"),
            "unix": unix,
            "abstract": abstract,
            "abstract_packets": packets,
            "tcp": tcp.getsockname()[1],
            "free": free,
            "names": ["root", "config", "keyring", "gate", "switchboard", "api"],
        }

    def _listen(self, kind: int, address: str) -> str:
        sock = self._stack.enter_context(socket.socket(socket.AF_UNIX, kind))
        sock.bind(address)
        sock.listen()
        return address

    def start(self, *options: str) -> float:
        os.environ["PEERUP_PROBE"] = json.dumps(self.places)
        return super().start(*options)

    def command(self, *arguments: str) -> list[str]:
        if arguments[:1] == ("daemon",):
            return [sys.executable, "-m", "tests.support.probed_daemon", str(self.home)]
        return super().command(*arguments)

    def results(self, name: str) -> dict[str, str]:
        # What an attempt to remove would remove.
        for place in ("names", "sockets"):
            with contextlib.suppress(FileExistsError):
                (self.home / "run" / place / "probed").symlink_to("starting:1:0:root:probed")
        return self.run_json("actors", "get", name)["description"]

    def leaves(self) -> list[str]:
        return [actor["name"] for actor in self.actors() if actor["name"] not in ("root", "proxies")]

    def close(self) -> None:
        os.environ.pop("PEERUP_PROBE", None)
        left = self.stop()
        self._stack.close()
        assert not left


@pytest.fixture(scope="module", params=["required"])
def node(request, tmp_path_factory):
    yield from running(tmp_path_factory.mktemp("confined"), request.param)


@pytest.fixture(scope="module")
def open_node(tmp_path_factory):
    yield from running(tmp_path_factory.mktemp("open"), "disabled")


def running(directory, mode):
    made = ProbedNode(directory, mode)
    try:
        made.prepare()
        made.start()
        expected = {"proxy/home/ssh", "service/web", "relay/keeper"}
        wait_until(
            lambda: expected <= {actor["name"] for actor in made.actors() if actor["state"] == "running"},
            within=30,
            what="all actors run",
        )
        yield made
    finally:
        made.close()


def expected_of(name):
    return next(may for pattern, may in MAY.items() if fnmatch.fnmatchcase(name, pattern))


def test_no_actor_can_do_what_it_is_not_there_for(node):
    tried = 0
    for name in node.leaves():
        results = node.results(name)
        can = {attempt for attempt, result in results.items() if result == "ok"}
        assert can == expected_of(name), f"{name}: {results}"
        tried += len(results)
    assert tried > 500


def test_refusals_say_that_it_is_not_permitted(node):
    for name in node.leaves():
        may = expected_of(name)
        for attempt, result in node.results(name).items():
            # ENOENT and the like would mean that nothing was tried.
            assert attempt in may or result in ("EACCES", "EPERM", "ENOSYS", "EAFNOSUPPORT"), (name, attempt, result)


def test_without_confinement_the_same_attempts_succeed(open_node):
    can = {attempt for attempt, result in open_node.results("switchboard").items() if result == "ok"}
    wanted = {"read-key", "write-config", "write-authorized-keys", "write-audit", "create-in-home", "link-in-names"}
    assert wanted | {"fork", "execute", "inet", "stranger-socket", "signal-other"} <= can
    assert {actor["confinement"] for actor in open_node.actors()} == {""}


def test_every_actor_of_the_tree_is_tried_and_confined(node):
    home = node_home(node.home, {})
    config = load_config(home.config_file)
    options = Options(home, config, service_pid=1, main_pid=1, started_at=0.0, allow_faults=False)
    names = {child.name for child in build_tree(options).children if child.factory != FACTORY}
    patterns = [*names, *CHILDREN_OF_PROXIES]
    running = node.leaves()
    assert all(any(fnmatch.fnmatchcase(name, pattern) for name in running) for pattern in patterns)
    assert all(any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns) for name in running)
    words = {actor["name"]: actor["confinement"] for actor in node.actors()}
    supervisors = {"root", "proxies"}
    assert {words[name] for name in words.keys() - supervisors} == {confinement.FULL}
    assert {words[name] for name in supervisors} == {confinement.BASE}


def test_the_kernel_says_the_same(node):
    for actor in node.actors():
        status = dict(
            line.split(":\t", 1)
            for line in Path(f"/proc/{actor['pid']}/status").read_text().splitlines()
            if ":\t" in line
        )
        assert status["Seccomp"].strip() == "2", actor["name"]
        assert status["NoNewPrivs"].strip() == "1", actor["name"]
        if actor["name"] not in ("root", "proxies"):
            assert int(status["CapEff"], 16) & ~(1 << 10) == 0, actor["name"]


def test_a_restarted_actor_is_confined_again(node):
    before = {actor["name"]: actor["pid"] for actor in node.actors()}
    os.kill(before["keyring"], 9)
    wait_until(
        lambda: any(
            actor["name"] == "keyring" and actor["pid"] not in (None, before["keyring"]) and actor["state"] == "running"
            for actor in node.actors()
        ),
        within=20,
        what="another keyring runs",
    )
    assert node.results("keyring")["inet"] == "EPERM"
    assert node.results("keyring")["read-key"] == "ok"


def test_where_the_kernel_has_no_landlock_there_is_one_warning_and_the_node_runs(tmp_path):
    """An older kernel is one whose landlock calls do not exist: a filter has them fail so, for the node."""
    home = tmp_path / "home"
    subprocess.run([sys.executable, "-m", "peerup.cli", "--home", home, "init", "--yes"], check=True, cwd=ROOT,
                   capture_output=True)  # fmt: skip
    code = (
        "import sys; from supervisor import seccomp;"
        "seccomp.Program(seccomp.refusing((), extra=range(444, 447))).install();"
        "sys.argv = ['peerup', '--home', sys.argv[1], 'daemon']; from peerup.cli import main; main()"
    )
    log = (tmp_path / "log").open("wb")
    daemon = subprocess.Popen([sys.executable, "-c", code, str(home)], stdout=subprocess.PIPE, stderr=log, cwd=ROOT)
    assert daemon.stdout is not None
    try:
        assert daemon.stdout.readline() == b"ready\n"
        status = json.loads(
            subprocess.run([sys.executable, "-m", "peerup.cli", "--home", home, "actors", "--json"], check=True,
                           cwd=ROOT, capture_output=True).stdout
        )  # fmt: skip
        words = {actor["confinement"] for actor in status if actor["name"] not in ("root", "proxies")}
        assert words == {confinement.FILTER_ONLY}
    finally:
        daemon.terminate()
        daemon.wait(30)
        daemon.stdout.close()
        log.close()
    text = (tmp_path / "log").read_text()
    assert text.count("not fully confined") == 1
    assert "no Landlock" in text
