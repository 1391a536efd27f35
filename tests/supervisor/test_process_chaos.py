"""A seeded storm of ends: whatever is killed, stopped or crashed, alone or together, the tree is whole again."""

from __future__ import annotations

import contextlib
import os
import random
import signal

import pytest

from protocol.messages.system import ChildSpec, ReadTree, Strategy
from supervisor.errors import AskError
from supervisor.overseer import FACTORY, supervisor_arguments
from tests.supervisor.process_harness import ToyService, run_directory, spec, toy
from tests.support.processes import descriptors, tree, wait_until

ACTORS = ("a", "b", "c", "d", "e")
SUPERVISORS = ("below", "beside")
PROCESSES = 3 + len(ACTORS) + len(SUPERVISORS)
"""With main, admin and root."""

BLOWS = 25
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP, signal.SIGSEGV, signal.SIGTERM)


def below(strategy: Strategy, *names: str) -> dict[str, object]:
    return supervisor_arguments(spec(*(toy(name) for name in names), strategy=strategy, intensity=1000))


def whole(service: ToyService) -> bool:
    """Every actor answers, and there is not one process too many or too few, zombies included."""
    try:
        return (
            all(service.echo(name, timeout=1.0).pid for name in ACTORS)
            and {child.name for child in service.visitor.ask("root", ReadTree(), timeout=3.0).children}
            == {"root", *ACTORS, *SUPERVISORS}
            and len(tree(service.pid)) == PROCESSES
        )
    except AskError:
        service.leave()  # the run directory may be made anew: come in again
        return False


@pytest.mark.chaos
@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("seed", [1, 2])
def test_the_tree_is_whole_after_every_blow(seed: int) -> None:
    source = random.Random(seed)
    root = spec(
        toy("a"),
        ChildSpec("below", FACTORY, below(Strategy.ONE_FOR_ALL, "b", "c"), heartbeat=0.5, heartbeat_deadline=1.0),
        ChildSpec("beside", FACTORY, below(Strategy.REST_FOR_ONE, "d"), heartbeat=0.5, heartbeat_deadline=1.0),
        toy("e", port=0),
        intensity=1000,
    )
    with run_directory() as path, ToyService(path, root) as service:
        wait_until(lambda: whole(service), within=10, what="whole at first")
        main_open = len(descriptors(service.pid))
        for _ in range(BLOWS):
            victims = [process for process in tree(service.pid)[1:] if process.name not in ("admin", "root")]
            blows = [(victim.name, victim.pid, source.choice(SIGNALS)) for victim in source.sample(victims, 2)]
            for _, pid, number in blows[: source.randint(1, 2)]:
                with contextlib.suppress(ProcessLookupError):  # it went with its supervisor, the first victim
                    os.kill(pid, number)
            wait_until(lambda: whole(service), within=15, what=f"whole again after {blows}")
        assert service.lines.count("ready") == 1  # it never came to the last resort
        assert len(descriptors(service.pid)) == main_open
        for name, number in (("root", signal.SIGKILL), ("admin", signal.SIGKILL)):
            victim = next(process.pid for process in tree(service.pid) if process.name == name)
            os.kill(victim, number)
            service.leave()
            wait_until(lambda: whole(service), within=15, what=f"whole again after the end of {name}")
        assert len(descriptors(service.pid)) == main_open
