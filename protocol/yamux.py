"""yamux (libp2p specs, yamux/README.md): many streams over one connection."""

from __future__ import annotations

import enum

from protocol.errors import ProtocolError


class YamuxError(ProtocolError):
    """The peer broke the yamux protocol; the session is over."""

    code = "yamux"


class Role(enum.Enum):
    """Who dialled: the client's streams have odd ids, the server's even ones."""

    CLIENT = 1
    SERVER = 2
