"""Builds the foreign peers, once per machine: results are kept beside the sources, under a name made of their hash.

Tests run in several processes at once, so a file lock lets one build while the others wait. Nothing is downloaded but
what go.sum and package-lock.json name with their hashes, by `go` and `npm` as the machine has them set up.
`python -m tests.interop.toolchains` builds all that can be built.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
BUILD_TIMEOUT = 540.0
"""Seconds for one build on a slow machine with nothing downloaded yet (measured on two cores: 40 s for go, 7 s for js,
130 s for rust)."""

MINIMUM_NODE = 20
MINIMUM_GO = (1, 25)
MINIMUM_RUST = (1, 88)

OPTIONAL = {"rust"}
"""Peers without which the interop tests are still whole: skipped where they cannot be built, whatever is required."""


class MissingToolError(Exception):
    """A peer cannot be built here; the text says which program is missing or too old."""


def go_peer() -> list[str]:
    """The command that starts the peer on go-libp2p.

    Raises:
        MissingToolError: no `go`, or too old a one.
    """
    go = shutil.which("go")
    if go is None:
        raise MissingToolError("go is not installed (the go-libp2p peer needs it)")
    version = _output(go, "version")
    found = re.search(r"go(\d+)\.(\d+)", version)
    if found is None or (int(found[1]), int(found[2])) < MINIMUM_GO:
        raise MissingToolError(f"go {MINIMUM_GO[0]}.{MINIMUM_GO[1]} or newer is needed, here is: {version.strip()}")
    directory = HERE / "go"
    program = directory / "build" / f"peer-{_digest(directory, '*.go', 'go.mod', 'go.sum', salt=version)}"
    with _locked(directory / "build"):
        if not program.exists():
            # Built under another name and then renamed, so that an interrupted build leaves nothing that looks whole.
            unfinished = program.with_suffix(".unfinished")
            _run([go, "build", "-trimpath", "-ldflags=-s -w", "-o", str(unfinished), "."], directory)
            unfinished.rename(program)
    return [str(program)]


def js_peer() -> list[str]:
    """The command that starts the peer on js-libp2p.

    Raises:
        MissingToolError: no `node` or `npm`, or too old a node.
    """
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        raise MissingToolError("node or npm is not installed (the js-libp2p peer needs both)")
    version = _output(node, "--version").strip()
    found = re.match(r"v(\d+)\.", version)
    if found is None or int(found[1]) < MINIMUM_NODE:
        raise MissingToolError(f"node {MINIMUM_NODE} or newer is needed, here is {version}")
    directory = HERE / "js"
    stamp = directory / "node_modules" / f".installed-{_digest(directory, 'package.json', 'package-lock.json')}"
    with _locked(directory / "build"):
        if not stamp.exists():
            _run([npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"], directory)
            stamp.touch()
    return [node, str(directory / "peer.mjs")]


def rust_peer() -> list[str]:
    """The command that starts the peer on rust-libp2p.

    Raises:
        MissingToolError: no `cargo`, too old a one, or one that cannot get the locked crates.
    """
    cargo = shutil.which("cargo")
    if cargo is None:
        raise MissingToolError("cargo is not installed (the rust-libp2p peer needs it)")
    version = _output(cargo, "--version").strip()
    found = re.match(r"cargo (\d+)\.(\d+)", version)
    if found is None or (int(found[1]), int(found[2])) < MINIMUM_RUST:
        raise MissingToolError(f"cargo {MINIMUM_RUST[0]}.{MINIMUM_RUST[1]} or newer is needed, here is: {version}")
    directory = HERE / "rust"
    program = directory / "build" / f"peer-{_digest(directory, 'src/*.rs', 'Cargo.toml', 'Cargo.lock', salt=version)}"
    with _locked(directory / "build"):
        if not program.exists():
            try:
                _run([cargo, "fetch", "--locked", "--quiet"], directory)
            except RuntimeError as error:
                raise MissingToolError(f"the crates of the rust-libp2p peer cannot be fetched: {error}") from error
            _run([cargo, "build", "--release", "--locked", "--offline", "--quiet"], directory)
            unfinished = program.with_suffix(".unfinished")
            shutil.copy2(directory / "target" / "release" / "peerup-interop-rust", unfinished)
            unfinished.rename(program)
    return [str(program)]


BUILDERS = {"go": go_peer, "js": js_peer, "rust": rust_peer}


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    directory.mkdir(exist_ok=True)
    with (directory / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _digest(directory: Path, *patterns: str, salt: str = "") -> str:
    digest = hashlib.sha256(salt.encode())
    for path in sorted({path for pattern in patterns for path in directory.glob(pattern)}):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def _run(command: list[str], directory: Path) -> None:
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=BUILD_TIMEOUT, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with status {done.returncode}:\n{done.stdout}\n{done.stderr}")


def main() -> int:
    for name, build in BUILDERS.items():
        try:
            print(f"{name}: {' '.join(build())}")
        except MissingToolError as error:
            print(f"{name}: not built: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
