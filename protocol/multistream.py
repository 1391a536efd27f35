"""multistream-select 1.0: agreeing on a protocol at the start of a connection or stream (libp2p specs, connections/).

Theory of operation
-------------------

Each message is a varint length, a text, and a newline that the length counts. Both sides begin with the header
`/multistream/1.0.0`. The initiator proposes protocols one after another; the responder answers each with the
same text (agreed) or `na`; it answers `ls` with a list. What follows the agreement belongs to the protocol.

Both machines are sans-I/O: bytes that came go into `receive_data`, bytes to send come out of `data_to_send`, the
outcome is in `result`, and what arrived after the negotiation is in `leftover`.

- The initiator sends its header and first proposal at once, and each further proposal when the last was
  answered by `na`. With one protocol only, a caller may send that protocol's bytes straight behind the
  proposal (`optimistic`): if the peer speaks it, a round trip is saved; if it does not, the stream is lost anyway.
- The responder says nothing before the peer's header has come, then sends header and answer in one piece.

The initiator::

    stateDiagram-v2
        [*] --> header
        header --> answer: header
        answer --> answer: na
        answer --> agreed: echo
        answer --> failed: exhausted
        header --> failed: bad
        answer --> failed: bad

The responder::

    stateDiagram-v2
        [*] --> header
        header --> proposal: header
        proposal --> proposal: ls
        proposal --> proposal: unsupported
        proposal --> agreed: supported
        header --> failed: bad
        proposal --> failed: bad

A peer that is not authenticated yet talks to these machines, so the length of a message, the number of
messages and the sum of their bytes are bounded, and a machine that failed stays failed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import ClassVar, Final

from protocol.errors import InvalidValueError, LimitExceededError, ProtocolError
from protocol.varint import VarintError, encode_varint, read_varint

MULTISTREAM: Final = "/multistream/1.0.0"
"""The header that both sides begin with."""

MAX_MESSAGE: Final = 1024
"""The longest message in bytes with its newline. go-libp2p and js-libp2p take as much."""

MAX_TRIES: Final = 32
"""The most proposals and `ls` requests answered in one negotiation, and the most protocols an initiator may try."""

INITIATOR_TRANSITIONS: Final = {
    ("header", "header"): "answer",
    ("answer", "na"): "answer",
    ("answer", "echo"): "agreed",
    ("answer", "exhausted"): "failed",
    ("header", "bad"): "failed",
    ("answer", "bad"): "failed",
}
"""The initiator's machine: (state, event) to the next state."""

RESPONDER_TRANSITIONS: Final = {
    ("header", "header"): "proposal",
    ("proposal", "ls"): "proposal",
    ("proposal", "unsupported"): "proposal",
    ("proposal", "supported"): "agreed",
    ("header", "bad"): "failed",
    ("proposal", "bad"): "failed",
}
"""The responder's machine: (state, event) to the next state."""


class NegotiationError(ProtocolError):
    """The peer does not speak multistream-select, or broke its rules."""

    code: ClassVar[str] = "negotiation-failed"


class ProtocolNotSupportedError(ProtocolError):
    """The peer speaks none of the protocols that were proposed."""

    code: ClassVar[str] = "protocol-not-supported"


class TooManyTriesError(LimitExceededError):
    """The peer proposes one protocol after another without end."""

    code: ClassVar[str] = "too-many-proposals"


@functools.lru_cache(maxsize=1024)
def encode_message(text: str) -> bytes:
    """One message: length, text, newline.

    Raises:
        InvalidValueError: empty, longer than `MAX_MESSAGE`, not encodable, or with a newline in it.
    """
    try:
        body = text.encode("utf-8")
    except UnicodeEncodeError:
        raise InvalidValueError(f"{text[:60]!r} cannot be a protocol id") from None
    if not body or len(body) >= MAX_MESSAGE or b"\n" in body:
        raise InvalidValueError(f"{text[:60]!r} cannot be a protocol id: it is empty, too long or has a newline")
    return encode_varint(len(body) + 1) + body + b"\n"


HEADER: Final = encode_message(MULTISTREAM)
"""The header as it goes over the wire."""

NOT_AVAILABLE: Final = encode_message("na")
_HEADER_BODY: Final = b"/multistream/1.0.0"
_MAX_NEGOTIATION: Final = MAX_MESSAGE * 8  # bytes of all messages together


def encode_list(protocols: Iterable[str]) -> bytes:
    """The answer to `ls`: one message that holds a message for each protocol and a newline."""
    body = b"".join([encode_message(protocol) for protocol in protocols]) + b"\n"
    return encode_varint(len(body)) + body


class _Machine:
    """What both sides share: the buffer, the bounds, and failing for good."""

    __slots__ = ("_buffer", "_out", "_taken", "_tries", "leftover", "result", "state")

    def __init__(self) -> None:
        self.state = "header"
        self.result: str | None = None
        self.leftover = b""
        self._buffer = b""
        self._out = b""
        self._tries = 0
        self._taken = 0

    @property
    def tries(self) -> int:
        """How many proposals and requests for the list there were."""
        return self._tries

    def data_to_send(self) -> bytes:
        """The bytes that must be sent now, in full; empty for none. They are handed out once."""
        out, self._out = self._out, b""
        return out

    def _next_message(self) -> bytes | None:
        """The next whole message without its newline; None while bytes are missing."""
        buffer = self._buffer
        if not buffer:
            return None
        try:
            found = read_varint(buffer)
        except VarintError as error:
            raise NegotiationError(f"a message of multistream-select has a bad length: {error}") from None
        if found is None:
            return None
        length, start = found
        end = start + length
        self._check_length(length)
        if len(buffer) < end:
            return None
        if buffer[end - 1] != 10:
            raise NegotiationError("a message of multistream-select does not end in a newline")
        self._taken += end
        if self._taken > _MAX_NEGOTIATION:
            raise LimitExceededError(f"a negotiation took more than {_MAX_NEGOTIATION} bytes")
        self._buffer = buffer[end:]
        return buffer[start : end - 1]

    def _check_length(self, length: int) -> None:
        if length == 0:
            raise NegotiationError("a message of multistream-select is empty")
        if length > MAX_MESSAGE:
            raise LimitExceededError(f"a message of multistream-select has {length} bytes, more than {MAX_MESSAGE}")

    def _count_try(self) -> None:
        self._tries += 1
        if self._tries > MAX_TRIES:
            raise TooManyTriesError(f"a negotiation took more than {MAX_TRIES} messages")

    def _agree(self, protocol: str) -> None:
        self.result = protocol
        self.leftover = self._buffer
        self._buffer = b""

    def _refuse_if_failed(self) -> None:
        if self.state == "failed":
            raise NegotiationError("this negotiation has failed before")


class Initiator(_Machine):
    """The side that wants a protocol: of a sequence, the first that the peer speaks.

    Attributes:
        state: `header`, `answer`, `agreed` or `failed`.
        result: the agreed protocol; None until then.
        leftover: bytes that arrived after the agreement; more may be appended by `receive_data`.
        proposal: what is proposed at present.
    """

    __slots__ = ("_protocols", "proposal")

    def __init__(self, protocols: Sequence[str]) -> None:
        """Begin with the first of these protocols; the header and its proposal are ready to be sent.

        Raises:
            InvalidValueError: none, more than `MAX_TRIES`, or one that cannot be a protocol id.
        """
        super().__init__()
        if not 1 <= len(protocols) <= MAX_TRIES:
            raise InvalidValueError(f"an initiator proposes 1 to {MAX_TRIES} protocols, not {len(protocols)}")
        self._protocols = protocols
        self.proposal = protocols[0]
        self._out = _opening(self.proposal)

    @property
    def optimistic(self) -> bool:
        """Whether the protocol's own bytes may be sent before the answer: only one protocol was offered."""
        return len(self._protocols) == 1

    def receive_data(self, data: bytes) -> None:
        """Take bytes from the peer, in any pieces.

        Raises:
            ProtocolNotSupportedError: the peer speaks none of the protocols.
            NegotiationError: it broke the rules, or this negotiation has failed before.
            LimitExceededError: it sent more than is granted.
        """
        if self.state == "agreed":
            self.leftover += data
            return
        self._refuse_if_failed()
        # The usual case, at the price of one comparison: header and echo in one piece.
        if self.state == "header" and not self._buffer and data.startswith(expected := _opening(self.proposal)):
            self._buffer = data[len(expected) :]
            self.state = "agreed"
            self._agree(self.proposal)
            return
        self._buffer += data
        try:
            while self.state != "agreed" and (message := self._next_message()) is not None:
                self._take(message)
        except ProtocolError:
            self.state = "failed"
            raise

    def _take(self, message: bytes) -> None:
        if self.state == "header":
            if message != _HEADER_BODY:
                raise NegotiationError(f"the peer began with {message[:40]!r} instead of {MULTISTREAM}")
            self.state = "answer"
        elif message == self.proposal.encode("utf-8"):
            self.state = "agreed"
            self._agree(self.proposal)
        elif message == b"na":
            self._tries += 1
            if self._tries == len(self._protocols):
                raise ProtocolNotSupportedError(f"the peer speaks none of {', '.join(self._protocols)}")
            self.proposal = self._protocols[self._tries]
            self._out += encode_message(self.proposal)
        else:
            raise NegotiationError(f"the peer answered {message[:40]!r} to the proposal {self.proposal}")


class Responder(_Machine):
    """The side that is asked: it agrees to the first proposal that it supports.

    Attributes:
        state: `header`, `proposal`, `agreed` or `failed`.
        result: the agreed protocol; None until then.
        leftover: bytes that arrived after the agreement; more may be appended by `receive_data`.
        refused: the proposals that were answered by `na`, in order, as the peer wrote them.
    """

    __slots__ = ("_listed", "_supports", "refused")

    def __init__(
        self, supported: Collection[str] | Callable[[str], bool], *, listed: Iterable[str] | None = None
    ) -> None:
        """Answer proposals.

        Args:
            supported: the protocols, or a function that says of one whether it is supported.
            listed: what `ls` is answered with. Without it, the collection in `supported`, or nothing for a function.
        """
        super().__init__()
        if callable(supported):
            self._supports = supported
            self._listed: Iterable[str] = () if listed is None else listed
        else:
            self._supports = supported.__contains__
            self._listed = supported if listed is None else listed
        self.refused: list[str] = []

    def receive_data(self, data: bytes) -> None:
        """Take bytes from the peer, in any pieces.

        Behind a proposal that was refused, bytes that are no proposal may be those of the protocol, sent in the hope
        that it would be agreed. What `data_to_send` gives then should still reach the peer, which waits for it.

        Raises:
            NegotiationError: it broke the rules, or this negotiation has failed before.
            TooManyTriesError: it proposes without end.
            LimitExceededError: it sent more than is granted.
        """
        if self.state == "agreed":
            self.leftover += data
            return
        self._refuse_if_failed()
        self._buffer = self._buffer + data if self._buffer else data
        try:
            while self.state != "agreed" and (message := self._next_message()) is not None:
                self._take(message)
        except ProtocolError:
            self.state = "failed"
            raise

    def _next_message(self) -> bytes | None:
        # The usual first bytes, at the price of one comparison.
        if self.state == "header" and self._buffer.startswith(HEADER):
            self._buffer = self._buffer[len(HEADER) :]
            return _HEADER_BODY
        return super()._next_message()

    def _take(self, message: bytes) -> None:
        if self.state == "header":
            if message != _HEADER_BODY:
                raise NegotiationError(f"the peer began with {message[:40]!r} instead of {MULTISTREAM}")
            self.state = "proposal"
            self._out = HEADER
            return
        self._count_try()
        if message == b"ls":
            self._out += encode_list(self._listed)
            return
        try:
            proposal = message.decode("utf-8")
        except UnicodeDecodeError:
            raise NegotiationError(f"the peer proposed {message[:40]!r}, which is not UTF-8") from None
        if self._supports(proposal):
            self.state = "agreed"
            self._out += encode_message(proposal)
            self._agree(proposal)
        else:
            self.refused.append(proposal)
            self._out += NOT_AVAILABLE


@functools.lru_cache(maxsize=1024)
def _opening(protocol: str) -> bytes:
    return HEADER + encode_message(protocol)
