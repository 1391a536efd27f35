"""The tree is what the configuration says."""

from pathlib import Path

import pytest

from actors.config.file import load_config
from actors.config.init import init_node
from actors.config.paths import node_home
from peerup.tree import Options, build_tree, time_to_drain


@pytest.fixture
def home(tmp_path):
    home = node_home(tmp_path / "home", {})
    init_node(home)
    return home


def tree_of(home, extra):
    config: Path = home.config_file
    config.write_text(config.read_text() + extra)
    options = Options(home=home, config=load_config(config), service_pid=1, started_at=0.0, allow_faults=False)
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
