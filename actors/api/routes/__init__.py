"""All routes of the control API."""

from actors.api.routes import actors, faults, node, peers, proxies, relays, trace
from actors.api.routing import Routes

ROUTES = Routes(node.routes, actors.routes, trace.routes, faults.routes, peers.routes, proxies.routes, relays.routes)

__all__ = ["ROUTES"]
