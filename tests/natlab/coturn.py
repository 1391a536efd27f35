"""A second opinion: coturn's server and its discovery program (RFC 5780) judge the laboratory's NATs."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from tests.natlab.behaviour import Filtering, Mapping
from tests.natlab.lab import Host
from tests.natlab.namespaces import LabError
from tests.natlab.probes import Servers
from tests.support.processes import wait_until

PORT = 3478
DISCOVERY_TIMEOUT = 60.0  # most of it is waiting for answers that a filter holds back


def start_server(servers: Servers, directory: Path) -> subprocess.Popen[bytes]:
    """Run coturn on the two addresses of `servers`; it answers on PORT and PORT + 1 when this returns."""
    one, other = (str(address) for address in servers.host.uplink.addresses)
    arguments = [
        "turnserver",
        "-n",
        "--no-tls",
        "--no-dtls",
        "--no-cli",
        "--no-auth",
        "--log-file",
        "stdout",
        "--simple-log",
    ]
    arguments += ["--pidfile", str(directory / "pid"), "--db", str(directory / "db")]
    arguments += ["-L", one, "-L", other, "-p", str(PORT), "--alt-listening-port", str(PORT + 1)]
    with (directory / "log").open("wb") as log:
        process = servers.host.popen(*arguments, stdout=log, stderr=subprocess.STDOUT)

    def listening() -> bool:
        if process.poll() is not None:
            raise LabError(f"turnserver has ended: {(directory / 'log').read_text(errors='replace')[-2000:]}")
        sockets = servers.host.run("ss", "-Hlun")
        return all(f"{address}:{PORT + more} " in sockets for address in (one, other) for more in (0, 1))

    wait_until(listening, within=20, what="coturn listens on both addresses and ports")
    return process


_MAPPING = {
    "NAT with Endpoint Independent Mapping!": Mapping.ENDPOINT_INDEPENDENT,
    "NAT with Address Dependent Mapping!": Mapping.ADDRESS_DEPENDENT,
    "NAT with Address and Port Dependent Mapping!": Mapping.ADDRESS_AND_PORT_DEPENDENT,
}
_FILTERING = {
    "NAT with Endpoint Independent Filtering!": Filtering.ENDPOINT_INDEPENDENT,
    "NAT with Address Dependent Filtering!": Filtering.ADDRESS_DEPENDENT,
    "NAT with Address and Port Dependent Filtering!": Filtering.ADDRESS_AND_PORT_DEPENDENT,
}


def discover(host: Host, servers: Servers) -> str:
    """What `turnutils_natdiscovery` says on `host` about mapping and filtering."""
    return host.run("turnutils_natdiscovery", "-m", "-f", servers.host.address, timeout=DISCOVERY_TIMEOUT)


def verdict(said: str) -> tuple[Mapping, Filtering]:
    """Mapping and filtering in the output of `discover`.

    Raises:
        LabError: there is no verdict in it.
    """
    lines = {line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", said).splitlines()}
    mapping = [kind for text, kind in _MAPPING.items() if text in lines]
    filtering = [kind for text, kind in _FILTERING.items() if text in lines]
    if len(mapping) != 1 or len(filtering) != 1:
        raise LabError(f"no clear verdict in: {said}")
    return mapping[0], filtering[0]
