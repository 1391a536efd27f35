"""`peerup daemon`, but each actor tries in its own process, when it is described, what it must not be able to do.

`python -m tests.support.probed_daemon HOME`, with the places to try as JSON in `PEERUP_PROBE`. What an attempt came to
is what `peerup actors get NAME` shows: `ok`, or the name of the error.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import signal
import socket
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peerup.daemon
import supervisor.process
from actors.config.paths import node_home

PLACES = json.loads(os.environ.get("PEERUP_PROBE", "{}"))
TEMPORARY = ".probe"

_libc = ctypes.CDLL(None, use_errno=True)
_SYSCALLS = {
    # name: number on x86-64, number on arm64
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "mount": (165, 40),
    "init_module": (175, 105),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "keyctl": (250, 219),
    "unshare": (272, 97),
    "setsid": (112, 157),
    "open_by_handle_at": (304, 265),
    "add_key": (248, 217),
    "shmget": (29, 194),
    "kexec_load": (246, 104),
    "memfd_secret": (447, 447),
    "process_madvise": (440, 440),
}

PTRACE_DETACH, PTRACE_SEIZE, PTRACE_INTERRUPT = 17, 0x4206, 0x4207
WALL = 0x40000000  # __WALL: also for processes that are no children of ours


def syscall(name: str, *arguments: int | None) -> None:
    """Make a system call; OSError says why it failed."""
    number = _SYSCALLS[name][os.uname().machine != "x86_64"]
    ctypes.set_errno(0)
    if _libc.syscall(ctypes.c_long(number), *(ctypes.c_long(argument or 0) for argument in arguments)) < 0:
        raise OSError(ctypes.get_errno(), name)


def read(path: str) -> None:
    """Open a file for reading, and read."""
    with open(path, "rb") as file:
        file.read(1)


def append(path: str) -> None:
    """Open a file for writing; nothing is written."""
    os.close(os.open(path, os.O_WRONLY | os.O_APPEND))


def create(directory: str) -> None:
    """Make a file in a directory, and remove it."""
    path = os.path.join(directory, TEMPORARY + str(os.getpid()))
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    os.unlink(path)


def link(directory: str) -> None:
    """Make a symbolic link in a directory, and remove it."""
    path = os.path.join(directory, TEMPORARY + str(os.getpid()))
    os.symlink("ready:1:1:root:forged", path)
    os.unlink(path)


def connect(kind: int, address: Any, family: int = socket.AF_UNIX) -> None:
    """Connect a socket; a refusal by whoever listens there is a connection all the same."""
    with socket.socket(family, kind) as sock:
        sock.settimeout(5)
        sock.connect(address)


def ask_control_api(path: str) -> None:
    """Ask the control API for something, as a person would."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(5)
        sock.connect(path)
        sock.sendall(b"GET /v1/version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        if not sock.recv(64).startswith(b"HTTP/1.1 2"):
            raise PermissionError(errno.EACCES, "refused")


def make_socket(family: int, kind: int, protocol: int = 0) -> None:
    """Make a socket."""
    socket.socket(family, kind, protocol).close()


def bind(family: int, kind: int, address: Any) -> None:
    """Bind a socket."""
    with socket.socket(family, kind) as sock:
        sock.bind(address)


def fork() -> None:
    """Make a process."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def execute() -> None:
    """Run a program: one that does not exist, so that this process lives on where it may."""
    with contextlib.suppress(FileNotFoundError):
        os.execv("/nonexistent", ["nonexistent"])


def peek(pid: int) -> None:
    """Read memory of another process."""
    buffer = ctypes.create_string_buffer(8)
    local = struct.pack("PN", ctypes.addressof(buffer), 8)
    here = ctypes.create_string_buffer(local)
    far = ctypes.create_string_buffer(local)
    try:
        syscall("process_vm_readv", pid, ctypes.addressof(here), 1, ctypes.addressof(far), 1, 0)
    except OSError as error:
        if error.errno != errno.EFAULT:  # allowed, and nothing is mapped there
            raise


def attach(pid: int) -> None:
    """Become the tracer of another process and let go: else that one stops for good at the next signal to it."""
    syscall("ptrace", PTRACE_SEIZE, pid, 0, 0)
    syscall("ptrace", PTRACE_INTERRUPT, pid, 0, 0)  # one can only let go of a process that is stopped
    os.waitpid(pid, WALL)
    syscall("ptrace", PTRACE_DETACH, pid, 0, 0)


def absent_is_ok(function: Callable[[], None], *allowed: int) -> None:
    """Call it; these errors mean that the kernel would have done it."""
    try:
        function()
    except OSError as error:
        if error.errno not in allowed:
            raise


def attempts() -> dict[str, Callable[[], None]]:
    """What is tried, by name."""
    home, others = PLACES["home"], _others()
    run = f"{home}/run"
    other = next(pid for name, pid in sorted(others.items()) if pid != os.getpid())
    made: dict[str, Callable[[], None]] = {
        "read-key": lambda: read(PLACES["key"]),
        "read-tls-key": lambda: read(PLACES["tls_key"]),
        "read-stranger": lambda: read(PLACES["stranger"]),
        "chmod-key": lambda: os.chmod(PLACES["key"], 0o600),
        "utime-key": lambda: os.utime(PLACES["key"]),
        "setxattr-key": lambda: absent_is_ok(lambda: os.setxattr(PLACES["key"], "user.x", b""), errno.EOPNOTSUPP),
        "truncate-stranger": lambda: os.truncate(PLACES["stranger"], 0),
        "read-config": lambda: read(f"{home}/config.yaml"),
        "read-authorized-keys": lambda: read(PLACES["authorized_keys"]),
        "write-key": lambda: append(PLACES["key"]),
        "write-config": lambda: append(f"{home}/config.yaml"),
        "write-authorized-keys": lambda: append(PLACES["authorized_keys"]),
        "write-audit": lambda: append(f"{home}/log/audit.jsonl"),
        "create-in-home": lambda: create(home),
        "create-in-state": lambda: create(f"{home}/state"),
        "create-in-log": lambda: create(f"{home}/log"),
        "create-in-run": lambda: create(run),
        "create-elsewhere": lambda: create(PLACES["elsewhere"]),
        "list-home": lambda: os.listdir(home) and None,
        "link-in-names": lambda: link(f"{run}/names"),
        "rename-name": lambda: os.rename(f"{run}/names/probed", f"{run}/names/.probed"),
        "remove-name": lambda: os.unlink(f"{run}/names/probed"),
        "remove-socket": lambda: os.unlink(f"{run}/sockets/probed"),
        "control-socket": lambda: ask_control_api(f"{run}/control.sock"),
        "stranger-socket": lambda: connect(socket.SOCK_STREAM, PLACES["unix"]),
        "abstract-socket": lambda: connect(socket.SOCK_STREAM, PLACES["abstract"]),
        "abstract-packets": lambda: connect(socket.SOCK_SEQPACKET, PLACES["abstract_packets"]),
        "unix-datagrams": lambda: make_socket(socket.AF_UNIX, socket.SOCK_DGRAM),
        "inet": lambda: make_socket(socket.AF_INET, socket.SOCK_STREAM),
        "inet6": lambda: make_socket(socket.AF_INET6, socket.SOCK_STREAM),
        "udp": lambda: make_socket(socket.AF_INET, socket.SOCK_DGRAM),
        "raw": lambda: make_socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP),
        "packet": lambda: make_socket(socket.AF_PACKET, socket.SOCK_RAW),
        "netlink-route": lambda: make_socket(socket.AF_NETLINK, socket.SOCK_RAW, 0),
        "netlink-audit": lambda: make_socket(socket.AF_NETLINK, socket.SOCK_RAW, 9),
        "vsock": lambda: make_socket(socket.AF_VSOCK, socket.SOCK_STREAM),
        "connect-tcp": lambda: connect(socket.SOCK_STREAM, ("127.0.0.1", PLACES["tcp"]), socket.AF_INET),
        "bind-any-tcp": lambda: absent_is_ok(
            lambda: bind(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", PLACES["free"])), errno.EADDRINUSE
        ),
        "fork": fork,
        "execute": execute,
        "read-other-memory": lambda: peek(other),
        "trace-other": lambda: attach(other),
        "signal-other": lambda: os.kill(other, 0),
        "signal-parent": lambda: os.kill(os.getppid(), 0),
        "signal-group": lambda: os.killpg(os.getpgrp(), 0),
        "signal-thread": lambda: syscall_tgkill(other),
        "stop-service": lambda: os.kill(PLACES["service"], 0),
        "pidfd-signal": lambda: signal.pidfd_send_signal(os.pidfd_open(other), 0),
        "pidfd-getfd": lambda: pidfd_getfd(other),
        "setsid": lambda: absent_is_ok(lambda: syscall("setsid"), 0),
        "mount": lambda: absent_is_ok(lambda: syscall("mount", 0, 0, 0, 0, 0), errno.EFAULT, errno.EINVAL),
        "unshare": lambda: syscall("unshare", 0),
        "keyctl": lambda: syscall("keyctl", 0, -3 & 0xFFFFFFFF, 0),
        "bpf": lambda: absent_is_ok(lambda: syscall("bpf", 0, 0, 0), errno.EINVAL, errno.EFAULT, errno.E2BIG),
        "perf": lambda: absent_is_ok(lambda: syscall("perf_event_open", 0, 0, -1, -1, 0), errno.EFAULT, errno.EINVAL),
        "module": lambda: absent_is_ok(lambda: syscall("init_module", 0, 0, 0), errno.EFAULT, errno.ENOEXEC),
        "open-by-handle": lambda: absent_is_ok(
            lambda: syscall("open_by_handle_at", -1, 0, 0), errno.EFAULT, errno.EBADF
        ),
        "io-uring": lambda: absent_is_ok(lambda: syscall("io_uring_setup", 0, 0), errno.EFAULT, errno.EINVAL),
        "shared-memory": lambda: syscall("shmget", 0, 4096, 0o600),
    }
    for name in ("mem", "maps", "environ", "auxv"):
        made[f"proc-{name}"] = lambda name=name: read(f"/proc/{other}/{name}")
    made["proc-fd"] = lambda: os.readlink(f"/proc/{other}/fd/0") and None
    made["proc-root"] = lambda: os.listdir(f"/proc/{other}/root") and None
    made["proc-cmdline"] = lambda: read(f"/proc/{other}/cmdline")
    made["proc-service-environ"] = lambda: read(f"/proc/{PLACES['service']}/environ")
    return made


def syscall_tgkill(pid: int) -> None:
    """Send no signal to a thread of another process."""
    number = 234 if os.uname().machine == "x86_64" else 131
    if _libc.syscall(ctypes.c_long(number), ctypes.c_long(pid), ctypes.c_long(pid), ctypes.c_long(0)) < 0:
        raise OSError(ctypes.get_errno(), "tgkill")


def pidfd_getfd(pid: int) -> None:
    """Copy standard error of another process."""
    fd = os.pidfd_open(pid)
    try:
        if _libc.syscall(ctypes.c_long(438), ctypes.c_long(fd), ctypes.c_long(2), ctypes.c_long(0)) < 0:
            raise OSError(ctypes.get_errno(), "pidfd_getfd")
    finally:
        os.close(fd)


def _others() -> dict[str, int]:
    """The processes of the other actors, from the registry, which everybody may look into."""
    names = Path(PLACES["home"], "run", "names")
    found = {}
    descriptor = os.open(names, os.O_PATH | os.O_DIRECTORY)
    try:
        for name in PLACES["names"]:
            with contextlib.suppress(OSError):
                pid = int(os.readlink(name, dir_fd=descriptor).split(":")[2])
                if pid not in (0, os.getpid()):
                    found[name] = pid
    finally:
        os.close(descriptor)
    return found


def probe(actor: str) -> dict[str, str]:
    """Try everything, in the process of this actor."""
    results = {}
    made = attempts()
    if actor == "api":  # it cannot answer while it waits for its own answer
        made["control-socket"] = lambda: connect(socket.SOCK_STREAM, f"{PLACES['home']}/run/control.sock")
    for name, attempt in made.items():
        try:
            attempt()
        except OSError as error:
            results[name] = errno.errorcode.get(error.errno or 0, str(error))
        else:
            results[name] = "ok"
    return results


def main() -> None:
    """Run the node."""
    original = supervisor.process.load_factory

    def load(factory: str, allowed: tuple[str, ...]) -> type:
        found = original(factory, allowed)
        return type(found.__name__, (found,), {"describe": lambda actor: probe(actor.context.name)})

    supervisor.process.load_factory = load
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    PLACES["service"] = os.getpid()
    peerup.daemon.run(node_home(sys.argv[1], {}))


if __name__ == "__main__":
    main()
