"""Envelopes between processes over Unix `SOCK_SEQPACKET` sockets. Implements :class:`supervisor.port.Port`.

Theory of operation. Each process listens on `sockets/<pid>` of the run directory. The first message to a process opens
a link, which both sides then use for both directions, so there is one link for each pair of processes that talk. A
frame is one packet: a type byte and a body.

====  ==================================================================
`E`   an envelope; descriptors ride along by `SCM_RIGHTS`
`M`   an envelope whose body is in sealed memory, which is the first descriptor
`T`   a control frame of the actor system (:mod:`supervisor.control`)
====  ==================================================================

Nobody can speak for another: the kernel tells the pid and uid behind a link (`SO_PEERCRED`), the uid must be ours, and
the sender named in an envelope must be the name whose registry entry has that pid. The first envelope binds the
name to the link. A connecting side checks the listener in the same way. (The registry itself can be written by every
process of this user: this is no wall against one of them that an attacker has taken over.) Frames that break a rule are
counted in `refusals` and dropped; they never end a process.

Sending never blocks. What the kernel does not take is queued for its link, within bounds, and sent when the socket
is writable again, so one stuck process delays only messages to itself. A link breaks when the process behind it
ends: what it had sent is read first, then queued messages are reported undelivered and the receiver is told that
the name is down. The end of a link is believed to be the end of the process only if the kernel or the registry says so
too; otherwise the receiver is told that what was on its way is lost, and the next message opens another link.

A process that has no descriptor left takes no new links for as long as that lasts: they wait, with what was sent on
them, in the kernel's queue. A message whose descriptors did not fit is a dead letter, and its sender is told at once.

All descriptors are in one epoll descriptor that lives as long as the process; :meth:`Transport.pump` does what is
due. Single-threaded: every call is made from the thread that owns the transport.
"""

from __future__ import annotations

import array
import collections
import dataclasses
import errno
import mmap
import os
import select
import socket
import time
from collections.abc import Callable, Sequence

from protocol.messages import Descriptor, Envelope, MessageError
from protocol.messages.codec import MAX_BODY
from supervisor import linux
from supervisor.port import NameState, NotDeliveredError, Receiver
from supervisor.registry import Changes, RunDirectory, escape

INLINE_LIMIT = 96 * 1024
"""The largest frame in bytes that goes through the socket: half of the usual send buffer. Larger ones go by memory."""

END_PATIENCE = 0.05
"""Seconds to wait for the kernel to say that a process has ended whose link did: it closes files a moment earlier."""

MAX_DESCRIPTORS = 16
"""Descriptors in one message, the memory of a large one not counted."""

QUEUE_LIMIT = 2000
"""Frames that may wait for one link beyond what the kernel has taken."""

QUEUE_BYTES = 8 * 1024 * 1024
"""Bytes that may wait for one link, those in sealed memory counted."""

BACKLOG = 1024
"""Connections that may wait to be accepted: more than the processes of a node."""

STARVED_PAUSE = 1.0
"""Seconds after which a process that had no descriptor for a caller looks whether it has one now."""

READ_BURST = 64
"""Frames read from one link before the others get their turn."""

_ANCILLARY = socket.CMSG_SPACE((MAX_DESCRIPTORS + 2) * array.array("i").itemsize)
_ENVELOPE, _MEMORY, _CONTROL = b"E", b"M", b"T"
_READ, _WRITE = select.EPOLLIN, select.EPOLLOUT
# As plain integers: combining the enumerations of the standard library costs microseconds for each frame.
_RECEIVE_FLAGS = int(socket.MSG_CMSG_CLOEXEC) | int(socket.MSG_DONTWAIT)
_TRUNCATED = int(socket.MSG_TRUNC)
_DESCRIPTORS_CUT = int(socket.MSG_CTRUNC)
_SEND_FLAGS = int(socket.MSG_NOSIGNAL)
_GONE = (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.ECONNREFUSED)


@dataclasses.dataclass(slots=True)
class _Queued:
    frame: bytes
    descriptors: list[Descriptor]
    envelope: Envelope | None
    size: int


class _Link:
    """One connection. `name` is None until an envelope has been sent or a verified one has come."""

    __slots__ = ("beside", "broken", "fd", "incarnation", "name", "pid", "queue", "queued_bytes", "sock")

    def __init__(self, sock: socket.socket, pid: int) -> None:
        self.sock = sock
        self.fd = sock.fileno()
        self.pid = pid
        self.name: str | None = None
        self.incarnation = 0
        self.queue: collections.deque[_Queued] = collections.deque()
        self.queued_bytes = 0
        self.beside = 0  # bytes in sealed memory that may still wait in the kernel's queue
        self.broken = False


class Transport:
    """See the module.

    Attributes:
        receiver: gets envelopes and notices; set it before the first :meth:`pump`.
        control: gets the control frames: (pid of the sender, body).
        name: if set, envelopes for anybody else are refused.
        refusals: how many frames and connections were refused, by reason.
    """

    def __init__(self, directory: RunDirectory) -> None:
        self.directory = directory
        self.receiver: Receiver | None = None
        self.control: Callable[[int, bytes], None] | None = None
        self.name: str | None = None
        self.refusals: collections.Counter[str] = collections.Counter()
        self._uid = os.geteuid()
        self._pid = os.getpid()
        self._epoll = select.epoll()
        # Fresh pages: unlike a bytearray's they take no memory before a message is long enough to reach them.
        self._buffer = memoryview(mmap.mmap(-1, INLINE_LIMIT + 1, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        self._links: dict[int, _Link] = {}
        self._by_name: dict[str, _Link] = {}
        self._by_pid: dict[int, _Link] = {}
        self._readers: dict[int, Callable[[], None]] = {}
        self._serial = 0  # of registrations; a descriptor's number may be used again while events are handled
        self._registered: dict[int, int] = {}
        self._starved = False
        self._spare_fd = _spare()
        self._changes: Changes | None = None
        self._watched: dict[str, tuple[int, int] | None] = {}
        self._gone: collections.deque[tuple[str, int, int]] = collections.deque(maxlen=256)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        directory.remove_socket(self._pid)
        self._listener.bind(directory.socket_path(self._pid))
        self._listener.listen(BACKLOG)
        self.add_reader(self._listener.fileno(), self._accept)

    # The owner's loop

    def fileno(self) -> int:
        """The epoll descriptor: readable when :meth:`pump` has something to do. The same one for life."""
        return self._epoll.fileno()

    def pump(self) -> None:
        """Do what is due, without waiting, and return soon even if more arrives meanwhile."""
        self._handle(self._epoll.poll(0))

    def wait(self, timeout: float | None) -> None:
        """Wait at most `timeout` seconds (None: for ever) until something is due, and do it."""
        if self._starved:
            timeout = STARVED_PAUSE if timeout is None else min(timeout, STARVED_PAUSE)
        self._handle(self._epoll.poll(timeout))

    def add_reader(self, fd: int, callback: Callable[[], None]) -> None:
        """Call back whenever this descriptor is readable."""
        self._readers[fd] = callback
        self._register(fd)

    def remove_reader(self, fd: int) -> None:
        """Stop calling back for this descriptor; do it before the descriptor is closed."""
        if self._readers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def _register(self, fd: int) -> None:
        self._serial += 1
        self._registered[fd] = self._serial
        self._epoll.register(fd, _READ)

    def _handle(self, events: list[tuple[int, int]]) -> None:
        before = self._serial
        if self._starved:
            self._accept()  # whatever woke us: supervisors look after their children every few seconds
        for fd, mask in events:
            if self._registered.get(fd, 0) > before:
                continue  # the event was another descriptor's that had this number
            link = self._links.get(fd)
            if link is not None:
                if mask & _WRITE:
                    self._flush(link)
                if mask & ~_WRITE:
                    self._read(link)
                continue
            reader = self._readers.get(fd)
            if reader is not None:
                reader()

    def drain(self, pid: int) -> None:
        """Deliver everything that a process which has ended had still sent, and drop its links."""
        self._accept()  # it may have connected, spoken and ended since the last look
        for link in [link for link in self._links.values() if link.pid == pid]:
            while self._links.get(link.fd) is link and self._read(link):
                pass
            self._drop(link, "the process ended")

    def flush(self, timeout: float) -> None:
        """Wait at most `timeout` seconds until the kernel has taken what is queued. For the end of a process."""
        end = time.monotonic() + timeout
        while any(link.queue and not link.broken for link in self._links.values()):
            left = end - time.monotonic()
            if left <= 0:
                return
            for fd, mask in self._epoll.poll(left):
                link = self._links.get(fd)
                if link is not None and mask & (_WRITE | select.EPOLLERR | select.EPOLLHUP):
                    self._flush(link)

    def close(self) -> None:
        """Close everything. What is queued is lost, what the kernel has taken is still delivered."""
        for link in list(self._links.values()):
            for queued in link.queue:
                _close_all(queued.descriptors)
            link.sock.close()
        self._links.clear()
        self._by_name.clear()
        self._by_pid.clear()
        self._listener.close()
        if self._spare_fd >= 0:
            os.close(self._spare_fd)
        self._spare_fd = -1
        if self._changes is not None:
            self._changes.close()
            self._changes = None
        self._epoll.close()
        self.directory.remove_socket(self._pid)

    # Port

    def send(self, envelope: Envelope, descriptors: Sequence[Descriptor]) -> None:
        """See :meth:`supervisor.port.Port.send`."""
        link = self._by_name.get(envelope.target) or self._open(envelope.target)
        if len(descriptors) > MAX_DESCRIPTORS:
            raise NotDeliveredError(f"{len(descriptors)} descriptors in one message are over {MAX_DESCRIPTORS}")
        frame = _ENVELOPE + envelope.to_bytes()
        if len(frame) <= INLINE_LIMIT:
            self._put(link, frame, descriptors, envelope)
            return
        try:
            memory = Descriptor(linux.sealed_memory(envelope.body))
        except OSError as error:
            raise NotDeliveredError(f"no memory for a message of {len(frame)} bytes: {error}") from error
        head = _MEMORY + dataclasses.replace(envelope, body=b"").to_bytes()
        try:
            self._put(link, head, [memory, *descriptors], envelope, len(envelope.body))
        finally:
            memory.close()

    def state(self, name: str) -> NameState:
        """See :meth:`supervisor.port.Port.state`."""
        entry = self.directory.read(name)
        if entry is None:
            return NameState.UNKNOWN
        if entry.state is NameState.READY:
            link = self._by_name.get(name)
            if (link is not None and link.broken) or (name, entry.incarnation, entry.pid) in self._gone:
                return NameState.STARTING
        return entry.state

    def watch(self, name: str) -> None:
        """See :meth:`supervisor.port.Port.watch`. A name that is ready now is not reported until it has been down."""
        if self._changes is None:
            changes = self._changes = Changes(self.directory)
            self.add_reader(changes.fd, lambda: self._names_changed(changes))
            if changes.polled:
                self.refusals["no-inotify"] += 1
        if name not in self._watched:
            self._watched[name] = self._present(name)

    # Control frames

    def send_control(self, pid: int, body: bytes) -> None:
        """Send a control frame to the process.

        Raises:
            NotDeliveredError: there is no such process, or its queue is full.
        """
        link = self._by_pid.get(pid) or self._connect(pid)
        self._put(link, _CONTROL + body, (), None)

    # Links

    def _open(self, name: str) -> _Link:
        entry = self.directory.read(name)
        if entry is None:
            raise NotDeliveredError(f"there is no actor called {name}")
        link = self._by_pid.get(entry.pid)
        if link is None:
            # Only its own supervisor may speak first to one that is starting.
            reachable = entry.state is NameState.READY or (entry.owner == self.name and entry.pid > 0)
            if not reachable or (name, entry.incarnation, entry.pid) in self._gone:
                raise NotDeliveredError(f"{name} is being restarted")
            # One that was ready has listened; one that starts may only not listen yet.
            who = (name, entry.incarnation, entry.pid) if entry.state is NameState.READY else None
            link = self._connect(entry.pid, who)
        elif link.broken:
            raise NotDeliveredError(f"{name} has just ended")
        link.name, link.incarnation = name, entry.incarnation
        self._by_name[name] = link
        return link

    def _connect(self, pid: int, who: tuple[str, int, int] | None = None) -> _Link:
        """A new link to this process; if it has ended, `who` (name, incarnation, pid) is known to be gone."""
        try:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        except OSError as error:
            raise NotDeliveredError(f"process {pid}: no link: {error.strerror}") from error
        try:
            sock.connect(self.directory.socket_path(pid))
            peer, uid = linux.peer_credentials(sock)
        except OSError as error:
            sock.close()
            if error.errno not in (errno.ECONNREFUSED, errno.ENOENT):
                raise NotDeliveredError(f"process {pid}: no link: {error.strerror}") from error
            if who is not None:
                self._gone.append(who)
            raise NotDeliveredError(f"process {pid}: has ended") from error
        if peer != pid or uid != self._uid:
            sock.close()
            self.refusals["foreign-listener"] += 1
            raise NotDeliveredError(f"the socket of process {pid} belongs to process {peer} of user {uid}")
        return self._add(sock, pid)

    def _add(self, sock: socket.socket, pid: int) -> _Link:
        link = _Link(sock, pid)
        self._links[link.fd] = link
        self._by_pid.setdefault(pid, link)
        self._register(link.fd)
        return link

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                if self._starved:
                    self._starved = False
                    self._epoll.modify(self._listener.fileno(), _READ)
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    self._stop_accepting()
                else:
                    self.refusals["accept"] += 1
                return
            pid, uid = linux.peer_credentials(sock)
            if uid != self._uid or pid <= 0:
                self.refusals["foreign-user"] += 1
                sock.close()
                continue
            sock.setblocking(False)
            self._add(sock, pid)

    def _stop_accepting(self) -> None:
        """No descriptor is left. Whoever connects waits; the listener wakes us for newcomers, and not all the time.

        Registered anew only once: each time the kernel would tell of those who wait already.
        """
        self.refusals["no-descriptors"] += 1
        if not self._starved:
            self._starved = True
            self._epoll.modify(self._listener.fileno(), _READ | select.EPOLLET)

    def _has_ended(self, link: _Link) -> bool:
        """Whether the process behind a link that broke has ended, and not only the link."""
        entry = None if link.name is None else self.directory.read(link.name)
        if entry is not None and entry.pid != link.pid:
            return True
        if self._spare_fd >= 0:
            os.close(self._spare_fd)  # it may be the last that this process can have
        try:
            return _ends_within(END_PATIENCE, link.pid)
        finally:
            self._spare_fd = _spare()

    def _broke(self, link: _Link, reason: str) -> None:
        """A link came to its end."""
        if link.name is None or self._by_name.get(link.name) is not link or self._has_ended(link):
            self._drop(link, reason)
            return
        self.refusals["link-lost"] += 1
        name, link.name = link.name, None  # so that nobody is told of the end of a process
        del self._by_name[name]
        self._drop(link, reason)
        if self.receiver is not None:
            self.receiver.link_lost(name, "the link to it broke, though its process goes on")

    def _drop(self, link: _Link, reason: str) -> None:
        if self._links.get(link.fd) is not link:
            return
        del self._links[link.fd]
        self._epoll.unregister(link.fd)
        link.sock.close()
        if self._by_pid.get(link.pid) is link:
            del self._by_pid[link.pid]
            others = [other for other in self._links.values() if other.pid == link.pid]
            if others:
                self._by_pid[link.pid] = others[0]
        queue, link.queue = link.queue, collections.deque()
        receiver = self.receiver
        for queued in queue:
            _close_all(queued.descriptors)
            if queued.envelope is not None and receiver is not None:
                receiver.undelivered(queued.envelope, f"{queued.envelope.target}: {reason}")
        name = link.name
        if name is None or self._by_name.get(name) is not link:
            return
        for other in [other for other in self._links.values() if other.pid == link.pid]:
            while self._links.get(other.fd) is other and self._read(other):
                pass
        if self._by_name.get(name) is link:
            del self._by_name[name]
        self._down(name, link.incarnation, link.pid, reason)

    def _down(self, name: str, incarnation: int, pid: int, reason: str) -> None:
        if (name, incarnation, pid) in self._gone:
            return
        self._gone.append((name, incarnation, pid))
        if self._watched.get(name) == (incarnation, pid):
            self._watched[name] = None
        if self.receiver is not None:
            self.receiver.name_down(name, reason)

    # Frames out

    def _put(
        self,
        link: _Link,
        frame: bytes,
        descriptors: Sequence[Descriptor],
        envelope: Envelope | None,
        beside: int = 0,
    ) -> None:
        """Send a frame or queue it; `beside` it are so many bytes in sealed memory."""
        if beside:
            self._check_beside(link, beside)
        if not link.queue and not link.broken:
            try:
                _transmit(link.sock, frame, descriptors)
            except BlockingIOError:
                pass
            except OSError as error:
                if error.errno not in _GONE:
                    raise NotDeliveredError(f"not sent: {error.strerror}") from error
                # What it had still sent is read at its turn in the loop; until then nobody else may have its name.
                link.broken = True
            else:
                return
        if link.broken:
            raise NotDeliveredError(f"{link.name or link.pid} has just ended")
        size = len(frame) + beside
        if len(link.queue) >= QUEUE_LIMIT or link.queued_bytes + size > QUEUE_BYTES:
            raise NotDeliveredError(f"{link.name or link.pid} does not read: {len(link.queue)} messages wait for it")
        link.queue.append(_Queued(frame, _duplicate(descriptors), envelope, size))
        link.queued_bytes += size
        if len(link.queue) == 1:
            self._epoll.modify(link.fd, _READ | _WRITE)

    @staticmethod
    def _check_beside(link: _Link, size: int) -> None:
        """The kernel counts a message in sealed memory as a few bytes, however long it is; so they are counted here."""
        if link.beside + size > QUEUE_BYTES and not linux.unread(link.sock):
            link.beside = 0
        if link.beside and link.beside + size > QUEUE_BYTES:
            raise NotDeliveredError(f"{link.name or link.pid} does not read: {link.beside} bytes wait for it")
        link.beside += size

    def _flush(self, link: _Link) -> None:
        while link.queue:
            queued = link.queue[0]
            try:
                _transmit(link.sock, queued.frame, queued.descriptors)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _GONE:
                    link.broken = True
                    self._epoll.modify(link.fd, _READ)
                    return
                if queued.envelope is not None and self.receiver is not None:
                    self.receiver.undelivered(queued.envelope, f"not sent: {error.strerror}")
            if link.queue and link.queue[0] is queued:
                link.queue.popleft()
                link.queued_bytes -= queued.size
            _close_all(queued.descriptors)
        self._epoll.modify(link.fd, _READ)

    # Frames in

    def _read(self, link: _Link) -> bool:
        """Handle a burst of frames; False when nothing is left for now (the link may be gone)."""
        for _ in range(READ_BURST):
            try:
                length, ancillary, flags, _ = link.sock.recvmsg_into([self._buffer], _ANCILLARY, _RECEIVE_FLAGS)
            except BlockingIOError:
                return False
            except ConnectionResetError:
                continue  # reported once, when the peer left something of ours unread; what it sent is still there
            except OSError as error:
                self._broke(link, f"the link broke: {error.strerror}")
                return False
            descriptors = _received(ancillary) if ancillary else []
            if length == 0:
                _close_all(descriptors)
                self._broke(link, "the process ended")
                return False
            if flags & _TRUNCATED:
                self._refuse("truncated", descriptors)
                continue
            self._receive(link, self._buffer[:length], descriptors, whole=not flags & _DESCRIPTORS_CUT)
            if self._links.get(link.fd) is not link:
                return False
        return True

    def _receive(self, link: _Link, frame: memoryview, descriptors: list[Descriptor], *, whole: bool) -> None:
        """Handle a frame; if it is not `whole`, some of its descriptors were lost."""
        kind = frame[:1]
        if kind == _CONTROL:
            _close_all(descriptors)
            if self.control is not None:
                self.control(link.pid, bytes(frame[1:]))
            return
        try:
            if kind not in (_ENVELOPE, _MEMORY):
                self._refuse("malformed", descriptors)
                return
            envelope = Envelope.from_bytes(frame[1:])
            if kind == _MEMORY and whole:
                envelope = _with_body(envelope, descriptors)
        except (MessageError, OSError):
            self._refuse("malformed", descriptors)
            return
        if envelope.sender != link.name and not self._verified(link, envelope.sender):
            self._refuse("forged-sender", descriptors)
            return
        if envelope.target != self.name and self.name is not None:
            self._refuse("misaddressed", descriptors)
            return
        if self.receiver is None:
            self._refuse("no-receiver", descriptors)
            return
        if not whole:
            self._refuse("descriptors-cut", descriptors)
            self.receiver.descriptors_lost(envelope)
            return
        self.receiver.deliver(envelope, descriptors)

    def _verified(self, link: _Link, claimed: str) -> bool:
        if link.name is not None or not claimed or len(claimed) > MAX_CLAIM:
            return False
        entry = self.directory.read(claimed)
        if entry is None or entry.pid != link.pid:
            return False
        old = self._by_name.get(claimed)
        if old is not None and old.pid != link.pid:
            # A successor speaks before the end of its predecessor was noticed: notice it now.
            while self._links.get(old.fd) is old and self._read(old):
                pass
            self._drop(old, "the process ended")
            old = None
        link.name, link.incarnation = claimed, entry.incarnation
        if old is None:
            self._by_name[claimed] = link
        return True

    def _refuse(self, reason: str, descriptors: list[Descriptor]) -> None:
        self.refusals[reason] += 1
        _close_all(descriptors)

    # Watched names

    def _present(self, name: str) -> tuple[int, int] | None:
        entry = self.directory.read(name)
        if entry is None or entry.state is not NameState.READY or (name, entry.incarnation, entry.pid) in self._gone:
            return None
        return entry.incarnation, entry.pid

    def _names_changed(self, changes: Changes) -> None:
        files = changes.read()
        for name in [name for name in self._watched if files is None or escape(name) in files]:
            seen, present = self._watched[name], self._present(name)
            if seen == present:
                continue
            if seen is not None:
                self._end_of(name, *seen)
            self._watched[name] = present
            if present is not None and self.receiver is not None:
                self.receiver.name_up(name, present[0])

    def _end_of(self, name: str, incarnation: int, pid: int) -> None:
        link = self._by_name.get(name)
        if link is not None and link.pid == pid:
            while self._links.get(link.fd) is link and self._read(link):
                pass
            self._drop(link, "the process ended")
        self._down(name, incarnation, pid, "the process ended")


MAX_CLAIM = 200
"""Characters of a sender's name that are looked up at all."""


def _transmit(sock: socket.socket, frame: bytes, descriptors: Sequence[Descriptor]) -> None:
    if descriptors:
        rights = array.array("i", [descriptor.fileno() for descriptor in descriptors])
        sock.sendmsg([frame], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)], _SEND_FLAGS)
    else:
        sock.send(frame, _SEND_FLAGS)


def _duplicate(descriptors: Sequence[Descriptor]) -> list[Descriptor]:
    copies: list[Descriptor] = []
    try:
        for descriptor in descriptors:
            copies.append(Descriptor(os.dup(descriptor.fileno())))  # noqa: PERF401 - what was made is closed on failure
    except OSError as error:
        _close_all(copies)
        raise NotDeliveredError(f"the message's descriptors cannot be kept: {error.strerror}") from error
    return copies


def _received(ancillary: list[tuple[int, int, bytes]]) -> list[Descriptor]:
    descriptors = []
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers = array.array("i")
            numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
            descriptors += [Descriptor(number) for number in numbers]
    return descriptors


def _with_body(envelope: Envelope, descriptors: list[Descriptor]) -> Envelope:
    """The envelope with the body that is in the first descriptor, which is taken out and closed.

    Raises:
        MessageError: there is none, or there are two.
        OSError: it is too large, or not sealed memory.
    """
    if envelope.body or not descriptors:
        raise MessageError("a message in sealed memory has its body there, and nowhere else")
    memory = descriptors.pop(0)
    try:
        return dataclasses.replace(envelope, body=linux.read_sealed_memory(memory.fileno(), MAX_BODY))
    finally:
        memory.close()


def _ends_within(seconds: float, pid: int) -> bool:
    """Whether a process has ended, or does so in this time. What cannot be found out counts as no."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        return bool(poll.poll(seconds * 1000))
    finally:
        os.close(pidfd)


def _spare() -> int:
    """A descriptor to be given up when one is needed; -1 if there is none."""
    try:
        return os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return -1


def _close_all(descriptors: Sequence[Descriptor]) -> None:
    for descriptor in descriptors:
        descriptor.close()
