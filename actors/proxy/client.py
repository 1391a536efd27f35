"""The client side of a tunnel: a local listener whose connections continue as streams to a peer's service.

The actor `proxy/<peer>/<service>`. It owns the listening socket and lends it to the switchboard, which accepts by
itself (decision 9). A connection that cannot be joined with a stream at once comes back here; so does every one while
the switchboard is away. Such a socket is given to the switchboard when there is, or can be, a stream for it. A socket
that is not a TCP socket gets a stream descriptor and a pump here. While the switchboard is being restarted a new
connection waits for it a little; any other failure is the switchboard's verdict, and the client sees a reset. The
listening socket is left with the supervisor, so that the port stays open, and clients wait in its backlog, while this
process is being replaced.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import TypeVar

import trio

from actors.local_user import user_of_caller
from actors.proxy.listening import address_of, inherit, listen, remove_file
from actors.proxy.tunnels import (
    MAX_TUNNELS,
    SWITCHBOARD,
    Tunnels,
    close_with_reset,
    is_tcp,
    is_untouched,
    path_of,
    reset_on_close,
)
from actors.reactor import READ, Reactor
from protocol.messages import Data, Descriptor, Request
from protocol.messages.doors import CallerAccepted, LendListener
from protocol.messages.proxy import Attach
from protocol.messages.switchboard import NeedPeer, OpenAttached, OpenStream, StreamReport
from protocol.messages.system import ActorDown, ActorUp
from protocol.peer_id import PeerId
from protocol.service import service_protocol
from supervisor.actor import Actor, Checkpoint, handles
from supervisor.errors import (
    ActorRestartingError,
    AskError,
    DeadlineExceededError,
    NoSuchActorError,
    RefusedError,
)

R = TypeVar("R")

OPEN_DEADLINE = 30.0
"""Seconds for the switchboard to connect and open a stream; its own deadlines are shorter."""
LEND_DEADLINE = 2.0
"""Seconds for the switchboard to take over accepting; else it is asked again."""
LEND_PAUSE = 2.0
"""Seconds until it is asked again where this process had no descriptor left for that."""
RESTART_PATIENCE = 5.0
"""Seconds that a new connection waits for a switchboard that is being restarted."""
ACCEPT_BATCH = 16
"""Connections accepted in a row before others get a turn."""
PAUSE = 0.2
"""Seconds without accepting when the process has no descriptor left."""


class ProxyClient(Actor):
    """See the module.

    Arguments:
        peer: the peer's id as text.
        peer_name: what the person calls it.
        service: the service's name.
        listen: `host:port` or `unix:/path` to listen on; None: only sockets given by `Attach` are tunnelled.
        limit: concurrent connections; more are refused.
        only_me: serve only connections of the user as whom this process runs, see `actors.local_user`.
    """

    def __init__(
        self,
        peer: str,
        peer_name: str,
        service: str,
        listen: str | None,
        limit: int = MAX_TUNNELS,
        *,
        only_me: bool = False,
    ) -> None:
        self._peer = PeerId.from_text(peer)
        self._peer_name = peer_name
        self._service = service
        self._protocol = service_protocol(service)
        self._listen = listen
        self._limit = limit
        self._only_user = os.geteuid() if only_me else None
        self._listener: socket.socket | None = None
        self._lease: int | None = None  # the writing end of a pipe; while it is open, the switchboard accepts

    async def start(self, checkpoint: Checkpoint | None) -> dict[str, Data]:
        """Listen."""
        context = self.context
        self._reactor = Reactor(context.now)
        self._tunnels = Tunnels(context, self._reactor, self._service, "client", limit=self._limit)
        context.nursery.start_soon(self._reactor.run)
        address = ""
        if self._listen is not None:
            listener = inherit(checkpoint, self._listen) or listen(self._listen)
            self._listener = listener
            address = address_of(listener)
            context.checkpoint({"wanted": self._listen, "listen": address}, [listener.fileno()])
            self._reactor.register(listener.fileno(), READ, self._accept, self._accept_failed)
        context.watch(SWITCHBOARD)
        await self._tunnels.adopt()
        context.tell(SWITCHBOARD, NeedPeer(self._peer))
        await self._lend()
        return {"listen": address}

    async def stop(self, reason: str) -> None:
        """Reset what runs and close the port."""
        self._end_lease()
        if self._listener is not None:
            self._reactor.unregister(self._listener.fileno())
            remove_file(self._listener)
            self._listener.close()
        await self._tunnels.close()

    def describe(self) -> dict[str, Data]:
        """Where it listens, where it leads, what runs."""
        return {
            "peer": str(self._peer),
            "peer_name": self._peer_name,
            "service": self._service,
            "listen": address_of(self._listener) if self._listener is not None else "",
            "only_user": self._only_user,
            "accepted_by": self.context.name if self._lease is None else SWITCHBOARD,
            **self._tunnels.describe(),
        }

    @handles(Attach, concurrent=True)
    async def attach(self, request: Attach) -> None:
        """Tunnel a socket that somebody else has connected."""
        fd = request.socket.detach()
        try:
            local = socket.socket(fileno=fd)
        except OSError:
            os.close(fd)
            raise RefusedError("not-a-socket", "the descriptor is not a connected socket") from None
        if not self._tunnels.reserve():
            local.close()
            raise RefusedError("limit-exceeded", f"{self._limit} connections are open, the limit")
        reset_on_close(local)
        try:
            await self._carry(local, request.outcome, confirm=request.confirm)
        except AskError as error:
            self._tunnels.failed(self._peer, "", self._words(error), error.code)
            local.close()
            raise error if isinstance(error, RefusedError) else RefusedError(error.code, str(error)) from error
        except OSError as error:
            self._tunnels.failed(self._peer, "", self._words(error), "local-failure")
            local.close()
            raise RefusedError("local-failure", str(error)) from error

    @handles(CallerAccepted)
    async def caller_accepted(self, message: CallerAccepted) -> None:
        """A client that the switchboard could not serve at once."""
        if self.context.current_sender == SWITCHBOARD:
            self._welcome(socket.socket(fileno=message.socket.detach()))

    @handles(ActorUp)
    async def actor_up(self, message: ActorUp) -> None:
        """A new switchboard does not know that we need the peer, nor where to accept for us."""
        self._tunnels.switchboard_back(message.incarnation)
        self.context.tell(SWITCHBOARD, NeedPeer(self._peer))
        await self._lend()

    @handles(ActorDown)
    async def actor_down(self, message: ActorDown) -> None:
        """Attached streams ended with it, and nobody accepts."""
        self._end_lease()
        self._tunnels.switchboard_lost()

    @handles(StreamReport)
    async def stream_report(self, report: StreamReport) -> None:
        """What attached streams carried, and how they ended."""
        if self.context.current_sender != SWITCHBOARD:
            raise RefusedError("not-allowed", "only the switchboard tells of streams")
        self._tunnels.reported(report)

    # ---- connections

    def _accept(self, _: int) -> None:
        listener = self._listener
        assert listener is not None
        for _ in range(ACCEPT_BATCH):
            try:
                local, _address = listener.accept()
            except BlockingIOError:
                return
            if self._only_user is not None and is_tcp(local) and user_of_caller(local) != self._only_user:
                close_with_reset(local)
                self._tunnels.refused("a connection of another user of this machine", "wrong-user")
                continue
            self._welcome(local)

    def _welcome(self, local: socket.socket) -> None:
        if self._tunnels.reserve():
            self.context.nursery.start_soon(self._serve, local)
        else:
            close_with_reset(local)
            self._tunnels.refused(f"{self._limit} connections are open, the limit", "limit-exceeded")

    def _accept_failed(self, error: Exception) -> None:
        # Out of descriptors, or the caller was gone before it was accepted. Level-triggered: pause, or this loop spins.
        listener = self._listener
        assert listener is not None
        self._tunnels.refused(f"cannot accept connections: {error}", "cannot-accept")
        self._reactor.modify(listener.fileno(), 0)
        self._reactor.call_later(PAUSE, self._accept_again)

    def _accept_again(self) -> None:
        if self._listener is not None and self._listener.fileno() >= 0 and self._lease is None:
            self._reactor.modify(self._listener.fileno(), READ)

    async def _lend(self) -> None:
        """Let the switchboard accept. If it is not there, its start brings another try."""
        listener = self._listener
        if listener is None or listener.fileno() < 0 or listener.family == socket.AF_UNIX:  # it takes TCP sockets only
            return
        try:
            request, writing = self._offer(listener)
        except OSError as error:  # no descriptor is left; connections are accepted here meanwhile
            self.context.log.debug("accepting here: {}", error.strerror)
            self.context.nursery.start_soon(self._lend_later)
            return
        try:
            await self.context.ask(SWITCHBOARD, request, timeout=LEND_DEADLINE)
        except AskError as error:
            os.close(writing)  # should it hear of it later, the door closes at once
            self.context.log.debug("accepting here: {}", error)
            if isinstance(error, DeadlineExceededError):  # it is there, so no ActorUp will come
                self.context.nursery.start_soon(self._lend)
            return
        except BaseException:
            os.close(writing)
            raise
        if listener.fileno() < 0:  # stopped meanwhile
            os.close(writing)
            return
        self._end_lease()
        self._lease = writing
        self._reactor.modify(listener.fileno(), 0)

    def _offer(self, listener: socket.socket) -> tuple[LendListener, int]:
        """What asks the switchboard to accept, and the descriptor that ends that when it is closed.

        Raises:
            OSError: no descriptor is left.
        """
        copy = Descriptor(os.dup(listener.fileno()))
        try:
            reading, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            copy.close()
            raise
        lent = LendListener(copy, Descriptor(reading), self._peer, self._protocol, self._limit, self._only_user)
        return lent, writing

    async def _lend_later(self) -> None:
        """Try again after a while, unless that has become needless."""
        await trio.sleep(LEND_PAUSE)
        if self._lease is None:
            await self._lend()

    def _end_lease(self) -> None:
        """Accept here again."""
        if self._lease is not None:
            os.close(self._lease)
            self._lease = None
            self._accept_again()

    async def _serve(self, local: socket.socket) -> None:
        try:
            await self._carry(local)
        except AskError as error:
            self._tunnels.failed(self._peer, "", self._words(error), error.code)
            close_with_reset(local)
        except OSError as error:  # no descriptor is left
            self._tunnels.failed(self._peer, "", self._words(error), "local-failure")
            close_with_reset(local)
        except BaseException:
            close_with_reset(local)
            raise

    async def _carry(self, local: socket.socket, outcome: Descriptor | None = None, *, confirm: bool = False) -> None:
        """Have the socket, which is taken over if this succeeds, joined with a stream."""
        if not is_tcp(local):
            opened = await self._ask(lambda: OpenStream(self._peer, (self._protocol,), confirm))
            stream = socket.socket(fileno=opened.stream.detach())
            self._tunnels.run(local, stream, self._peer, path_of(opened.connection), outcome, confirm=confirm)
            return
        attached = await self._ask(
            lambda: OpenAttached(self._peer, (self._protocol,), Descriptor(os.dup(local.fileno()))),
            # a switchboard that was killed with the request may have carried bytes already
            again=lambda: is_untouched(local),
        )
        local.close()
        self._tunnels.attached(attached.stream_id, self._peer, attached.path)

    async def _ask(self, request: Callable[[], Request[R]], again: Callable[[], bool] = lambda: True) -> R:
        """Ask the switchboard, again after its restart if it was away and `again` allows it."""
        context = self.context
        patience = context.now() + RESTART_PATIENCE
        while True:
            try:
                return await context.ask(SWITCHBOARD, request(), timeout=OPEN_DEADLINE)
            except (ActorRestartingError, NoSuchActorError) as error:
                left = patience - context.now()
                if left <= 0 or not again():
                    raise
                try:
                    await context.wait_for(SWITCHBOARD, timeout=left)
                except DeadlineExceededError:
                    raise error from None

    def _words(self, error: Exception) -> str:
        return f"no stream to {self._service} at {self._peer_name}: {error}"
