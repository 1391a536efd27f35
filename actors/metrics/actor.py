"""The actor `metrics`: gathers the counters of all actors over messages and serves them as Prometheus text.

Theory of operation. A scrape (`GET /metrics`) asks the supervisor on top for the tree, then every actor in it, side by
side and with one deadline, for its series. Who does not answer in time is left out and said to be so
(`peerup_actor_scraped 0`); nothing that an actor does can fail a scrape. Each series gets the label `actor`; what the
tree tells (up, restarts, mailbox) and what the kernel tells of each process (CPU time, memory, descriptors) is added.

Between scrapes the actor does nothing. The listening socket is left to a successor, so its port is never lost.
"""

from __future__ import annotations

import ipaddress
import socket
import sys
from importlib import metadata

import trio

from actors.config.schema import parse_listen_address
from actors.http import HttpError, HttpLimits, HttpRequest, Response, serve_http
from actors.metrics.exposition import CONTENT_TYPE, Exposition
from actors.metrics.processes import process_samples
from protocol.errors import PeerupError
from protocol.messages import Data
from protocol.messages.system import ChildStatus, CollectMetrics, ReadTree, Sample
from supervisor.actor import Actor, Checkpoint
from supervisor.errors import AskError

ROOT = "root"

COLLECT_SECONDS = 2.0
"""How long actors get, all together, to tell their series: they do it from memory, and scrapers wait ten seconds."""

AT_ONCE = 64
"""So many actors are asked side by side; a node with thousands of proxies must not flood itself."""

LIMITS = HttpLimits(body_bytes=4096, connections=16)


class ListenError(PeerupError):
    """The address to serve metrics at cannot be used."""

    code = "port-in-use"


class Metrics(Actor):
    """See the module.

    Arguments:
        listen: `host:port`; port 0 takes a free one. Everybody who reaches it can read it: keep it on loopback.
    """

    def __init__(self, listen: str = "127.0.0.1:9091") -> None:
        self._asked_for = listen
        self._listen = ""
        self._scrapes = 0
        self._seconds = 0.0
        self._silent: list[str] = []
        self._left_out: set[str] = set()

    async def start(self, checkpoint: Checkpoint | None) -> dict[str, Data]:
        """Listen."""
        sock = self._inherit(checkpoint) or self._open()
        address = sock.getsockname()
        self._listen = f"[{address[0]}]:{address[1]}" if ":" in address[0] else f"{address[0]}:{address[1]}"
        if not ipaddress.ip_address(address[0]).is_loopback:
            self.context.log.warning("metrics are served at {} to everybody who can reach it", self._listen)
        self.context.checkpoint({"asked_for": self._asked_for}, [sock.fileno()])
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))

        async def serve() -> None:
            await serve_http([listener], self._handle, limits=LIMITS)

        self.context.nursery.start_soon(serve)
        self.context.log.info("metrics at http://{}/metrics", self._listen)
        return {"listen": self._listen}

    def describe(self) -> dict[str, Data]:
        """Where it listens and how the last scrape went."""
        return {
            "listen": self._listen,
            "scrapes": self._scrapes,
            "last_scrape_seconds": self._seconds,
            "silent_actors": self._silent,
        }

    def _inherit(self, checkpoint: Checkpoint | None) -> socket.socket | None:
        if checkpoint is None or len(checkpoint.descriptors) != 1:
            return None
        sock = socket.socket(fileno=checkpoint.descriptors[0].detach())
        if checkpoint.state.get("asked_for") == self._asked_for:
            sock.setblocking(False)
            return sock
        sock.close()
        return None

    def _open(self) -> socket.socket:
        host, port = parse_listen_address(self._asked_for)
        host = {"localhost": "127.0.0.1"}.get(host, host)
        try:
            family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
        except ValueError:
            raise ListenError(
                f"telemetry.metrics.listen_address is {self._asked_for}; its host must be an IP address or localhost"
            ) from None
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((host, port))
            sock.listen(16)
        except OSError as error:
            sock.close()
            raise ListenError(
                f"cannot serve metrics at {self._asked_for}: {error.strerror}; "
                "choose another telemetry.metrics.listen_address"
            ) from error
        return sock

    async def _handle(self, request: HttpRequest) -> Response:
        if not names_this_machine(request.headers.get("host", "")):
            raise HttpError(
                421,
                "wrong-host",
                "the request is for another host: a web page may have led a browser here",
                "ask for this machine by its IP address, as localhost, or by its host name",
            )
        if request.path != "/metrics":
            raise HttpError(404, "not-found", "only /metrics is served here")
        if request.method not in ("GET", "HEAD"):
            raise HttpError(405, "method-not-allowed", "only GET is served here", headers=[("allow", "GET, HEAD")])
        return Response(200, await self.scrape(), CONTENT_TYPE)

    async def scrape(self) -> bytes:
        """Ask everybody, and make the text."""
        began = self.context.now()
        children = await self._tree()
        answers: dict[str, tuple[Sample, ...]] = {}
        limiter = trio.CapacityLimiter(AT_ONCE)

        async def ask(name: str) -> None:
            async with limiter:
                left = began + COLLECT_SECONDS - self.context.now()
                try:
                    answers[name] = (await self.context.ask(name, CollectMetrics(), timeout=max(left, 0.01))).samples
                except AskError as error:
                    self.context.log.debug("{} does not tell its metrics: {}", name, error)

        async with trio.open_nursery() as nursery:
            for child in children:
                nursery.start_soon(ask, child.name)
        self._scrapes += 1
        self._seconds = self.context.now() - began
        self._silent = sorted({child.name for child in children} - answers.keys())
        exposition = Exposition()
        exposition.add("", _node_samples(len(children), self._seconds))
        for child in children:
            exposition.add(child.name, _child_samples(child, answered=child.name in answers))
            if child.pid is not None:
                exposition.add(child.name, process_samples(child.pid))
            exposition.add(child.name, answers.get(child.name, ()))
        for reason in exposition.left_out:
            if reason not in self._left_out:  # once, not at each scrape
                self._left_out.add(reason)
                self.context.log.warning("metrics left out: {}", reason)
        return exposition.render()

    async def _tree(self) -> tuple[ChildStatus, ...]:
        try:
            return (await self.context.ask(ROOT, ReadTree(), timeout=COLLECT_SECONDS)).children
        except AskError as error:
            self.context.log.warning("the tree cannot be read: {}", error)
            return ()


def names_this_machine(host: str) -> bool:
    """Whether this Host header is an IP address, a name without a dot, or what this machine is called.

    Any other name may be one that a web page's owner has pointed here (DNS rebinding), so that the page's scripts may
    read what is answered. Nobody can register a name without a dot.
    """
    name = host.strip().lower()
    name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
    own = socket.gethostname().lower()
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return "." not in name or name in {own, f"{own.partition('.')[0]}.local"}
    return True


def _node_samples(actors: int, seconds: float) -> tuple[Sample, ...]:
    try:
        version = metadata.version("peerup")
    except metadata.PackageNotFoundError:
        version = "unknown"
    python = ".".join(map(str, (sys.version_info.major, sys.version_info.minor)))
    return (
        Sample("peerup_info", "gauge", {"version": version, "python_version": python}, 1),
        Sample("peerup_tree_readable", "gauge", {}, float(actors > 0)),
        Sample("peerup_actors", "gauge", {}, actors),
        Sample("peerup_scrape_seconds", "gauge", {}, seconds),
    )


def _child_samples(child: ChildStatus, *, answered: bool) -> tuple[Sample, ...]:
    return (
        Sample("peerup_actor_up", "gauge", {}, float(child.state == "running")),
        Sample("peerup_actor_scraped", "gauge", {}, float(answered)),
        Sample("peerup_actor_restarts_total", "counter", {}, child.restarts_total),
        Sample("peerup_actor_uptime_seconds", "gauge", {}, child.uptime),
        Sample("peerup_actor_mailbox", "gauge", {}, child.mailbox),
        Sample("peerup_actor_handled_total", "counter", {}, child.handled),
    )
