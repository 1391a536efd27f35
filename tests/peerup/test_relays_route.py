"""`GET /v1/relays` over its real socket, with a keeper that answers from a table."""

from __future__ import annotations

import json

from click.testing import CliRunner

from peerup.cli import cli
from protocol.messages.config import ConfigSnapshot
from protocol.messages.reservations import ReadRelays, Relays, RelayStatus
from protocol.multiaddr import Multiaddr
from protocol.peer_id import PeerId

NEAR, FAR, US = (PeerId.from_public_key(bytes.fromhex("08011220") + bytes([n] * 32)) for n in (1, 2, 3))
NEAR_AT = Multiaddr(f"/ip4/192.0.2.1/tcp/4001/p2p/{NEAR}")
FAR_AT = Multiaddr(f"/dns/far.example/tcp/443/p2p/{FAR}")
THROUGH_NEAR = Multiaddr(f"{NEAR_AT}/p2p-circuit/p2p/{US}")
RELAYS = Relays(
    (
        RelayStatus(NEAR, (NEAR_AT,), "held", (THROUGH_NEAR,), 3000.0, 600.0, 1500.0, 120, 131072, 0.04, "", 2, 1),
        RelayStatus(FAR, (FAR_AT,), "waiting", (), None, None, 12.0, None, None, None, "the relay is full", 0, 9),
    )
)


async def test_without_a_keeper_there_are_no_relays(serve):
    async with serve() as node:
        assert await node.call(node.client.get, "/v1/relays") == []


async def test_before_the_keeper_is_there_relays_are_starting(serve):
    async with serve() as node:
        await node.context.until(lambda: node.actor._node.config is not None)
        node.actor._keep(ConfigSnapshot(2, True, (), (), (), (NEAR_AT, FAR_AT)))
        near, far = await node.call(node.client.get, "/v1/relays")
        assert (near["state"], near["addresses"]) == ("starting", [str(NEAR_AT)])
        assert far["expires_in"] is None


async def test_relays_are_told_with_their_names_and_health(serve):
    async with serve() as node:
        node.context.answers[ReadRelays] = lambda _target, _request: RELAYS
        near, far = await node.call(node.client.get, "/v1/relays")
        assert near == {
            "peer_id": str(NEAR),
            "name": "",
            "addresses": [str(NEAR_AT)],
            "state": "held",
            "relayed_addresses": [str(THROUGH_NEAR)],
            "expires_in": 3000.0,
            "held_for": 600.0,
            "next_attempt": 1500.0,
            "limit_seconds": 120,
            "limit_bytes": 131072,
            "rtt": 0.04,
            "last_failure": "",
            "granted": 2,
            "failed": 1,
            "warning": "",
        }
        assert (far["state"], far["expires_in"], far["last_failure"]) == ("waiting", None, "the relay is full")
        assert [target for target, request in node.context.asked if isinstance(request, ReadRelays)] == ["relay/keeper"]


async def test_the_command_shows_what_the_node_tells(serve, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    home = tmp_path / "home"
    (home / "run").mkdir(parents=True)
    async with serve(path=home / "run" / "control.sock") as node:
        node.context.answers[ReadRelays] = lambda _target, _request: RELAYS

        def run(*arguments: str) -> str:
            result = CliRunner().invoke(cli, ["--home", str(home), "relay", "list", *arguments])
            assert result.exit_code == 0, result.output
            return result.stdout

        shown = await node.call(run)
        assert max(len(line) for line in shown.splitlines() if not line.startswith("  /")) <= 80
        for word in (
            *("held", "25m00s", "40.0ms", "2m00s, 128.0 KiB each way", "none", "the relay is full", "12s"),
            *(f"  {THROUGH_NEAR}", f"  {FAR_AT}"),
        ):
            assert word in shown
        assert [relay["state"] for relay in json.loads(await node.call(run, "--json"))] == ["held", "waiting"]
