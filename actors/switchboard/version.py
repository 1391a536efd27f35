"""What this program calls itself towards peers."""

from __future__ import annotations

from typing import Final

from protocol.version import VERSION

AGENT: Final = f"peerup/{VERSION}"
