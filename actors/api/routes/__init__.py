"""All routes of the control API."""

from actors.api.routes import actors, faults, node, peers, proxies, relay_server, relays, trace
from actors.api.routing import Routes

ROUTES = Routes(
    node.routes,
    actors.routes,
    trace.routes,
    faults.routes,
    peers.routes,
    proxies.routes,
    relays.routes,
    relay_server.routes,
)

__all__ = ["ROUTES"]
