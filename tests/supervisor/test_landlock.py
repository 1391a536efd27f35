"""What Landlock rules allow and refuse, in children of the test."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import pytest

from protocol.messages.confinement import Confinement, ConfinementRule
from supervisor import confinement, landlock
from tests.support.confined import in_child

pytestmark = pytest.mark.skipif(not landlock.version(), reason="this kernel has no Landlock")


def outcome(attempt) -> str:
    try:
        attempt()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "ok"


def connect(port: int) -> None:
    with socket.socket() as sock:
        sock.connect(("127.0.0.1", port))


def test_only_what_is_below_an_allowed_path_is_reachable(tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "out"
    for directory in (inside, outside):
        directory.mkdir()
        (directory / "file").write_text("x")

    def confined() -> list[str]:
        ruleset = landlock.Ruleset()
        os.close(ruleset.allow_path(str(inside), landlock.READ))
        assert ruleset.allow_path(str(tmp_path / "missing"), landlock.READ) is None
        ruleset.enforce()
        return [
            outcome((inside / "file").read_text),
            outcome((outside / "file").read_text),
            outcome(lambda: (inside / "file").write_text("y")),
            outcome(lambda: os.truncate(inside / "file", 0)),
        ]

    assert in_child(confined) == ["ok", "EACCES", "EACCES", "EACCES"]


def test_a_file_that_takes_the_place_of_another_is_another(tmp_path):
    """Why what people edit is lent, and not readable by a rule of its own."""
    file, new = tmp_path / "file", tmp_path / "new"
    file.write_text("x")
    new.write_text("y")

    def confined() -> list[str]:
        ruleset = landlock.Ruleset()
        os.close(ruleset.allow_path(str(file), landlock.READ))
        os.close(ruleset.allow_path(str(tmp_path), landlock.WRITE & ~landlock.READ))
        ruleset.enforce()
        before = outcome(file.read_text)
        new.replace(file)
        return [before, outcome(file.read_text)]

    assert in_child(confined) == ["ok", "EACCES"]


@pytest.mark.skipif(landlock.version() < landlock.NETWORK_VERSION, reason="this kernel's Landlock knows no ports")
def test_ports_are_governed_where_that_is_asked_for():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_server(("127.0.0.1", 0)) as other:
        allowed, refused = server.getsockname()[1], other.getsockname()[1]

        def confined() -> list[str]:
            ruleset = landlock.Ruleset(network=landlock.BIND_TCP | landlock.CONNECT_TCP)
            ruleset.allow_port(allowed, landlock.CONNECT_TCP)
            ruleset.enforce()
            return [
                outcome(lambda: connect(allowed)),
                outcome(lambda: connect(refused)),
                outcome(lambda: socket.socket().bind(("127.0.0.1", 0))),
            ]

        assert in_child(confined) == ["ok", "EACCES", "EACCES"]


def test_what_is_withheld_is_left_out_of_wider_directories(tmp_path):
    secret = tmp_path / "system" / "secrets"
    plain = tmp_path / "system" / "plain"
    for directory in (secret, plain):
        directory.mkdir(parents=True)
        (directory / "file").write_text("x")
    (tmp_path / "system" / "link").symlink_to("secrets/file")
    (tmp_path / "system" / "beside").write_text("x")

    def confined() -> list[str]:
        spec = Confinement(system=(str(tmp_path / "system"),), withheld=(str(secret),))
        confinement.confine(confinement.Prepared(spec))
        places = ("plain/file", "beside", "secrets/file", "link")
        return [outcome((tmp_path / "system" / place).read_text) for place in places]

    assert in_child(confined) == ["ok", "ok", "EACCES", "EACCES"]


def test_the_program_stays_readable_wherever_it_is(tmp_path):
    def confined() -> list[str]:
        confinement.confine(confinement.Prepared(Confinement(withheld=(str(tmp_path),))))
        import this  # noqa: F401  # a module that nothing has imported yet

        return [outcome(Path(confinement.__file__).read_text), outcome(lambda: Path("/etc/localtime").stat())]

    confinement.prepare()
    assert in_child(confined)[0] == "ok"


def test_it_says_what_is_in_force():
    expected = confinement.FULL if landlock.version() >= landlock.SCOPE_VERSION else confinement.PARTLY
    assert in_child(lambda: confinement.confine(confinement.Prepared(Confinement()))) == expected


def test_required_is_refused_where_the_kernel_has_no_landlock():
    from supervisor import seccomp

    def confined() -> list[str]:
        seccomp.Program(seccomp.refusing((), extra=range(444, 447))).install()
        said = confinement.shortcomings()
        said.append(confinement.confine(confinement.Prepared(Confinement())))
        try:
            confinement.confine(confinement.Prepared(Confinement(required=True)))
        except confinement.NotConfinedError as error:
            said.append(str(error))
        return said

    shortcoming, word, refusal = in_child(confined)
    assert word == confinement.FILTER_ONLY
    assert "no Landlock" in shortcoming
    assert "required" in refusal


def test_a_supervisor_keeps_what_its_children_need_and_no_more(tmp_path):
    names, secret, shared = tmp_path / "names", tmp_path / "secret", tmp_path / "shared"
    names.mkdir()
    shared.mkdir()
    for file in (secret, shared / "file"):
        file.write_text("x")

    def confined() -> list[str]:
        confinement.confine_supervisor(Confinement(system=(str(shared),)), [str(names)])
        (names / "entry").symlink_to("ready")
        (names / "entry").unlink()
        said = [outcome(secret.read_text), outcome((shared / "file").read_text)]
        return said + in_child(child)

    def child() -> list[str]:
        word = confinement.confine(confinement.Prepared(Confinement()))
        return [word, outcome((shared / "file").read_text), outcome(lambda: (names / "entry").symlink_to("forged"))]

    said = in_child(confined)
    assert said[:2] == ["EACCES", "ok"]
    assert said[2] in (confinement.FULL, confinement.PARTLY)
    assert said[3] == "EACCES"
    assert said[4] in ("EACCES", "EPERM")


def test_a_child_that_listens_at_a_unix_socket_may_make_it_there_and_nowhere_else(tmp_path):
    spec = Confinement(withheld=(str(tmp_path / "home"),), families=("inet",))
    rule = ConfinementRule("proxy/*", spec, "listen")
    place = str(tmp_path / "sockets")
    made = confinement.for_child(rule, {"listen": f"unix:{place}/ssh.sock"})
    assert made is not None
    assert made.sockets == (place,)
    assert made.families == ("inet", "unix")
    for other in ({"listen": "127.0.0.1:1"}, {"listen": None}, {}, {"listen": f"unix:{tmp_path}/home/run/x"}):
        assert confinement.for_child(rule, other) == spec
    assert confinement.for_child(ConfinementRule("proxy/*", None, "listen"), {"listen": "unix:/x"}) is None
