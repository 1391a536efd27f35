"""Identities and upgraders for tests of single rooms."""

import hashlib
import socket

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from actors.switchboard.upgrade import Upgrader
from protocol.keys import PrivateKey
from protocol.noise import SIGNATURE_PREFIX, Identity


def key_of(name):
    return PrivateKey.from_seed(hashlib.sha256(name.encode()).digest())


def peer_of(name):
    return key_of(name).peer_id


def noise_identity(key):
    static = X25519PrivateKey.generate()
    signature = key.sign(SIGNATURE_PREFIX + static.public_key().public_bytes_raw())
    return static, Identity(key.public_key.to_protobuf(), signature)


def upgrader_of(name):
    return Upgrader(*noise_identity(key_of(name)))


def tcp_pair():
    """Two connected, non-blocking TCP sockets."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
    client.setblocking(False)
    server.setblocking(False)
    return client, server
