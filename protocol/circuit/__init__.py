"""Circuit relay v2 (libp2p specs, relay/circuit-v2.md): messages, vouchers, and both ends of hop and stop streams.

`hop_client` and `hop_server` talk between a client and its relay, `stop` between the relay and the target of a
circuit. What a relay keeps in mind is in `protocol.reservations`; keeping a reservation is `protocol.keeper`.
"""
