"""The actor `keyring`: the only process that holds the identity key, and the only one that signs with it.

It signs two things, each built here from typed fields: the switchboard's Noise static key and this node's own
peer record. It never signs bytes that somebody else composed, answers two actors only, and is
limited in how often: a switchboard gone wrong cannot turn it into an oracle.
"""

from __future__ import annotations

import resource
from pathlib import Path

from actors.keyring.key_file import load_key
from protocol.errors import PeerupError
from protocol.keys import PrivateKey
from protocol.messages import Data
from protocol.messages.keyring import (
    Identity,
    ReadIdentity,
    Signature,
    SignedPeerRecord,
    SignNoiseStaticKey,
    SignPeerRecord,
)
from protocol.noise import SIGNATURE_PREFIX
from protocol.peer_record import MAX_ADDRESSES, seal_peer_record
from supervisor.actor import Actor, Checkpoint, handles
from supervisor.errors import RefusedError

ALLOWED_SENDERS = frozenset({"switchboard", "api"})
"""Who may ask. The transport has verified who sends."""

SIGNING_SENDERS = frozenset({"switchboard"})
"""Who may have something signed."""

BURST = 64
"""Signatures that may be made at once: a switchboard needs two when it starts, and one for each change of address."""

RATE = 4.0
"""Signatures a second after that."""


class Keyring(Actor):
    """See the module.

    Arguments:
        path: the identity key's file. It is read when the process runs, so no other process ever has it in memory.
    """

    mailbox_limit = 256

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._key: PrivateKey | None = None
        self._tokens = float(BURST)
        self._filled_at = 0.0
        self._signed = 0

    async def start(self, checkpoint: Checkpoint | None) -> dict[str, Data]:
        """Load the key."""
        hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
        resource.setrlimit(resource.RLIMIT_CORE, (0, hard))  # a core dump would hold the key
        self._filled_at = self.context.now()
        self._key = load_key(self._path)
        self.context.log.info("identity {} loaded", self._key.peer_id)
        return {"peer_id": str(self._key.peer_id)}

    def describe(self) -> dict[str, Data]:
        """Who this node is, and how often that was signed."""
        return {
            "peer_id": str(self._key.peer_id) if self._key is not None else None,
            "file": str(self._path),
            "signatures": self._signed,
        }

    @handles(ReadIdentity)
    async def read_identity(self, request: ReadIdentity) -> Identity:
        """Say who this node is."""
        key = self._key_for(ALLOWED_SENDERS)
        return Identity(key.peer_id, key.public_key.to_protobuf())

    @handles(SignNoiseStaticKey)
    async def sign_noise_static_key(self, request: SignNoiseStaticKey) -> Signature:
        """Sign that this Noise static key is ours."""
        key = self._key_for(SIGNING_SENDERS)
        if len(request.static_key) != 32:
            raise self._refusal("bad-request", f"a Noise static key has 32 bytes, not {len(request.static_key)}")
        self._spend("noise-static-key")
        return Signature(key.public_key.to_protobuf(), key.sign(SIGNATURE_PREFIX + request.static_key))

    @handles(SignPeerRecord)
    async def sign_peer_record(self, request: SignPeerRecord) -> SignedPeerRecord:
        """Make and sign our peer record."""
        key = self._key_for(SIGNING_SENDERS)
        if len(request.addresses) > MAX_ADDRESSES:
            raise self._refusal(
                "bad-request", f"a peer record has at most {MAX_ADDRESSES} addresses, not {len(request.addresses)}"
            )
        self._spend("peer-record")
        try:
            return SignedPeerRecord(seal_peer_record(key, request.addresses, request.seq))
        except PeerupError as error:
            raise self._refusal("bad-request", str(error)) from error

    def _key_for(self, allowed: frozenset[str]) -> PrivateKey:
        sender = self.context.current_sender
        if sender not in allowed:
            raise self._refusal("not-allowed", f"the keyring does not answer {sender!r}")
        assert self._key is not None
        return self._key

    def _spend(self, purpose: str) -> None:
        now = self.context.now()
        self._tokens = min(float(BURST), self._tokens + (now - self._filled_at) * RATE)
        self._filled_at = now
        if self._tokens < 1:
            raise self._refusal("too-many-requests", f"more than {RATE:g} signatures a second")
        self._tokens -= 1
        self._signed += 1
        self.context.metrics.counter("peerup_signatures_total", purpose=purpose).inc()

    def _refusal(self, code: str, reason: str) -> RefusedError:
        self.context.metrics.counter("peerup_signatures_refused_total", reason=code).inc()
        self.context.log.warning("refused {}: {}", self.context.current_sender, reason)
        return RefusedError(code, reason)
