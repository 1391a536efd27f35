"""The config actor in a simulated tree: what it publishes, resolves, and keeps running through every kind of loss."""

import os

import pytest
import trio

from actors.config.actor import Config
from actors.config.file import edit_config
from actors.config.proxies_file import load_proxies
from actors.config.reconciler import KEEPER, PROXY_FACTORY, SERVICE_FACTORY
from protocol.errors import PeerupError
from protocol.messages.config import (
    AddProxy,
    ConfigSnapshot,
    ReadProxies,
    ReloadConfig,
    RemoveProxy,
    Resolve,
    SubscribeConfig,
)
from protocol.messages.system import ChildSpec, Restart, Strategy, SupervisorSpec
from protocol.multiaddr import Multiaddr
from protocol.peer_id import PeerId
from supervisor.actor import Actor
from supervisor.overseer import FACTORY, supervisor_arguments
from supervisor.simulation import Simulation
from tests.actors.config.samples import HOME, NAS
from tests.support.stage import Stage, StartFailedError, refused

CONFIG = f"""\
services:
  ssh: {{enabled: true, local_address: "localhost:22"}}
  web: {{enabled: false, local_address: "localhost:80"}}
names:
  home: {HOME}
"""
HOME_ID, NAS_ID = PeerId.from_text(HOME), PeerId.from_text(NAS)


class PortInUseError(PeerupError):
    code = "port-in-use"


class Machine:
    """What outlives the pretended processes: ports, and who was started with what how often."""

    def __init__(self, directory):
        self.path = directory / "config.yaml"
        self.proxies = directory / "state" / "proxies.yaml"
        self.proxies.parent.mkdir()
        self.put(CONFIG)
        self.starts = []
        self.taken = set()
        self.next_port = 41000

    def put(self, text):
        self.path.write_text(text)
        self.path.chmod(0o600)

    def simulation(self, seed=1):
        machine = self

        class ProxyClient(Actor):
            def __init__(self, peer, peer_name, service, listen, limit):
                self.arguments = (peer, peer_name, service, listen)

            async def start(self, checkpoint):
                machine.starts.append(self.context.name)
                listen = self.arguments[3]
                if listen is None:
                    return {"listen": ""}
                if checkpoint is not None:  # the socket of the predecessor
                    return {"listen": checkpoint.state["listen"]}
                host, _, port = listen.rpartition(":")
                if port == "0":
                    machine.next_port += 1
                    listen = f"{host}:{machine.next_port}"
                if listen in machine.taken:
                    raise PortInUseError(f"{listen} is in use")
                self.context.checkpoint({"listen": listen})
                return {"listen": listen}

        class ServiceServer(Actor):
            def __init__(self, name, address, limit):
                self.arguments = (name, address)

            async def start(self, checkpoint):
                machine.starts.append(f"{self.context.name} {self.arguments[1]}")
                return {}

        classes = {PROXY_FACTORY: ProxyClient, SERVICE_FACTORY: ServiceServer, KEEPER.factory: Actor, "config": Config}
        return Simulation(seed, classes=classes)

    def tree(self):
        def supervision(*children):
            return SupervisorSpec(Strategy.ONE_FOR_ONE, 100, 60.0, 0.1, 1.0, children, starters=("config",))

        arguments = {"path": str(self.path), "proxies": str(self.proxies), "watch": False}
        return supervision(
            ChildSpec("config", "config", arguments),
            ChildSpec("proxies", FACTORY, supervisor_arguments(supervision()), Restart.PERMANENT),
        )

    def run(self, scenario, seed=1):
        return self.simulation(seed).main(self.tree(), scenario)


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def running(world):
    return sorted(child.name for child in world.tree() if child.name.startswith(("proxy/", "service/", "relay/")))


async def settle(world, *names, seconds=30):
    """Wait until exactly these children run."""
    with trio.fail_after(seconds):
        while running(world) != sorted(names) or any(child.state != "running" for child in world.tree()):  # noqa: ASYNC110
            await trio.sleep(0.01)  # virtual time, and the tree has no event


def test_enabled_services_run_and_follow_the_file(machine):
    async def scenario(world):
        await settle(world, "service/ssh")
        with edit_config(machine.path) as editor:
            editor.set_service_enabled("web", enabled=True)
            editor.add_service("db", "localhost:5432")
        reloaded = await world.ask("config", ReloadConfig())
        assert reloaded.changes == ("services.db added", "services.web changed")
        await settle(world, "service/db", "service/ssh", "service/web")
        machine.put(CONFIG.replace("localhost:22", "localhost:2222"))
        await world.ask("config", ReloadConfig())
        await settle(world, "service/ssh")
        assert machine.starts[-1] == "service/ssh localhost:2222"
        before = list(machine.starts)
        assert (await world.ask("config", ReloadConfig())).changes == ()
        await trio.sleep(200)
        assert machine.starts == before

    machine.run(scenario)


def test_the_keeper_of_reservations_runs_while_there_are_relays(machine):
    relay = Multiaddr(f"/ip4/192.0.2.1/tcp/4001/p2p/{NAS}")

    async def scenario(world):
        await settle(world, "service/ssh")
        with edit_config(machine.path) as editor:
            editor.add_relays([relay])
        reloaded = await world.ask("config", ReloadConfig())
        assert reloaded.changes == ("relay.addresses changed",)  # and nothing about the next start
        assert (await world.ask("config", SubscribeConfig())).relays == (relay,)
        await settle(world, "relay/keeper", "service/ssh")
        world.kill("config")
        await world.wait_for("config", incarnation=2)
        await trio.sleep(100)
        assert world.incarnation("relay/keeper") == 1
        world.kill("proxies")
        await trio.sleep(0.5)
        await settle(world, "relay/keeper", "service/ssh")
        with edit_config(machine.path) as editor:
            editor.remove_relays(relay)
        await world.ask("config", ReloadConfig())
        await settle(world, "service/ssh")

    machine.run(scenario)


def test_a_proxy_gets_a_port_keeps_it_and_comes_back(machine):
    async def first(world):
        added = await world.ask("config", AddProxy("home", "ssh", "127.0.0.1:0"))
        assert added.created
        assert (added.proxy.actor, added.proxy.peer, added.proxy.listen) == (
            "proxy/home/ssh",
            HOME_ID,
            "127.0.0.1:41001",
        )
        for listen in ("127.0.0.1:0", "127.0.0.1:41001", None):
            again = await world.ask("config", AddProxy("home", "ssh", listen))
            assert (again.created, again.proxy.listen) == (False, "127.0.0.1:41001")
        with refused("already-exists"):
            await world.ask("config", AddProxy("home", "ssh", "127.0.0.1:9"))
        await settle(world, "proxy/home/ssh", "service/ssh")
        assert machine.starts.count("proxy/home/ssh") == 1
        (entry,) = (await world.ask("config", ReadProxies())).proxies
        assert (entry.state, entry.listen) == ("running", "127.0.0.1:41001")

    async def second(world):
        await settle(world, "proxy/home/ssh", "service/ssh")
        (entry,) = (await world.ask("config", ReadProxies())).proxies
        assert entry.listen == "127.0.0.1:41001"

    machine.run(first)
    machine.run(second)


@pytest.mark.parametrize("seed", range(8))
def test_any_loss_is_made_good_and_nothing_else_is_touched(machine, seed):
    async def scenario(world):
        await world.ask("config", AddProxy("home", "ssh", "127.0.0.1:0"))
        await world.ask("config", AddProxy(NAS, "web", None))
        everything = ("proxy/home/ssh", f"proxy/{NAS}/web", "service/ssh")
        await settle(world, *everything)
        starts = list(machine.starts)
        world.kill("config")
        await world.wait_for("config", incarnation=2)
        await trio.sleep(100)
        await settle(world, *everything)
        assert machine.starts == starts  # a new config actor leaves alone what runs
        world.kill("proxies")
        await trio.sleep(0.5)
        await settle(world, *everything)
        assert sorted(machine.starts[len(starts) :]) == sorted([*everything[:2], "service/ssh localhost:22"])
        world.kill("proxies")
        world.kill("config")
        await trio.sleep(0.5)
        await settle(world, *everything)
        (entry,) = [one for one in (await world.ask("config", ReadProxies())).proxies if one.listen]
        assert entry.listen == "127.0.0.1:41001"

    machine.run(scenario, seed)


def test_what_is_wrong_with_a_request_is_refused_and_nothing_is_kept(machine):
    machine.taken.add("127.0.0.1:2222")

    async def scenario(world):
        for peer, service, listen, code in [
            ("nobody", "ssh", "127.0.0.1:0", "unknown-peer"),
            ("home", "SSH", "127.0.0.1:0", "bad-name"),
            ("home", "invite", "127.0.0.1:0", "bad-name"),
            ("home", "ssh", "nonsense", "bad-address"),
            ("home", "ssh", "127.0.0.1:2222", "port-in-use"),
        ]:
            with refused(code):
                await world.ask("config", AddProxy(peer, service, listen))
        with refused("not-found"):
            await world.ask("config", RemoveProxy("proxy/home/ssh"))
        assert (await world.ask("config", ReadProxies())).proxies == ()
        await settle(world, "service/ssh")

    machine.run(scenario)
    assert load_proxies(machine.proxies) == ()


def test_removing_stops_and_forgets(machine):
    async def scenario(world):
        await world.ask("config", AddProxy("home", "ssh", "127.0.0.1:0"))
        await world.ask("config", AddProxy("home", "web", None))
        await world.ask("config", RemoveProxy("proxy/home/ssh"))
        await world.ask("config", RemoveProxy("proxy/home/web"))
        await settle(world, "service/ssh")
        world.kill("proxies")
        await trio.sleep(1)
        await settle(world, "service/ssh")

    machine.run(scenario)
    assert load_proxies(machine.proxies) == ()


def test_a_port_that_is_in_use_at_the_start_is_tried_again(machine):
    async def add(world):
        await world.ask("config", AddProxy("home", "ssh", "127.0.0.1:2222"))

    async def scenario(world):
        await settle(world, "service/ssh")
        (entry,) = (await world.ask("config", ReadProxies())).proxies
        assert entry.state == "failed: 127.0.0.1:2222 is in use"
        await trio.sleep(300)
        assert machine.starts.count("proxy/home/ssh") < 15  # with growing pauses
        machine.taken.clear()
        await settle(world, "proxy/home/ssh", "service/ssh", seconds=61)
        (entry,) = (await world.ask("config", ReadProxies())).proxies
        assert entry.state == "running"

    machine.run(add)
    machine.starts.clear()
    machine.taken.add("127.0.0.1:2222")
    machine.run(scenario)


def test_a_proxy_that_gets_a_listener_later(machine):
    async def scenario(world):
        assert (await world.ask("config", AddProxy("home", "ssh", None))).proxy.listen == ""
        assert load_proxies(machine.proxies) == ()
        added = await world.ask("config", AddProxy("home", "ssh", "127.0.0.1:2222"))
        assert (added.created, added.proxy.listen) == (True, "127.0.0.1:2222")
        assert len((await world.ask("config", ReadProxies())).proxies) == 1

    machine.run(scenario)
    assert [proxy.listen for proxy in load_proxies(machine.proxies)] == ["127.0.0.1:2222"]


def test_a_proxy_follows_its_name(machine):
    async def scenario(world):
        await world.ask("config", AddProxy("home", "ssh", "127.0.0.1:2222"))
        with edit_config(machine.path) as editor:
            editor.add_name("home", NAS_ID, replace=True)
        await world.ask("config", ReloadConfig())
        await trio.sleep(1)
        await settle(world, "proxy/home/ssh", "service/ssh")
        assert world.actor("proxy/home/ssh").arguments[0] == NAS
        assert (await world.ask("config", ReadProxies())).proxies[0].peer == NAS_ID

    machine.run(scenario)
    assert [proxy.peer for proxy in load_proxies(machine.proxies)] == [NAS_ID]


def test_a_full_disk_starts_no_proxy_that_would_be_forgotten(machine, monkeypatch):
    async def scenario(world):
        await world.ask("config", AddProxy("home", "ssh", "127.0.0.1:2222"))

        def full(descriptor, data):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("actors.files.os.write", full)
        with refused("disk-full"):
            await world.ask("config", AddProxy("home", "web", "127.0.0.1:0"))
        with refused("disk-full"):
            await world.ask("config", RemoveProxy("proxy/home/ssh"))
        monkeypatch.undo()
        await settle(world, "proxy/home/ssh", "service/ssh")

    machine.run(scenario)
    assert [proxy.actor for proxy in load_proxies(machine.proxies)] == ["proxy/home/ssh"]


def test_a_broken_file_of_proxies_is_neither_used_nor_overwritten(machine):
    machine.proxies.write_text("proxies: [")
    machine.proxies.chmod(0o600)

    async def scenario(world):
        await settle(world, "service/ssh")
        with refused("bad-proxies-file"):
            await world.ask("config", AddProxy("home", "ssh", "127.0.0.1:0"))
        await settle(world, "service/ssh")

    machine.run(scenario)
    assert machine.proxies.read_text() == "proxies: ["


# Alone on a stage: reading, publishing, resolving


def config(machine, **options):
    return Config(str(machine.path), str(machine.proxies), **options)


async def test_it_publishes_what_changed_and_only_then(machine):
    async with Stage() as stage:
        await stage.start("config", config(machine, watch=False))
        gate = stage.visitor("gate")
        first = await gate.ask("config", SubscribeConfig())
        assert (first.version, first.gating, len(first.services)) == (1, True, 2)
        with edit_config(machine.path) as editor:
            editor.add_name("nas", NAS_ID)
        reloaded = await stage.ask("config", ReloadConfig())
        assert (reloaded.version, reloaded.changes, reloaded.problems) == (2, ("names.nas added",), ())
        (told,) = await gate.wait_until(lambda inbox: [one for one in inbox if isinstance(one, ConfigSnapshot)])
        assert [entry.name for entry in told.names] == ["home", "nas"]
        machine.put(machine.path.read_text() + "log: {level: debug}\n")
        reloaded = await stage.ask("config", ReloadConfig())
        assert reloaded.changes == ("log.level changed (takes effect when the node is started again)",)
        assert reloaded.version == 2


async def test_what_waits_for_the_next_start_of_the_node_is_told_until_it_is_undone(machine):
    before = machine.path.read_text()
    async with Stage() as stage:
        await stage.start("config", config(machine, watch=False))
        assert stage.describe("config")["after_restart"] == []
        machine.put(before + "relay_service: {enabled: true, drain_time: 1m, reservation_ttl: 2h}\n")
        await stage.ask("config", ReloadConfig())
        waiting = ["relay_service.enabled", "relay_service.drain_time"]
        assert stage.describe("config")["after_restart"] == waiting
        await stage.kill("config")  # its end starts nothing else again
        await stage.start("config", config(machine, watch=False))
        assert stage.describe("config")["after_restart"] == waiting
        machine.put(before)
        await stage.ask("config", ReloadConfig())
        assert stage.describe("config")["after_restart"] == []


async def test_a_broken_file_keeps_what_it_does_not_take_away_even_across_a_kill(machine):
    async with Stage() as stage:
        await stage.start("config", config(machine, watch=False))
        good = await stage.ask("config", SubscribeConfig())
        machine.put(CONFIG + "  nas: [\n")
        reloaded = await stage.ask("config", ReloadConfig())
        assert reloaded.version == good.version
        assert len(reloaded.problems) == 1
        assert f"{machine.path}: line 7: column 1: not YAML" in reloaded.problems[0]
        await stage.kill("config")
        await stage.start("config", config(machine, watch=False))
        after = await stage.ask("config", SubscribeConfig())
        assert (after.services, after.names) == (good.services, good.names)
        assert after.version > good.version
        assert stage.describe("config")["problems"]
        machine.put(CONFIG)
        assert (await stage.ask("config", ReloadConfig())).problems == ()
        machine.path.chmod(0o666)  # others may take away, and they have not
        assert "chmod 600" in (await stage.ask("config", ReloadConfig())).problems[0]
        assert (await stage.ask("config", SubscribeConfig())).services == good.services
        machine.path.unlink()
        assert "peerup init" in (await stage.ask("config", ReloadConfig())).problems[0]
        assert not any(service.enabled for service in (await stage.ask("config", SubscribeConfig())).services)
        machine.put(CONFIG)
        assert (await stage.ask("config", ReloadConfig())).problems == ()
        assert (await stage.ask("config", SubscribeConfig())).services == good.services


RELAYS = [f"/ip4/192.0.2.{number}/tcp/4001/p2p/{NAS}" for number in (1, 2)]
GRANTS = f"""\
services:
  ssh: {{enabled: true, local_address: "localhost:22"}}
  web:
    enabled: true
    local_address: "localhost:80"
    allowed_peers:
      - {HOME}
      - {NAS}
relay:
  addresses: ["{RELAYS[0]}", "{RELAYS[1]}"]
security:
  enable_connection_gating: false
relay_service:
  enabled: true
  circuits: {{total: 100}}
"""


def in_force(snapshot):
    return {
        "services": {service.name: service.allowed_peers for service in snapshot.services if service.enabled},
        "relays": [str(relay) for relay in snapshot.relays],
        "gating": snapshot.gating,
        "circuits": snapshot.relay_service.rules.circuits.total,
    }


@pytest.mark.parametrize(
    ("edits", "change"),
    [
        ([("    - x\n", "")], {}),
        ([("  ssh: {enabled: true,", "  ssh: {enabled: false,")], {"services": {"web": (HOME_ID, NAS_ID)}}),
        ([('  ssh: {enabled: true, local_address: "localhost:22"}\n', "")], {"services": {"web": (HOME_ID, NAS_ID)}}),
        ([("localhost:22", "localhost:2222")], {"services": {"web": (HOME_ID, NAS_ID)}}),
        ([("localhost:22", "nonsense")], {"services": {"web": (HOME_ID, NAS_ID)}}),
        ([(f"      - {NAS}\n", "")], {"services": {"ssh": None, "web": (HOME_ID,)}}),
        ([(f"      - {NAS}\n", "      - 12D3KooWslip\n")], {"services": {"ssh": None, "web": (HOME_ID,)}}),
        ([(f"      - {HOME}\n      - {NAS}\n", "")], {"services": {"ssh": None, "web": ()}}),
        ([("    allowed_peers:\n", ""), (f"      - {HOME}\n      - {NAS}\n", "")], {}),
        ([('"localhost:22"}', f'"localhost:22", allowed_peers: ["{NAS}"]}}')],
         {"services": {"ssh": (NAS_ID,), "web": (HOME_ID, NAS_ID)}}),
        ([(f'"{RELAYS[0]}", ', "")], {"relays": RELAYS[1:]}),
        ([("gating: false", "gating: true")], {"gating": True}),
        ([("gating: false", "gating: flase")], {"gating": True}),
        ([("  enable_connection_gating: false\n", "  {}\n")], {"gating": True}),
        ([("total: 100", "total: 10")], {"circuits": 10}),
        ([("total: 100", "total: 1000")], {}),
        ([("  web:\n", "  new: {enabled: true, local_address: 'localhost:1'}\n  web:\n")], {}),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "broken", ["names:\n  home: nonsense\n", "names: [\n", "log: 'unended\n", "names:\n\thome: x\n"]
)
async def test_what_a_broken_file_takes_away_counts_and_what_it_adds_waits(machine, edits, change, broken):
    text = GRANTS
    machine.put(text)
    async with Stage() as stage:
        await stage.start("config", config(machine, watch=False))
        before = in_force(await stage.ask("config", SubscribeConfig()))
        for old, new in edits:
            text = text.replace(old, new)
        machine.put(text + broken)
        assert (await stage.ask("config", ReloadConfig())).problems
        after = in_force(await stage.ask("config", SubscribeConfig()))
        assert after == before | change
        machine.put(GRANTS + broken)  # what was taken away comes back with a whole file alone, not by a restart either
        await stage.ask("config", ReloadConfig())
        await stage.kill("config")
        await stage.start("config", config(machine, watch=False))
        again = in_force(await stage.ask("config", SubscribeConfig()))
        assert {**again, "circuits": 0} == {**after, "circuits": 0}
        machine.put(GRANTS)
        assert (await stage.ask("config", ReloadConfig())).problems == ()
        assert in_force(await stage.ask("config", SubscribeConfig())) == before


async def test_a_file_made_whole_again_by_its_mode_alone_is_taken_over(machine):
    async with Stage() as stage:
        await stage.start("config", config(machine, watch=True))
        subscriber = stage.visitor("switchboard")
        await subscriber.ask("config", SubscribeConfig())
        machine.put(CONFIG.replace("enabled: true", "enabled: false"))
        machine.path.chmod(0o666)
        await subscriber.wait_until(lambda inbox: any(not m.services[0].enabled for m in inbox))
        machine.put(CONFIG)
        await subscriber.wait_until(lambda inbox: inbox[-1].services[0].enabled)
        assert stage.describe("config")["problems"] == []


@pytest.mark.parametrize(
    ("spoil", "code", "text"),
    [
        (lambda path: path.write_text("names: ["), "bad-config", "line 1"),
        (lambda path: path.unlink(), "file-missing", "peerup init"),
        (lambda path: path.chmod(0o666), "bad-permissions", "chmod 600"),
    ],
)
async def test_a_node_does_not_begin_with_a_broken_configuration(machine, spoil, code, text):
    spoil(machine.path)
    async with Stage() as stage:
        with pytest.raises(StartFailedError, match=text) as failure:
            await stage.start("config", config(machine, watch=False))
        assert failure.value.code == code


async def test_names_and_peer_ids_are_resolved(machine):
    async with Stage() as stage:
        await stage.start("config", config(machine, watch=False))
        resolved = await stage.ask("config", Resolve("home"))
        assert (resolved.peer, resolved.source) == (HOME_ID, "config")
        resolved = await stage.ask("config", Resolve(NAS))
        assert (resolved.peer, resolved.source) == (NAS_ID, "peer-id")
        with refused("unknown-peer") as refusal:
            await stage.ask("config", Resolve("nobody"))
        assert "home" in refusal.error.reason
        assert "peerup names add" in refusal.error.action


async def test_the_watch_takes_an_edit_over(machine):
    async with Stage() as stage:
        await stage.start("config", config(machine))
        gate = stage.visitor("gate")
        await gate.ask("config", SubscribeConfig())
        with edit_config(machine.path) as editor:
            editor.add_name("nas", NAS_ID)

        def last_names(inbox):
            return inbox and [entry.name for entry in inbox[-1].names]

        await gate.wait_until(lambda inbox: last_names(inbox) == ["home", "nas"], seconds=20)
        machine.put("names: [")
        machine.put("names: {}\n")
        await gate.wait_until(lambda inbox: last_names(inbox) == [], seconds=20)


async def test_a_full_disk_does_not_keep_a_good_configuration_out(machine, monkeypatch):
    async with Stage() as stage:
        await stage.start("config", config(machine, watch=False))
        machine.put(CONFIG.replace("home", "house"))

        def full(descriptor, data):
            raise OSError(28, os.strerror(28))

        monkeypatch.setattr("actors.files.os.write", full)
        reloaded = await stage.ask("config", ReloadConfig())
        monkeypatch.undo()
        assert reloaded.changes == ("names.home removed", "names.house added")
    assert not list(machine.proxies.parent.glob(".*.tmp"))
