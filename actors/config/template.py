"""The configuration file of a new node: every key with what it means, its default, and when a change takes effect."""

from __future__ import annotations

import json
from collections.abc import Sequence

from protocol.multiaddr import Multiaddr

DEFAULT_LISTEN = (Multiaddr("/ip4/0.0.0.0/tcp/0"), Multiaddr("/ip6/::/tcp/0"))


def render_config(listen_addresses: Sequence[Multiaddr] | None = None, network: str | None = None) -> str:
    """The text of `config.yaml` for a new node that listens at these addresses; None: at any free port."""
    addresses = DEFAULT_LISTEN if listen_addresses is None else listen_addresses
    listen = "".join(f"    - {json.dumps(str(address))}\n" for address in addresses) or "    []\n"
    secure = any(address.value("tls") is not None for address in addresses)
    namespace = f"  network: {json.dumps(network)}\n" if network else '  # network: "family"\n'
    tls = _TLS.replace("@", "") if secure else _TLS.replace("@", "# ")
    return _TEMPLATE.replace("@LISTEN@\n", listen).replace("@TLS@\n", tls).replace("@NETWORK@\n", namespace)


_TLS = """\
  # Certificates for WebSocket in TLS: PEM files, read again when they have changed. Default: none
  @tls:
  @  certificate_file: tls/fullchain.pem  # the node's own, for addresses with /tls/ws
  @  key_file: tls/privkey.pem
  #   trusted_file: tls/authority.pem      # an authority to believe besides the system's when dialling such addresses
"""


_TEMPLATE = """\
# Configuration of a peerup node. Keys marked [live] take effect as soon as the file is saved; the others when
# the node is started again. A key without a value is an error: to have its default, remove the key, or put a # before
# it. `peerup config validate` checks this file. A peer-up config.yaml works here as well.

version: 1

identity:
  # The node's private key, which is its identity. Relative paths start at the directory of this file.
  key_file: identity.key

network:
  # Where peers may connect. Port 0 takes any free port, another one at each start. With [] the node listens nowhere: it
  # dials, and peers reach it through its relays. /ws at the end is WebSocket and /tls/ws WebSocket in TLS, which passes
  # for HTTPS; addresses may share a port.
  listen_addresses:
@LISTEN@
@TLS@
  # [live] How long a connection may be silent, because a cable is out, a laptop sleeps or a router restarts, before it
  # and the streams in it are given up; from 30s to 24h. New streams look for another way after a few seconds.
  # Default: 15m
  # silence_timeout: 15m

relay:
  # [live] Relays that carry connections when no direct path exists, each ending with /p2p/<peer id>; edit with
  # `peerup relay`.
  addresses: []

# Serve as a relay for the peers in authorized_keys; on a machine that they all can reach. `peerup relay setup` makes
# a configuration for it. Each limit may also be `unlimited`; per_network counts a /24 of IPv4, a /48 of IPv6.
# relay_service:
#   enabled: false
#   # [live] Where this relay can be reached, instead of what it finds out. Default: found out
#   announce_addresses: []
#   drain_time: 30s                 # when the relay stops, open circuits get so long; counts from the next start on
#   reservation_ttl: 1h             # [live] how long a place is reserved, 30s at least; clients renew it in time
#   reservations:                   # [live] reserved places at a time
#     per_peer: unlimited           # a peer has at most one
#     per_ip: 64
#     per_network: 128
#     total: 1024
#   circuits:                       # [live] relayed connections at a time; each counts for both of its ends
#     per_peer: 64
#     per_ip: 128
#     per_network: 256
#     total: 512
#   bytes_per_second:               # [live] both directions together, such as 10MB
#     per_peer: unlimited
#     per_ip: unlimited
#     per_network: unlimited
#     total: unlimited
#   requests_per_minute:            # [live] reservations and connections asked for
#     per_peer: 120
#     per_ip: 600
#     per_network: 1200
#     total: 6000
#   circuit:                        # [live] one relayed connection between peers in authorized_keys
#     duration: unlimited           # such as 2h
#     data: unlimited               # each way, such as 64MiB
#   guest_circuit:                  # [live] the same for others, with security.enable_connection_gating: false
#     duration: 2m
#     data: 128KiB

# Nothing in this section has an effect yet: peers are reached at the addresses that the node is given, and through
# relays.
discovery:
  # Name of the rendezvous point. Default: peerup-default-network
  rendezvous: peerup-default-network
  # A private network of this name: its nodes find each other and nobody else. Default: the common network
@NETWORK@
  # Peers to ask first, each ending with /p2p/<peer id>. Default: the relays
  bootstrap_peers: []

security:
  # The peers that may connect, one a line; edit it with `peerup auth`. Its content is [live].
  authorized_keys_file: authorized_keys
  # [live] false lets every peer in the world connect and use services without allowed_peers. Default: true
  enable_connection_gating: true
  # Limit each part of the node to what it needs, by Landlock and seccomp (docs/confinement.md): `auto` where the kernel
  # can, `required` or do not start, `disabled`. Default: auto
  # confinement: auto

protocols:
  ping_pong:
    # Answer peer-up's own ping, /pingpong/1.0.0, besides libp2p's. Default: true
    enabled: true

# [live] Local TCP services that peers may use; edit with `peerup service`. For example:
#   ssh:
#     enabled: true
#     local_address: "localhost:22"
#     allowed_peers: []      # peer ids; without this key every authorised peer may use the service
services: {}

# [live] Friendly names of peers; edit with `peerup names`. For example:
#   home: "12D3KooW..."
names: {}

# [live] Where peers may be reached, by peer id; edit with `peerup names add --address`. For example:
#   "12D3KooW...":
#     - "/dns4/home.example.org/tcp/4101"
addresses: {}

telemetry:
  metrics:
    # Serve Prometheus metrics over HTTP, without authentication: keep it on loopback. Default: false
    enabled: false
    listen_address: "127.0.0.1:9091"
  audit:
    # Write who reached what, allowed or refused, to log/audit.jsonl. Default: false
    enabled: false

log:
  # trace, debug, info, warning or error; `peerup log NAME LEVEL` changes it while the node runs. Default: info
  level: info
  # text for people, json for programs. Default: text
  format: text

# limits:
#   connections: 1024               # live connections to peers
#   handshakes: 64                  # connections that are not authenticated yet
#   streams_per_connection: 1024    # streams that a peer may have open on one connection
#   connections_per_service: 4096   # tunnelled connections through one service or proxy
"""
