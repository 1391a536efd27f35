"""Routes about the node as a whole: its state, its files, its end.

GET  /v1/status          who and how the node is
POST /v1/config/reload   read the configuration again
POST /v1/auth/reload     {peer?}: read authorized_keys again
POST /v1/resolve         {name} -> the peer behind it
POST /v1/shutdown        end the node
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from actors.api.node import ANSWER_DEADLINE, ROOT, Node
from actors.api.present import plain
from actors.api.routing import Answer, Call, Routes, data_response, data_then
from actors.http import Work
from protocol.messages import Data
from protocol.messages.config import ReadProxies, ReloadConfig
from protocol.messages.gate import Reload
from protocol.messages.keyring import ReadIdentity
from protocol.messages.reservations import ReadRelays
from protocol.messages.switchboard import ReadStatus, SwitchboardStatus
from protocol.messages.system import ChildStatus, Describe
from protocol.peer_id import PeerId
from supervisor.confinement import BASE, FULL
from supervisor.errors import AskError, NoSuchActorError

RELOAD_DEADLINE = 10.0
"""Seconds for reading a file again; a slow disk is not a failure."""

IN_FORCE_SECONDS = 8.0
"""Seconds for a change to be in force in each part of the node; it takes milliseconds, or a few seconds where a service
has to be stopped."""

FIRST_LOOK, LAST_LOOK = 0.01, 0.25
"""Seconds between two looks at whether it is."""

KEEPER = "relay/keeper"
"""Who keeps the reservations."""

RELAY_SERVER = "relay/server"
"""Who says what this node grants as a relay; it runs only where the node is one."""

HELD = frozenset(("held", "renewing"))
"""The states in which there is a reservation."""

routes = Routes()


@routes.on("GET", "/v1/status", Work.RESERVED)
async def status(node: Node, call: Call) -> Answer:
    """Who and how the node is.

    Parts that do not answer, and what the node is to do and does not, are named in `problems`, and the rest is told all
    the same; what parts find wrong with their files is in `warnings`.
    """
    problems: list[str] = []
    result: dict[str, Data] = {
        "version": node.launch.version,
        "home": node.launch.home,
        "pid": node.launch.service_pid,
        "main_pid": node.launch.main_pid,
        "uptime": max(0.0, node.context.wall() - node.launch.started_at),
        "allow_faults": node.launch.allow_faults,
        "faults": len(node.watchers.faults()),
    }
    try:
        tree = await node.tree()
        result["actors"] = len(tree)
        result["actors_not_running"] = [child.name for child in tree if child.state != "running"]
        result["restarts"] = sum(child.restarts for child in tree if child.name != ROOT)
        result["confinement"] = _confinement(tree)
    except AskError as error:
        problems.append(f"{ROOT}: {error}")
    await _identity(node, result, problems)
    await _connections(node, result, problems)
    described, silent = await node.ask_each(["gate", "config"], Describe())
    problems.extend(f"{name}: {reason}" for name, reason in silent.items())
    result["gate"] = plain(described["gate"].state) if "gate" in described else {}
    result["warnings"] = [
        f"{name}: {problem}" for name, told in described.items() for problem in told.state.get("problems", [])
    ]
    try:
        proxies = (await node.context.ask("config", ReadProxies(), timeout=ANSWER_DEADLINE)).proxies
        result["proxies"] = plain(proxies)
        problems.extend(
            f"{proxy.actor}: does not accept connections ({proxy.state})"
            for proxy in proxies
            if proxy.state != "running"  # one that serves --stdio alone runs and has no listener
        )
    except AskError as error:
        problems.append(f"config: {error}")
    await _reservations(node, result, problems)
    result["services"] = plain(node.config.services) if node.config is not None else []
    result["problems"] = problems
    return data_response(result)


def _confinement(tree: tuple[ChildStatus, ...]) -> dict[str, Data]:
    """Whether the kernel limits each process to what it needs: `full`, `partial`, or `none`, and where it does not."""
    running = [child for child in tree if child.state == "running"]
    lacking = [child.name for child in running if child.confinement not in (FULL, BASE)]
    state = "full" if not lacking else "none" if not any(child.confinement for child in running) else "partial"
    return {"state": state, "lacking": lacking}


async def _identity(node: Node, result: dict[str, Data], problems: list[str]) -> None:
    result["peer_id"] = None
    try:
        identity = await node.context.ask("keyring", ReadIdentity(), timeout=ANSWER_DEADLINE)
        result["peer_id"] = str(identity.peer_id)
    except AskError as error:
        problems.append(f"keyring: {error}")


async def _reservations(node: Node, result: dict[str, Data], problems: list[str]) -> None:
    """Whether peers can reach this node through its relays; it is not well if they can through none."""
    if node.config is None or not node.config.relays:
        return
    try:
        relays = (await node.ask(KEEPER, ReadRelays())).relays
    except AskError as error:
        problems.append(f"{KEEPER}: {error}")
        return
    held = [relay for relay in relays if relay.state in HELD]
    result["reservations_held"] = len(held)
    if relays and not held:
        for relay in relays:
            why = relay.last_failure or "it is being made"
            problems.append(f"no reservation at the relay {node.name_of(relay.peer) or relay.peer}: {why}")


async def _connections(node: Node, result: dict[str, Data], problems: list[str]) -> None:
    try:
        board: SwitchboardStatus = await node.context.ask("switchboard", ReadStatus(), timeout=ANSWER_DEADLINE)
    except AskError as error:
        problems.append(f"switchboard: {error}")
        return
    result["listen_addresses"] = plain(board.listen_addresses)
    result["connected_peers"] = sum(1 for peer in board.peers if peer.connections)
    result["protocols"] = plain(board.protocols)


@routes.on("POST", "/v1/config/reload", Work.RESERVED)
async def reload_config(node: Node, call: Call) -> Answer:
    """Read the configuration again; with problems, which are told, only what it takes away counts.

    Answers when it is in force in the whole node; `not_in_force` says where it is not after some seconds, and why.
    """
    reloaded = await node.ask("config", ReloadConfig(), timeout=RELOAD_DEADLINE)
    policy: Data = None
    relays: Data = None

    def has_it(state: dict[str, Data]) -> bool:
        return bool(state.get("config_version", 0) >= reloaded.version)

    def gate_has_it(gate: dict[str, Data]) -> bool:
        nonlocal policy
        policy = gate.get("version")
        return has_it(gate)

    def switchboard_has_it(board: dict[str, Data]) -> bool:
        return (board.get("policy_version") or 0) >= (policy or 0) and has_it(board)

    failed: dict[str, Data] = {}

    def all_is_started(config: dict[str, Data]) -> bool:
        nonlocal relays
        children, relays = config.get("children", {}), config.get("relays")
        failed.clear()
        failed.update(children.get("failed", {}))
        return not children.get("pending")

    async def policy_is_in_force() -> list[str]:
        return [
            await _comes_true(node, "gate", gate_has_it),
            await _comes_true(node, "switchboard", switchboard_has_it),
        ]

    async def relays_are_in_force() -> list[str]:
        reasons = [await _comes_true(node, "config", all_is_started)]
        if relays and KEEPER not in failed:
            reasons.append(await _comes_true(node, KEEPER, has_it))
        return reasons

    async def limits_are_in_force() -> list[str]:
        try:
            served = RELAY_SERVER in {child.name for child in await node.tree()}
        except AskError as error:
            return [f"{ROOT}: {error}"]
        return [await _comes_true(node, RELAY_SERVER, has_it)] if served else []

    reasons = await _all(policy_is_in_force, relays_are_in_force, limits_are_in_force)
    told = plain(reloaded) | {"not_in_force": [reason for reason in reasons if reason], "failed": failed}
    return data_response(told)


async def _all(*looks: Callable[[], Awaitable[list[str]]]) -> list[str]:
    """What these find, each beside the others, in their order."""
    found: list[list[str]] = [[] for _ in looks]

    async def look(at: int) -> None:
        found[at] = await looks[at]()

    async with trio.open_nursery() as nursery:
        for at in range(len(looks)):
            nursery.start_soon(look, at)
    return [reason for reasons in found for reason in reasons]


@routes.on("POST", "/v1/auth/reload", Work.RESERVED)
async def reload_authorized_keys(node: Node, call: Call) -> Answer:
    """Read authorized_keys again; with problems, which are told, only what it takes away counts.

    Answers when that is enforced; `not_in_force` says why it is not after some seconds. With `peer`, `allowed` and
    `rule` say whether that peer may connect now, and `relay` whether it is one of this node's relays, which the node
    connects to by itself.
    """
    text = call.optional_text("peer")
    peer = None if text is None else PeerId.from_text(text)
    reload = Reload(peer)
    reloaded = await node.ask("gate", reload, timeout=RELOAD_DEADLINE)
    reason = await _comes_true(
        node, "switchboard", lambda board: (board.get("policy_version") or 0) >= reloaded.version
    )
    relays = {address.peer_id for address in node.config.relays} if node.config is not None else set()
    is_relay = peer is not None and peer in relays
    return data_response(plain(reloaded) | {"not_in_force": [reason] if reason else [], "relay": is_relay})


async def _comes_true(node: Node, name: str, condition: Callable[[dict[str, Data]], bool]) -> str:
    """Wait until what this actor says of itself meets the condition; empty, or why it does not in time."""
    why = "has not taken it over"
    with trio.move_on_after(IN_FORCE_SECONDS):
        pause = FIRST_LOOK
        while True:
            try:
                state = (await node.context.ask(name, Describe(), timeout=ANSWER_DEADLINE)).state
                if condition(state):
                    return ""
            except NoSuchActorError:
                return f"{name}: is not running"
            except AskError as error:
                why = f"does not answer: {error}"
            else:
                why = state.get("problem") or "has not taken it over"
            await trio.sleep(pause)
            pause = min(2 * pause, LAST_LOOK)
    return f"{name}: {why} (within {IN_FORCE_SECONDS:g} seconds)"


@routes.on("POST", "/v1/resolve")
async def resolve(node: Node, call: Call) -> Answer:
    """The peer that a person means by a name."""
    name = call.text("name")
    found = await node.resolve(name)
    return data_response({"name": name, "peer_id": str(found.peer), "source": found.source})


@routes.on("POST", "/v1/shutdown", Work.AT_ONCE)
async def shutdown(node: Node, call: Call) -> Answer:
    """End the node, once the client has been told so."""
    return data_then({"stopping": True, "pid": node.launch.service_pid}, node.end)
