"""All routes of the control API."""

from actors.api.routes import actors, faults, node, peers, proxies, trace
from actors.api.routing import Routes

ROUTES = Routes(node.routes, actors.routes, trace.routes, faults.routes, peers.routes, proxies.routes)

__all__ = ["ROUTES"]
