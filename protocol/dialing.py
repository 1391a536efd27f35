"""How many addresses of a peer are dialled: known to whoever dials, and to whoever is given addresses to write down."""

from __future__ import annotations

from typing import Final

MAX_ADDRESSES: Final = 32
"""Direct addresses of one dial; what is ranked lower is not tried."""

MAX_RELAYED: Final = 32
"""Relayed addresses of one dial: one for each relay that the configuration may name, and as many of the peer's own."""
