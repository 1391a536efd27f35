"""Which of the addresses in a configuration are never dialled, and why: so that it can be said where they are typed."""

from __future__ import annotations

from collections.abc import Iterable

from protocol.dialing import MAX_ADDRESSES, MAX_RELAYED
from protocol.multiaddr import Multiaddr


def why_undialable(address: Multiaddr) -> str:
    """Why nobody here can ever connect to this address; empty: somebody can.

    Dialled are `/tcp`, `/tcp/…/ws` and `/tcp/…/tls/ws` upon an IP address or a name, and one relay that is named so.
    """
    circuits = sum(component.name == "p2p-circuit" for component in address.components)
    hop = address.relay if circuits else address
    if circuits > 1:
        return "leads through more than one relay, and only one is dialled through"
    if hop is None or (circuits and hop.peer_id is None):
        return "does not say which relay: write the relay's address with its /p2p/<peer id> before /p2p-circuit"
    if hop.endpoint is None:
        return "has no port to connect to; write it like /ip4/192.0.2.7/tcp/4101"
    if hop.endpoint.kind == "dnsaddr":
        return "is a list of addresses in DNS, which is not read; write the address itself, or /dns/NAME/tcp/PORT"
    if hop.transport not in ("tcp", "websocket"):
        return "is no address that can be dialled: neither TCP nor WebSocket"
    return ""


def unused_addresses(addresses: Iterable[Multiaddr]) -> list[tuple[Multiaddr, str]]:
    """Those of one peer's addresses that are never dialled, each with the reason.

    They are those that nobody can dial, and those beyond the number that is tried.
    """
    unused = []
    direct, relays = 0, set()
    for address in dict.fromkeys(addresses):
        if why := why_undialable(address):
            unused.append((address, why))
        elif not address.is_relayed:
            direct += 1
            if direct > MAX_ADDRESSES:
                unused.append((address, f"is one of more than {MAX_ADDRESSES} addresses of the peer"))
        elif (relay := address.relay) is not None:
            relays.add(relay.peer_id)
            if len(relays) > MAX_RELAYED:
                unused.append((address, f"leads through one of more than {MAX_RELAYED} relays to the peer"))
    return unused
