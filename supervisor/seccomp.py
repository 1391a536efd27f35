"""seccomp: which system calls a process may make from now on: a filter in the kernel that cannot be taken away again.

Theory of operation. A filter is a program for the kernel's packet-filter machine (seccomp(2), "classic BPF"), which
sees the number of a system call, the architecture and the values of the arguments, but not what pointers lead to. So
it decides about kinds of things (a socket of this family, a signal to this process); which *files* may be used is
decided by Landlock (:mod:`supervisor.landlock`), which knows paths.

Two filters are made here:

* :func:`actor_filter`: what is listed is allowed, all else is refused. For processes that make no others.
* :func:`base_filter`: what no process of a node ever needs is refused, all else is allowed. For processes that make
  others. A child inherits it and adds its own; the stricter answer counts.

A refused call fails with EPERM. Those that libc tries before an older one, and those that are newer than this file,
fail with ENOSYS, so that libc and libraries fall back as they do on an older kernel. The numbers are those of x86-64
and arm64; there is no filter for other machines. Calls in another convention of the same machine (32-bit, x32) have
other numbers and are all refused.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import platform
import socket
import struct
from collections.abc import Collection, Iterable, Sequence
from typing import Final

from protocol.errors import PeerupError

NEWEST_KNOWN: Final = 469
"""The highest number of a system call when this file was written (Linux 6.18); the same on both machines."""

RECENT: Final = 449
"""From this number on (Linux 5.16) libc may try a call and expects ENOSYS where there is none."""

_ALLOWED: Final = (
    "accept 43 202; accept4 288 242; access 21 -1; alarm 37 -1; arch_prctl 158 -1; bind 49 200; brk 12 214; "
    "capget 125 90; clock_getres 229 114; clock_gettime 228 113; clock_nanosleep 230 115; close 3 57; "
    "close_range 436 436; connect 42 203; copy_file_range 326 285; dup 32 23; dup2 33 -1; dup3 292 24; "
    "epoll_create 213 -1; epoll_create1 291 20; epoll_ctl 233 21; epoll_pwait 281 22; epoll_pwait2 441 441; "
    "epoll_wait 232 -1; eventfd 284 -1; eventfd2 290 19; exit 60 93; exit_group 231 94; faccessat 269 48; "
    "faccessat2 439 439; fadvise64 221 223; fallocate 285 47; fdatasync 75 83; flock 73 32; fstat 5 80; "
    "fstatfs 138 44; fsync 74 82; ftruncate 77 46; futex 202 98; get_robust_list 274 100; getcpu 309 168; "
    "getcwd 79 17; getdents 78 -1; getdents64 217 61; getegid 108 177; geteuid 107 175; getgid 104 176; "
    "getgroups 115 158; getitimer 36 102; getpeername 52 205; getpgid 121 155; getpgrp 111 -1; getpid 39 172; "
    "getppid 110 173; getpriority 140 141; getrandom 318 278; getresgid 120 150; getresuid 118 148; "
    "getrlimit 97 163; getrusage 98 165; getsid 124 156; getsockname 51 204; getsockopt 55 209; gettid 186 178; "
    "gettimeofday 96 169; getuid 102 174; inotify_add_watch 254 27; inotify_init 253 -1; inotify_init1 294 26; "
    "inotify_rm_watch 255 28; listen 50 201; lseek 8 62; lstat 6 -1; madvise 28 233; membarrier 324 283; "
    "memfd_create 319 279; mincore 27 232; mlock 149 228; mlock2 325 284; mmap 9 222; mprotect 10 226; "
    "mremap 25 216; msync 26 227; munlock 150 229; munmap 11 215; nanosleep 35 101; newfstatat 262 79; "
    "open 2 -1; openat 257 56; openat2 437 437; pidfd_open 434 434; pipe 22 -1; pipe2 293 59; poll 7 -1; "
    "ppoll 271 73; pread64 17 67; preadv 295 69; preadv2 327 286; pselect6 270 72; pwrite64 18 68; "
    "pwritev 296 70; pwritev2 328 287; read 0 63; readahead 187 213; readlink 89 -1; readlinkat 267 78; "
    "readv 19 65; recvfrom 45 207; recvmmsg 299 243; recvmsg 47 212; rename 82 -1; renameat 264 38; "
    "renameat2 316 276; restart_syscall 219 128; rseq 334 293; rt_sigaction 13 134; rt_sigpending 127 136; "
    "rt_sigprocmask 14 135; rt_sigreturn 15 139; rt_sigsuspend 130 133; rt_sigtimedwait 128 137; "
    "sched_get_priority_max 146 125; sched_get_priority_min 147 126; sched_getaffinity 204 123; "
    "sched_getparam 143 121; sched_getscheduler 145 120; sched_yield 24 124; select 23 -1; sendfile 40 71; "
    "sendmmsg 307 269; sendmsg 46 211; sendto 44 206; set_robust_list 273 99; set_tid_address 218 96; "
    "setitimer 38 103; setsockopt 54 208; shutdown 48 210; sigaltstack 131 132; signalfd 282 -1; "
    "signalfd4 289 74; splice 275 76; stat 4 -1; statfs 137 43; statx 332 291; sync_file_range 277 84; "
    "sysinfo 99 179; time 201 -1; timerfd_create 283 85; timerfd_gettime 287 87; timerfd_settime 286 86; "
    "times 100 153; truncate 76 45; umask 95 166; uname 63 160; unlink 87 -1; unlinkat 263 35; wait4 61 260; "
    "waitid 247 95; write 1 64; writev 20 66"
)
"""Harmless for a process that may only touch what it has: `name x86-64 arm64`, -1 where there is none."""

_CONDITIONAL: Final = (
    "clone 56 220; clone3 435 435; fchmod 91 52; fchown 93 55; fcntl 72 25; ioctl 16 29; kill 62 129; "
    "prctl 157 167; prlimit64 302 261; socket 41 198; socketpair 53 199; tgkill 234 131"
)
"""What depends on the arguments, or on what the process is for."""

_DANGEROUS: Final = (
    "_sysctl 156 -1; acct 163 89; add_key 248 217; adjtimex 159 171; bpf 321 280; chroot 161 51; "
    "clock_adjtime 305 266; clock_settime 227 112; delete_module 176 106; execve 59 221; execveat 322 281; "
    "fanotify_init 300 262; fanotify_mark 301 263; finit_module 313 273; fsconfig 431 431; fsmount 432 432; "
    "fsopen 430 430; fspick 433 433; init_module 175 105; io_uring_enter 426 426; io_uring_register 427 427; "
    "io_uring_setup 425 425; ioperm 173 -1; iopl 172 -1; kcmp 312 272; kexec_file_load 320 294; "
    "kexec_load 246 104; keyctl 250 219; lookup_dcookie 212 18; memfd_secret 447 447; migrate_pages 256 238; "
    "modify_ldt 154 -1; mount 165 40; mount_setattr 442 442; move_mount 429 429; move_pages 279 239; "
    "name_to_handle_at 303 264; nfsservctl 180 42; open_by_handle_at 304 265; open_tree 428 428; "
    "open_tree_attr 467 467; perf_event_open 298 241; personality 135 92; pidfd_getfd 438 438; "
    "pivot_root 155 41; process_madvise 440 440; process_vm_readv 310 270; process_vm_writev 311 271; "
    "ptrace 101 117; quotactl 179 60; quotactl_fd 443 443; reboot 169 142; request_key 249 218; "
    "setdomainname 171 162; sethostname 170 161; setns 308 268; settimeofday 164 170; swapoff 168 225; "
    "swapon 167 224; syslog 103 116; umount2 166 39; unshare 272 97; uselib 134 -1; userfaultfd 323 282; "
    "vhangup 153 58"
)
"""What no process of a node ever needs, not even one that makes processes."""

_ARCHITECTURES: Final = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Machine: its column in the tables, and the kernel's AUDIT_ARCH number for it."""

_X32_BIT: Final = 0x40000000

_INSTRUCTION: Final = struct.Struct("=HBBI")
_LOAD, _AND, _EQUAL, _ABOVE, _AT_LEAST, _RETURN = 0x20, 0x54, 0x15, 0x25, 0x35, 0x06
_NUMBER_OFFSET, _ARCH_OFFSET = 0, 4
_ALLOW: Final = 0x7FFF0000
_ERRNO: Final = 0x00050000
_REFUSE: Final = _ERRNO | errno.EPERM
_ABSENT: Final = _ERRNO | errno.ENOSYS
_MAX_JUMP: Final = 255

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _PR_GET_SECCOMP = 38, 22, 21
_FILTER_MODE: Final = 2

OWN_PID: Final = 0x7FEDCBA9
"""Stands for the number of the process that puts a filter in force; no process and nothing else has this number."""

_SOCKET_TYPE_MASK: Final = 0xF
_WORD: Final = 0xFFFFFFFF
_CLONE_THREAD: Final = 0x10000
_CLONE_NEW: Final = 0x7E020080
"""Flags of clone that make namespaces."""

_PRCTL_ALLOWED: Final = (3, 15, 16, 21, 39, 0x53564D41)
"""PR_GET_DUMPABLE, PR_SET_NAME, PR_GET_NAME, PR_GET_SECCOMP, PR_GET_NO_NEW_PRIVS, PR_SET_VMA (names for memory)."""

_FCNTL_REFUSED: Final = (8, 10, 15, 1026)
"""F_SETOWN, F_SETSIG, F_SETOWN_EX, F_NOTIFY: signals to other processes."""

_IOCTL_REFUSED: Final = (0x5412, 0x541C, 0x8901, 0x8902)
"""TIOCSTI and TIOCLINUX (typing into the terminal), FIOSETOWN and SIOCSPGRP (signals)."""

_libc = ctypes.CDLL(None, use_errno=True)

Test = tuple[int, int, int]
"""Which argument, a mask, and what must be left of its lower 32 bits."""

Clause = tuple[Sequence[Test], int]
"""All of these tests, and the answer if they hold."""


class SeccompUnavailableError(PeerupError):
    """The kernel has no seccomp filters, does not let this process have one, or the machine is of an unknown kind."""

    code = "seccomp-unavailable"


def is_available() -> bool:
    """Whether this kernel takes filters, on this machine."""
    if platform.machine() not in _ARCHITECTURES:
        return False
    # With a filter that cannot be read the call fails with EFAULT where there are filters, with EINVAL where not.
    _libc.prctl(_PR_SET_SECCOMP, _FILTER_MODE, None, 0, 0)
    return ctypes.get_errno() == errno.EFAULT


@functools.cache
def numbers(machine: str) -> dict[str, int]:
    """The numbers of all calls that the filters name, on this kind of machine.

    Raises:
        SeccompUnavailableError: it is of an unknown kind.
    """
    column, _ = _architecture(machine)
    found = {}
    for entry in f"{_ALLOWED}; {_CONDITIONAL}; {_DANGEROUS}".split("; "):
        name, *both = entry.split()
        if int(both[column]) >= 0:
            found[name] = int(both[column])
    return found


def actor_filter(
    *,
    families: Collection[str] = (),
    ownership: bool = False,
    terminate: int = 0,
    pid: int = OWN_PID,
    machine: str | None = None,
) -> bytes:
    """The filter for a process that makes no others and runs no programs.

    Arguments:
        families: further sockets than `SOCK_SEQPACKET` of the Unix family: `inet` (IPv4 and IPv6), `netlink` (routes),
            `unix` (streams and datagrams).
        ownership: whether modes and owners of open files may be changed.
        terminate: a process that may be sent SIGTERM, besides itself any signal; 0 for none.
        pid: the process that the filter is for; by default the one that puts it in force.
        machine: as `platform.machine()` names it; None: this one.

    Raises:
        SeccompUnavailableError: the machine is of an unknown kind.
    """
    machine = platform.machine() if machine is None else machine
    known = numbers(machine)
    program = _Program(machine)
    conditions: dict[str, tuple[list[Clause], int]] = {
        "socket": (_sockets(families), _REFUSE),
        "socketpair": (
            [(((0, _WORD, socket.AF_UNIX), (1, _SOCKET_TYPE_MASK, int(kind))), _ALLOW) for kind in _PAIRS],
            _REFUSE,
        ),
        "clone": ([(((0, _CLONE_THREAD | _CLONE_NEW, _CLONE_THREAD),), _ALLOW)], _REFUSE),
        "kill": (
            [
                (((0, _WORD, pid),), _ALLOW),
                *([(((0, _WORD, terminate), (1, _WORD, 15)), _ALLOW)] if terminate else []),
            ],
            _REFUSE,
        ),
        "tgkill": ([(((0, _WORD, pid),), _ALLOW)], _REFUSE),
        "prctl": ([(((0, _WORD, option),), _ALLOW) for option in _PRCTL_ALLOWED], _REFUSE),
        "fcntl": ([(((1, _WORD, command),), _REFUSE) for command in _FCNTL_REFUSED], _ALLOW),
        "ioctl": ([(((1, _WORD, request),), _REFUSE) for request in _IOCTL_REFUSED], _ALLOW),
        "prlimit64": ([(((0, _WORD, 0),), _ALLOW), (((0, _WORD, pid),), _ALLOW)], _REFUSE),
        "fchmod": ([], _ALLOW if ownership else _REFUSE),
        "fchown": ([], _ALLOW if ownership else _REFUSE),
        "clone3": ([], _ABSENT),  # its flags are behind a pointer
    }
    program.answer(_named(_ALLOWED, known), _ALLOW)
    for name, (clauses, otherwise) in conditions.items():
        program.judge(known[name], clauses, otherwise)
    return program.end(RECENT, below=_REFUSE)


_PAIRS: Final = (socket.SOCK_STREAM, socket.SOCK_SEQPACKET)
"""Pairs of these are connected for good; one end of a pair for datagrams could be connected anew, to anybody."""


def _sockets(families: Collection[str]) -> list[Clause]:
    clauses: list[Clause] = [(((0, _WORD, socket.AF_UNIX), (1, _SOCKET_TYPE_MASK, int(socket.SOCK_SEQPACKET))), _ALLOW)]
    if "unix" in families:
        clauses.append((((0, _WORD, socket.AF_UNIX),), _ALLOW))
    if "inet" in families:
        # No raw sockets, and of the datagrams and streams only those of UDP and TCP.
        for family in (socket.AF_INET, socket.AF_INET6):
            for kind, protocol in ((socket.SOCK_STREAM, socket.IPPROTO_TCP), (socket.SOCK_DGRAM, socket.IPPROTO_UDP)):
                for number in (0, int(protocol)):
                    tests = (0, _WORD, int(family)), (1, _SOCKET_TYPE_MASK, int(kind)), (2, _WORD, number)
                    clauses.append((tests, _ALLOW))
    if "netlink" in families:
        clauses.append((((0, _WORD, socket.AF_NETLINK), (2, _WORD, socket.NETLINK_ROUTE)), _ALLOW))
    return clauses


def base_filter(machine: str | None = None) -> bytes:
    """The filter for processes that make others: without what no process of a node needs.

    Raises:
        SeccompUnavailableError: the machine is of an unknown kind.
    """
    machine = platform.machine() if machine is None else machine
    known = numbers(machine)
    program = _Program(machine)
    program.answer(_named(_DANGEROUS, known), _REFUSE)
    program.judge(known["clone"], [(((0, _CLONE_NEW, 0),), _ALLOW)], _REFUSE)
    program.judge(known["clone3"], [], _ABSENT)
    return program.end(NEWEST_KNOWN + 1, below=_ALLOW)


def refusing(names: Iterable[str], number: int = errno.ENOSYS, extra: Iterable[int] = ()) -> bytes:
    """A filter that lets everything pass but these calls, by name or number: for trying what an older kernel does."""
    known = numbers(platform.machine())
    program = _Program(platform.machine())
    program.answer({*(known[name] for name in names), *extra}, _ERRNO | number)
    return program.end(_X32_BIT, below=_ALLOW)


class Program:
    """A filter that is ready to be put in force, by this process or by one that is made after it."""

    def __init__(self, code: bytes) -> None:
        self._buffer = ctypes.create_string_buffer(code, len(code))
        wanted = struct.pack("=I", OWN_PID)
        size = _INSTRUCTION.size
        self._own = [at + 4 for at in range(0, len(code), size) if code[at + 4 : at + size] == wanted]
        self._header = struct.pack("HxxxxxxP", len(code) // size, ctypes.addressof(self._buffer))

    def install(self) -> None:
        """Put the filter in force for this thread and all that it makes from now on; there is no way back.

        It also gives up the right to gain privileges by running programs, which the kernel wants first.

        Raises:
            SeccompUnavailableError: the kernel does not take it.
        """
        for offset in self._own:
            struct.pack_into("=I", self._buffer, offset, os.getpid())
        _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        if _libc.prctl(_PR_SET_SECCOMP, _FILTER_MODE, ctypes.c_char_p(self._header), 0, 0) != 0:
            number = ctypes.get_errno()
            raise SeccompUnavailableError(f"the kernel takes no seccomp filter: {os.strerror(number)}")


def _architecture(machine: str) -> tuple[int, int]:
    try:
        return _ARCHITECTURES[machine]
    except KeyError:
        raise SeccompUnavailableError(f"there is no seccomp filter for machines of the kind {machine}") from None


def _named(table: str, known: dict[str, int]) -> set[int]:
    return {known[name] for name in (entry.split()[0] for entry in table.split("; ")) if name in known}


class _Program:
    """A filter while it is being put together. The number of the call is at hand between any two of its parts."""

    def __init__(self, machine: str) -> None:
        _, architecture = _architecture(machine)
        self._code = bytearray()
        self._emit(_LOAD, _ARCH_OFFSET)
        self._emit(_EQUAL, architecture, yes=1)
        self._emit(_RETURN, _REFUSE)
        self._emit(_LOAD, _NUMBER_OFFSET)
        if machine == "x86_64":
            self._emit(_AT_LEAST, _X32_BIT, no=1)
            self._emit(_RETURN, _REFUSE)

    def answer(self, calls: Collection[int], answer: int) -> None:
        """Give this answer for these calls."""
        for first, last in _runs(sorted(calls)):
            if first == last:
                self._emit(_EQUAL, first, no=1)
            else:
                self._emit(_AT_LEAST, first, no=2)
                self._emit(_ABOVE, last, yes=1)
            self._emit(_RETURN, answer)

    def judge(self, call: int, clauses: Sequence[Clause], otherwise: int) -> None:
        """Give the answer of the first clause that holds for the arguments of this call, or the last one."""
        body = bytearray()
        for tests, answer in clauses:
            part = bytearray()
            left = 3 * len(tests)
            for argument, mask, wanted in tests:
                left -= 3
                part += _INSTRUCTION.pack(_LOAD, 0, 0, 16 + 8 * argument)
                part += _INSTRUCTION.pack(_AND, 0, 0, mask)
                part += _INSTRUCTION.pack(_EQUAL, 0, left + 1, wanted)
            body += part + _INSTRUCTION.pack(_RETURN, 0, 0, answer)
        body += _INSTRUCTION.pack(_RETURN, 0, 0, otherwise)
        length = len(body) // _INSTRUCTION.size
        assert length <= _MAX_JUMP
        self._emit(_EQUAL, call, no=length)
        self._code += body

    def end(self, absent: int, *, below: int) -> bytes:
        """The whole: calls from the number `absent` on do not exist, and for the rest there is one answer."""
        self._emit(_AT_LEAST, absent, no=1)
        self._emit(_RETURN, _ABSENT)
        self._emit(_RETURN, below)
        return bytes(self._code)

    def _emit(self, operation: int, value: int, *, yes: int = 0, no: int = 0) -> None:
        self._code += _INSTRUCTION.pack(operation, yes, no, value)


def _runs(values: Sequence[int]) -> Iterable[tuple[int, int]]:
    """Neighbouring numbers as (first, last)."""
    first = last = -1
    for value in values:
        if value == last + 1 and first >= 0:
            last = value
            continue
        if first >= 0:
            yield first, last
        first = last = value
    if first >= 0:
        yield first, last
