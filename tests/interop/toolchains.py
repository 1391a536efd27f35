"""Builds the foreign peers, once: results are kept under a name made of the hash of their sources.

They are beside the sources, or in the directory that PEERUP_INTEROP_CACHE names, which several checkouts may share.
Tests run in several processes at once, so a file lock lets one build while the others wait. Nothing is downloaded but
what go.sum, package-lock.json and Cargo.lock name with their hashes, by `go`, `npm` and `cargo` as the machine has them
set up; a download that fails is tried again. `python -m tests.interop.toolchains` builds all that can be built.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).parent
BUILD_TIMEOUT = 540.0
"""Seconds for one build on a slow machine with nothing downloaded yet (measured on two cores: 40 s for go, 7 s for js,
130 s for rust)."""

PAUSES = (5.0, 20.0)
"""Seconds before a download that failed is tried again."""

MINIMUM_NODE = 20
MINIMUM_GO = (1, 25)
MINIMUM_RUST = (1, 88)

OPTIONAL = {"rust"}
"""Peers without which the interop tests are still whole: skipped where they cannot be built, whatever is required."""


class MissingToolError(Exception):
    """A peer cannot be built here; the text says which program is missing or too old."""


class BuildError(Exception):
    """A peer that should be built here could not be; the text is what the tool said."""


def go_peer() -> list[str]:
    """The command that starts the peer on go-libp2p.

    Raises:
        MissingToolError: no `go`, or too old a one.
        BuildError: it could not be built.
    """
    go = shutil.which("go")
    if go is None:
        raise MissingToolError("go is not installed (the go-libp2p peer needs it)")
    version = _output(go, "version")
    found = re.search(r"go(\d+)\.(\d+)", version)
    if found is None or (int(found[1]), int(found[2])) < MINIMUM_GO:
        raise MissingToolError(f"go {MINIMUM_GO[0]}.{MINIMUM_GO[1]} or newer is needed, here is: {version.strip()}")
    directory = HERE / "go"
    kept = _kept("go")
    program = kept / f"peer-{_digest(directory, '*.go', 'go.mod', 'go.sum', salt=version)}"
    with _locked(kept):
        if not program.exists():
            # Built under another name and then renamed, so that an interrupted build leaves nothing that looks whole.
            unfinished = program.with_suffix(".unfinished")
            _download([go, "mod", "download"], directory)
            _run([go, "build", "-trimpath", "-ldflags=-s -w", "-o", str(unfinished), "."], directory)
            unfinished.rename(program)
    return [str(program)]


def js_peer() -> list[str]:
    """The command that starts the peer on js-libp2p.

    Raises:
        MissingToolError: no `node` or `npm`, or too old a node.
        BuildError: its packages could not be installed.
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
            _download([npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"], directory)
            stamp.touch()
    return [node, str(directory / "peer.mjs")]


def rust_peer() -> list[str]:
    """The command that starts the peer on rust-libp2p.

    Raises:
        MissingToolError: no `cargo`, too old a one, or one that cannot get the locked crates.
        BuildError: it could not be built.
    """
    cargo = shutil.which("cargo")
    if cargo is None:
        raise MissingToolError("cargo is not installed (the rust-libp2p peer needs it)")
    version = _output(cargo, "--version").strip()
    found = re.match(r"cargo (\d+)\.(\d+)", version)
    if found is None or (int(found[1]), int(found[2])) < MINIMUM_RUST:
        raise MissingToolError(f"cargo {MINIMUM_RUST[0]}.{MINIMUM_RUST[1]} or newer is needed, here is: {version}")
    directory = HERE / "rust"
    kept = _kept("rust")
    program = kept / f"peer-{_digest(directory, 'src/*.rs', 'Cargo.toml', 'Cargo.lock', salt=version)}"
    with _locked(kept):
        if not program.exists():
            try:
                _download([cargo, "fetch", "--locked", "--quiet"], directory)
            except BuildError as error:
                raise MissingToolError(f"the crates of the rust-libp2p peer cannot be fetched: {error}") from error
            _run([cargo, "build", "--release", "--locked", "--offline", "--quiet"], directory)
            unfinished = program.with_suffix(".unfinished")
            shutil.copy2(directory / "target" / "release" / "peerup-interop-rust", unfinished)
            unfinished.rename(program)
    return [str(program)]


def _once(build: Callable[[], list[str]]) -> Callable[[], list[str]]:
    """Build it once in this process; who asks again gets the same failure, and not another attempt."""

    @functools.cache
    def outcome() -> list[str] | Exception:
        try:
            return build()
        except (MissingToolError, BuildError) as error:
            return error

    def command() -> list[str]:
        found = outcome()
        if isinstance(found, Exception):
            raise found.with_traceback(None)
        return found

    return command


BUILDERS = {"go": _once(go_peer), "js": _once(js_peer), "rust": _once(rust_peer)}


def _kept(name: str) -> Path:
    """Where the programs of this peer are kept."""
    cache = os.environ.get("PEERUP_INTEROP_CACHE")
    return Path(cache) / name if cache else HERE / name / "build"


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    directory.mkdir(parents=True, exist_ok=True)
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
    try:
        done = subprocess.run(
            command, cwd=directory, capture_output=True, text=True, timeout=BUILD_TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        raise BuildError(f"{' '.join(command)} in {directory} took more than {BUILD_TIMEOUT:g} s") from None
    if done.returncode:
        raise BuildError(
            f"{' '.join(command)} in {directory} failed with status {done.returncode}:\n{done.stdout}\n{done.stderr}"
        )


def _download(command: list[str], directory: Path) -> None:
    """Run what needs the network, and try again where it fails: most failures there are over in a moment."""
    for pause in PAUSES:
        try:
            return _run(command, directory)
        except BuildError as error:
            print(f"{error}\ntrying again in {pause:g} s", file=sys.stderr)
        time.sleep(pause)
    return _run(command, directory)


def main() -> int:
    status = 0
    for name, build in BUILDERS.items():
        began = time.monotonic()
        try:
            print(f"{name}: {' '.join(build())} ({time.monotonic() - began:.0f} s)")
        except MissingToolError as error:
            print(f"{name}: not built: {error}")
        except BuildError as error:
            print(f"{name}: NOT BUILT: {error}")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
