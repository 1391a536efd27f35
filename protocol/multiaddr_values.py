"""The protocols of multiaddrs and the forms of their values (multiformats/multiaddr, protocols.csv).

Each protocol turns the text of its value into bytes and back, and refuses what its values cannot be. The text
that comes from bytes is the normal one, so text, bytes, text ends where it began.
"""

from __future__ import annotations

import dataclasses
import ipaddress
from collections.abc import Callable
from typing import ClassVar, Final

from protocol.errors import InvalidValueError
from protocol.multibase import MultibaseError, decode_multibase, encode_multibase_base64url
from protocol.peer_id import PeerId, PeerIdError
from protocol.varint import VarintError, decode_varint, encode_varint


class MultiaddrError(InvalidValueError):
    """A text or bytes are not a multiaddr, or not one that is known here."""

    code: ClassVar[str] = "bad-multiaddr"


@dataclasses.dataclass(frozen=True, slots=True)
class Protocol:
    """One protocol of multiaddrs.

    Attributes:
        code: its multicodec.
        name: its name in texts.
        size: bytes of each value; 0 for no value, None for values that carry their length.
        to_bytes, to_text: value from text to bytes and back; each checks.
        is_path: the value is a path that takes the rest of the text.
        prefix: the code as a varint.
    """

    code: int
    name: str
    size: int | None
    to_bytes: Callable[[str], bytes]
    to_text: Callable[[bytes], str]
    is_path: bool = False
    prefix: bytes = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "prefix", encode_varint(self.code))


def _nothing_to_bytes(_text: str) -> bytes:
    return b""


def _nothing_to_text(_raw: bytes) -> str:
    return ""


def _ip4_to_bytes(text: str) -> bytes:
    try:
        return ipaddress.IPv4Address(text).packed
    except ValueError:
        raise MultiaddrError(f"{text[:60]!r} is not an IPv4 address") from None


def _ip4_to_text(raw: bytes) -> str:
    return str(ipaddress.IPv4Address(raw))


def _ip6_to_bytes(text: str) -> bytes:
    try:
        address = ipaddress.IPv6Address(text)
    except ValueError:
        raise MultiaddrError(f"{text[:60]!r} is not an IPv6 address") from None
    if address.scope_id is not None:
        raise MultiaddrError("the zone of an IPv6 address is written /ip6zone/ZONE/ip6/ADDRESS")
    return address.packed


def _ip6_to_text(raw: bytes) -> str:
    address = ipaddress.IPv6Address(raw)
    mapped = address.ipv4_mapped
    # Python 3.13 writes mapped addresses so by itself, and 3.11 does not.
    return str(address) if mapped is None else f"::ffff:{mapped}"


def _decimal(text: str, highest: int, what: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and int(text) <= highest):
        raise MultiaddrError(f"{text[:60]!r} is not {what}")
    return int(text)


def _port_to_bytes(text: str) -> bytes:
    return _decimal(text, 65535, "a port from 0 to 65535").to_bytes(2, "big")


def _port_to_text(raw: bytes) -> str:
    return str(int.from_bytes(raw, "big"))


def _cidr_to_bytes(text: str) -> bytes:
    return bytes((_decimal(text, 255, "a prefix length from 0 to 255"),))


def _cidr_to_text(raw: bytes) -> str:
    return str(raw[0])


def _checked_text(text: str, longest: int, what: str) -> str:
    if not 1 <= len(text) <= longest:
        raise MultiaddrError(f"{what} has 1 to {longest} characters")
    if "/" in text or " " in text or not text.isprintable():
        raise MultiaddrError(f"{what} has no slash, space or control character, unlike {text!r}")
    return text


def _decode_utf8(raw: bytes, what: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise MultiaddrError(f"{what} is not UTF-8") from None


def _encode_utf8(text: str, what: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        raise MultiaddrError(f"{what} is not UTF-8") from None


def _name_to_bytes(text: str) -> bytes:
    return _encode_utf8(_checked_text(text, 253, "a host name"), "a host name")


def _name_to_text(raw: bytes) -> str:
    return _checked_text(_decode_utf8(raw, "a host name"), 253, "a host name")


def _zone_to_bytes(text: str) -> bytes:
    return _encode_utf8(_checked_text(text, 63, "an IPv6 zone"), "an IPv6 zone")


def _zone_to_text(raw: bytes) -> str:
    return _checked_text(_decode_utf8(raw, "an IPv6 zone"), 63, "an IPv6 zone")


def _check_path(path: str) -> str:
    if len(path) < 2 or not path.startswith("/") or path.endswith("/") or not path.isprintable():
        raise MultiaddrError(f"{path[:60]!r} is not the path of a socket")
    return path


def _path_to_bytes(text: str) -> bytes:
    return _encode_utf8(_check_path(text), "a path")


def _path_to_text(raw: bytes) -> str:
    return _check_path(_decode_utf8(raw, "a path"))


def _peer_to_bytes(text: str) -> bytes:
    try:
        return PeerId.from_text(text).multihash
    except PeerIdError as error:
        raise MultiaddrError(str(error)) from None


def _peer_to_text(raw: bytes) -> str:
    try:
        return str(PeerId(raw))
    except PeerIdError as error:
        raise MultiaddrError(f"not a peer id: {error}") from None


def _check_certhash(raw: bytes) -> bytes:
    try:
        _, offset = decode_varint(raw)
        length, offset = decode_varint(raw, offset)
    except VarintError:
        raise MultiaddrError("a certhash is not a multihash") from None
    if length == 0 or length > 64 or length != len(raw) - offset:
        raise MultiaddrError("a certhash is not a multihash of 1 to 64 bytes")
    return raw


def _certhash_to_bytes(text: str) -> bytes:
    try:
        return _check_certhash(decode_multibase(text))
    except MultibaseError as error:
        raise MultiaddrError(f"a certhash is a multihash in multibase: {error}") from None


def _certhash_to_text(raw: bytes) -> str:
    return encode_multibase_base64url(_check_certhash(raw))


def _port(code: int, name: str) -> Protocol:
    return Protocol(code, name, 2, _port_to_bytes, _port_to_text)


def _bare(code: int, name: str) -> Protocol:
    return Protocol(code, name, 0, _nothing_to_bytes, _nothing_to_text)


def _name(code: int, name: str) -> Protocol:
    return Protocol(code, name, None, _name_to_bytes, _name_to_text)


_PROTOCOLS: Final = (
    Protocol(4, "ip4", 4, _ip4_to_bytes, _ip4_to_text),
    _port(6, "tcp"),
    _port(33, "dccp"),
    Protocol(41, "ip6", 16, _ip6_to_bytes, _ip6_to_text),
    Protocol(42, "ip6zone", None, _zone_to_bytes, _zone_to_text),
    Protocol(43, "ipcidr", 1, _cidr_to_bytes, _cidr_to_text),
    _name(53, "dns"),
    _name(54, "dns4"),
    _name(55, "dns6"),
    _name(56, "dnsaddr"),
    _port(132, "sctp"),
    _port(273, "udp"),
    _bare(280, "webrtc-direct"),
    _bare(281, "webrtc"),
    _bare(290, "p2p-circuit"),
    _bare(301, "udt"),
    _bare(302, "utp"),
    Protocol(400, "unix", None, _path_to_bytes, _path_to_text, is_path=True),
    Protocol(421, "p2p", None, _peer_to_bytes, _peer_to_text),
    _bare(443, "https"),
    _bare(448, "tls"),
    _name(449, "sni"),
    _bare(454, "noise"),
    _bare(460, "quic"),
    _bare(461, "quic-v1"),
    _bare(465, "webtransport"),
    Protocol(466, "certhash", None, _certhash_to_bytes, _certhash_to_text),
    _bare(477, "ws"),
    _bare(478, "wss"),
    _bare(480, "http"),
)

PROTOCOLS_BY_CODE: Final = {protocol.code: protocol for protocol in _PROTOCOLS}
"""Every known protocol by its code."""

PROTOCOLS_BY_NAME: Final = {protocol.name: protocol for protocol in _PROTOCOLS} | {"ipfs": PROTOCOLS_BY_CODE[421]}
"""Every known protocol by its name; `ipfs` is the old name of `p2p`."""
