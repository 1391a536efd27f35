"""The tunnels that peerup is measured beside: nothing at all, a socat pair, OpenSSH's port forwarding.

Each is a context manager that is given the port of a server on loopback and gives a `Tunnel`: a port on loopback that
leads to it. Everything runs from a private directory, on loopback, with keys made for the occasion. A reference whose
programs are not installed raises `AbsentError`; a result is never made up for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import getpass
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO

STARTUP = 15.0
"""Seconds that a reference may take to listen."""


class AbsentError(Exception):
    """A reference cannot run here; the text says what is missing."""


@dataclasses.dataclass(frozen=True)
class Tunnel:
    """A way to a server.

    Attributes:
        port: where clients connect, on 127.0.0.1.
        roots: pids of the tunnel's processes; with their descendants they are what the tunnel costs.
        started: CLOCK_MONOTONIC when the first process of the tunnel was started.
    """

    name: str
    port: int
    roots: tuple[int, ...]
    started: float


Reference = Callable[[int], AbstractContextManager[Tunnel]]


@contextlib.contextmanager
def loopback(target: int) -> Iterator[Tunnel]:
    """No tunnel: the client connects straight to the server."""
    yield Tunnel("loopback", target, (), time.monotonic())


@contextlib.contextmanager
def socat(target: int) -> Iterator[Tunnel]:
    """Two socat processes in a row with socat's default block size (8 KiB). Nothing is encrypted."""
    program = _find("socat")
    entry, middle = free_ports(2)
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        options = "bind=127.0.0.1,reuseaddr,fork,nodelay,backlog=1024"
        far = stack.enter_context(
            _running([program, f"TCP-LISTEN:{middle},{options}", f"TCP:127.0.0.1:{target},nodelay"])
        )
        near = stack.enter_context(
            _running([program, f"TCP-LISTEN:{entry},{options}", f"TCP:127.0.0.1:{middle},nodelay"])
        )
        wait_for_listener(middle, far)
        wait_for_listener(entry, near)
        yield Tunnel("socat", entry, (near.pid, far.pid), started)


def ssh(cipher: str | None = None) -> Reference:
    """`ssh -N -L` to a private sshd, with OpenSSH's default cipher or the one named."""

    @contextlib.contextmanager
    def run(target: int) -> Iterator[Tunnel]:
        programs = _find("ssh"), _find("sshd", "/usr/sbin"), _find("ssh-keygen")
        with (
            tempfile.TemporaryDirectory(prefix="peerup-bench-ssh-") as directory,
            _ssh_in(Path(directory), programs, cipher, target) as tunnel,
        ):
            yield tunnel

    return run


@contextlib.contextmanager
def _ssh_in(directory: Path, programs: tuple[str, str, str], cipher: str | None, target: int) -> Iterator[Tunnel]:
    client_program, server_program, keygen = programs
    for key in ("host", "client"):
        subprocess.run([keygen, "-q", "-t", "ed25519", "-N", "", "-f", directory / key], check=True)
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd's privilege separation needs it when root starts it
    shutil.copy(directory / "client.pub", directory / "authorized_keys")
    entry, port = free_ports(2)
    (directory / "known_hosts").write_text(f"[127.0.0.1]:{port} {(directory / 'host.pub').read_text()}")
    (directory / "sshd_config").write_text(
        "\n".join(
            [
                f"Port {port}",
                "ListenAddress 127.0.0.1",
                f"HostKey {directory}/host",
                f"AuthorizedKeysFile {directory}/authorized_keys",
                "StrictModes no",
                "UsePAM no",
                "PidFile none",
                "AuthenticationMethods publickey",
                "PasswordAuthentication no",
                "KbdInteractiveAuthentication no",
                "PermitRootLogin prohibit-password",
                "AllowTcpForwarding local",
                "AllowAgentForwarding no",
                "X11Forwarding no",
                "Compression no",
                "LogLevel ERROR",
                "",
            ]
        )
    )
    log = (directory / "log").open("w+")
    started = time.monotonic()
    with log, contextlib.ExitStack() as stack:
        # sshd insists on an absolute path to itself
        server = stack.enter_context(_running([server_program, "-D", "-e", "-f", f"{directory}/sshd_config"], log))
        wait_for_listener(port, server)
        options = [
            "BatchMode=yes",
            "Compression=no",
            "ExitOnForwardFailure=yes",
            "IdentitiesOnly=yes",
            "LogLevel=ERROR",
            "StrictHostKeyChecking=yes",
            f"UserKnownHostsFile={directory}/known_hosts",
            "GlobalKnownHostsFile=none",
        ]
        command = [client_program, "-F", "none", "-N", "-a", "-x", "-p", str(port), "-i", f"{directory}/client"]
        for option in options:
            command += ["-o", option]
        if cipher is not None:
            command += ["-c", cipher]
        command += ["-L", f"127.0.0.1:{entry}:127.0.0.1:{target}", f"{getpass.getuser()}@127.0.0.1"]
        client = stack.enter_context(_running(command, log))
        try:
            wait_for_listener(entry, client)
        except AbsentError as error:
            log.seek(0)
            raise AbsentError(f"{error}; it said: {log.read().strip() or 'nothing'}") from None
        yield Tunnel("ssh" if cipher is None else f"ssh {cipher}", entry, (client.pid, server.pid), started)


REFERENCES: dict[str, Reference] = {
    "loopback": loopback,
    "socat": socat,
    "ssh": ssh(),
    "ssh aes128-gcm": ssh("aes128-gcm@openssh.com"),
}


def free_ports(count: int) -> list[int]:
    """Different TCP ports on loopback that nobody listens on at this moment."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def wait_for_listener(port: int, process: subprocess.Popen[bytes]) -> None:
    """Return as soon as somebody listens on the port.

    Raises:
        AbsentError: the process ended first, or nobody listened within `STARTUP` seconds.
    """
    name = Path(str(process.args[0] if isinstance(process.args, list) else process.args)).name
    deadline = time.monotonic() + STARTUP
    needle = f"0100007F:{port:04X} 00000000:0000 0A"  # 127.0.0.1, any peer, LISTEN: see without connecting
    while needle not in Path("/proc/net/tcp").read_text():
        if process.poll() is not None:
            raise AbsentError(f"{name} ended with status {process.returncode} before it listened")
        if time.monotonic() > deadline:
            raise AbsentError(f"{name} did not listen within {STARTUP:g} s")
        time.sleep(0.002)


def _find(program: str, *more_places: str) -> str:
    path = os.pathsep.join([os.environ.get("PATH", ""), *more_places])
    found = shutil.which(program, path=path)
    if found is None:
        raise AbsentError(f"{program} is not installed")
    return found


@contextlib.contextmanager
def _running(command: list[str], log: IO[str] | int = subprocess.DEVNULL) -> Iterator[subprocess.Popen[bytes]]:
    # A group of its own, so that children that it forks per connection end with it.
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
