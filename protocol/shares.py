"""What one peer may have of what all share: three quarters. The last quarter is always there for others."""

from __future__ import annotations


def share(limit: int) -> int:
    """How much of a limit one peer, or one kind of peers, may use: three quarters."""
    return limit - limit // 4
