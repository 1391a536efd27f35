"""`make install` and `make uninstall`, into directories made for the occasion."""

from __future__ import annotations

import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECONDS = 300

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(shutil.which("make") is None, reason="there is no make"),
]


def make(target: str, *, status: int = 0, umask: int = 0o022, **variables: object) -> subprocess.CompletedProcess[str]:
    """Run make with these variables, as somebody with this umask would."""
    done = subprocess.run(
        ["make", target, f"PYTHON={sys.executable}", *(f"{key}={value}" for key, value in variables.items())],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
        umask=umask,
    )
    assert (done.returncode == 0) == (status == 0), done.stdout + done.stderr
    return done


def below(path: Path) -> set[str]:
    """Everything in this directory, as relative paths."""
    return {str(found.relative_to(path)) for found in path.rglob("*")}


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A PREFIX in which peerup is installed beside files of somebody else."""
    prefix = tmp_path_factory.mktemp("installed") / "prefix"
    (prefix / "bin").mkdir(parents=True)
    (prefix / "bin" / "other").write_text("not ours\n")
    before = {entry.name for entry in ROOT.iterdir()}
    make("install", umask=0o077, PREFIX=prefix)
    assert {entry.name for entry in ROOT.iterdir()} == before, "it builds nothing in the source tree"
    return prefix


def test_the_programs_run_isolated_and_everybody_may_run_them(installed, tmp_path):
    (tmp_path / "peerup.py").write_text("raise SystemExit('not this one')\n")
    program = installed / "bin" / "peerup"
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(tmp_path)}
    for arguments in (["version"], ["--version"], ["daemon", "--help"], ["relay", "--help"]):
        done = subprocess.run(
            [program, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=True
        )
        assert "peerup" in done.stdout
    for path in installed.rglob("*"):
        if not path.is_symlink():
            readable = 0o555 if path.is_dir() or path.parent == installed / "bin" else 0o444
            if path.name != "other":
                assert stat.S_IMODE(path.stat().st_mode) & readable == readable, path


def test_the_environment_holds_the_locked_dependencies_and_no_tools(installed):
    site = next((installed / "lib" / "peerup" / "lib").glob("python3*")) / "site-packages"
    there = dict(
        re.fullmatch(r"(.+)-([^-]+)\.dist-info", path.name).groups()  # type: ignore[union-attr]  # fails the test
        for path in site.glob("*.dist-info")
    )
    locked = dict(re.findall(r"^([A-Za-z0-9_.-]+)==([^ ;\\]+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE))

    def plain(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    wanted = {plain(name): version for name, version in locked.items()}
    del there["peerup"]
    for name, version in there.items():
        assert wanted[plain(name)] == version
    assert {"trio", "thespian", "cryptography"} <= {plain(name) for name in there}
    assert not {"pip", "setuptools", "wheel", "pytest"} & {path.name for path in site.iterdir()}
    assert {path.name.rstrip("0123456789.") for path in (installed / "lib" / "peerup" / "bin").iterdir()} == {"python"}
    assert not list(site.glob("tests")), "only the program"


def test_nothing_points_to_where_it_was_built(installed):
    for path in installed.rglob("*"):
        if path.is_file() and not path.is_symlink():
            assert b"peerup-install." not in path.read_bytes(), path


def test_the_manifest_names_all_and_the_units_and_completions_are_in_place(installed):
    lines = (installed / "lib" / "peerup" / "manifest").read_text().splitlines()
    named = {line[2:] for line in lines}
    rest = {name for name in below(installed) if name != "lib/peerup" and not name.startswith("lib/peerup/")}
    assert rest - named == {"bin", "bin/other"}
    assert named <= rest
    for unit in ("system/peerup.service", "system/peerup-relay.service", "user/peerup.service"):
        text = (installed / "lib" / "systemd" / unit).read_text()
        assert f"ExecStart={installed}/bin/peerup " in text
        assert "/usr/local" not in text
    for name, words in {
        "share/bash-completion/completions/peerup": "complete -o",
        "share/zsh/site-functions/_peerup": "#compdef peerup",
        "share/fish/vendor_completions.d/peerup.fish": "complete --no-files",
    }.items():
        assert words in (installed / name).read_text()


def test_an_installed_node_runs_and_ends(installed, tmp_path):
    program, home = str(installed / "bin" / "peerup"), str(tmp_path / "node")
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    listen = "/ip4/127.0.0.1/tcp/0"
    subprocess.run(
        [program, "--home", home, "init", "--yes", "--listen", listen],
        env=environment,
        check=True,
        timeout=60,
        capture_output=True,
    )
    log = tmp_path / "log"
    with (
        log.open("wb") as errors,
        subprocess.Popen(
            [program, "--home", home, "daemon"], env=environment, stdout=subprocess.PIPE, stderr=errors
        ) as daemon,
    ):
        try:
            assert daemon.stdout is not None
            assert daemon.stdout.readline() == b"ready\n", log.read_text()
            daemon.send_signal(signal.SIGTERM)
            assert daemon.wait(30) == 0, log.read_text()
        finally:
            daemon.kill()


def test_an_update_removes_what_only_the_old_version_had_and_uninstalling_leaves_the_rest(installed, tmp_path):
    manifest = installed / "lib" / "peerup" / "manifest"
    (installed / "share" / "old").mkdir()
    (installed / "share" / "old" / "page").write_text("of the old version\n")
    manifest.write_text(manifest.read_text() + "d share/old\nf share/old/page\n")
    (installed / "lib" / "peerup" / "old-module.py").write_text("")
    home = tmp_path / "home"
    shutil.copytree(installed / "share", home)  # stands for somebody's home
    make("install", PREFIX=installed)
    assert not (installed / "lib" / "peerup" / "old-module.py").exists()
    assert not (installed / "share" / "old" / "page").exists()
    assert [entry.name for entry in (installed / "lib").iterdir() if entry.name.startswith("peerup")] == ["peerup"]

    (installed / "share" / "doc" / "notes").write_text("somebody else's\n")
    make("uninstall", PREFIX=installed)
    assert below(installed) == {"bin", "bin/other", "share", "share/doc", "share/doc/notes"}
    again = make("uninstall", PREFIX=installed, status=1)
    assert "nothing to remove" in again.stderr
    assert below(home)


def test_a_package_is_built_below_destdir_for_another_place(tmp_path):
    make("install", DESTDIR=tmp_path, PREFIX="/opt/peerup")
    root = tmp_path / "opt" / "peerup"
    assert (root / "bin" / "peerup").read_text().startswith("#!/opt/peerup/lib/peerup/bin/python -I\n")
    assert "ExecStart=/opt/peerup/bin/peerup " in (root / "lib/systemd/system/peerup-relay.service").read_text()
    for path in root.rglob("*"):
        if path.is_file() and not path.is_symlink():
            assert bytes(tmp_path) not in path.read_bytes(), path
    make("uninstall", DESTDIR=tmp_path, PREFIX="/opt/peerup")
    assert below(tmp_path) <= {"opt", "opt/peerup"}


@pytest.mark.parametrize(
    ("prefix", "words"),
    [("relative", "absolute path"), ("/with blank", "blanks")],
)
def test_places_that_cannot_be(prefix, words):
    assert words in make("install", PREFIX=prefix, status=1).stderr


def test_what_somebody_else_put_there_is_not_replaced(tmp_path):
    (tmp_path / "lib" / "peerup").mkdir(parents=True)
    assert "was not made by this" in make("install", PREFIX=tmp_path, status=1).stderr
    assert below(tmp_path) == {"lib", "lib/peerup"}
