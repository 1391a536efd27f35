"""`peerup ping`, `paths` and `traceroute` through a real control API, with relays and without."""

from __future__ import annotations

import dataclasses
import json

import pytest
from click.testing import CliRunner

from peerup.cli import cli
from peerup.cli.paths import way_words
from protocol.messages.config import ConfigSnapshot, NameEntry, Resolved, SubscribeConfig
from protocol.messages.config import Resolve as ResolveName
from protocol.messages.paths import Hop, MeasuredPath, MeasurePaths, PathsMeasured, Traced, TracePath
from protocol.messages.switchboard import ConnectionInfo, Pinged, PingPeer
from protocol.multiaddr import Multiaddr
from protocol.peer_id import PeerId


def peer(number: int) -> PeerId:
    return PeerId.from_public_key(bytes.fromhex("08011220") + bytes([number]) * 32)


HOME, VPS, US = peer(1), peer(2), peer(3)
VIA = Multiaddr(f"/ip4/203.0.113.7/tcp/4001/p2p/{VPS}/p2p-circuit")
DIRECT = ConnectionInfo(
    "1-1",
    HOME,
    "outbound",
    "direct",
    "tcp",
    Multiaddr("/ip4/192.0.2.1/tcp/1"),
    Multiaddr("/ip4/192.0.2.2/tcp/2"),
    1,
    0.001,
    10,
    2048,
    1.0,
    "peerup/0.1",
    (),
)
RELAYED = dataclasses.replace(
    DIRECT, id="1-2", path="relayed", remote_address=VIA, relay=VPS, limit_seconds=120, limit_bytes=131072
)


@pytest.fixture
def node(serve, monkeypatch, tmp_path):
    """A node that answers `answers`; the commands run beside it."""

    def make(answers):
        return _Commands(serve, tmp_path, answers)

    monkeypatch.setenv("COLUMNS", "100")
    (tmp_path / "run").mkdir(mode=0o700)
    return make


class _Commands:
    def __init__(self, serve, home, answers):
        self._serve, self._home, self._answers = serve, home, answers

    async def run(self, *arguments, status=0):
        async with self._serve(path=self._home / "run" / "control.sock") as node:
            node.context.answers[ResolveName] = lambda *_: Resolved(HOME, "config")
            for kind, answer in self._answers.items():
                node.context.answers[kind] = lambda _target, request, answer=answer: (
                    answer(request) if callable(answer) else answer
                )
            names = (NameEntry("home", HOME), NameEntry("vps", VPS))
            snapshot = ConfigSnapshot(1, gating=True, services=(), names=names, addresses=())
            node.context.answers[SubscribeConfig] = lambda *_: snapshot
            await node.actor._subscribe()
            result = await node.call(CliRunner().invoke, cli, ["--home", str(self._home), *arguments])
            self.asked = [request for _, request in node.context.asked]
        assert result.exit_code == status, result.output
        return result


def measured(*paths):
    return {MeasurePaths: PathsMeasured(paths)}


async def test_paths_tell_of_the_relay_the_measured_time_the_limit_and_why_not_directly(node):
    commands = node(measured(MeasuredPath(RELAYED, True, 0.0815, "", "192.0.2.9: no answer within 10 s")))
    result = await commands.run("paths")
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("home")]
    assert "relayed tcp via vps" in line
    assert "81.5ms" in line
    assert "the relay grants this circuit 120 s and 128.0 KiB each way" in result.stderr
    assert "home is not reached directly: 192.0.2.9: no answer" in result.stderr


async def test_paths_of_one_peer_as_json(node):
    commands = node(
        measured(MeasuredPath(DIRECT, True, 0.002, "", ""), MeasuredPath(RELAYED, False, None, "no answer", ""))
    )
    direct, relayed = json.loads((await commands.run("paths", "home", "--json")).stdout)
    assert [request.peer for request in commands.asked if isinstance(request, MeasurePaths)] == [HOME]
    assert (direct["path"], direct["rtt"], direct["in_use"], direct["relay"]) == ("direct", 0.002, True, None)
    assert (relayed["path"], relayed["rtt"], relayed["in_use"], relayed["failure"]) == (
        "relayed",
        None,
        False,
        "no answer",
    )
    assert (relayed["relay"], relayed["relay_name"], relayed["limit_bytes"]) == (str(VPS), "vps", 131072)


async def test_a_path_that_is_given_up_stands_in_parentheses_and_one_that_is_silent_is_explained(node):
    commands = node(
        measured(MeasuredPath(DIRECT, True, 0.002, "", ""), MeasuredPath(RELAYED, False, None, "no answer", ""))
    )
    result = await commands.run("paths")
    assert "(relayed" in result.stdout
    assert "no answer" in result.stdout
    assert "home does not answer: no answer" in result.stderr


async def test_a_path_in_doubt_is_shown_as_such(node):
    doubted = dataclasses.replace(DIRECT, in_doubt=True)
    commands = node(
        measured(MeasuredPath(doubted, False, None, "no answer", ""), MeasuredPath(RELAYED, True, 0.002, "", ""))
    )
    result = await commands.run("paths")
    assert " ".join(result.stdout.split()).count("in doubt") == 1
    assert "(direct tcp ->)" in result.stdout
    assert "home gives no sign of life over (direct tcp ->); new streams avoid it" in " ".join(result.stderr.split())
    told = json.loads((await commands.run("paths", "--json")).stdout)
    assert [path["in_doubt"] for path in told] == [True, False]


async def test_without_a_connection_paths_says_so(node):
    assert (await node(measured()).run("paths")).stdout == "not connected to any peer\n"
    assert (await node(measured()).run("paths", "home")).stdout == "not connected to home\n"


HOPS = (
    Hop("node", US, None, "", 0.0, ""),
    Hop("relay", VPS, Multiaddr("/ip4/203.0.113.7/tcp/4001"), "tcp", 0.0402, ""),
    Hop("peer", HOME, VIA, "tcp", 0.0815, ""),
)


async def test_traceroute_shows_this_node_the_relay_and_the_peer_with_times(node):
    result = await node({TracePath: Traced(HOPS, "relayed", 0.2)}).run("traceroute", "home")
    lines = result.stdout.splitlines()
    assert "this node" in lines[1]
    assert "relay vps" in lines[2]
    assert lines[2].endswith("40.20ms")
    assert "peer home" in "\n".join(lines[3:])
    assert "81.50ms" in "\n".join(lines[3:])
    assert "connected in 200 ms" in result.stderr


async def test_traceroute_to_a_silent_peer_fails_and_tells_how_far_it_came(node):
    hops = (*HOPS[:2], dataclasses.replace(HOPS[2], rtt=None, failure="no answer within 5 s"))
    result = await node({TracePath: Traced(hops, "relayed", None)}).run("traceroute", "home", status=1)
    assert "40.20ms" in result.stdout
    assert "hop 2: no answer within 5 s" in result.stderr
    answer = json.loads(
        (await node({TracePath: Traced(hops, "relayed", None)}).run("traceroute", "home", "--json", status=1)).stdout
    )
    assert [hop["rtt_ms"] for hop in answer["hops"]] == [0.0, 40.2, None]
    assert [hop["role"] for hop in answer["hops"]] == ["node", "relay", "peer"]


async def test_ping_names_the_relay(node):
    answers = {PingPeer: Pinged(0.0815, "/ipfs/ping/1.0.0", RELAYED, 0.2)}
    result = await node(answers).run("ping", "home", "-c", "1")
    assert "rtt=81.50 ms relayed tcp via vps /ip4/203.0.113.7" in result.stdout
    line = json.loads((await node(answers).run("ping", "home", "-c", "1", "--json")).stdout.splitlines()[0])
    assert (line["path"], line["transport"], line["relay"], line["relay_name"]) == ("relayed", "tcp", str(VPS), "vps")


def test_a_relay_without_a_name_is_shown_by_its_id():
    assert way_words("direct", "websocket", None, "") == "direct websocket"
    assert way_words("relayed", "tcp", str(VPS), "").startswith(f"relayed tcp via {str(VPS)[:8]}")
