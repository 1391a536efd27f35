"""Routes that break things on purpose; all are refused unless the node runs with `--allow-faults`.

POST   /v1/actors/{name}/fault   {fault: kill | stop | hang}
GET    /v1/faults                the message faults, and in which actors each is in force
POST   /v1/faults                {action, from?, to?, kind?, probability?, nth?, seed?, seconds?, delay?}
DELETE /v1/faults[/{id}]         end all, or one
"""

from __future__ import annotations

import trio

from actors.api.node import ROOT, SERVICE, Node
from actors.api.present import plain
from actors.api.routing import Answer, Call, Routes, data_response, data_then
from protocol.messages import Data
from protocol.messages.codec import kinds
from protocol.messages.system import (
    EdgeFilter,
    FaultAction,
    FaultRule,
    FaultsInForce,
    InjectProcessFault,
    ProcessFault,
    ReadFaults,
)
from supervisor.edges import EXEMPT, matches_text
from supervisor.errors import AskError, RefusedError

LONGEST_FAULT = 3600.0
"""Seconds that a message fault may last: whoever forgets one should not wonder for days."""

FAULT_DEADLINE = 5.0
"""Seconds for a supervisor to do a process fault."""

CLEAR_DEADLINE = 4.0
"""Seconds for all actors to end a fault."""

CLEAR_PAUSE = 0.1
"""Seconds between looks at them meanwhile."""

routes = Routes()


def _demand_permission(node: Node) -> None:
    if not node.launch.allow_faults:
        raise RefusedError(
            "faults-not-allowed",
            "this node does not take faults",
            "start it with `peerup daemon --allow-faults` to break it on purpose",
        )


@routes.on("POST", "/v1/actors/{name}/fault")
async def process_fault(node: Node, call: Call) -> Answer:
    """Kill, stop or hang the process of an actor."""
    _demand_permission(node)
    word = call.text("fault")
    try:
        fault = ProcessFault(word)
    except ValueError:
        raise RefusedError("bad-request", f"{word!r} is no process fault", "use kill, stop or hang") from None
    name = call.text("name")
    child = next((child for child in await node.tree() if child.name == name), None)
    if child is None:
        await node.matching(name)  # explains what there is
        raise RefusedError("bad-request", "a process fault hits one actor, so it takes a name and no pattern")
    result = {"name": name, "fault": fault.value, "pid": child.pid}
    request = InjectProcessFault(name, fault)
    if name in (node.context.name, ROOT):

        async def act() -> None:
            try:
                await node.context.ask(SERVICE if name == ROOT else ROOT, request, timeout=FAULT_DEADLINE)
            except AskError as error:
                node.context.log.warning("the {} of {} failed: {}", fault.value, name, error)

        return data_then(result, act)
    await node.context.ask(ROOT, request, timeout=FAULT_DEADLINE)
    return data_response(result)


@routes.on("GET", "/v1/faults")
async def list_faults(node: Node, call: Call) -> Answer:
    """The message faults in force."""
    rules = {rule.id: rule for rule in node.watchers.faults()}
    answers, silent = await _in_force(node)
    actors: dict[str, list[str]] = {ident: [] for ident in rules}
    for name, answer in answers.items():
        for rule in answer.faults:
            rules.setdefault(rule.id, rule)  # one that was to end, and goes on there
            actors.setdefault(rule.id, []).append(name)
    return data_response(
        [
            _present(node, rule)
            | {"actors": sorted(actors[ident]), "missing": sorted(set(answers) - set(actors[ident])), "silent": silent}
            for ident, rule in rules.items()
        ]
    )


@routes.on("POST", "/v1/faults")
async def add_fault(node: Node, call: Call) -> Answer:
    """Put a message fault in force."""
    _demand_permission(node)
    word = call.text("action")
    try:
        action = FaultAction(word)
    except ValueError:
        known = ", ".join(action.value for action in FaultAction)
        raise RefusedError("bad-request", f"{word!r} is no message fault", f"use one of {known}") from None
    _demand_effect(call.optional_text("kind"))
    match = EdgeFilter(call.optional_text("from"), call.optional_text("to"), call.optional_text("kind"))
    if match == EdgeFilter():
        raise RefusedError("bad-request", "this would hit every message", "give --from, --to or --kind ('*' for all)")
    nth = call.whole("nth", 0, low=0, high=2**31)
    rule = await node.watchers.add_fault(
        match,
        action,
        probability=call.number("probability", 1.0, low=0.0, high=1.0),
        nth=nth or None,
        seed=call.whole("seed", node.context.random.getrandbits(31), low=0, high=2**53),
        seconds=call.number("seconds", 30.0, low=0.1, high=LONGEST_FAULT),
        delay=call.number("delay", 0.1, low=0.0, high=60.0),
    )
    return data_response(_present(node, rule))


def _demand_effect(pattern: str | None) -> None:
    """Refuse a fault of kinds that no fault touches."""
    if pattern is None:
        return
    matching = {kind for kind in kinds() if matches_text(pattern, kind)}
    if not matching:
        raise RefusedError("bad-request", f"no message is of a kind like {pattern!r}", "`peerup tap` shows kinds")
    if matching <= EXEMPT:
        raise RefusedError(
            "bad-request",
            f"no fault touches {', '.join(sorted(matching))}: faults are listed and ended by these",
            "choose another kind",
        )


@routes.on("DELETE", "/v1/faults")
async def clear_faults(node: Node, call: Call) -> Answer:
    """End all message faults."""
    return await _clear(node)


@routes.on("DELETE", "/v1/faults/{id}")
async def clear_fault(node: Node, call: Call) -> Answer:
    """End one message fault."""
    return await _clear(node, call.text("id"))


async def _clear(node: Node, ident: str | None = None) -> Answer:
    """End faults, and find out that the actors have done so."""
    cleared = await node.watchers.clear_faults(ident)
    remaining: dict[str, str] = {}
    with trio.move_on_after(CLEAR_DEADLINE):
        while True:
            answers, remaining = await _in_force(node)
            for name, answer in answers.items():
                if left := [rule.id for rule in answer.faults if ident is None or rule.id == ident]:
                    remaining[name] = f"still applies {', '.join(left)}"
            if not remaining:
                break
            await trio.sleep(CLEAR_PAUSE)
    node.watchers.leave_checkpoint()
    return data_response({"cleared": len(cleared), "remaining": remaining})


async def _in_force(node: Node) -> tuple[dict[str, FaultsInForce], dict[str, str]]:
    """What each actor that has a process now says, and for those that say nothing the reason."""
    return await node.ask_each([child.name for child in await node.tree() if child.pid is not None], ReadFaults())


def _present(node: Node, rule: FaultRule) -> dict[str, Data]:
    return {
        "id": rule.id,
        "action": rule.action.value,
        "from": rule.match.sender,
        "to": rule.match.target,
        "kind": rule.match.kind,
        "probability": rule.probability,
        "nth": rule.nth,
        "seed": rule.seed,
        "delay": rule.delay,
        "seconds_left": plain(round(max(0.0, rule.until - node.context.now()), 3)),
    }
