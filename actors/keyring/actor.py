"""The actor `keyring`: the only process that holds the identity key, and the only one that signs with it.

It signs three things, each built here from typed fields: the switchboard's Noise static key, this node's own
peer record, and, for a node that serves as a relay, vouchers for reservations. It never signs bytes that somebody
else composed, answers three actors only, and is limited in how often: a switchboard gone wrong cannot turn it into an
oracle. Vouchers have a limit of their own, so that clients of a relay cannot keep a new address from being signed.
"""

from __future__ import annotations

import resource
from pathlib import Path

from actors.keyring.key_file import load_key
from protocol.circuit.voucher import seal_voucher
from protocol.errors import PeerupError
from protocol.keys import PrivateKey
from protocol.messages import Data
from protocol.messages.keyring import (
    Identity,
    ReadIdentity,
    Signature,
    SignedPeerRecord,
    SignedRelayVoucher,
    SignNoiseStaticKey,
    SignPeerRecord,
    SignRelayVoucher,
)
from protocol.noise import SIGNATURE_PREFIX
from protocol.peer_record import MAX_ADDRESSES, seal_peer_record
from protocol.token_bucket import TokenBucket
from supervisor.actor import Actor, Checkpoint, handles
from supervisor.errors import RefusedError

ALLOWED_SENDERS = frozenset({"switchboard", "api", "relay/keeper"})
"""Who may ask. The transport has verified who sends."""

SIGNING_SENDERS = frozenset({"switchboard"})
"""Who may have something signed."""

BURST = 64
"""Signatures that may be made at once: a switchboard needs two when it starts, and one for each change of address."""

RATE = 4.0
"""Signatures a second after that."""

VOUCHER_BURST = 1024
"""Vouchers that may be signed at once: a relay that was restarted hears of all its clients within a second."""

VOUCHER_RATE = 32.0
"""Vouchers a second after that: 1,000 clients that renew every minute need 17."""

MAX_VOUCHER_SECONDS = 8 * 86400
"""How far ahead a voucher may expire: the longest reservation, and a day for a clock that was just set."""


class Keyring(Actor):
    """See the module.

    Arguments:
        path: the identity key's file. It is read when the process runs, so no other process ever has it in memory.
    """

    mailbox_limit = 256

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._key: PrivateKey | None = None
        self._signed = 0

    async def start(self, checkpoint: Checkpoint | None) -> dict[str, Data]:
        """Load the key."""
        hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
        resource.setrlimit(resource.RLIMIT_CORE, (0, hard))  # a core dump would hold the key
        self._own = TokenBucket(RATE, BURST, self.context.now())
        self._vouchers = TokenBucket(VOUCHER_RATE, VOUCHER_BURST, self.context.now())
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
        self._spend("noise-static-key", self._own)
        return Signature(key.public_key.to_protobuf(), key.sign(SIGNATURE_PREFIX + request.static_key))

    @handles(SignPeerRecord)
    async def sign_peer_record(self, request: SignPeerRecord) -> SignedPeerRecord:
        """Make and sign our peer record."""
        key = self._key_for(SIGNING_SENDERS)
        if len(request.addresses) > MAX_ADDRESSES:
            raise self._refusal(
                "bad-request", f"a peer record has at most {MAX_ADDRESSES} addresses, not {len(request.addresses)}"
            )
        self._spend("peer-record", self._own)
        try:
            return SignedPeerRecord(seal_peer_record(key, request.addresses, request.seq))
        except PeerupError as error:
            raise self._refusal("bad-request", str(error)) from error

    @handles(SignRelayVoucher)
    async def sign_relay_voucher(self, request: SignRelayVoucher) -> SignedRelayVoucher:
        """Make and sign a voucher of ours for a reservation."""
        key = self._key_for(SIGNING_SENDERS)
        now = self.context.wall()
        if not now < request.expiration <= now + MAX_VOUCHER_SECONDS:
            raise self._refusal("bad-request", f"a voucher does not expire in {request.expiration - now:.0f} seconds")
        self._spend("relay-voucher", self._vouchers)
        return SignedRelayVoucher(seal_voucher(key, request.peer, request.expiration))

    def _key_for(self, allowed: frozenset[str]) -> PrivateKey:
        sender = self.context.current_sender
        if sender not in allowed:
            raise self._refusal("not-allowed", f"the keyring does not answer {sender!r}")
        assert self._key is not None
        return self._key

    def _spend(self, purpose: str, bucket: TokenBucket) -> None:
        now = self.context.now()
        if bucket.level(now) < 1:
            raise self._refusal("too-many-requests", f"more than {bucket.rate:g} signatures a second")
        bucket.take(1, now)
        self._signed += 1
        self.context.metrics.counter("peerup_signatures_total", purpose=purpose).inc()

    def _refusal(self, code: str, reason: str) -> RefusedError:
        self.context.metrics.counter("peerup_signatures_refused_total", reason=code).inc()
        self.context.log.warning("refused {}: {}", self.context.current_sender, reason)
        return RefusedError(code, reason)
