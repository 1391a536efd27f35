"""Who gets in, for how long, to what: on real nodes, from both sides, and told in the audit log."""

from __future__ import annotations

import base64
import contextlib
import datetime as dt
import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from actors.keyring.key_file import load_key
from demo.node import Node
from peerup.client import Client, segment
from protocol.multistream import HEADER, encode_message
from protocol.protocol_ids import IDENTIFY
from protocol.stream_descriptor import ResetCode
from tests.abuse.attacker import RST, SYN, Attacker, ClosedError, data, new_key
from tests.abuse.world import World, fails
from tests.chaos.load import echo_works
from tests.support.processes import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

ECHO = "/peerup/echo/1.0.0"
CUT_WITHIN = 5.0
"""Seconds from a change of authorized_keys to the end of what it forbids; milliseconds are usual."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with contextlib.ExitStack() as stack:
        yield World(tmp_path_factory.mktemp("a"), stack, log_level="debug")


@pytest.fixture(autouse=True)
def restored(world: World) -> Iterator[None]:
    """Whatever a test does to authorized_keys, the next one begins with what this one began with."""
    before = keys_file(world).read_bytes()
    yield
    replace(keys_file(world), before.decode())
    world.home.run("auth", "list")
    reload(world)
    wait_until(lambda: echo_works(world.tunnel), within=20, what="the tunnel after the test")


def keys_file(world: World) -> Path:
    return world.home.home / "authorized_keys"


def reload(world: World) -> Any:
    return Client(world.home.home / "run/control.sock").post("/v1/auth/reload")


def replace(path: Path, content: str) -> None:
    """Save as editors do: a new file takes the old one's name."""
    new = path.with_name(path.name + "~new")
    new.write_text(content)
    new.chmod(0o600)
    new.replace(path)


class Held:
    """A tunnelled connection that is open and has carried something."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=20)
        self.socket.sendall(b"held")
        assert self.socket.recv(4) == b"held"

    def seconds_until_cut(self, what: Callable[[], object]) -> float:
        """Do it; how long until the connection is cut. Nothing may arrive before."""
        what()
        began = time.monotonic()
        with contextlib.suppress(ConnectionResetError):
            assert self.socket.recv(100) == b""
        self.socket.close()
        return time.monotonic() - began

    def works(self) -> bool:
        self.socket.sendall(b"more")
        return self.socket.recv(4) == b"more"


def audit(world: World) -> list[dict[str, Any]]:
    """Every event in the audit log; each line must be whole."""
    lines = (world.home.home / "log/audit.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


async def answer_of(world: World, key: Any, protocol: str) -> bytes:
    """What `home` answers this peer to this proposal; empty when it hangs up, `reset CODE` when it resets."""
    async with Attacker.connect(world.port, key, source="127.0.0.9") as peer:
        with trio.fail_after(15):
            try:
                await peer.secure()
                await peer.say(data(1, HEADER + encode_message(protocol), SYN))
                said = b""
                while len(said) <= len(HEADER):
                    heard = await peer.hear_on(1)
                    if heard.flags & RST:
                        return f"reset {heard.length}".encode()
                    said += heard.body
            except ClosedError:
                return b""
            return said[len(HEADER) :]


async def test_a_peer_that_is_not_listed_gets_no_service_and_no_identify(world: World) -> None:
    for protocol in (ECHO, IDENTIFY, "/ipfs/ping/1.0.0", "/pingpong/1.0.0"):
        assert await answer_of(world, new_key(), protocol) == b""
    assert await answer_of(world, world.insider, ECHO) == encode_message(ECHO)
    assert await answer_of(world, world.insider, IDENTIFY) == encode_message(IDENTIFY)


async def test_with_an_empty_or_missing_file_nobody_gets_in(world: World) -> None:
    replace(keys_file(world), "# nobody\n")
    assert reload(world)["problems"] == []
    assert await answer_of(world, world.insider, ECHO) == b""
    assert not echo_works(world.tunnel)


async def test_a_new_peer_gets_in_as_soon_as_the_command_returns(world: World) -> None:
    guest = new_key()
    assert await answer_of(world, guest, ECHO) == b""
    world.home.run("auth", "add", str(guest.peer_id), "--comment", "guest")
    assert await answer_of(world, guest, ECHO) == encode_message(ECHO)
    world.home.run("auth", "remove", str(guest.peer_id))
    assert await answer_of(world, guest, ECHO) == b""


def test_expiry_cuts_a_live_tunnel_by_itself(world: World) -> None:
    held = Held(world.tunnel)
    world.home.run("auth", "remove", world.laptop.peer_id)
    held.socket.close()
    expires = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=4)
    stamp = expires.replace(microsecond=0).isoformat().replace("+00:00", "Z")
    content = keys_file(world).read_text()
    replace(keys_file(world), content + f"{world.laptop.peer_id} expires={stamp} # for a moment\n")
    reload(world)
    wait_until(lambda: echo_works(world.tunnel, 0.5), within=3, what="the tunnel before the expiry")
    cut = Held(world.tunnel).seconds_until_cut(lambda: None)
    late = dt.datetime.now(dt.UTC) - expires.replace(microsecond=0)
    assert cut > 0
    assert dt.timedelta(seconds=-0.1) < late < dt.timedelta(seconds=CUT_WITHIN), f"cut {late} after the expiry"
    assert not echo_works(world.tunnel)
    rules = [event["rule"] for event in audit(world) if event["event"] == "decision" and not event["allowed"]]
    assert any(rule.startswith("expired:") for rule in rules)


def test_a_peer_that_is_expired_already_never_gets_in(world: World) -> None:
    world.home.run("auth", "remove", world.laptop.peer_id)
    content = keys_file(world).read_text()
    replace(keys_file(world), content + f"{world.laptop.peer_id} expires=2001-01-01T00:00:00Z\n")
    reload(world)
    assert not echo_works(world.tunnel)


def test_removing_a_peer_by_command_cuts_it_at_once(world: World) -> None:
    held = Held(world.tunnel)
    cut = held.seconds_until_cut(lambda: world.home.run("auth", "remove", world.laptop.peer_id))
    assert cut < CUT_WITHIN
    assert not echo_works(world.tunnel)
    said = fails(world.laptop, "ping", "home", "-c", "1")
    assert "authorise" in said


def test_removing_a_peer_in_an_editor_cuts_it_at_once(world: World) -> None:
    held = Held(world.tunnel)
    content = keys_file(world).read_text()
    assert world.laptop.peer_id in content
    without = "".join(line for line in content.splitlines(True) if world.laptop.peer_id not in line)
    cut = held.seconds_until_cut(lambda: replace(keys_file(world), without))
    assert cut < CUT_WITHIN
    assert not echo_works(world.tunnel)
    replace(keys_file(world), content)
    wait_until(lambda: echo_works(world.tunnel), within=20, what="the peer back in")


def test_a_broken_line_takes_nothing_from_the_others_and_is_told_by_number(world: World) -> None:
    held = Held(world.tunnel)
    guest = new_key()
    content = keys_file(world).read_text()
    broken = content + f"12D3KooWnonsense # a slip of the pen\n{guest.peer_id}\n"
    number = len(broken.splitlines()) - 1
    replace(keys_file(world), broken)
    answer = reload(world)
    assert [problem["line"] for problem in answer["problems"]] == [number]
    assert held.works(), "a peer whose line is right has lost its tunnel"
    assert echo_works(world.tunnel, 10)
    assert trio.run(answer_of, world, guest, ECHO) == b"", "an addition counts before the file is whole"
    assert f"line {number}" in fails(world.home, "auth", "validate")
    told = json.loads(fails(world.home, "auth", "validate", "--json").partition('\n{"error"')[0])
    assert [problem["line"] for problem in told["problems"]] == [number]
    described = world.describe("gate")["description"]
    assert any(problem.startswith(f"line {number}:") for problem in described["problems"])
    assert f"line {number}: " in world.log()
    # An edit by command on a file with a broken line: the edit is made, and the person hears that it is not in force.
    said = fails(world.home, "auth", "add", str(new_key().peer_id))
    assert f"line {number}" in said
    assert held.works()
    held.socket.close()
    replace(keys_file(world), content + f"{guest.peer_id}\n")
    assert reload(world)["problems"] == []
    assert trio.run(answer_of, world, guest, ECHO) == encode_message(ECHO)


def remove_line(world: World, content: str) -> None:
    without = "".join(line for line in content.splitlines(True) if world.laptop.peer_id not in line)
    replace(keys_file(world), without + "a slip of the pen\n")


def spoil_expiry(world: World, content: str) -> None:
    laptop = world.laptop.peer_id
    replace(keys_file(world), content.replace(laptop, f"{laptop} expires=tomorrow"))


def make_directory(world: World, content: str) -> None:
    keys_file(world).unlink()
    keys_file(world).mkdir()


def cut_short(world: World, content: str) -> None:
    keys_file(world).write_text(content[: content.index(world.laptop.peer_id) + 20])


def take_away_and_let_others_write(world: World, content: str) -> None:
    remove_line(world, content)
    keys_file(world).chmod(0o666)


@pytest.mark.parametrize(
    "spoil",
    [
        remove_line,
        spoil_expiry,
        make_directory,
        cut_short,
        take_away_and_let_others_write,
        lambda world, _: keys_file(world).unlink(),
        lambda world, _: keys_file(world).write_bytes(b"\xff" * 5_000_000),
    ],
    ids=["removed", "expiry", "directory", "truncated", "loose", "deleted", "garbage"],
)
def test_what_a_broken_file_takes_away_is_cut_off_at_once(world: World, spoil: Callable[[World, str], None]) -> None:
    content = keys_file(world).read_text()
    held = Held(world.tunnel)
    assert held.seconds_until_cut(lambda: spoil(world, content)) < CUT_WITHIN
    assert not echo_works(world.tunnel)
    assert json.loads(fails(world.home, "status", "--json", status=0))["gate"]["whole"] is False
    if keys_file(world).is_dir():
        keys_file(world).rmdir()
    replace(keys_file(world), content)
    wait_until(lambda: echo_works(world.tunnel), within=20, what="the peer back with a whole file")


def test_a_command_that_removes_a_peer_counts_though_another_line_is_broken(world: World) -> None:
    with keys_file(world).open("a") as file:
        file.write("a slip of the pen\n")
    held = Held(world.tunnel)
    remove = world.home.command("auth", "remove", world.laptop.peer_id)
    assert held.seconds_until_cut(lambda: subprocess.run(remove, check=False, capture_output=True)) < CUT_WITHIN
    assert not echo_works(world.tunnel)


def test_a_file_that_others_may_write_to_is_not_believed(world: World) -> None:
    guest = new_key()
    replace(keys_file(world), keys_file(world).read_text() + f"{guest.peer_id}\n")
    keys_file(world).chmod(0o666)
    answer = reload(world)
    assert "chmod 600" in str(answer["problems"])
    assert echo_works(world.tunnel, 10)
    assert trio.run(answer_of, world, guest, ECHO) == b"", "a line that anybody may have written counts"
    keys_file(world).chmod(0o600)
    assert reload(world)["problems"] == []
    assert trio.run(answer_of, world, guest, ECHO) == encode_message(ECHO)


def test_a_service_that_a_broken_configuration_takes_away_is_cut_off(world: World) -> None:
    config = world.home.home / "config.yaml"
    plain = config.read_text()
    try:
        held = Held(world.tunnel)
        other = plain.replace("services:\n", "services:\n  more: {enabled: true, local_address: 'localhost:9'}\n")
        replace(config, other + "log: [\n")
        wait_until(lambda: world.describe("config")["description"]["problems"], within=20, what="the broken file")
        assert held.works(), "a service of which the broken file says the same has been cut"
        gone = plain.replace("  echo:\n    enabled: true\n", "  echo:\n    enabled: false\n") + "log: [\n"
        assert "enabled: false\n    local_address" in gone
        assert held.seconds_until_cut(lambda: replace(config, gone)) < CUT_WITHIN
        assert not echo_works(world.tunnel)
        told = json.loads(fails(world.home, "status", "--json", status=0))["warnings"]
        assert any("services.echo is not offered" in warning for warning in told)
    finally:
        replace(config, plain)
    wait_until(lambda: echo_works(world.tunnel), within=20, what="the service back")


def test_allowed_peers_bound_a_service_and_changing_them_cuts(world: World) -> None:
    port = world.server.port
    laptop, insider = world.laptop.peer_id, str(world.insider.peer_id)
    config = world.home.home / "config.yaml"
    plain = config.read_text()
    assert f"127.0.0.1:{port}" in plain

    def allow(*peers: str) -> None:
        (line,) = (line for line in plain.splitlines() if f"127.0.0.1:{port}" in line)
        head, _, rest = plain.partition(line + "\n")
        listed = json.dumps(list(peers))
        replace(config, f"{head}{line}\n    allowed_peers: {listed}\n{rest}")
        assert Client(world.home.home / "run/control.sock").post("/v1/config/reload")["problems"] == []

    try:
        allow(laptop)
        wait_until(
            lambda: trio.run(answer_of, world, world.insider, ECHO) == encode_message("na"),
            within=10,
            what="na for the peer that the service leaves out",
        )
        # It cannot tell whether there is such a service.
        assert trio.run(answer_of, world, world.insider, "/peerup/none/1.0.0") == encode_message("na")
        held = Held(world.tunnel)
        assert held.seconds_until_cut(lambda: allow(insider)) < CUT_WITHIN
        assert not echo_works(world.tunnel)
        world.laptop.run("ping", "home", "-c", "1")  # the connection itself is still allowed
        assert trio.run(answer_of, world, world.insider, ECHO) == encode_message(ECHO)
        allow()
        wait_until(
            lambda: trio.run(answer_of, world, world.insider, ECHO) == encode_message("na"),
            within=10,
            what="an empty list that allows nobody",
        )
        refused = [event for event in audit(world) if event["event"] == "decision" and event["rule"] == "service:echo"]
        assert {event["allowed"] for event in refused} == {True, False}
    finally:
        replace(config, plain)
        Client(world.home.home / "run/control.sock").post("/v1/config/reload")


class Impostor(threading.Thread):
    """A libp2p peer that the node dials, and that opens streams of its own on that connection.

    Attributes:
        answers: what the node said to each of its proposals.
    """

    def __init__(self, protocols: list[str]) -> None:
        super().__init__(daemon=True)
        self.key = new_key()
        self.answers: dict[str, str] = {}
        self.identified = False
        self._protocols = protocols
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"/ip4/127.0.0.1/tcp/{self._listener.getsockname()[1]}"
        self.failure: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            trio.run(self._serve)
        except BaseException as error:  # noqa: BLE001  # told to the test
            self.failure = error

    async def _serve(self) -> None:
        with trio.fail_after(40):
            listener = trio.socket.from_stdlib_socket(self._listener)
            accepted, _ = await listener.accept()
            peer = Attacker(accepted, self.key)
            await peer.secured_by_caller()
            for number, protocol in enumerate(self._protocols):
                stream = 2 + 2 * number
                await peer.say(data(stream, HEADER + encode_message(protocol), SYN))
                said = b""
                while len(said) <= len(HEADER):
                    heard = await peer.hear_on(stream)
                    if heard.flags & RST:
                        said = b""
                        self.answers[protocol] = f"reset {heard.length}"
                        break
                    said += heard.body
                else:
                    self.answers[protocol] = said[len(HEADER) + 1 : -1].decode()
            accepted.close()
        self._listener.close()


def test_a_peer_that_we_dial_may_use_nothing_unless_it_is_authorised(world: World) -> None:
    protocols = [ECHO, IDENTIFY, "/ipfs/ping/1.0.0"]
    impostor = Impostor(protocols)
    world.home.run("names", "add", "stranger", str(impostor.key.peer_id), "--address", impostor.address)
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(
            world.home.command("ping", "stranger", "-c", "1", "--timeout", "3s"),
            capture_output=True,
            timeout=30,
            check=False,
        )
    impostor.join(40)
    assert impostor.failure is None, impostor.failure
    assert set(impostor.answers) == set(protocols)
    gated = f"reset {int(ResetCode.GATED)}"
    assert set(impostor.answers.values()) == {gated}, impostor.answers
    denied = [
        event["subject"]
        for event in audit(world)
        if event["event"] == "decision" and event["peer"] == str(impostor.key.peer_id) and not event["allowed"]
    ]
    assert set(denied) == set(protocols)

    friend = Impostor(protocols)
    world.home.run("auth", "add", str(friend.key.peer_id))
    world.home.run("names", "add", "friend", str(friend.key.peer_id), "--address", friend.address)
    subprocess.run(
        world.home.command("ping", "friend", "-c", "1", "--timeout", "3s"), capture_output=True, timeout=30, check=False
    )
    friend.join(40)
    assert friend.failure is None, friend.failure
    assert friend.answers == {protocol: protocol for protocol in protocols}


def test_every_decision_and_tunnel_is_in_the_audit_log_with_its_rule(world: World) -> None:
    before = len(audit(world))
    stranger = new_key()
    assert trio.run(answer_of, world, stranger, ECHO) == b""
    assert trio.run(answer_of, world, world.insider, ECHO) == encode_message(ECHO)
    assert trio.run(answer_of, world, world.insider, "/peerup/none/1.0.0") == encode_message("na")
    assert echo_works(world.tunnel, 10)

    def told() -> set[tuple[str, str, bool, str]]:
        return {
            (event["peer"], event["subject"], event["allowed"], event["rule"].partition(":")[0])
            for event in audit(world)[before:]
            if event["event"] == "decision"
        }

    insider, laptop = str(world.insider.peer_id), world.laptop.peer_id
    wanted = {
        (str(stranger.peer_id), "connection", False, "not-listed"),
        (insider, "connection", True, "authorized_keys"),
        (insider, ECHO, True, "authorized_keys"),
        (insider, "/peerup/none/1.0.0", False, "unknown-service"),
        (laptop, ECHO, True, "authorized_keys"),
    }
    wait_until(lambda: wanted <= told(), within=10, what=f"{wanted} in the audit log")
    for event in audit(world)[before:]:
        assert event["time"].endswith("Z")
        assert event["path"].startswith("direct tcp /ip4/127.0.0."), event
        if event["event"] == "decision" and event["allowed"]:
            number = int(event["rule"].partition(":")[2])
            assert event["peer"] in keys_file(world).read_text().splitlines()[number - 1]
    wait_until(
        lambda: any(
            event["event"] == "tunnel"
            and event["peer"] == laptop
            and (event["service"], event["received"], event["sent"], event["outcome"]) == ("echo", 14, 14, "finished")
            for event in audit(world)[before:]
        ),
        within=10,
        what="the tunnel with its bytes",
    )


def test_nothing_is_missing_from_the_audit_log_though_the_gate_is_killed(world: World) -> None:
    """What is decided and what ends while there is no gate is told to its successor."""
    before, worked, killed = len(audit(world)), 0, set[int]()

    def gate() -> int | None:
        """A gate that was not killed yet: the end of one is noticed a moment later."""
        found = next((actor["pid"] for actor in world.home.actors() if actor["name"] == "gate"), None)
        return None if found in killed else found

    for number in range(40):
        if number % 8 == 3:
            pid = wait_until(gate, within=15, what="the gate")
            os.kill(pid, 9)
            killed.add(pid)
        worked += echo_works(world.tunnel, 10)
    assert worked == 40, "tunnels do not need the gate"

    def events() -> list[dict[str, Any]]:
        return [event for event in audit(world)[before:] if event["peer"] == world.laptop.peer_id]

    def ended() -> int:
        return sum(event["event"] == "tunnel" and event["outcome"] == "finished" for event in events())

    def decided() -> int:
        return sum(event["count"] for event in events() if event["event"] == "decision" and event["subject"] == ECHO)

    wait_until(lambda: ended() >= worked and decided() >= worked, within=15, what="all of it in the log")
    # What the gate had written but not answered when it was killed is there twice.
    assert ended() <= worked + len(killed)
    assert decided() <= worked + len(killed) * 16


def secrets_of(node: Node) -> list[bytes]:
    """The node's private key in every form in which it could slip out."""
    private = load_key(node.home / "identity.key")
    whole = private.to_protobuf()
    seed = whole[4:36]
    forms = []
    for secret in (seed, whole[4:]):
        forms += [
            secret,
            secret.hex().encode(),
            secret.hex().upper().encode(),
            base64.b64encode(secret).rstrip(b"=")[:40],
            base64.urlsafe_b64encode(secret).rstrip(b"=")[:40],
            repr(secret).encode()[2:-1],
            json.dumps(list(secret)).encode()[1:-1],
            json.dumps(list(secret), separators=(",", ":")).encode()[1:-1],
        ]
    return forms


def test_no_secret_is_in_logs_descriptions_or_taps(world: World) -> None:
    """While everything is tapped, the switchboard is killed, so that its successor has its new key signed."""
    home = world.home
    tap = subprocess.Popen(
        home.command("tap", "--json", "--limit", "100000", "--for", "6s"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    client = Client(home.home / "run/control.sock")
    wait_until(lambda: world.describe("api")["description"]["taps"], within=5, what="the tap")
    os.kill(world.switchboard(), 9)
    wait_until(lambda: echo_works(world.tunnel), within=20, what="the tunnel with a new switchboard")
    said, errors = tap.communicate(timeout=30)
    assert tap.returncode == 0, errors
    kinds = {json.loads(line).get("kind") for line in said.splitlines()}
    assert any("sign" in str(kind) for kind in kinds), f"the keyring signed nothing: {sorted(map(str, kinds))}"
    seen = [said, errors]
    for node in (world.home, world.laptop):
        seen.append((world.directory / f"{node.name}.log").read_bytes())
        for actor in node.actors():
            described = Client(node.home / "run/control.sock").get(f"/v1/actors/{segment(actor['name'])}")
            seen.append(json.dumps(described).encode())
    seen.append((home.home / "log/audit.jsonl").read_bytes())
    seen.append(json.dumps(client.get("/v1/status")).encode())
    seen.append(json.dumps(sorted(world.metrics())).encode())
    for node in (world.home, world.laptop):
        for secret in secrets_of(node):
            for text in seen:
                assert secret not in text
    # The search itself finds what is there: the public half is in many of these places.
    assert any(home.peer_id.encode() in text for text in seen)
