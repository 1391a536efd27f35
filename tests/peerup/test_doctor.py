"""`peerup doctor` judges facts; here they are made up."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from peerup.cli import cli
from peerup.cli.doctor import CHECKS, FAILED, OK, SKIPPED, WARNING, Facts

FILTERED, OPEN = {"Seccomp": "2"}, {"Seccomp": "0"}


def actor(name, pid, confinement="full", state="running"):
    return {"name": name, "pid": pid, "state": state, "confinement": confinement}


def results(actors=(), *, wanted="auto", shortcomings=(), kernel=None):
    told = {one["pid"]: FILTERED for one in actors or ()} if kernel is None else kernel
    facts = Facts(wanted, tuple(shortcomings), actors, told)
    return {result.check: result for check in CHECKS for result in check(facts)}


def test_a_node_that_is_well():
    found = results((actor("root", 1, "base"), actor("gate", 2)))
    assert {result.result for result in found.values()} == {OK}
    assert "confinement.gate" in found


def test_an_actor_that_does_not_run():
    found = results((actor("gate", None, "", "backing-off"),), kernel={})
    assert found["node.running"].result == FAILED
    assert found["confinement.gate"].result == SKIPPED


@pytest.mark.parametrize(("wanted", "result"), [("auto", WARNING), ("required", FAILED)])
def test_an_actor_that_is_not_confined(wanted, result):
    assert results((actor("gate", 2, "none"),), wanted=wanted)["confinement.gate"].result == result


def test_what_the_kernel_says_counts_more_than_what_an_actor_says():
    assert results((actor("gate", 2),), kernel={2: OPEN})["confinement.gate"].result == FAILED


def test_a_kernel_without_landlock_is_a_warning_with_a_hint():
    found = results((actor("gate", 2, "seccomp"),), shortcomings=["no Landlock"])
    assert found["confinement.kernel"].result == WARNING
    assert found["confinement.kernel"].hint
    assert found["confinement.gate"].result == WARNING


def test_confinement_that_is_switched_off_is_said_once():
    found = results((actor("root", 1, ""), actor("gate", 2, "")), wanted="disabled", kernel={})
    assert found["confinement.wanted"].result == WARNING
    assert found["confinement.gate"].result == SKIPPED


def test_without_a_running_node_the_rest_is_checked(tmp_path):
    home = str(tmp_path / "home")
    assert CliRunner().invoke(cli, ["--home", home, "init", "--yes"]).exit_code == 0
    done = CliRunner().invoke(cli, ["--home", home, "doctor", "--json"])
    assert done.exit_code == 0, done.output
    found = {entry["check"]: entry for entry in json.loads(done.stdout)}
    assert found["node.running"]["result"] == SKIPPED
    assert found["confinement.kernel"].keys() == {"check", "result", "reason", "hint"}
    plain = CliRunner().invoke(cli, ["--home", home, "doctor"])
    assert "the node does not run" in plain.stdout
