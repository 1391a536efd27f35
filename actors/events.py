"""Waiting for one of several events."""

from __future__ import annotations

import trio


async def until_any(*events: trio.Event) -> None:
    """Return when one of these has happened, or has already."""
    async with trio.open_nursery() as nursery:

        async def wait_for(event: trio.Event) -> None:
            await event.wait()
            nursery.cancel_scope.cancel()

        for event in events:
            nursery.start_soon(wait_for, event)
