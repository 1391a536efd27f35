"""The control API's actor: a Unix socket, its clients, and what the routes need to know.

It keeps nothing that matters. Its listening socket and the message faults in force are in its checkpoint (for the
latter see :mod:`actors.api.watchers`), so a client that connects while it is being restarted waits for a moment
instead of failing, and only requests that were under way are cut.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from pathlib import Path
from typing import ClassVar

import trio

from actors.api.node import ANSWER_DEADLINE, Launch, Node
from actors.api.routes import ROUTES
from actors.api.routing import http_error
from actors.api.watchers import Watchers
from actors.http import HttpError, HttpLimits, HttpRequest, Response, Upgrade, listen_unix, serve_http
from protocol.errors import PeerupError
from protocol.messages import Data
from protocol.messages.config import ConfigSnapshot, SubscribeConfig
from protocol.messages.system import ActorDown, ActorUp, ChildStatus, Overflow, Tapped
from supervisor.actor import Actor, Checkpoint, handles
from supervisor.errors import AskError

LIMITS = HttpLimits(body_bytes=64 * 1024, connections=64)
"""No request of ours has a body above a few hundred bytes. 64 at a time are far more than one person's commands; who
waits is not counted among them, see `actors.http`."""

PROBE_SECONDS = 2.0
"""How long a socket file that is in the way gets to prove that somebody serves it."""


class SocketInUseError(PeerupError):
    """Another process serves the control socket's path."""

    code: ClassVar[str] = "already-running"


class ApiActor(Actor):
    """Serves the control API.

    Arguments:
        socket_path: where to listen; a left-over socket there is recognised by trying it, and replaced.
        home, version, service_pid, main_pid, started_at, allow_faults: see :class:`actors.api.node.Launch`.
        own_session: whether the processes of the node have a session (setsid(2)) of their own, so that they are told
            from people's by it. They are not served: an actor gone wrong must not give orders here.
    """

    mailbox_limit: ClassVar[int] = 4096
    overflow: ClassVar[Overflow] = Overflow.DROP_NEWEST  # a flood of tapped copies must not become dead letters

    def __init__(
        self,
        *,
        socket_path: str,
        home: str,
        version: str,
        service_pid: int,
        main_pid: int,
        started_at: float,
        allow_faults: bool = False,
        own_session: bool = False,
    ) -> None:
        self._own_session = own_session
        self._path = Path(socket_path)
        self._launch = Launch(home, version, service_pid, main_pid, started_at, allow_faults)
        self._node: Node | None = None
        self._watchers: Watchers | None = None
        self._served = 0

    async def start(self, checkpoint: Checkpoint | None) -> dict[str, Data]:
        """Take over or make the socket, and serve."""
        context = self.context
        listener = _inherited(checkpoint, self._path) or await _listen(self._path)
        self._watchers = Watchers(context, self._tree, (listener.socket.fileno(),))
        self._node = Node(context, self._launch, self._watchers)
        if checkpoint is not None:
            self._watchers.restore(checkpoint.state)
        self._watchers.leave_checkpoint()
        context.watch("config")
        context.nursery.start_soon(self._subscribe)
        context.nursery.start_soon(self._serve, listener)
        return {"socket": str(self._path)}

    async def stop(self, reason: str) -> None:
        """Remove the socket file, so that nobody takes it for a running node."""
        _remove(self._path)

    def describe(self) -> dict[str, Data]:
        """Socket, requests, taps and faults."""
        assert self._watchers is not None
        return {
            "socket": str(self._path),
            "requests": self._served,
            "taps": [rule.id for rule in self._watchers.taps()],
            "faults": [rule.id for rule in self._watchers.faults()],
            "allow_faults": self._launch.allow_faults,
        }

    @handles(Tapped)
    async def tapped(self, message: Tapped) -> None:
        """A copy for a tap's reader."""
        assert self._watchers is not None
        self._watchers.tapped(message)

    @handles(ConfigSnapshot)
    async def configured(self, message: ConfigSnapshot) -> None:
        """The configuration changed; the names in it are shown beside peer ids."""
        if self.context.current_sender == "config":
            self._keep(message)

    @handles(ActorUp)
    async def actor_up(self, message: ActorUp) -> None:
        """An actor is back: it must know taps and faults, and the config actor its subscriber."""
        assert self._watchers is not None
        self._watchers.actor_up(message.name)
        if message.name == "config":
            self.context.nursery.start_soon(self._subscribe)

    @handles(ActorDown)
    async def actor_down(self, message: ActorDown) -> None:
        """Nothing to do: requests to it fail by themselves."""

    async def _subscribe(self) -> None:
        try:
            self._keep(await self.context.ask("config", SubscribeConfig(), timeout=ANSWER_DEADLINE))
        except AskError as error:
            self.context.log.debug("no configuration yet: {}", error)  # the next ActorUp brings it

    def _keep(self, snapshot: ConfigSnapshot) -> None:
        assert self._node is not None
        self._node.config = snapshot

    async def _tree(self) -> tuple[ChildStatus, ...]:
        assert self._node is not None
        return await self._node.tree()

    async def _serve(self, listener: trio.SocketListener) -> None:
        await serve_http(
            [listener],
            self._answer,
            limits=LIMITS,
            allowed_uids=frozenset({os.geteuid()}),
            work_of=ROUTES.work_of,
        )

    async def _answer(self, request: HttpRequest) -> Response | Upgrade:
        assert self._node is not None
        if self._own_session and _is_in_our_session(request):
            raise HttpError(403, "wrong-process", "this socket serves people, not the processes of the node")
        self._served += 1
        route, call = ROUTES.find(request)
        try:
            return await route.handler(self._node, call)
        except PeerupError as error:
            raise http_error(error) from error


def _is_in_our_session(request: HttpRequest) -> bool:
    """Whether the client is a process of this node; a confined one cannot leave its session or make processes."""
    pid = request.credentials.pid if request.credentials is not None else 0
    if pid <= 0:  # of another PID namespace
        return False
    with contextlib.suppress(ProcessLookupError):
        return os.getsid(pid) == os.getsid(0)
    return False


def _inherited(checkpoint: Checkpoint | None, path: Path) -> trio.SocketListener | None:
    """The predecessor's listening socket, if there is one and the path still leads to it."""
    if checkpoint is None or not checkpoint.descriptors:
        return None
    sock = socket.socket(fileno=checkpoint.descriptors[0].detach())
    with contextlib.suppress(OSError):
        # The path leads to this socket if a connection made through it arrives here.
        if path.is_socket() and sock.getsockname() == os.fspath(path):
            sock.setblocking(False)
            return trio.SocketListener(trio.socket.from_stdlib_socket(sock))
    sock.close()
    return None


async def _listen(path: Path) -> trio.SocketListener:
    """Listen at this path, in the place of a socket that nobody serves any more.

    Raises:
        SocketInUseError: somebody serves it, or it is something else than a socket.
    """
    if _is_in_the_way(path):
        if await _is_served(path):
            raise SocketInUseError(f"another node serves {path}; stop it first, or use another --home")
        _remove(path)
    return listen_unix(path)


def _is_in_the_way(path: Path) -> bool:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return False
    if not stat.S_ISSOCK(mode):
        raise SocketInUseError(f"{path} is in the way and is not a socket; remove it")
    return True


def _remove(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        path.unlink()


async def _is_served(path: Path) -> bool:
    """Whether a connection to this socket is accepted."""
    with trio.move_on_after(PROBE_SECONDS), trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            await probe.connect(os.fspath(path))
        except OSError as error:
            return error.errno not in (errno.ECONNREFUSED, errno.ENOENT)
    return True
