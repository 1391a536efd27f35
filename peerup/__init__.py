"""peerup: reach services on your own devices from anywhere, with no account and no control server.

For programs: `peerup.connect(home)` gives a client of the node that runs in that home::

    import peerup

    node = peerup.connect("~/nodes/laptop")
    print(node.get("/v1/status")["peer_id"])
    with node.open_stdio("home", "ssh") as stream:
        ...
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from protocol.version import VERSION

if TYPE_CHECKING:
    from peerup.client import Client

__version__ = VERSION

__all__ = ["__version__", "connect"]


def connect(home: str | Path | None = None) -> Client:
    """A client of the node in this home; without one, of `PEERUP_HOME` or the default node.

    Nothing is sent yet: the first call raises :class:`peerup.client.NotRunningError` if no node is running there.
    """
    from actors.config.paths import node_home
    from peerup.client import Client

    return Client(node_home(home, os.environ).control_socket)
