"""Routes that break things on purpose; all are refused unless the node runs with `--allow-faults`.

POST   /v1/actors/{name}/fault   {fault: kill | stop | hang}
GET    /v1/faults                the message faults in force
POST   /v1/faults                {action, from?, to?, kind?, probability?, nth?, seed?, seconds?, delay?}
DELETE /v1/faults[/{id}]         end all, or one
"""

from __future__ import annotations

from actors.api.node import ROOT, SERVICE, Node
from actors.api.present import plain
from actors.api.routing import Answer, Call, Routes, data_response, data_then
from protocol.messages import Data
from protocol.messages.system import EdgeFilter, FaultAction, FaultRule, InjectProcessFault, ProcessFault
from supervisor.errors import AskError, RefusedError

LONGEST_FAULT = 3600.0
"""Seconds that a message fault may last: whoever forgets one should not wonder for days."""

FAULT_DEADLINE = 5.0
"""Seconds for a supervisor to do a process fault."""

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
    return data_response([_present(node, rule) for rule in node.watchers.faults()])


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


@routes.on("DELETE", "/v1/faults")
async def clear_faults(node: Node, call: Call) -> Answer:
    """End all message faults."""
    return data_response({"cleared": await node.watchers.clear_faults()})


@routes.on("DELETE", "/v1/faults/{id}")
async def clear_fault(node: Node, call: Call) -> Answer:
    """End one message fault."""
    return data_response({"cleared": await node.watchers.clear_faults(call.text("id"))})


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
