"""A second and a third opinion: coturn's RFC 5780 discovery and the classic `stun` client name every kind as we do."""

from __future__ import annotations

import concurrent.futures
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.natlab import coturn
from tests.natlab.behaviour import SYMMETRIC, Filtering, Mapping, Ports
from tests.natlab.lab import Host, Lab
from tests.natlab.probes import Servers

# The words of the RFC 3489 client; for other mappings than endpoint-independent it does not judge the filter.
FILTER_WORDS = {
    Filtering.ENDPOINT_INDEPENDENT: "Independent Filter",
    Filtering.ADDRESS_DEPENDENT: "Address Dependent Filter",
    Filtering.ADDRESS_AND_PORT_DEPENDENT: "Port Dependent Filter",
}


@pytest.mark.slow
def test_coturn_and_stun_name_every_kind(natlab: Lab, natlab_program: Callable[..., None], tmp_path: Path) -> None:
    natlab_program("turnserver", "turnutils_natdiscovery", "stun")
    servers = Servers(natlab)
    coturn.start_server(servers, tmp_path)
    hosts: dict[tuple[Mapping, Filtering, bool], Host] = {}
    for number, (mapping, filtering) in enumerate(itertools.product(Mapping, Filtering)):
        hairpin = number % 2 == 0
        nat = natlab.nat(f"nat{number}", mapping=mapping, filtering=filtering, hairpin=hairpin)
        hosts[mapping, filtering, hairpin] = natlab.host(f"host{number}", behind=nat)
    changed = natlab.host("changed", behind=natlab.nat("nat-changed", ports=Ports.RANDOM))
    carrier = natlab.carrier_nat("isp", SYMMETRIC)
    customer = natlab.host("customer", behind=natlab.nat("home", behind=carrier))

    with concurrent.futures.ThreadPoolExecutor(len(hosts) * 2 + 4) as pool:
        # Each waits for seconds for answers that a filter holds back, so all at once.
        discovered = {kind: pool.submit(coturn.discover, host, servers) for kind, host in hosts.items()}
        named = {kind: pool.submit(host.run, "stun", servers.host.address, check=False) for kind, host in hosts.items()}
        changed_said = pool.submit(changed.run, "stun", servers.host.address, check=False)
        customer_said = pool.submit(coturn.discover, customer, servers)

        for (mapping, filtering, hairpin), said in discovered.items():
            assert coturn.verdict(said.result()) == (mapping, filtering)
            words = named[mapping, filtering, hairpin].result()
            assert ("will hairpin" in words) == hairpin, words
            if mapping is Mapping.ENDPOINT_INDEPENDENT:
                assert f"Independent Mapping, {FILTER_WORDS[filtering]}, preserves ports" in words
            else:
                assert "Dependent Mapping, random port" in words
        assert "Independent Mapping, Port Dependent Filter, random port" in changed_said.result()
        # Two levels: the worse of both, whatever the home router is.
        assert coturn.verdict(customer_said.result()) == (
            Mapping.ADDRESS_AND_PORT_DEPENDENT,
            Filtering.ADDRESS_AND_PORT_DEPENDENT,
        )


def test_no_nat_at_all_is_told_apart(natlab: Lab, natlab_program: Callable[..., None], tmp_path: Path) -> None:
    natlab_program("turnserver", "stun")
    servers = Servers(natlab)
    coturn.start_server(servers, tmp_path)
    assert "Primary: Open" in natlab.host("open").run("stun", servers.host.address, check=False)
