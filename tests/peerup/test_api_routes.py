"""The control API over its real socket, with actors that answer from a table."""

from __future__ import annotations

import contextlib
import math
import os
import random
import re
import socket
import stat
import threading
from pathlib import Path
from urllib.parse import quote, urlencode

import pytest
import trio

from actors.api.routes import ROUTES, faults
from actors.api.routes.proxies import stdio
from actors.api.routing import Call
from actors.http import HttpLimits, HttpRequest
from peerup.client import Client, ClientError, LostConnectionError, NotRunningError, RefusedByNodeError
from protocol.messages import Descriptor, Envelope, encode_body
from protocol.messages.config import (
    AddProxy,
    ConfigSnapshot,
    Proxies,
    ProxyAdded,
    ProxyEntry,
    ReadProxies,
    ReloadConfig,
    Resolve,
    Resolved,
)
from protocol.messages.proxy import Attach
from protocol.messages.reservations import ReadRelays, Relays, RelayStatus
from protocol.messages.switchboard import ConnectionInfo, Pinged, PingPeer
from protocol.messages.system import (
    ActorUp,
    DeadLetter,
    DeadLetters,
    Describe,
    Description,
    EdgeFilter,
    FaultAction,
    FaultRule,
    FaultsInForce,
    InjectProcessFault,
    Journal,
    JournalEntry,
    Ok,
    Ping,
    ReadDeadLetters,
    ReadFaults,
    ReadJournal,
    SetFaults,
    SetLogLevel,
    SetTaps,
    Tapped,
)
from protocol.multiaddr import Multiaddr
from protocol.peer_id import PeerId
from supervisor.actor import Checkpoint
from supervisor.errors import DeadlineExceededError, NoSuchActorError, RefusedError

PEER = PeerId.from_public_key(bytes.fromhex("08011220") + bytes(range(32)))
CONNECTION = ConnectionInfo(
    "1",
    PEER,
    "outbound",
    "direct",
    "tcp",
    Multiaddr("/ip4/127.0.0.1/tcp/1"),
    Multiaddr("/ip4/127.0.0.1/tcp/2"),
    1,
    0.001,
    10,
    20,
    1.0,
    "peerup/0.1",
    (),
)


async def test_the_socket_is_private_and_gone_after_stop(serve):
    async with serve() as node:
        assert stat.S_IMODE(node.path.stat().st_mode) == 0o600
        path = node.path
    assert not path.exists()
    with pytest.raises(NotRunningError):
        Client(path).get("/v1/status")


def test_every_route_is_documented_and_nothing_else_is():
    text = (Path(__file__).parents[2] / "docs" / "control-api.md").read_text()
    documented = re.findall(r"^\| `([A-Z]+ /v1/[^`]*)`", text, re.MULTILINE)
    assert sorted(documented) == sorted(f"{route.method} {route.pattern}" for route in ROUTES)


async def test_actors_come_depth_first_as_plain_objects(serve):
    async with serve() as node:
        tree = await node.call(node.client.get, "/v1/actors")
    assert [actor["name"] for actor in tree] == ["root", "gate", "api"]
    assert tree[1] | {"pid": 101, "state": "running", "restarts": 0, "mailbox": 0} == tree[1]


async def test_errors_have_code_reason_action_and_status(serve):
    async with serve() as node:
        node.context.answers[Resolve] = _refuse("unknown-peer", "nobody is called x", "add the name")
        with pytest.raises(RefusedByNodeError) as caught:
            await node.call(node.client.post, "/v1/resolve", {"name": "x"})
        assert (caught.value.code, caught.value.status) == ("unknown-peer", 404)
        assert (caught.value.reason, caught.value.action) == ("nobody is called x", "add the name")
        for method, path, code, status in (
            (node.client.get, "/v1/nothing", "no-such-route", 404),
            (node.client.delete, "/v1/actors", "method-not-allowed", 405),
            (node.client.post, "/v1/resolve", "bad-request", 400),
        ):
            with pytest.raises(RefusedByNodeError) as caught:
                await node.call(method, path)
            assert (caught.value.code, caught.value.status) == (code, status)


def always(answer):
    return lambda _target, _request: answer


def _refuse(code: str, reason: str, action: str = ""):
    def answer(target, request):
        raise RefusedError(code, reason, action)

    return answer


async def test_a_part_that_does_not_answer_is_a_problem_and_no_failure(serve):
    async with serve() as node:
        status = await node.call(node.client.get, "/v1/status")
    assert status["actors"] == 3
    assert status["peer_id"] is None
    assert any(problem.startswith("keyring: ") for problem in status["problems"])


def reservation(state, failure=""):
    relay = PeerId.from_public_key(bytes.fromhex("08011220") + bytes(32))
    address = Multiaddr(f"/ip4/192.0.2.1/tcp/4001/p2p/{relay}")
    return address, RelayStatus(relay, (address,), state, (), None, None, None, None, None, None, failure, 0, 0)


@pytest.mark.parametrize(
    ("state", "well"), [("held", True), ("renewing", True), ("connecting", False), ("waiting", False)]
)
async def test_a_node_without_any_reservation_is_not_well(serve, state, well):
    address, told = reservation(state, "" if well else "the relay does not answer")
    async with serve() as node:
        await node.context.until(lambda: node.actor._node.config is not None)
        node.actor._keep(ConfigSnapshot(2, True, (), (), (), (address,)))
        node.context.answers[ReadRelays] = lambda _target, _request: Relays((told,))
        status = await node.call(node.client.get, "/v1/status")
    said = [problem for problem in status["problems"] if "reservation" in problem]
    assert status["reservations_held"] == well
    assert bool(said) is not well
    assert well or "the relay does not answer" in said[0]


@pytest.mark.parametrize(
    ("listen", "state", "well"),
    [
        ("127.0.0.1:2222", "running", True),
        ("", "backing-off", False),
        ("", "running", True),  # it serves `--stdio` alone; one that cannot listen does not run
    ],
)
async def test_a_proxy_that_does_not_run_is_a_problem(serve, listen, state, well):
    address, _ = reservation("held")
    entry = ProxyEntry("proxy/home/ssh", address.peer_id, "home", "ssh", listen, state)
    async with serve() as node:
        node.context.answers[ReadProxies] = lambda _target, _request: Proxies((entry,))
        status = await node.call(node.client.get, "/v1/status")
    assert any("proxy/home/ssh" in problem for problem in status["problems"]) is not well


async def test_describe_takes_quoted_names(serve):
    async with serve() as node:
        node.context.tree.append(_status("proxy/home/ssh", 103))
        node.context.answers[Describe] = lambda target, _: Description({"i am": target})
        data = await node.call(node.client.get, "/v1/actors/proxy%2Fhome%2Fssh")
        assert data["description"] == {"i am": "proxy/home/ssh"}
        assert data["status"]["pid"] == 103
        with pytest.raises(RefusedByNodeError, match="did you mean proxy/home/ssh"):
            await node.call(node.client.get, "/v1/actors/ssh")


def _status(name: str, pid: int | None, supervisor: str = "proxies"):
    from protocol.messages.system import ChildStatus

    return ChildStatus(name, "actors.x:X", supervisor, pid, "running", 1.0, 0, 0, 0, 0, "")


async def test_log_level_by_pattern(serve):
    async with serve() as node:
        node.context.answers[SetLogLevel] = always(Ok())
        data = await node.call(node.client.post, "/v1/actors/g*/log", {"level": "debug", "seconds": 300})
        assert data["changed"] == ["gate"]
        assert ("gate", SetLogLevel("debug", 300.0)) in node.context.asked
        node.context.answers[SetLogLevel] = _refuse("bad-request", "no such level")
        with pytest.raises(RefusedByNodeError, match="no such level"):
            await node.call(node.client.post, "/v1/actors/gate/log", {"level": "loud"})


# Taps


def _tapped(tap: str, sequence: int, skipped: int = 0, kind=Describe) -> Tapped:
    body, _ = encode_body(kind())
    envelope = Envelope(f"gate:1:{sequence}", None, None, "gate", "root", kind.KIND, None, body)
    return Tapped(tap, 1.0, envelope.to_bytes(), False, skipped)


async def _read_tap(node, results: list, **query) -> None:
    def read() -> None:
        results.extend(node.client.lines("/v1/tap", **query))

    await node.call(read)


async def test_a_tap_reaches_all_actors_streams_and_is_withdrawn_at_its_limit(serve):
    async with serve() as node:
        results: list = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: _read_tap(node, results, limit=2, seconds=30, kind="system.*"))
            await node.context.until(lambda: bool(node.taps("gate")))
            (rule,) = node.taps("gate")
            assert rule.sink == "api"
            assert rule.match.kind == "system.*"
            assert node.taps("root") == node.taps("api") == (rule,)
            for sequence in range(2):
                await node.actor.tapped(_tapped(rule.id, sequence))
        assert [line["id"] for line in results] == ["gate:1:0", "gate:1:1"]
        assert results[0]["body"] == {}
        assert results[0]["kind"] == "system.describe"
        await node.context.until(lambda: node.taps("gate") == ())


@pytest.mark.parametrize(("query", "shown"), [({}, 1), ({"all": "true"}, 2), ({"kind": "system.*"}, 2)])
async def test_heartbeats_are_hidden_unless_asked_for(serve, query, shown):
    async with serve() as node:
        results: list = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: _read_tap(node, results, limit=shown, seconds=30, **query))
            await node.context.until(lambda: bool(node.taps("gate")))
            await node.actor.tapped(_tapped(node.taps("gate")[0].id, 1, kind=Ping))
            await node.actor.tapped(_tapped(node.taps("gate")[0].id, 2))
        assert len(results) == shown
        assert results[-1]["id"] == "gate:1:2"


async def test_a_tap_ends_by_itself(serve):
    async with serve() as node:
        results: list = []
        with trio.fail_after(10):
            await _read_tap(node, results, seconds=0.2)
        assert results == []
        await node.context.until(lambda: node.taps("gate") == ())


async def test_a_tap_is_withdrawn_when_the_client_leaves(serve):
    async with serve() as node:
        lines = node.client.lines("/v1/tap", seconds=60)
        got = []
        reader = threading.Thread(target=lambda: got.append(next(lines)))
        reader.start()
        await node.context.until(lambda: bool(node.taps("gate")))
        await node.actor.tapped(_tapped(node.taps("gate")[0].id, 1))
        await node.call(reader.join)
        assert got
        await node.call(lines.close)
        await node.context.until(lambda: node.taps("gate") == ())


async def test_an_actor_that_comes_back_is_told_of_the_tap(serve):
    async with serve() as node:
        results: list = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: _read_tap(node, results, limit=1, seconds=30))
            await node.context.until(lambda: bool(node.taps("gate")))
            assert "gate" in node.context.watched
            node.context.told.clear()
            await node.actor.actor_up(ActorUp("gate", 2))
            assert len(node.taps("gate")) == 1
            node.context.tree.append(_status("proxy/home/ssh", 110))
            await node.context.until(lambda: len(node.taps("proxy/home/ssh")) == 1)
            await node.actor.tapped(_tapped(node.taps("gate")[0].id, 1))
        assert len(results) == 1


async def test_a_tap_keeps_its_rate_and_counts_the_rest(serve):
    async with serve() as node:
        results: list = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: _read_tap(node, results, seconds=1.0, rate=2))
            await node.context.until(lambda: bool(node.taps("gate")))
            for sequence in range(50):
                await node.actor.tapped(_tapped(node.taps("gate")[0].id, sequence, skipped=1))
        shown = [line for line in results if "id" in line]
        assert 2 <= len(shown) <= 5
        assert sum(line["skipped"] for line in results) == 50 + (50 - len(shown))


async def test_too_many_taps_are_refused(serve):
    async with serve() as node:
        open_taps = []
        for _ in range(8):
            lines = node.client.lines("/v1/tap", seconds=60, limit=1)
            open_taps.append(lines)
            count = len(open_taps)
            reader = threading.Thread(target=lambda lines=lines: next(lines, None), daemon=True)
            reader.start()
            await node.context.until(lambda count=count: len(node.taps("gate")) == count)
        with pytest.raises(RefusedByNodeError, match="8 taps are open") as caught:
            await node.call(lambda: next(node.client.lines("/v1/tap")))
        assert caught.value.status == 429
        for rule in node.taps("gate"):
            await node.actor.tapped(_tapped(rule.id, 1))
        await node.context.until(lambda: node.taps("gate") == ())


# Why


async def test_why_follows_causes_across_actors(serve):
    entries = {
        "config": [JournalEntry("config:1:3", "api:2:9", None, "config", "switchboard", "config.snapshot", 3.0)],
        "gate": [JournalEntry("api:2:9", None, "api:2:1", "api", "config", "config.reload", 2.0)],
        "switchboard": [],
    }

    def journal(target, request):
        assert len(request.ids) == 1
        return Journal(tuple(entry for entry in entries.get(target, []) if entry.id in request.ids))

    async with serve() as node:
        node.context.tree += [_status("config", 104), _status("switchboard", 105)]
        node.context.answers[ReadJournal] = journal
        data = await node.call(node.client.get, "/v1/why/config%3A1%3A3")
        assert [entry["id"] for entry in data["chain"]] == ["config:1:3", "api:2:9"]
        assert data["forgotten"] == "api:2:1"
        with pytest.raises(RefusedByNodeError, match="no actor remembers"):
            await node.call(node.client.get, "/v1/why/gate%3A1%3A1")


async def test_why_ends_when_causes_go_in_circles(serve):
    rows = {
        "gate:1:1": JournalEntry("gate:1:1", "gate:1:2", None, "gate", "root", "x", 1.0),
        "gate:1:2": JournalEntry("gate:1:2", "gate:1:1", None, "gate", "root", "x", 1.0),
    }
    async with serve() as node:
        node.context.answers[ReadJournal] = lambda _, request: Journal((rows[request.ids[0]],))
        data = await node.call(node.client.get, "/v1/why/gate%3A1%3A1")
    assert len(data["chain"]) == 2


async def test_dead_letters_of_all_actors_in_order_and_the_silent_are_named(serve):
    def letters(target, request):
        if target == "gate":
            raise DeadlineExceededError("no answer in time")
        at = 2.0 if target == "root" else 1.0
        entry = JournalEntry(f"{target}:1:1", None, None, target, "x", "system.ping", at)
        return DeadLetters((DeadLetter(entry, "no such actor"),), 3, {})

    async with serve() as node:
        node.context.answers[ReadDeadLetters] = letters
        data = await node.call(node.client.get, "/v1/deadletters")
    assert [letter["entry"]["sender"] for letter in data["letters"]] == ["api", "root"]
    assert data["dropped"] == 6
    assert data["silent"] == {"gate": "no answer in time"}


# Faults


async def test_faults_are_refused_unless_the_node_allows_them(serve):
    async with serve(allow_faults=False) as node:
        for path, body in (
            ("/v1/faults", {"action": "drop", "to": "gate"}),
            ("/v1/actors/gate/fault", {"fault": "kill"}),
        ):
            with pytest.raises(RefusedByNodeError, match="does not take faults") as caught:
                await node.call(node.client.post, path, body)
            assert (caught.value.code, caught.value.status) == ("faults-not-allowed", 403)
            assert "--allow-faults" in caught.value.action
        assert not node.context.told_to("gate", SetFaults)


async def test_message_faults_are_told_listed_checkpointed_and_cleared(serve):
    async with serve() as node:
        body = {
            "action": "delay",
            "to": "gate",
            "kind": "gate.*",
            "delay": 0.25,
            "probability": 0.5,
            "seed": 9,
            "seconds": 20,
        }
        made = await node.call(node.client.post, "/v1/faults", body)
        (rule,) = node.faults("gate")
        assert (rule.action, rule.delay, rule.probability, rule.seed) == (FaultAction.DELAY, 0.25, 0.5, 9)
        assert node.faults("root") == node.faults("api") == (rule,)
        (listed,) = await node.call(node.client.get, "/v1/faults")
        assert listed["id"] == made["id"] == rule.id
        assert 10 < listed["seconds_left"] <= 20
        assert node.context.checkpoints[-1][0]["faults"][0]["id"] == rule.id
        await node.call(node.client.post, "/v1/faults", {"action": "drop", "from": "x"})
        assert (await node.call(node.client.delete, f"/v1/faults/{rule.id}"))["cleared"] == 1
        assert [other.action for other in node.faults("gate")] == [FaultAction.DROP]
        assert (await node.call(node.client.delete, "/v1/faults"))["cleared"] == 1
        assert node.faults("gate") == ()
        with pytest.raises(RefusedByNodeError, match="no fault"):
            await node.call(node.client.delete, "/v1/faults/fault99")


async def test_the_list_of_faults_is_what_the_actors_say(serve):
    async with serve() as node:
        stale = FaultRule("fault77", EdgeFilter(target="gate"), FaultAction.DROP, 1.0, None, 1, math.inf, 0.0)
        await node.call(node.client.post, "/v1/faults", {"action": "drop", "from": "x"})
        told = node.faults("root")

        def answer(target, _):
            if target == "api":
                raise NoSuchActorError("api is away")
            return FaultsInForce(told if target == "root" else (stale,))

        node.context.answers[ReadFaults] = answer
        first, second = await node.call(node.client.get, "/v1/faults")
        assert (first["id"], first["actors"], first["missing"]) == (told[0].id, ["root"], ["gate"])
        assert (second["id"], second["actors"]) == ("fault77", ["gate"])
        assert first["silent"] == {"api": "api is away"}


async def test_an_actor_that_goes_on_with_a_fault_is_named(serve, monkeypatch):
    monkeypatch.setattr(faults, "CLEAR_DEADLINE", 0.3)
    async with serve() as node:
        await node.call(node.client.post, "/v1/faults", {"action": "drop", "from": "x"})
        (rule,) = node.faults("gate")
        before = node.context.answers[ReadFaults]
        node.context.answers[ReadFaults] = lambda target, request: (
            FaultsInForce((rule,)) if target == "gate" else before(target, request)
        )
        answer = await node.call(node.client.delete, "/v1/faults")
        assert answer == {"cleared": 1, "remaining": {"gate": f"still applies {rule.id}"}}


@pytest.mark.parametrize("kind", ["system.read-tree", "system.*-faults", "no.such"])
async def test_a_fault_that_could_touch_nothing_is_refused(serve, kind):
    async with serve() as node:
        with pytest.raises(RefusedByNodeError):
            await node.call(node.client.post, "/v1/faults", {"action": "drop", "kind": kind})
        assert await node.call(node.client.get, "/v1/faults") == []


async def test_faults_end_by_themselves(serve):
    async with serve() as node:
        await node.call(node.client.post, "/v1/faults", {"action": "drop", "to": "gate", "seconds": 0.1})
        with trio.fail_after(5):
            while await node.call(node.client.get, "/v1/faults"):
                await trio.lowlevel.checkpoint()


@pytest.mark.parametrize(
    "body",
    [
        {"action": "explode", "to": "x"},
        {"action": "drop"},
        {"action": "drop", "to": "x", "probability": 2},
        {"action": "drop", "to": "x", "seconds": "nan"},
        {"action": "drop", "to": ["x"]},
        {"action": "drop", "to": "x", "nth": 1.5},
    ],
)
async def test_bad_faults_are_refused(serve, body):
    async with serve() as node:
        with pytest.raises(RefusedByNodeError) as caught:
            await node.call(node.client.post, "/v1/faults", body)
        assert caught.value.status == 400
        assert await node.call(node.client.get, "/v1/faults") == []


async def test_process_faults_go_to_the_root(serve):
    async with serve() as node:
        node.context.answers[InjectProcessFault] = always(Ok())
        data = await node.call(node.client.post, "/v1/actors/gate/fault", {"fault": "kill"})
        assert data == {"name": "gate", "fault": "kill", "pid": 101}
        (asked,) = [
            (target, request) for target, request in node.context.asked if isinstance(request, InjectProcessFault)
        ]
        assert asked[0] == "root"
        assert asked[1].name == "gate"
        for name, fault in (("nobody", "kill"), ("gate", "tickle"), ("g*", "kill")):
            with pytest.raises(RefusedByNodeError):
                await node.call(node.client.post, f"/v1/actors/{name}/fault", {"fault": fault})


async def test_killing_the_api_itself_is_answered_first(serve):
    async with serve() as node:
        done = trio.Event()

        def inject(target, request):
            done.set()
            return Ok()

        node.context.answers[InjectProcessFault] = inject
        data = await node.call(node.client.post, "/v1/actors/api/fault", {"fault": "kill"})
        assert data["name"] == "api"
        with trio.fail_after(5):
            await done.wait()


async def test_a_successor_keeps_faults_and_socket_and_withdraws_taps(serve):
    async with serve() as node:
        await node.call(node.client.post, "/v1/faults", {"action": "drop", "to": "gate", "seconds": 60})
        (rule,) = node.faults("gate")
        state, descriptors = node.context.checkpoints[-1]
        copies = tuple(Descriptor(os.dup(fd)) for fd in descriptors)
        async with serve(checkpoint=Checkpoint(state, copies), path=node.path) as successor:
            await successor.context.until(lambda: successor.faults("gate") == (rule,))
            assert successor.taps("gate") == ()
            assert successor.context.told_to("gate", SetTaps)
            (listed,) = await successor.call(successor.client.get, "/v1/faults")
            assert listed["id"] == rule.id


# The socket


async def test_a_left_over_socket_is_replaced_and_a_served_one_is_not(serve, tmp_path):
    path = tmp_path / "left.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    async with serve(path=path) as node:
        assert node.client.is_running()
        with pytest.RaisesGroup(pytest.RaisesExc(Exception, match="another node serves"), flatten_subgroups=True):
            async with serve(path=path):
                pass
        assert await node.call(node.client.get, "/v1/actors")


async def test_a_file_that_is_no_socket_is_not_removed(serve, tmp_path):
    path = tmp_path / "precious"
    path.write_text("x")
    with pytest.RaisesGroup(pytest.RaisesExc(Exception, match="is not a socket"), flatten_subgroups=True):
        async with serve(path=path):
            pass
    assert path.read_text() == "x"


async def test_oversized_requests_are_refused(serve):
    async with serve() as node:
        with pytest.raises(ClientError):
            await node.call(node.client.post, "/v1/resolve", {"name": "x" * (HttpLimits().body_bytes + 10)})
        assert await node.call(node.client.get, "/v1/actors")


# Peers and proxies


async def test_ping_streams_lines_then_statistics_and_tells_lost_ones(serve):
    rtts = iter([0.001, None, 0.003])

    def ping(target, request):
        rtt = next(rtts)
        if rtt is None:
            raise RefusedError("unreachable", "no answer")
        return Pinged(rtt, "/ipfs/ping/1.0.0", CONNECTION, None)

    async with serve() as node:
        node.context.answers[Resolve] = always(Resolved(PEER, "config"))
        node.context.answers[PingPeer] = ping
        lines = await node.call(lambda: list(node.client.lines("/v1/peers/home/ping", count=3, interval=0.01)))
    assert [line.get("seq") for line in lines] == [1, 2, 3, None]
    assert lines[0]["rtt_ms"] == 1.0
    assert lines[0]["path"] == "direct"
    assert lines[1]["rtt_ms"] is None
    assert lines[1]["error"]["code"] == "unreachable"
    assert lines[3]["stats"] == {
        "sent": 3,
        "received": 2,
        "lost": 1,
        "loss_pct": 33.3,
        "min_ms": 1.0,
        "avg_ms": 2.0,
        "max_ms": 3.0,
    }


async def test_add_proxy_prints_where_it_listens(serve):
    entry = ProxyEntry("proxy/home/ssh", PEER, "home", "ssh", "127.0.0.1:2222", "running")
    async with serve() as node:
        node.context.answers[AddProxy] = always(ProxyAdded(entry, created=True))
        body = {"peer": "home", "service": "ssh", "listen": "127.0.0.1:2222"}
        data = await node.call(node.client.post, "/v1/proxies", body)
    assert (data["listen"], data["name"], data["peer_id"]) == ("127.0.0.1:2222", "proxy/home/ssh", str(PEER))


async def test_stdio_hands_a_socket_over_and_closes_its_own_copies(serve):
    entry = ProxyEntry("proxy/home/ssh", PEER, "home", "ssh", "", "running")
    taken: list[socket.socket] = []

    def attach(target, request):
        taken.append(socket.socket(fileno=request.socket.detach()))
        taken[0].sendall(b"SSH-2.0-early")
        return Ok()

    async with serve() as node:
        node.context.answers[AddProxy] = always(ProxyAdded(entry, created=True))
        node.context.answers[Attach] = attach
        mine = await node.call(node.client.open_stdio, "home", "ssh")
        with mine, taken[0] as theirs:
            mine.settimeout(5)
            theirs.settimeout(5)
            assert mine.recv(100) == b"SSH-2.0-early"
            mine.sendall(b"hello")
            mine.shutdown(socket.SHUT_WR)
            assert await node.call(theirs.recv, 100) == b"hello"
            assert await node.call(theirs.recv, 100) == b""
            theirs.close()
            # The end arrives only if nobody else still holds the proxy's side.
            assert await node.call(mine.recv, 100) == b""


async def test_a_client_that_leaves_before_it_has_its_descriptor_ends_its_own_connection_alone(serve):
    entry = ProxyEntry("proxy/home/ssh", PEER, "home", "ssh", "", "running")
    async with serve() as node:
        node.context.answers[AddProxy] = always(ProxyAdded(entry, created=True))
        node.context.answers[Attach] = always(Ok())
        headers = {"upgrade": "peerup-descriptor"}
        request = HttpRequest(
            "GET", "/v1/stdio", ("v1", "stdio"), {"peer": "home", "service": "ssh"}, headers, b"", None
        )
        upgrade = await stdio(node.actor._node, Call(request, {}, {}))
        near, far = trio.socket.socketpair()
        far.close()
        with near, pytest.raises(trio.BrokenResourceError):  # which the server bears, unlike an OSError
            await upgrade.run(trio.SocketStream(near), b"")


async def test_stdio_failure_is_told_in_words(serve):
    entry = ProxyEntry("proxy/home/ssh", PEER, "home", "ssh", "", "running")
    async with serve() as node:
        node.context.answers[AddProxy] = always(ProxyAdded(entry, created=True))
        node.context.answers[Attach] = _refuse("unreachable", "home does not answer")
        with pytest.raises(RefusedByNodeError, match="home does not answer") as caught:
            await node.call(node.client.open_stdio, "home", "ssh")
        assert caught.value.status == 502
        node.context.answers[Attach] = always(Ok())
        with pytest.raises(RefusedByNodeError, match="only served with the header"):
            await node.call(lambda: node.client.get("/v1/stdio", peer="home", service="ssh"))


async def test_reload_tells_problems(serve):
    from protocol.messages.config import ConfigReloaded

    async with serve() as node:
        node.context.answers[ReloadConfig] = always(ConfigReloaded(4, (), ("line 3: nonsense",)))
        data = await node.call(node.client.post, "/v1/config/reload")
    assert (data["version"], data["changes"], data["problems"]) == (4, [], ["line 3: nonsense"])
    assert data["not_in_force"] == [f"{name}: is not running" for name in ("gate", "switchboard", "config")]


async def test_reload_answers_when_every_part_has_the_change(serve):
    from protocol.messages.config import ConfigReloaded
    from protocol.messages.gate import Reload, Reloaded
    from protocol.messages.system import Describe, Description

    looks = {"gate": 0, "switchboard": 0, "config": 0}

    def describe(target, _request):
        looks[target] += 1
        late = looks[target] > 2  # each takes the change over only after having been asked twice
        states = {
            "gate": {"version": 7 if late else 6, "config_version": 4 if late else 3},
            "switchboard": {"policy_version": 7 if late else 6, "config_version": 4 if late else 3},
            "config": {"children": {"failed": {"proxy/a/b": "port in use"}, "pending": [] if late else ["service/x"]}},
        }
        return Description(states[target])

    async with serve() as node:
        node.context.answers[ReloadConfig] = always(ConfigReloaded(4, (), ()))
        node.context.answers[Reload] = always(Reloaded(7, 1, ()))
        node.context.answers[Describe] = describe
        data = await node.call(node.client.post, "/v1/config/reload")
        assert (data["not_in_force"], data["failed"]) == ([], {"proxy/a/b": "port in use"})
        assert looks == {"gate": 3, "switchboard": 3, "config": 3}
        looks["switchboard"] = 0
        data = await node.call(node.client.post, "/v1/auth/reload")
        assert (data["not_in_force"], looks["switchboard"]) == ([], 3)


VALUES = [
    None,
    "",
    "x",
    "*",
    "a/b",
    "\x00",
    "é" * 300,
    -1,
    0,
    1,
    2**70,
    1e308,
    float("nan"),
    True,
    [],
    {},
    ["x"],
    {"a": 1},
]
KEYS = ["name", "level", "seconds", "action", "fault", "from", "to", "kind", "probability", "nth", "seed", "delay"]
KEYS += ["peer", "service", "listen", "limit", "rate", "all", "count", "interval", "timeout"]


async def test_no_input_ends_the_api(serve):
    """Any client error is an answer below 500 or an actor's refusal; a defect would end the actor and this test."""
    generator = random.Random(11)
    async with serve() as node:
        for _ in range(12):
            for route in ROUTES:
                path = re.sub(r"{\w+}", lambda _: quote(str(generator.choice(VALUES)), safe=""), route.pattern)
                body = {key: generator.choice(VALUES) for key in generator.sample(KEYS, 5)}
                if route.pattern == "/v1/tap":
                    path += "?seconds=0.1&limit=x"
                elif route.method == "GET" and generator.random() < 0.5:
                    path += "?" + urlencode({key: str(value) for key, value in body.items()})
                if route.pattern in ("/v1/shutdown", "/v1/tap"):
                    continue
                call = node.client.post if route.method == "POST" else node.client.delete
                with contextlib.suppress(RefusedByNodeError):
                    if route.method == "GET":
                        await node.call(lambda path=path: list(node.client.lines(path)))
                    elif route.method == "POST":
                        await node.call(call, path, body)
                    else:
                        await node.call(call, path)
        assert await node.call(node.client.get, "/v1/actors")


async def test_a_connection_that_breaks_is_told(tmp_path):
    path = tmp_path / "rude.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        accepted = []

        def hang_up() -> None:
            for _ in range(3):
                connection, _ = listener.accept()
                accepted.append(connection.recv(1000).split()[0])
                connection.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        client = Client(path, timeout=5)
        with pytest.raises(LostConnectionError):
            await trio.to_thread.run_sync(client.post, "/v1/proxies", {})
        with pytest.raises(LostConnectionError):
            await trio.to_thread.run_sync(client.get, "/v1/status")
        thread.join()
        assert accepted == [b"POST", b"GET", b"GET"], "only what changes nothing is asked again"
