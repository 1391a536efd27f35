"""What is done once, before the first process of the tree is made, so that none of them needs to do it again.

A process of the tree is a fork: whatever is imported and set up by then is shared memory and costs a child no time.
Three things are worth it. Modules are imported: all that any process may ever need, even if this node has no use for it
yet. So a node whose program files are replaced while it runs goes on with the code that it began with. What libraries
set up at their first use is set up: a first signature, key agreement and cipher make OpenSSL look up its algorithms
(5 MB and 4 ms in each process that does it), a first event loop of trio fills its caches, and so on. And the life of a
process is rehearsed (:mod:`supervisor.rehearsal`).

Nothing here draws random numbers or touches the node's key, so no process shares a secret with another.
"""

from __future__ import annotations

import contextlib
import gc
import hmac
import importlib
from collections.abc import Iterator

PRELOAD = (
    "trio",
    "msgpack",
    "supervisor.supervisor",
    "actors.config.actor",
    "actors.keyring.actor",
    "actors.gate.actor",
    "actors.switchboard.actor",
    "actors.switchboard.tls",
    "actors.switchboard.websocket",
    "actors.nat.monitor",
    "actors.relay.keeper",
    "actors.relay.server",
    "actors.proxy.client",
    "actors.proxy.service",
    "actors.api.actor",
)
"""What the processes of a node run, and what these import only when they need it."""

PRELOAD_FOR_METRICS = ("actors.metrics.actor",)
"""The same for the metrics endpoint, where it is enabled."""


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """Keep the garbage collector from looking, again and again, through modules that are there to stay."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def preload(*, metrics: bool) -> None:
    """Import and set up what the processes of the tree use. Call it before there is any thread."""
    with without_collector():
        for module in (*PRELOAD, *(PRELOAD_FOR_METRICS if metrics else ())):
            importlib.import_module(module)
        _use_cryptography()
        _use_trio()
        _use_messages()
        _rehearse()


def _use_cryptography() -> None:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    from actors.switchboard.ciphers import better_ciphers
    from protocol.keys import PrivateKey
    from protocol.noise_cipher import CipherState

    seed = bytes(32)
    key = PrivateKey.from_seed(seed)
    key.public_key.verify(b"", key.sign(b""))
    agreement = X25519PrivateKey.from_private_bytes(seed)
    agreement.exchange(agreement.public_key())
    CipherState(seed).decrypt(CipherState(seed).encrypt(b""))
    better_ciphers()
    hmac.digest(seed, b"", "sha256")


def _use_trio() -> None:
    import trio

    async def child() -> None:
        await trio.lowlevel.checkpoint()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(child)

    trio.run(main)


def _use_messages() -> None:
    from protocol.messages import codec
    from supervisor import exchange

    codec.prepare()
    exchange.prepare()


def _rehearse() -> None:
    from supervisor.rehearsal import rehearse

    rehearse()
