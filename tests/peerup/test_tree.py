"""The tree is what the configuration says."""

import fnmatch
import re
from pathlib import Path

import pytest

from actors.config.file import load_config
from actors.config.init import init_node
from actors.config.paths import node_home
from peerup.confinement import CHILDREN_OF_PROXIES
from peerup.tree import Options, build_tree, time_to_drain
from supervisor.overseer import supervisor_spec


@pytest.fixture
def home(tmp_path):
    home = node_home(tmp_path / "home", {})
    init_node(home)
    return home


def tree_of(home, extra):
    config: Path = home.config_file
    config.write_text(config.read_text() + extra)
    options = Options(
        home=home, config=load_config(config), service_pid=1, main_pid=1, started_at=0.0, allow_faults=False
    )
    return {child.name: child for child in build_tree(options).children}


def test_the_limits_of_the_configuration_reach_who_must_hold_them(home):
    limits = "limits:\n  connections: 7\n  handshakes: 3\n  streams_per_connection: 5\n"
    arguments = tree_of(home, limits)["switchboard"].arguments
    assert arguments["max_connections"] == 7
    assert arguments["max_streams"] == 5
    assert arguments["admission"] == {"concurrent": 3}


def test_children_start_in_the_order_in_which_they_need_each_other(home):
    names = list(tree_of(home, ""))
    assert names == ["config", "keyring", "gate", "switchboard", "nat/monitor", "proxies", "api"]


def test_a_relay_has_its_server_and_time_to_drain(home):
    tree = tree_of(home, "relay_service: {enabled: true, drain_time: 40s}\n")
    names = list(tree)
    assert names.index("switchboard") < names.index("relay/server") < names.index("proxies")
    assert tree["relay/server"].arguments == {"drain": 40.0}
    assert tree["relay/server"].stop_deadline == 45.0
    assert time_to_drain(load_config(home.config_file)) == 45.0


def test_metrics_run_only_where_they_are_wanted(home):
    config: Path = home.config_file
    off = 'enabled: false\n    listen_address: "127.0.0.1:9091"'
    text = config.read_text()
    assert text.count(off) == 1
    config.write_text(text.replace(off, off.replace("false", "true")))
    assert tree_of(home, "")["metrics"].arguments["listen"] == "127.0.0.1:9091"


def test_the_page_about_confinement_has_a_row_for_each_actor(home):
    page = (Path(__file__).parents[2] / "docs" / "confinement.md").read_text()
    rows = re.findall(r"^\| `([a-z/*]+)` \|", page, re.MULTILINE)
    served = "relay_service: {enabled: true}\ntelemetry: {metrics: {enabled: true}}\n"
    text = home.config_file.read_text()
    home.config_file.write_text(text.partition("telemetry:\n")[0])
    tree = tree_of(home, served)
    assert sorted(row for row in rows if row not in ("auto", "required", "disabled")) == sorted(
        {name for name in tree if name != "proxies"} | set(CHILDREN_OF_PROXIES)
    )


def test_every_actor_is_confined_unless_the_configuration_says_otherwise(home):
    tree = tree_of(home, "")
    assert all(child.confinement is not None for child in tree.values())
    rules = supervisor_spec(tree["proxies"]).confinements
    for name in ("proxy/home/ssh", "service/web", "relay/keeper"):
        assert any(fnmatch.fnmatchcase(name, rule.pattern) and rule.confinement is not None for rule in rules)
    text = home.config_file.read_text()
    home.config_file.write_text(text.replace("security:\n", "security:\n  confinement: disabled\n"))
    tree = tree_of(home, "")
    assert {child.confinement for child in tree.values()} == {None}
    assert supervisor_spec(tree["proxies"]).confinements == ()


def test_only_the_keyring_may_read_the_key_and_it_has_no_network(home):
    key = str(home.key_file)
    for name, child in tree_of(home, "").items():
        if child.confinement is None:
            continue
        may = child.confinement
        assert (key in may.read) == (name == "keyring")
        # The supervisor of proxies has what any of its children may be asked for: a Unix socket anywhere.
        sockets = () if name == "proxies" else may.sockets
        assert all(not Path(key).is_relative_to(place) for place in (*may.write, *sockets))
        if name == "keyring":
            assert may.families == ()
