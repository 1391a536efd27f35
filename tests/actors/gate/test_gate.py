"""The gate: what policy is published when, out of which file and configuration, and what is counted and written."""

import hashlib
import json
import os
import shutil

import msgpack
import pytest
import trio

import actors.gate.actor
from actors.files import BusyError
from actors.gate.actor import CHECKPOINT_BYTES, LOOK_AGAIN, SUBSCRIBE_SECONDS, Gate
from protocol.authorized_keys import MAX_FILE
from protocol.keys import PrivateKey
from protocol.messages.config import ConfigSnapshot, ServiceEntry, SubscribeConfig
from protocol.messages.gate import (
    Decided,
    PolicyPublished,
    Reload,
    SubscribePolicy,
    TunnelEnded,
)
from protocol.policy import PolicyIndex
from supervisor.actor import Actor, handles
from tests.support.stage import Stage

A, B, C = (PrivateKey.from_seed(bytes([number]) * 32).peer_id for number in range(3))
SSH = "/peerup/ssh/1.0.0"


class FakeConfig(Actor):
    def __init__(self, snapshot):
        self.snapshot = snapshot
        self.subscribers = []

    @handles(SubscribeConfig)
    async def subscribe(self, request):
        self.subscribers.append(self.context.current_sender)
        return self.snapshot

    def change(self, snapshot):
        self.snapshot = snapshot
        for subscriber in self.subscribers:
            self.context.tell(subscriber, snapshot)


SERVICES = (ServiceEntry("ssh", "localhost:22", True, None),)


def snapshot(version=1, *, gating=True, services=SERVICES):
    return ConfigSnapshot(version, gating, tuple(services), (), ())


@pytest.fixture
def path(tmp_path):
    found = tmp_path / "authorized_keys"
    put(found, f"{A} # laptop\n")
    return found


def put(path, text):
    temporary = path.with_name("new")
    temporary.write_text(text)
    temporary.chmod(0o600)
    temporary.replace(path)


async def stand(stage, path, *, config=None, **options):
    """A gate with a configuration and one subscriber, `switchboard`; the subscriber and the first policy."""
    await stage.start("config", config or FakeConfig(snapshot()))
    await stage.start("gate", Gate(str(path), watch=False, **options))
    switchboard = stage.visitor("switchboard", acknowledges=True)
    published = await switchboard.ask("gate", SubscribePolicy())
    return switchboard, published.policy


def policies(inbox):
    return [message.policy for message in inbox if isinstance(message, PolicyPublished)]


def after(version):
    """For `wait_until`: the first policy after this version."""
    return lambda inbox: next((policy for policy in policies(inbox) if policy.version > version), None)


async def test_the_first_policy_has_both_sources(path):
    async with Stage() as stage:
        _, policy = await stand(stage, path)
        index = PolicyIndex(policy)
        assert index.decide_stream(A, SSH, stage.wall()).rule == "authorized_keys:1"
        assert index.decide_connection(B, stage.wall()).rule == "not-listed"
        assert policy.version == 1


async def test_a_reload_publishes_what_changed_and_only_then(path):
    async with Stage() as stage:
        switchboard, policy = await stand(stage, path)
        reloaded = await stage.ask("gate", Reload())
        assert (reloaded.version, reloaded.peers, reloaded.problems) == (1, 1, ())
        put(path, f"{A} # laptop\n{B}\n")
        reloaded = await stage.ask("gate", Reload())
        assert (reloaded.version, reloaded.peers) == (2, 2)
        told = await switchboard.wait_until(after(policy.version))
        assert {rule.peer for rule in told.peers} == {A, B}
        put(path, f"{B}\n")
        await stage.ask("gate", Reload())
        told = await switchboard.wait_until(after(2))
        assert {rule.peer for rule in told.peers} == {B}
        assert len(policies(switchboard.inbox)) == 2


async def test_a_broken_line_holds_back_what_is_new_and_is_told_with_its_number(path):
    async with Stage() as stage:
        switchboard, _ = await stand(stage, path)
        put(path, f"{A}\n{B}\nnonsense here\n# fine\n{C} expires=tomorrow\n")
        reloaded = await stage.ask("gate", Reload(B))
        assert [problem.line for problem in reloaded.problems] == [3, 5]
        assert (reloaded.peers, reloaded.whole, reloaded.waiting) == (1, False, (B,))
        assert (reloaded.allowed, reloaded.rule) == (False, "not-listed")
        assert [rule.peer for rule in (await switchboard.ask("gate", SubscribePolicy())).policy.peers] == [A]
        assert stage.metrics("gate")[("peerup_authorized_keys_problems",)] == 2
        described = stage.describe("gate")
        assert any(text.startswith("line 3: ") for text in described["problems"])
        assert "1 line waiting" in described["problems"][0]
        assert (described["whole"], described["waiting"]) == (False, [str(B)])
        put(path, f"{A}\n{B}\n")
        reloaded = await stage.ask("gate", Reload(B))
        assert (reloaded.problems, reloaded.whole, reloaded.waiting, reloaded.allowed) == ((), True, (), True)
        assert reloaded.file == str(path)
        assert reloaded.digest == hashlib.sha256(path.read_bytes()).hexdigest()
        told = await switchboard.wait_until(after(reloaded.version - 1))
        assert {rule.peer for rule in told.peers} == {A, B}


@pytest.mark.parametrize(
    ("content", "allowed"),
    [
        ("{A}\nbroken\n", {"A"}),
        ("broken\n{B}\n", {"B"}),
        ("{A}\n{B} expires=tomorrow\n", {"A"}),
        ("{A}\n{B} expires=2020-01-01T00:00:00Z\nbroken\n", {"A"}),
        ("{A}\n{B}\n{A} expires=2020-01-01T00:00:00Z\n", {"B"}),
        ("{A}\n{B", {"A"}),
        ("broken\n", set()),
        ("\udcff\n{A}\n", {"A"}),
    ],
)
async def test_what_no_readable_line_allows_any_more_is_refused_at_once(path, content, allowed):
    put(path, f"{A}\n{B}\n")
    async with Stage() as stage:
        switchboard, policy = await stand(stage, path)
        text = content.replace("{A}", str(A)).replace("{B}", str(B)).replace("{B", str(B)[:-7])
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        await stage.ask("gate", Reload())
        index = PolicyIndex(await switchboard.wait_until(after(policy.version)))
        by_name = {"A": A, "B": B}
        assert {
            name for name, peer in by_name.items() if index.decide_connection(peer, stage.wall()).allowed
        } == allowed


async def test_what_a_broken_file_took_away_comes_back_only_with_a_whole_one(path):
    put(path, f"{A}\n{B}\n")
    async with Stage() as stage:
        await stand(stage, path)
        put(path, f"{A}\nbroken\n")
        assert not (await stage.ask("gate", Reload(B))).allowed
        put(path, f"{A}\n{B}\nbroken\n")
        reloaded = await stage.ask("gate", Reload(B))
        assert (reloaded.allowed, reloaded.waiting) == (False, (B,))
        await stage.kill("gate")  # nor by a restart
        await stage.start("gate", Gate(str(path), watch=False))
        assert not (await stage.ask("gate", Reload(B))).allowed
        put(path, f"{A}\n{B}\n")
        assert (await stage.ask("gate", Reload(B))).allowed


@pytest.mark.parametrize("spoil", ["missing", "directory", "pipe", "too-long"])
async def test_a_file_that_cannot_be_read_allows_nobody_any_more(path, spoil):
    async with Stage() as stage:
        switchboard, policy = await stand(stage, path)
        before = path.read_bytes()
        path.unlink()
        if spoil == "directory":
            path.mkdir()
        elif spoil == "pipe":
            os.mkfifo(path)
        elif spoil == "too-long":
            path.write_bytes(before + b"#" * MAX_FILE)
        reloaded = await stage.ask("gate", Reload(A))
        assert [problem.line for problem in reloaded.problems] == [0]
        assert str(path) in reloaded.problems[0].reason
        assert (reloaded.allowed, reloaded.withdrawn, reloaded.whole, reloaded.digest) == (False, 1, False, "")
        assert (await switchboard.wait_until(after(policy.version))).peers == ()


async def test_a_file_that_others_may_write_to_can_only_take_away(path):
    put(path, f"{A}\n{B}\n")
    async with Stage() as stage:
        await stand(stage, path)
        put(path, f"{A}\n{C}\n")
        path.chmod(0o666)
        reloaded = await stage.ask("gate", Reload(A))
        assert reloaded.allowed
        assert "chmod 600" in reloaded.problems[0].reason
        assert not (await stage.ask("gate", Reload(B))).allowed
        assert not (await stage.ask("gate", Reload(C))).allowed
        path.chmod(0o600)
        assert (await stage.ask("gate", Reload(C))).allowed


async def test_with_gating_off_a_broken_file_makes_no_guest_of_an_expired_peer(path):
    put(path, f"{A}\n{B} expires=2020-01-01T00:00:00Z\n")
    async with Stage() as stage:
        await stand(stage, path, config=FakeConfig(snapshot(gating=False)))
        assert not (await stage.ask("gate", Reload(B))).allowed
        path.unlink()
        reloaded = await stage.ask("gate", Reload(B))
        assert (reloaded.allowed, reloaded.rule) == (False, "withdrawn:2")
        assert (await stage.ask("gate", Reload(A))).rule == "gating-off"


async def test_a_machine_short_of_descriptors_is_no_change_of_the_policy(path, monkeypatch, autojump_clock):
    async with Stage() as stage:
        await stand(stage, path)

        def refuse(path):
            raise BusyError("no descriptors; try again")

        with monkeypatch.context() as patched:
            patched.setattr(actors.gate.actor, "inspect_authorized_keys", refuse)
            put(path, f"{B}\n")
            reloaded = await stage.ask("gate", Reload(A))
            assert (reloaded.allowed, reloaded.whole, len(reloaded.problems)) == (True, False, 1)
        await trio.sleep(LOOK_AGAIN + 0.1)
        assert (await stage.ask("gate", SubscribePolicy())).policy.peers[0].peer == B


async def test_at_the_first_start_only_right_lines_count(path):
    put(path, f"{A}\n{B} expires=never\n")
    async with Stage() as stage:
        _, policy = await stand(stage, path)
        assert [rule.peer for rule in policy.peers] == [A]
        put(path, f"{A}\n{C}\nbroken\n")  # from now on additions wait
        await stage.ask("gate", Reload())
        assert [peer.peer for peer in (await stage.ask("gate", SubscribePolicy())).policy.peers] == [A]


async def test_without_a_file_nobody_gets_in(path):
    path.unlink()
    async with Stage() as stage:
        _, policy = await stand(stage, path)
        assert (policy.peers, policy.gating) == ((), True)


async def test_services_and_gating_follow_the_configuration(path):
    config = FakeConfig(snapshot())
    async with Stage() as stage:
        switchboard, policy = await stand(stage, path, config=config)
        assert [rule.service for rule in policy.services] == ["ssh"]
        services = [ServiceEntry("web", "localhost:80", True, (A,)), ServiceEntry("db", "localhost:5432", False, None)]
        config.change(snapshot(2, gating=False, services=services))
        told = await switchboard.wait_until(after(1))
        assert [(rule.service, rule.allowed_peers) for rule in told.services] == [("web", (A,))]
        assert not told.gating
        config.change(snapshot(3, gating=False, services=services))  # nothing that concerns the policy
        assert (await switchboard.ask("gate", SubscribePolicy())).policy.version == 2


async def test_nobody_else_can_pretend_to_be_the_configuration(path):
    async with Stage() as stage:
        switchboard, policy = await stand(stage, path)
        stage.visitor("proxy/x/y").tell("gate", snapshot(9, gating=False))
        assert (await switchboard.ask("gate", SubscribePolicy())).policy == policy


async def test_a_restarted_configuration_is_followed_again_and_the_last_one_stays_meanwhile(path):
    async with Stage() as stage:
        switchboard, policy = await stand(stage, path)
        await stage.kill("config")
        assert (await switchboard.ask("gate", SubscribePolicy())).policy == policy
        await stage.start("config", FakeConfig(snapshot(1, services=())))
        told = await switchboard.wait_until(after(policy.version))
        assert told.services == ()


async def test_a_gate_without_configuration_offers_nothing_until_there_is_one(path):
    async with Stage() as stage:
        await stage.start("gate", Gate(str(path), watch=False))
        switchboard = stage.visitor("switchboard")
        policy = (await switchboard.ask("gate", SubscribePolicy())).policy
        assert (policy.gating, policy.services, len(policy.peers)) == (True, (), 1)
        await stage.start("config", FakeConfig(snapshot()))
        assert len((await switchboard.wait_until(after(policy.version))).services) == 1


async def test_a_configuration_that_was_slow_to_answer_is_asked_for_again(path, autojump_clock):
    class SlowOnce(FakeConfig):
        @handles(SubscribeConfig)
        async def subscribe(self, request):
            if not self.subscribers:
                self.subscribers.append("nobody heard the answer")
                await trio.sleep(SUBSCRIBE_SECONDS + 1)
            return self.snapshot

    async with Stage() as stage:
        switchboard, policy = await stand(stage, path, config=SlowOnce(snapshot()))
        assert policy.services == ()
        assert len((await switchboard.wait_until(after(policy.version))).services) == 1


async def test_versions_grow_across_a_kill(path):
    async with Stage() as stage:
        switchboard, first = await stand(stage, path)
        await stage.kill("gate")
        await stage.start("gate", Gate(str(path), watch=False))
        second = (await switchboard.ask("gate", SubscribePolicy())).policy
        assert second.version > first.version
        assert second.peers == first.peers


async def test_a_successor_keeps_in_force_what_it_cannot_read_anew(path):
    services = [ServiceEntry("ssh", "localhost:22", True, None), ServiceEntry("web", "localhost:80", True, (A, B))]
    async with Stage() as stage:
        put(path, f"{A} expires=2033-01-01T00:00:00Z # laptop\n{B}\n")
        switchboard, first = await stand(stage, path, config=FakeConfig(snapshot(gating=False, services=services)))
        await stage.kill("config")
        put(path, f"broken\n{A} expires=2034-01-01T00:00:00Z\n{C}\n")
        await stage.kill("gate")
        await stage.start("gate", Gate(str(path), watch=False))
        second = (await switchboard.ask("gate", SubscribePolicy())).policy
        assert second.version > first.version
        assert (second.gating, second.services) == (first.gating, first.services)
        assert [(rule.peer, rule.expires) for rule in second.peers] == [(A, first.peers[0].expires)]
        assert stage.describe("gate")["problems"]
        put(path, f"{B}\n")
        assert (await stage.ask("gate", Reload())).peers == 1


async def test_a_large_file_is_remembered_as_well_while_it_is_broken(path):
    peers = [PrivateKey.from_seed(number.to_bytes(32)).peer_id for number in range(CHECKPOINT_BYTES // 64 + 100)]
    put(path, "".join(f"{peer}\n" for peer in peers))
    async with Stage() as stage:
        switchboard, _ = await stand(stage, path)
        lines = "".join(f"{peer}\n" for peer in peers[1:])
        put(path, f"broken\n{lines}")
        await stage.ask("gate", Reload())
        put(path, f"broken\n{lines}{peers[0]}\n")
        await stage.kill("gate")
        await stage.start("gate", Gate(str(path), watch=False))
        told = (await switchboard.ask("gate", SubscribePolicy())).policy
        assert {rule.peer for rule in told.peers} == set(peers[1:])


@pytest.mark.parametrize("count", [CHECKPOINT_BYTES // 64, CHECKPOINT_BYTES // 64 + 1, 1000])
async def test_the_checkpoint_stays_small_however_many_peers_there_are(path, count):
    peers = [PrivateKey.from_seed(number.to_bytes(32)).peer_id for number in range(count)]
    put(path, "".join(f"{peer}\n" for peer in peers))
    async with Stage() as stage:
        switchboard, first = await stand(stage, path)
        assert len(first.peers) == len(peers)
        await stage.kill("gate")
        assert len(msgpack.packb(stage.checkpoints["gate"].state)) < 16 * 1024
        await stage.start("gate", Gate(str(path), watch=False))
        assert (await switchboard.ask("gate", SubscribePolicy())).policy.peers == first.peers


async def test_a_subscriber_that_ended_is_told_nothing_more(path):
    async with Stage() as stage:
        await stand(stage, path)
        stage.dismiss("switchboard")
        put(path, f"{B}\n")
        await stage.ask("gate", Reload())
        told = stage.describe("gate")
        assert (told["subscribers"], told["behind"]) == ([], [])


async def test_expiry_publishes_at_its_moment(path, autojump_clock):
    async with Stage(start_wall=1_800_000_000.0) as stage:
        put(path, f"{A} expires=2027-01-15T08:10:00Z\n{B} expires=2027-01-15T08:00:30.5Z\n{C}\n")
        switchboard, policy = await stand(stage, path)
        assert PolicyIndex(policy).decide_connection(B, stage.wall()).allowed
        told = await switchboard.wait_until(after(1), seconds=60)
        assert stage.wall() == pytest.approx(1_800_000_030.5, abs=0.01)
        assert PolicyIndex(told).decide_connection(B, stage.wall()).rule == "expired:2"
        assert PolicyIndex(told).decide_connection(A, stage.wall()).allowed
        await switchboard.wait_until(after(2), seconds=1000)
        assert stage.wall() == pytest.approx(1_800_000_600, abs=0.01)
        await trio.sleep(50_000)
        assert len(policies(switchboard.inbox)) == 2


async def test_an_expiry_that_is_set_while_running_is_kept(path, autojump_clock):
    async with Stage(start_wall=1_800_000_000.0) as stage:
        switchboard, _ = await stand(stage, path)
        await trio.sleep(100)
        put(path, f"{A} expires=2027-01-15T08:05:00Z\n")
        await stage.ask("gate", Reload())
        told = await switchboard.wait_until(after(2), seconds=1000)
        assert stage.wall() == pytest.approx(1_800_000_300, abs=0.01)
        assert not PolicyIndex(told).decide_connection(A, stage.wall()).allowed


async def test_a_clock_that_is_set_forward_expires_soon(path, autojump_clock):
    async with Stage(start_wall=1_800_000_000.0) as stage:
        put(path, f"{A} expires=2027-01-16T08:00:00Z\n")
        switchboard, _ = await stand(stage, path)
        stage.start_wall += 86_400
        await switchboard.wait_until(after(1), seconds=31)


async def test_decisions_are_counted_by_rule_and_audited(path, tmp_path):
    audit = tmp_path / "audit.jsonl"
    async with Stage() as stage:
        switchboard, _ = await stand(stage, path, audit=str(audit))
        switchboard.tell("gate", Decided(A, "connection", True, "authorized_keys:1", "direct tcp /ip4/1.2.3.4/tcp/5"))
        switchboard.tell("gate", Decided(A, SSH, True, "authorized_keys:1", "direct"))
        switchboard.tell("gate", Decided(None, "connection", False, "not-listed", "direct", 40))
        switchboard.tell("gate", Decided(B, "/peerup/made-up-7/1.0.0", False, "unknown-service", "direct"))
        switchboard.tell("gate", TunnelEnded(A, "ssh", "server", "direct", 10, 2**40, 1.23456, "finished"))
        await switchboard.ask("gate", SubscribePolicy())  # handled behind them
        counted = {
            tuple(value for _, value in labels): count
            for (name, *labels), count in stage.metrics("gate").items()
            if name == "peerup_auth_decisions_total"
        }
        assert counted == {  # decision, rule, subject
            ("allow", "authorized_keys", "connection"): 1,
            ("allow", "authorized_keys", "ssh"): 1,
            ("deny", "not-listed", "connection"): 40,
            ("deny", "unknown-service", "other"): 1,
        }
        written = [json.loads(line) for line in audit.read_text().splitlines()]
        assert [event["event"] for event in written] == ["decision"] * 4 + ["tunnel"]
        assert written[0]["peer"] == str(A)
        assert (written[2]["peer"], written[2]["count"], written[2]["allowed"]) == (None, 40, False)
        assert (written[4]["received"], written[4]["duration"], written[4]["from"]) == (2**40, 1.235, "switchboard")


async def test_an_audit_log_that_cannot_be_written_is_counted_and_harms_nothing(path, tmp_path):
    async with Stage() as stage:
        switchboard, _ = await stand(stage, path, audit=str(tmp_path / "missing" / "audit.jsonl"))
        for _ in range(3):
            switchboard.tell("gate", Decided(A, SSH, True, "authorized_keys:1", "direct"))
        await switchboard.ask("gate", SubscribePolicy())
        assert stage.metrics("gate")[("peerup_audit_events_lost_total",)] == 3
        assert stage.describe("gate")["audit"]["lost"] == 3


async def test_the_watch_sees_every_way_to_change_the_file(path, tmp_path):
    async with Stage() as stage:
        await stage.start("config", FakeConfig(snapshot()))
        await stage.start("gate", Gate(str(path)))
        switchboard = stage.visitor("switchboard")
        await switchboard.ask("gate", SubscribePolicy())

        async def becomes(*peers):
            def seen(inbox):
                return policies(inbox) and {rule.peer for rule in policies(inbox)[-1].peers} == set(peers)

            await switchboard.wait_until(seen, seconds=20)

        put(path, f"{A}\n{B}\n")  # replaced
        await becomes(A, B)
        with path.open("a") as file:  # written to
            file.write(f"{C}\n")
        await becomes(A, B, C)
        path.unlink()  # removed and made anew
        path.write_text(f"{C}\n")
        path.chmod(0o600)
        await becomes(C)
        shutil.rmtree(path.parent)  # the directory goes and comes back
        path.parent.mkdir()
        put(path, f"{A}\n")
        await becomes(A)
        put(path, f"{A}\n{B}\n")
        await becomes(A, B)
        other = tmp_path.with_name(f"{tmp_path.name}-other")  # a link, and then its target changes
        other.mkdir()
        put(other / "real", f"{C}\n")
        path.unlink()
        path.symlink_to(other / "real")
        await becomes(C)
        put(other / "real", f"{B}\n")
        await becomes(B)


async def test_a_flood_of_one_peer_leaves_the_audit_log_to_others(path, tmp_path):
    audit = tmp_path / "audit.jsonl"
    ended = TunnelEnded(
        peer=A, service="ssh", role="server", path="direct", sent=1, received=2, duration=0.1, outcome="finished"
    )
    refused = Decided(peer=B, subject="connection", allowed=False, rule="not-listed", path="direct")
    async with Stage() as stage:
        switchboard, _ = await stand(stage, path, audit=str(audit))
        for _ in range(3000):
            await switchboard.ask("gate", ended)
        for _ in range(700):
            await switchboard.ask("gate", refused)
    lines = [json.loads(line) for line in audit.read_text().splitlines()]
    tunnels = [line for line in lines if line["event"] == "tunnel"]
    assert len(tunnels) < 700
    assert sum(line.get("count", 1) for line in tunnels) == 3000
    assert sum(line["sent"] for line in tunnels) == 3000
    assert sum(line["event"] == "decision" for line in lines) == 700  # what is refused is never added up here
