"""Configurations to read: peer-up's documented keys all together, and one with every habit of a person's hand."""

HOME = "12D3KooWQK1wnefoLrcVHbbnf5tLzbopUd3K3bFAoJpA7YJgL5pV"
NAS = "12D3KooWK99VoVxNE7XzyBwXEzW7xhK7Gpv85r9F3V3fyKSUKPH5"

# Every key of peer-up's node configuration, with its template's values, and one that nobody knows.
PEER_UP = f"""\
version: 1

# Identity of this node
identity:
  key_file: "identity.key"

network:
  listen_addresses:
    - "/ip4/0.0.0.0/tcp/0"
    - "/ip4/0.0.0.0/udp/0/quic-v1"
    - "/ip6/::/tcp/0"
    - "/ip6/::/udp/0/quic-v1"
  force_private_reachability: false
  resource_limits_enabled: false

relay:
  addresses:
    - "/ip4/203.0.113.50/tcp/7777/p2p/{HOME}"
  reservation_interval: "2m"

discovery:
  rendezvous: "peerup-default-network"
  network: "family"
  bootstrap_peers: []

security:
  authorized_keys_file: "authorized_keys"
  enable_connection_gating: true

protocols:
  ping_pong:
    enabled: true
    id: "/pingpong/1.0.0"

services:
  ssh:
    enabled: true
    local_address: "localhost:22"
  xrdp:
    enabled: false
    local_address: "192.168.1.20:3389"
    protocol: "/custom/1.0.0"
    allowed_peers:
      - "{NAS}"

names:
  home: "{HOME}"

telemetry:
  metrics:
    enabled: true
    listen_address: "127.0.0.1:9091"
  audit:
    enabled: true

colour_of_the_bike_shed: green
"""

HAND_WRITTEN = f"""\
# My node. Do not touch!
version: 1   # the only one there is

network:
    listen_addresses: [ /ip4/127.0.0.1/tcp/4101 ]     # loopback only

services:          # what I offer

    # Shell, for me alone
    ssh:
        enabled: true      # switch off on holidays
        local_address: "localhost:22"
        allowed_peers:
        - {HOME}   # laptop

    # The web
    web: {{ enabled: true, local_address: "localhost:80" }}

# -------- people --------
names:

    home: {HOME}   # the big one
    "nas":   '{NAS}'
addresses: {{}}
# the end
"""
