"""The filters, run by an interpreter of the kernel's packet-filter machine, for both machines; and in the kernel."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import struct
from pathlib import Path

import pytest

from supervisor import seccomp
from tests.support.confined import in_child

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
OWN = 4711
ALLOWED, EPERM, ENOSYS = "allowed", "EPERM", "ENOSYS"


def verdict(program: bytes, machine: str, call: int, *arguments: int, architecture: int | None = None) -> str:
    """What the kernel would do (struct seccomp_data and the instructions that the filters use)."""
    architecture = ARCHITECTURES[machine] if architecture is None else architecture
    data = struct.pack("<IIQ6Q", call, architecture, 0, *(list(arguments) + [0] * 6)[:6])
    code = list(struct.iter_unpack("=HBBI", program))
    at = accumulator = 0
    while True:
        operation, yes, no, value = code[at]
        at += 1
        match operation:
            case 0x20:
                (accumulator,) = struct.unpack_from("<I", data, value)
            case 0x54:
                accumulator &= value
            case 0x15:
                at += yes if accumulator == value else no
            case 0x25:
                at += yes if accumulator > value else no
            case 0x35:
                at += yes if accumulator >= value else no
            case 0x06:
                return {
                    0x7FFF0000: ALLOWED,
                    0x00050000 | errno.EPERM: EPERM,
                    0x00050000 | errno.ENOSYS: ENOSYS,
                }[value]
            case _:
                raise AssertionError(f"an instruction that is not used: {operation:#x}")


@pytest.fixture(params=ARCHITECTURES)
def machine(request):
    return request.param


class Judge:
    def __init__(self, machine, **options):
        self.machine = machine
        self.numbers = seccomp.numbers(machine)
        self.program = seccomp.actor_filter(pid=OWN, machine=machine, **options)

    def __call__(self, name, *arguments):
        return verdict(self.program, self.machine, self.numbers[name], *arguments)


def test_what_every_process_needs_is_allowed(machine):
    judge = Judge(machine)
    for name in (
        "read",
        "write",
        "openat",
        "mmap",
        "futex",
        "epoll_ctl",
        "recvmsg",
        "sendmsg",
        "exit_group",
        "pidfd_open",
    ):
        assert judge(name) == ALLOWED


@pytest.mark.parametrize(
    "name",
    ["execve", "execveat", "ptrace", "process_vm_readv", "process_vm_writev", "pidfd_getfd", "mount", "init_module",
     "keyctl", "bpf", "perf_event_open", "userfaultfd", "io_uring_setup", "unshare", "setns", "open_by_handle_at"],
)  # fmt: skip
def test_what_no_process_needs_is_refused_in_both_filters(machine, name):
    assert Judge(machine)(name) == EPERM
    assert verdict(seccomp.base_filter(machine), machine, seccomp.numbers(machine)[name]) == EPERM


def test_calls_that_are_newer_do_not_exist(machine):
    judge = Judge(machine)
    assert verdict(judge.program, machine, seccomp.NEWEST_KNOWN + 1) == ENOSYS
    assert verdict(judge.program, machine, seccomp.RECENT) == ENOSYS
    assert verdict(seccomp.base_filter(machine), machine, seccomp.NEWEST_KNOWN + 1) == ENOSYS
    assert verdict(seccomp.base_filter(machine), machine, seccomp.NEWEST_KNOWN) == ALLOWED
    assert judge("clone3") == ENOSYS


def test_other_conventions_of_the_machine_are_refused(machine):
    for program in (Judge(machine).program, seccomp.base_filter(machine)):
        assert verdict(program, machine, 0, architecture=0x40000003) == EPERM
    x32 = verdict(Judge("x86_64").program, "x86_64", 0x40000000)
    assert x32 == EPERM


def test_threads_are_allowed_and_processes_are_not(machine):
    judge = Judge(machine)
    thread = 0x3D0F00  # what libc passes
    assert judge("clone", thread) == ALLOWED
    assert judge("clone", signal.SIGCHLD) == EPERM
    assert judge("clone", thread | 0x10000000) == EPERM  # CLONE_NEWUSER
    base = seccomp.base_filter(machine)
    number = seccomp.numbers(machine)["clone"]
    assert verdict(base, machine, number, signal.SIGCHLD) == ALLOWED
    assert verdict(base, machine, number, signal.SIGCHLD | 0x10000000) == EPERM


def test_signals_reach_the_process_itself_and_one_other(machine):
    judge = Judge(machine, terminate=99)
    assert judge("kill", OWN, signal.SIGKILL) == ALLOWED
    assert judge("tgkill", OWN, OWN, signal.SIGABRT) == ALLOWED
    assert judge("kill", 99, signal.SIGTERM) == ALLOWED
    assert judge("kill", 99, signal.SIGKILL) == EPERM
    assert judge("kill", 0, signal.SIGTERM) == EPERM
    assert judge("kill", 2**64 - 1, signal.SIGTERM) == EPERM
    assert Judge(machine)("kill", 99, signal.SIGTERM) == EPERM


NO_KIND = (socket.AF_PACKET, socket.SOCK_RAW, 0)
SOCKETS = {
    "messages": (socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC, 0),
    "unix": (socket.AF_UNIX, socket.SOCK_STREAM, 0),
    "datagrams": (socket.AF_UNIX, socket.SOCK_DGRAM, 0),
    "tcp": (socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK, 0),
    "tcp6": (socket.AF_INET6, socket.SOCK_STREAM, socket.IPPROTO_TCP),
    "udp": (socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_UDP),
    "raw": (socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP),
    "sctp": (socket.AF_INET, socket.SOCK_STREAM, 132),
    "route": (socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE),
    "audit": (socket.AF_NETLINK, socket.SOCK_RAW, 9),
    "packet": NO_KIND,
}


@pytest.mark.parametrize(
    ("families", "expected"),
    [
        ((), {"messages"}),
        (("unix",), {"messages", "unix", "datagrams"}),
        (("inet",), {"messages", "tcp", "tcp6", "udp"}),
        (("netlink",), {"messages", "route"}),
    ],
)
def test_sockets_are_of_the_kinds_that_are_wanted(machine, families, expected):
    judge = Judge(machine, families=families)
    assert {name for name, arguments in SOCKETS.items() if judge("socket", *map(int, arguments)) == ALLOWED} == expected


def test_pairs_of_datagram_sockets_could_be_connected_elsewhere(machine):
    judge = Judge(machine)
    assert judge("socketpair", socket.AF_UNIX, int(socket.SOCK_STREAM)) == ALLOWED
    assert judge("socketpair", socket.AF_UNIX, int(socket.SOCK_DGRAM)) == EPERM


def test_modes_of_files_are_changed_only_by_who_writes_them(machine):
    assert Judge(machine)("fchmod", 3, 0o600) == EPERM
    assert Judge(machine, ownership=True)("fchmod", 3, 0o600) == ALLOWED


def test_typing_into_the_terminal_is_refused(machine):
    judge = Judge(machine)
    assert judge("ioctl", 0, 0x5412) == EPERM
    assert judge("ioctl", 0, 0x5411) == ALLOWED
    assert judge("fcntl", 0, 8, 1) == EPERM


def test_an_unknown_machine_has_no_filter():
    with pytest.raises(seccomp.SeccompUnavailableError):
        seccomp.actor_filter(machine="riscv64")


HEADERS = {
    "x86_64": ("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", r"#define __NR_(\w+)\s+(\d+)"),
    "aarch64": ("/usr/include/asm-generic/unistd.h", r"#define __NR(?:3264)?_(\w+)\s+(\d+)"),
}


def test_the_numbers_are_those_of_the_kernels_headers(machine):
    path, pattern = HEADERS[machine]
    if not Path(path).exists():
        pytest.skip("the kernel's headers are not installed")
    said: dict[str, int] = {}
    for name, number in re.findall(pattern, Path(path).read_text()):
        said.setdefault({"fstatat": "newfstatat"}.get(name, name) if machine == "aarch64" else name, int(number))
    known = seccomp.numbers(machine)
    compared = {name: number for name, number in known.items() if name in said}
    assert len(compared) > 150
    assert compared == {name: said[name] for name in compared}


@pytest.mark.skipif(not seccomp.is_available(), reason="this kernel takes no filters")
def test_the_kernel_does_as_the_filter_says():
    def confined() -> list[str]:
        seccomp.Program(seccomp.actor_filter(families=("inet",))).install()
        tried = (
            lambda: socket.socket().close(),
            lambda: socket.socket(socket.AF_UNIX).close(),
            lambda: os.kill(os.getpid(), 0),
            lambda: os.kill(os.getppid(), 0),
            os.fork,
            lambda: os.execv("/bin/true", ["true"]),
        )
        return [_outcome(attempt) for attempt in tried]

    assert in_child(confined) == ["ok", EPERM, "ok", EPERM, EPERM, EPERM]


def _outcome(attempt) -> str:
    try:
        attempt()
    except OSError as error:
        return errno.errorcode[error.errno]
    return "ok"


def test_asking_whether_filters_can_be_had_installs_none():
    before = Path("/proc/self/status").read_text().partition("Seccomp:")[2]
    seccomp.is_available()
    assert Path("/proc/self/status").read_text().partition("Seccomp:")[2].split()[:3] == before.split()[:3]
