"""Routes about single actors. Names hold slashes, so clients quote them (`proxy%2Fhome%2Fssh`).

GET  /v1/actors              the tree, depth first
GET  /v1/actors/{name}       the actor's status and its own description
POST /v1/actors/{name}/log   {level, seconds?} for the actors that this name or glob means
GET  /v1/deadletters         messages that reached nobody
"""

from __future__ import annotations

import dataclasses

from actors.api.node import ANSWER_DEADLINE, Node
from actors.api.present import plain
from actors.api.routing import Answer, Call, Routes, data_response
from protocol.messages.system import Describe, ReadDeadLetters, SetLogLevel

LONGEST_LOG_CHANGE = 24 * 3600.0
"""Seconds that a changed log level may last; for longer, change the configuration."""

routes = Routes()


@routes.on("GET", "/v1/actors")
async def read_tree(node: Node, call: Call) -> Answer:
    """Every supervisor and actor, depth first."""
    return data_response(plain(await node.tree()))


@routes.on("GET", "/v1/actors/{name}")
async def describe(node: Node, call: Call) -> Answer:
    """One actor: what its supervisor knows, and what it says of itself."""
    (name,) = (await node.matching(call.text("name")))[:1]
    status = next(child for child in await node.tree() if child.name == name)
    description = await node.ask(name, Describe())
    return data_response({"status": plain(status), "description": plain(description.state)})


@routes.on("POST", "/v1/actors/{name}/log")
async def set_log_level(node: Node, call: Call) -> Answer:
    """Change the log level of actors, for a while or for as long as they live."""
    names = await node.matching(call.text("name"))
    level = call.text("level")
    seconds = call.number("seconds", 0.0, low=0.0, high=LONGEST_LOG_CHANGE) or None
    answers, silent = await node.ask_each(names, SetLogLevel(level, seconds))
    if not answers:
        # All the same refusal, most likely a level that does not exist: let the first one speak.
        await node.context.ask(names[0], SetLogLevel(level, seconds), timeout=ANSWER_DEADLINE)
    return data_response({"changed": sorted(answers), "unchanged": silent, "level": level, "seconds": seconds})


@routes.on("GET", "/v1/deadletters")
async def dead_letters(node: Node, call: Call) -> Answer:
    """The last messages of every actor that reached nobody, oldest first."""
    answers, silent = await node.ask_each([child.name for child in await node.tree()], ReadDeadLetters())
    letters = [letter for answer in answers.values() for letter in answer.letters]
    letters.sort(key=lambda letter: letter.entry.at)
    dropped = sum(answer.dropped for answer in answers.values())
    shown = [
        {"entry": plain(dataclasses.replace(letter.entry, at=node.wall_time(letter.entry.at))), "reason": letter.reason}
        for letter in letters
    ]
    refused = {name: dict(answer.refused) for name, answer in answers.items() if answer.refused}
    return data_response({"letters": shown, "dropped": dropped, "refused": refused, "silent": silent})
