"""A process of the node itself that says what it should not: to a real node, under a name that the registry has.

It stands for an actor whose process misbehaves, by a defect or because bytes from outside have turned it. It cannot be
told from any other actor by its name, which the transport has verified; so what it may not say must be refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from demo.node import Node
from protocol.messages import Request
from protocol.messages.config import ConfigSnapshot, SubscribeConfig
from protocol.messages.gate import PolicyPublished, SubscribePolicy
from protocol.messages.keyring import SignNoiseStaticKey
from protocol.messages.switchboard import ReadStatus
from protocol.messages.system import ChildSpec, CollectMetrics, ReadDeadLetters, SetLogLevel, StopChild
from supervisor.authority import CODE
from supervisor.errors import AskError
from supervisor.visitor import Visitor
from tests.support.commands import commands
from tests.support.processes import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

NAME = "proxy/gone/bad"
COMMANDS = commands(
    NAME,
    victim="gate",
    sibling="service/web",
    child=ChildSpec("proxy/evil/x", "actors.metrics.actor:Metrics", {"listen": "127.0.0.1:0"}),
)
PROCESSES = ("root", "proxies", "config", "keyring", "gate", "switchboard", "api", "service/web")


def is_whole(node: Node) -> bool:
    """Whether everything runs, its service as well, which is started after the node has said that it is ready."""
    states = {actor["name"]: actor["state"] for actor in node.actors()}
    return "service/web" in states and set(states.values()) == {"running"}


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A running node that takes faults, so that nothing else stands in the way of one."""
    made = Node("n", tmp_path_factory.mktemp("b"))
    made.initialise()
    made.run("service", "add", "web", "127.0.0.1:9")
    made.start("--allow-faults")
    wait_until(lambda: is_whole(made), within=60, what="a whole node")
    yield made
    assert made.stop() == set()


@pytest.fixture
def bad(node: Node) -> Iterator[Visitor]:
    """The misbehaving process."""
    with Visitor(str(node.home / "run"), NAME) as visitor:
        yield visitor


def refused(visitor: Visitor, target: str) -> dict[str, float]:
    """How many messages this process has refused for their sender, by kind."""
    samples = visitor.ask(target, CollectMetrics()).samples
    return {
        sample.labels["kind"]: sample.value for sample in samples if sample.name == "peerup_messages_not_allowed_total"
    }


def state(node: Node) -> list[tuple[Any, ...]]:
    return [(actor["name"], actor["pid"], actor["state"]) for actor in node.actors()]


@pytest.mark.parametrize("target", PROCESSES)
def test_nothing_that_commands_the_runtime_is_taken_from_it(node: Node, bad: Visitor, target: str) -> None:
    before, counted = state(node), refused(bad, target)
    for content in COMMANDS.values():
        if isinstance(content, Request):
            with pytest.raises(AskError) as caught:
                bad.ask(target, content, timeout=5)
            assert caught.value.code == CODE, content
        else:
            bad.tell(target, content)
    after = refused(bad, target)
    assert {kind: value - counted.get(kind, 0) for kind, value in after.items()} == {
        content.KIND: 1.0 for content in COMMANDS.values()
    }
    letters = bad.exchange.dead_letters().letters
    assert [letter.entry.kind for letter in letters] == [content.KIND for content in COMMANDS.values()]
    for letter in letters:
        assert f"not from {NAME}" in letter.reason or "no message that anybody sends" in letter.reason
    assert state(node) == before


def test_it_cannot_pass_for_the_gate_the_configuration_or_the_switchboard(node: Node, bad: Visitor) -> None:
    """What they publish is not taken from it, and the key signs nothing for it."""
    policy = bad.ask("gate", SubscribePolicy()).policy
    snapshot = bad.ask("config", SubscribeConfig())
    bad.tell("switchboard", PolicyPublished(_with(policy, version=policy.version + 1000, gating=False)))
    bad.tell("switchboard", _with(snapshot, names=()))
    bad.tell("gate", _with(snapshot, gating=not snapshot.gating))
    with pytest.raises(AskError):
        bad.ask("keyring", SignNoiseStaticKey(bytes(32)))
    bad.ask("switchboard", ReadStatus())
    described = node.run_json("actors", "get", "switchboard")["description"]
    assert described["policy_version"] == policy.version
    assert bad.ask("gate", SubscribePolicy()).policy.gating == policy.gating
    assert isinstance(snapshot, ConfigSnapshot)


def _with(value: Any, **changes: Any) -> Any:
    return type(value)(**{**{name: getattr(value, name) for name in value.__dataclass_fields__}, **changes})


def test_a_name_that_the_registry_gives_to_another_process_is_refused(node: Node, tmp_path: Path) -> None:
    """Without an entry of its own it is nobody: what it says in the operator's name is not even looked at."""
    before = state(node)
    with Visitor(str(node.home / "run"), NAME) as visitor:
        visitor.exchange.name = "api"
        visitor.exchange._prefix = "api:1:"
        visitor.tell("gate", SetLogLevel("trace", None))
        visitor.tell("root", StopChild("service/web"))
        visitor.exchange.name = NAME
        with contextlib.suppress(AskError):
            visitor.ask("gate", ReadDeadLetters(), timeout=1)
    wait_until(lambda: state(node) == before, within=5, what="nothing has changed")
    log = (node.home.parent / "n.log").read_text()
    assert "TRACE" not in log
