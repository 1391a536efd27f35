"""Network namespaces without names: each belongs to a descriptor of this process and ends with it.

A throw-away thread unshares the network, its namespace is opened through /proc and the thread ends; from then on only
our descriptor keeps the namespace alive. Nothing is written to /run/netns, so parallel workers cannot collide and a
killed test run leaves nothing behind. All of it works for root and for the root of a user namespace (`unshare -Urn`).

What to know about namespaces and threads:

* A thread is in one namespace at a time. `Namespace.enter` moves the *calling thread* and brings it back.
* A socket stays for ever in the namespace in which it was created, so one process can own sockets in many hosts.
* Processes and threads that are started inside inherit the namespace. That is how programs get into a host, and why no
  `await` may stand inside `with host.enter():`: another task would run there, and trio's worker threads, which are used
  again later, would stay there.
* 127.0.0.1, abstract Unix sockets and /proc/sys/net are per namespace; files, pipes and Unix sockets with a path are
  shared.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import socket
import struct
import subprocess
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.support.processes import wait_until

CLONE_NEWNET = 0x40000000
SIOCGIFFLAGS = 0x8913
SIOCSIFFLAGS = 0x8914
IFF_UP = 0x1
IFF_RUNNING = 0x40
SBIN = "/usr/local/sbin:/usr/sbin:/sbin"  # where Debian keeps ip and nft; not in everybody's PATH

_libc = ctypes.CDLL(None, use_errno=True)


class LabError(Exception):
    """Something of the laboratory itself does not work; says which command or call, and what it answered."""


def _checked(result: int, call: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")


def _current() -> int:
    """A new descriptor of the namespace of the calling thread."""
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _inode_here() -> int:
    return Path("/proc/thread-self/ns/net").stat().st_ino


class _Entered(threading.local):
    """What a thread has entered: how many namespaces, and a descriptor of the one in which it was before the first."""

    depth = 0
    home = -1


_entered = _Entered()


@contextlib.contextmanager
def _way_home() -> Iterator[int]:
    """Know where the thread belongs, so that one that two tasks sent astray is brought home."""
    if _entered.depth == 0:
        _entered.home = _current()
    _entered.depth += 1
    try:
        yield _entered.home
    finally:
        _entered.depth -= 1
        if _entered.depth == 0:
            os.close(_entered.home)


def _new_namespace() -> int:
    """A descriptor of a new, empty network namespace.

    Raises:
        OSError: the kernel refuses (EPERM: neither root nor in a user namespace of our own).
    """
    result: list[int | OSError] = []

    def make() -> None:
        try:
            _checked(_libc.unshare(CLONE_NEWNET), "unshare(CLONE_NEWNET)")
            result.append(_current())
        except OSError as error:
            result.append(error)

    thread = threading.Thread(target=make, name="new network namespace")
    thread.start()
    thread.join()
    if isinstance(result[0], OSError):
        raise result[0]
    return result[0]


def program(name: str) -> str:
    """The path of a program that the laboratory needs.

    Raises:
        LabError: it is not installed.
    """
    path = shutil.which(name, path=os.pathsep.join((os.environ.get("PATH", ""), SBIN)))
    if path is None:
        raise LabError(f"the program {name!r} is not installed")
    return path


class Namespace:
    """One network namespace: its own interfaces, addresses, routes, firewall and connection tracking.

    A new one has nothing but a loopback interface, which is up, and no way to anywhere.

    Args:
        name: for messages only.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._fd = _new_namespace()
        self.inode = os.fstat(self._fd).st_ino
        with self.socket() as asker:
            fcntl.ioctl(asker, SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", IFF_UP | IFF_RUNNING))

    def __repr__(self) -> str:
        return f"<namespace {self.name} net:[{self.inode}]>"

    @property
    def path(self) -> str:
        """A path that names this namespace to other programs (`ip link set eth0 netns PATH`) while we live."""
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    def close(self) -> None:
        """Give the namespace up. It ends with its interfaces when the last process and socket in it are gone."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @contextlib.contextmanager
    def enter(self) -> Iterator[None]:
        """Run the body in this namespace; sockets, processes and threads made there belong to it.

        Entering may be nested. The body must not `await` (see the module's text).

        Raises:
            LabError: the thread left the body in another namespace than this: something awaited inside.
        """
        if self._fd < 0:
            raise LabError(f"{self.name} is closed")
        with _way_home() as home:
            before = _current()
            try:
                _checked(_libc.setns(self._fd, CLONE_NEWNET), "setns")
                try:
                    yield
                finally:
                    astray = _inode_here() != self.inode
                    _checked(_libc.setns(home if astray else before, CLONE_NEWNET), "setns")
                    if astray:
                        raise LabError(f"the body of enter() of {self.name} ended in another namespace; did it await?")
            finally:
                os.close(before)

    def run(
        self, arguments: Sequence[str], *, text_in: str | None = None, timeout: float = 30, check: bool = True
    ) -> str:
        """Run a program here to its end and return what it printed on standard output.

        Raises:
            LabError: it ended with another status than 0 (with `check`); contains what it wrote to standard error.
            subprocess.TimeoutExpired: it was not done within `timeout` seconds.
        """
        with self.enter():
            done = subprocess.run(  # noqa: PLW1510 - judged below, with the program's own words
                [program(arguments[0]), *arguments[1:]], input=text_in, capture_output=True, text=True, timeout=timeout
            )
        if check and done.returncode != 0:
            said = (done.stderr or done.stdout).strip()
            raise LabError(
                f"in {self.name}: {' '.join(arguments)} ended with {done.returncode}: {said}\n{text_in or ''}"
            )
        return done.stdout

    def popen(self, arguments: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a program here; `options` are those of `subprocess.Popen`."""
        with self.enter():
            return subprocess.Popen([program(arguments[0]), *arguments[1:]], **options)

    def socket(self, family: int = socket.AF_INET, kind: int = socket.SOCK_DGRAM, protocol: int = 0) -> socket.socket:
        """A socket of this process that lives in this namespace."""
        with contextlib.ExitStack() as on_error:
            with self.enter():
                made = on_error.enter_context(socket.socket(family, kind, protocol))
            on_error.pop_all()
        return made

    def ip(self, *commands: str) -> None:
        """Run commands of ip(8), each without the word `ip`, in one process.

        Raises:
            LabError: one of them failed; those before it have been done.
        """
        if commands:
            self.run(["ip", "-batch", "-"], text_in="\n".join(commands) + "\n")

    def nft(self, rules: str) -> None:
        """Load an nftables script, all of it or nothing."""
        self.run(["nft", "-f", "-"], text_in=rules)

    def sysctl(self, **values: int | str) -> None:
        """Set values below /proc/sys/net; a name is the path with `__` for `/`: `ipv4__ip_forward=1`."""
        with self.enter():
            for name, value in values.items():
                (Path("/proc/sys/net") / name.replace("__", "/")).write_text(f"{value}\n")

    def has_sysctl(self, name: str) -> bool:
        """Whether this kernel has the value (`bridge__bridge-nf-call-iptables` depends on its configuration)."""
        with self.enter():
            return (Path("/proc/sys/net") / name.replace("__", "/")).exists()

    def interfaces(self) -> dict[int, str]:
        """Names of all interfaces by index."""
        with self.enter():
            return dict(socket.if_nameindex())

    def wait_running(self, names: Iterable[str], *, within: float = 5.0) -> None:
        """Wait until these interfaces carry frames.

        An interface that was just set up drops what is sent before its queue runs, up to some 20 ms on a busy machine;
        if that is the first packet of a test, the next try may be a second away.

        Raises:
            ConditionNotMetError: not within that many seconds.
        """
        waiting = list(names)
        with self.socket() as asker:

            def running() -> bool:
                while waiting:
                    request = struct.pack("16sH22x", waiting[0].encode(), 0)
                    flags = struct.unpack_from("H", fcntl.ioctl(asker, SIOCGIFFLAGS, request), 16)[0]
                    if not flags & IFF_RUNNING:
                        return False
                    waiting.pop(0)
                return True

            wait_until(running, within=within, what=f"{waiting} of {self.name} run", every=0.001)
