"""The real services that the demonstration tunnels to: a web server with files, and OpenSSH where it exists."""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from demo.node import DemoError, free_port

LARGE = 64 * 1024 * 1024


class WebServer:
    """Python's own web server in a process of its own, serving a few files.

    Attributes:
        port: where it listens on loopback.
        files: the SHA-256 of each file by name.
    """

    def __init__(self, directory: Path) -> None:
        root = directory / "www"
        root.mkdir()
        self.files: dict[str, str] = {}
        for name, content in {
            "hello.txt": b"Hello from home.\n",
            "empty.bin": b"",
            "small.bin": os.urandom(10_000),
            "large.bin": os.urandom(LARGE),
        }.items():
            (root / name).write_bytes(content)
            self.files[name] = hashlib.sha256(content).hexdigest()
        self.port = free_port()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", "--directory", str(root), str(self.port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def stop(self) -> None:
        """End the server."""
        self._process.terminate()
        self._process.wait(10)


class SshServer:
    """An OpenSSH server of our own on a loopback port, with keys made for the occasion.

    Attributes:
        port: where it listens.
    """

    def __init__(self, directory: Path) -> None:
        home = directory / "ssh"
        home.mkdir(mode=0o700)
        for key in ("host", "user"):
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(home / key)], check=True, timeout=30
            )
        shutil.copy(home / "user.pub", home / "authorized_keys")
        self.port = free_port()
        self._key = home / "user"
        config = home / "sshd_config"
        config.write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {home}/host\nPidFile none\n"
            f"AuthorizedKeysFile {home}/authorized_keys\nStrictModes no\nPasswordAuthentication no\n"
        )
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True, mode=0o755)  # sshd, started as root, insists on it
        self._log = (home / "sshd.log").open("wb")
        self._process = subprocess.Popen(
            [_sshd() or "sshd", "-D", "-e", "-f", str(config)], stdout=subprocess.DEVNULL, stderr=self._log
        )

    @staticmethod
    def available() -> bool:
        """Whether this machine has an OpenSSH server and client."""
        return bool(_sshd() and shutil.which("ssh") and shutil.which("ssh-keygen"))

    def session(self, *options: str) -> str:
        """What a command printed in an ssh session made with these further options."""
        arguments = ["ssh", "-F", "none", "-i", str(self._key), "-o", "BatchMode=yes", "-o", "IdentitiesOnly=yes"]
        arguments += ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR"]
        arguments += [*options, f"{getpass.getuser()}@127.0.0.1", "echo it is $(expr 6 \\* 7)"]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=30, check=False)
        if done.returncode != 0:
            raise DemoError(f"ssh failed: {done.stderr.strip()}")
        return done.stdout.strip()

    def stop(self) -> None:
        """End the server."""
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        self._log.close()


def _sshd() -> str | None:
    for candidate in (shutil.which("sshd"), "/usr/sbin/sshd", "/usr/local/sbin/sshd"):
        if candidate and Path(candidate).exists():
            return candidate
    return None


def wait_for_port(port: int, deadline: float = 10.0) -> None:
    """Return as soon as something listens on this loopback port.

    Raises:
        DemoError: nothing does within `deadline` seconds.
    """
    import socket

    until = time.monotonic() + deadline
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        if time.monotonic() > until:
            raise DemoError(f"nothing listens on port {port}")
        time.sleep(0.01)
