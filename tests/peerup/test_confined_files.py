"""Files that people change while the node runs stay theirs to move, although its processes are confined."""

from __future__ import annotations

import ssl

import pytest

from protocol.peer_id import PeerId
from tests.support.certificates import Authority
from tests.support.nodes import Node
from tests.support.ports import own_port
from tests.support.processes import wait_until

pytestmark = pytest.mark.slow

PEER = PeerId.from_public_key(bytes.fromhex("08011220") + bytes([7] * 32))


def certificate_served(port: int) -> str:
    return ssl.get_server_certificate(("127.0.0.1", port), timeout=10)


def test_links_may_be_pointed_elsewhere_while_the_node_runs(tmp_path):
    """Certificates as certbot renews them, and authorized_keys behind a link to a directory that is made later."""
    authority, port = Authority(tmp_path), own_port()
    first, second = (authority.issue("localhost", file=name) for name in ("first", "second"))
    links = [tmp_path / "live-chain.pem", tmp_path / "live-key.pem"]
    for link, target in zip(links, first, strict=True):
        link.symlink_to(target)
    node = Node("node", tmp_path)
    node.initialise()
    config = node.home / "config.yaml"
    text = config.read_text().replace(node.address, f"/ip4/127.0.0.1/tcp/{port}/tls/ws")
    tls = f"network:\n  tls: {{certificate_file: {links[0]}, key_file: {links[1]}}}\n"
    text = text.replace("network:\n", tls, 1).replace("security:\n", "security:\n  confinement: required\n")
    keys = tmp_path / "keys"
    text = text.replace("authorized_keys_file: authorized_keys", f"authorized_keys_file: {keys}/authorized_keys")
    config.write_text(text)
    node.start()
    try:
        assert certificate_served(port).strip() == first[0].read_text().strip().partition("\n\n")[0]
        for link, target in zip(links, second, strict=True):
            link.unlink()
            link.symlink_to(target)
        wait_until(
            lambda: certificate_served(port).strip() in second[0].read_text(), within=30, what="the second is served"
        )
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        (elsewhere / "authorized_keys").write_text(f"{PEER}  # laptop\n")
        (elsewhere / "authorized_keys").chmod(0o600)
        keys.symlink_to(elsewhere)
        wait_until(
            lambda: node.run_json("actors", "get", "gate")["description"]["peers"] == 1,
            within=30,
            what="the peer is authorised",
        )
    finally:
        assert not node.stop()
