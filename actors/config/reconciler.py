"""Making the children of the supervisor `proxies` agree with what should run.

Theory of operation. What should run is asked for anew each time (`wanted`), what does run is read from the
supervisor, so nothing drifts: a round starts what is missing, stops what is not wanted, and starts anew what was
started with other arguments. A round happens when something changed, when the supervisor has come up, and, with growing
pauses, as long as something could not be started. Rounds and single starts exclude each other
(:meth:`Reconciler.exclusive`).

The arguments that children were started with are remembered across restarts of our own process (`started`),
because the supervisor does not tell them; so a restart of ours touches no running child.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import trio

from actors.config.proxies_file import DesiredProxy
from protocol.messages import Data
from protocol.messages.config import ServiceEntry
from protocol.messages.system import ChildSpec, ReadTree, StartChild, StopChild
from supervisor.actor import Context
from supervisor.errors import ActorRestartingError, AskError, DeadlineExceededError, NoSuchActorError, RefusedError

PROXY_FACTORY = "actors.proxy.client:ProxyClient"
SERVICE_FACTORY = "actors.proxy.service:ServiceServer"

KEEPER = ChildSpec("relay/keeper", "actors.relay.keeper:RelayKeeper", {})
"""The child that keeps reservations at relays. It runs only where there are relays: an idle process takes 7 MB."""

ANSWER_SECONDS = 3.0
"""How long the supervisor may take for an answer from memory."""

GRACE_SECONDS = 2.0
"""What is added to the deadlines that a supervisor sets for its child, so that its own answer arrives."""

FIRST_WAIT = 30.0
"""How long the first round waits for the supervisor to come up; after that it is tried as at any time."""

FIRST_RETRY = 1.0
LAST_RETRY = 60.0
"""Seconds between attempts to start what could not be started: a port in use rarely gets free within a second."""


def proxy_child(proxy: DesiredProxy, limit: int) -> ChildSpec:
    """The child that listens for this proxy (without `listen`: waits for `Attach`), with at most `limit` tunnels."""
    arguments = {
        "peer": str(proxy.peer),
        "peer_name": proxy.peer_name,
        "service": proxy.service,
        "listen": proxy.listen or None,
        "limit": limit,
        **({"only_me": True} if proxy.only_me else {}),
    }
    return ChildSpec(proxy.actor, PROXY_FACTORY, arguments)


def service_child(service: ServiceEntry, limit: int) -> ChildSpec:
    """The child that serves this local service to peers, with at most `limit` tunnels."""
    return ChildSpec(
        f"service/{service.name}", SERVICE_FACTORY, {"name": service.name, "address": service.address, "limit": limit}
    )


class Reconciler:
    """See the module.

    Arguments:
        supervisor: the name of the supervisor whose children these are.
        wanted: every child that should run, by name.
        started: what a predecessor left as :attr:`started`.
        changed: called when :attr:`started` has changed.

    Attributes:
        started: the arguments of the children that were started, by name.
    """

    def __init__(
        self,
        context: Context,
        supervisor: str,
        wanted: Callable[[], dict[str, ChildSpec]],
        started: dict[str, Any],
        changed: Callable[[], None],
    ) -> None:
        self.started = started
        self._context = context
        self._supervisor = supervisor
        self._wanted = wanted
        self._changed = changed
        self._lock = trio.Lock()
        self._wake = trio.Event()
        self._failures: dict[str, str] = {}

    async def run(self) -> None:
        """Reconcile for ever."""
        # At the start of a node the supervisor comes up later than we do; asking it before is a message to nobody.
        with contextlib.suppress(DeadlineExceededError):
            await self._context.wait_for(self._supervisor, timeout=FIRST_WAIT)
        self.wake()
        failed = 0
        while True:
            pause = float("inf")
            if failed:
                pause = min(LAST_RETRY, FIRST_RETRY * 2 ** min(failed - 1, 10)) * self._context.random.uniform(0.75, 1)
            with trio.move_on_after(pause):
                await self._wake.wait()
            self._wake = trio.Event()
            async with self._lock:
                failed = 0 if await self._round() else failed + 1

    def wake(self) -> None:
        """Something that should run has changed."""
        self._wake.set()

    def supervisor_restarted(self) -> None:
        """The supervisor has come (back) up; its children of before are gone."""
        self._forget(*self.started)
        self.wake()

    @contextlib.asynccontextmanager
    async def exclusive(self) -> AsyncIterator[None]:
        """Keep rounds out while the block runs."""
        async with self._lock:
            yield

    def is_started(self, name: str) -> bool:
        """Whether this child was started and nothing says that it is gone. Ask inside :meth:`exclusive`."""
        return name in self.started

    async def start(self, spec: ChildSpec) -> dict[str, Data]:
        """Start a child, in place of one of the same name; what its `start` returned. Inside :meth:`exclusive`.

        Raises:
            RefusedError: it could not be started, with the child's own reason.
        """
        try:
            answer = await self._ask_start(spec)
        except RefusedError as error:
            if error.code != "already-started":
                self._forget(spec.name)
                raise
            # It runs, and nobody remembers with which arguments.
            await self.stop(spec.name)
            answer = await self._ask_start(spec)
        self.adopt(spec)
        return answer

    def adopt(self, spec: ChildSpec) -> None:
        """From now on take the child of this name for one that was started with these arguments."""
        self.started[spec.name] = spec.arguments
        self._failures.pop(spec.name, None)
        self._changed()

    async def stop(self, name: str) -> None:
        """Stop a child; harmless when there is none. Inside :meth:`exclusive`.

        Raises:
            RefusedError: the supervisor did not answer.
        """
        self._forget(name)
        deadline = ChildSpec(name, "", {}).stop_deadline + GRACE_SECONDS
        try:
            await self._context.ask(self._supervisor, StopChild(name), timeout=deadline)
        except NoSuchActorError:
            pass
        except RefusedError as error:
            if error.code != "no-such-child":
                raise
        except AskError as error:
            self.wake()
            raise self._silent(error) from error

    async def states(self) -> dict[str, str]:
        """The state of each child that the supervisor has, or that could not be started; none if it is down."""
        try:
            tree = await self._context.ask(self._supervisor, ReadTree(), timeout=ANSWER_SECONDS)
        except AskError:
            return {}
        failed = {name: f"failed: {reason}" for name, reason in self._failures.items()}
        return failed | {child.name: child.state for child in tree.children}

    def describe(self) -> dict[str, Data]:
        """What was started, what could not be, and what the next round will start or stop."""
        wanted = self._wanted()
        pending = {
            name
            for name in wanted.keys() | self.started.keys()
            if name not in self._failures
            and not (name in wanted and name in self.started and _same(self.started[name], wanted[name].arguments))
        }
        return {"started": sorted(self.started), "failed": dict(self._failures), "pending": sorted(pending)}

    async def _round(self) -> bool:
        """One round; whether all is as it should be (or will be made so when the supervisor comes up)."""
        try:
            tree = await self._context.ask(self._supervisor, ReadTree(), timeout=ANSWER_SECONDS)
        except (NoSuchActorError, ActorRestartingError):
            return True  # ActorUp wakes us
        except AskError as error:
            self._context.log.warning("cannot see the proxies that run: {}", error)
            return False
        wanted = self._wanted()
        present = {child.name for child in tree.children if child.name != self._supervisor}
        self._forget(*(self.started.keys() - present))
        self._failures = {name: reason for name, reason in self._failures.items() if name in wanted}
        fine = True
        for name in sorted(present):
            if name not in wanted or not _same(self.started.get(name), wanted[name].arguments):
                fine &= await self._try(name, self.stop(name))
                present.discard(name)
        for name, spec in wanted.items():
            if name not in present:
                fine &= await self._try(name, self.start(spec))
        return fine

    async def _try(self, name: str, doing: Any) -> bool:
        try:
            await doing
        except RefusedError as error:
            if self._failures.get(name) != str(error):
                self._context.log.warning("{}: {}", name, error)
            self._failures[name] = str(error)
            return False
        return True

    async def _ask_start(self, spec: ChildSpec) -> dict[str, Data]:
        deadline = spec.start_deadline + spec.stop_deadline + GRACE_SECONDS
        try:
            answer = await self._context.ask(self._supervisor, StartChild(spec), timeout=deadline)
        except RefusedError:
            raise
        except AskError as error:
            self.wake()  # whether it was started is unknown; the next round sees
            raise self._silent(error) from error
        return answer.ready

    def _silent(self, error: AskError) -> RefusedError:
        return RefusedError(error.code, f"the supervisor of proxies did not answer: {error}", "try again")

    def _forget(self, *names: str) -> None:
        known = [name for name in names if name in self.started]
        for name in known:
            del self.started[name]
        if known:
            self._changed()


def _same(started: dict[str, Any] | None, wanted: dict[str, Any]) -> bool:
    """Whether a child that was started with these arguments (None: unknown) is what is wanted.

    A changed limit alone is not worth the tunnels that a new start would cut.
    """
    return started is None or {**started, "limit": 0} == {**wanted, "limit": 0}
