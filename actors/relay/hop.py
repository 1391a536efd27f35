"""A RESERVE over a stream descriptor: what `protocol.circuit.hop_client` has to say, said."""

from __future__ import annotations

import contextlib
import os
import socket

import trio

from protocol.circuit.hop_client import ReserveClient
from protocol.errors import PeerupError
from protocol.stream_descriptor import (
    DATA,
    FINISH_MESSAGE,
    MAX_MESSAGE,
    RESET,
    ResetCode,
    check_message,
    parse_reset,
    reset_message,
)

_MEANINGS = {
    ResetCode.CONNECTION_LOST: "the connection to the relay ended",
    ResetCode.NEGOTIATION_FAILED: "it does not offer itself as a relay to this node",
    ResetCode.GATED: "its policy refuses this node",
}


class StreamEndedError(PeerupError):
    """The stream to the relay ended before the relay had answered."""

    code = "stream-ended"


async def exchange(stream: socket.socket, client: ReserveClient) -> None:
    """Send the request and take the answer; `client` has it when this returns. The socket is closed in any case.

    Set a deadline around it.

    Raises:
        StreamEndedError: no answer.
        PeerupError: an answer that is none, see `ReserveClient.receive_data`.
    """
    stream.setblocking(False)
    with trio.socket.from_stdlib_socket(stream) as sock:
        try:
            await sock.send(bytes([DATA]) + client.data_to_send())
            while client.state == "waiting":
                _take(await sock.recv(MAX_MESSAGE + 1), client)
            with contextlib.suppress(OSError):  # the other end may be closed already, as the answer was all of it
                await sock.send(FINISH_MESSAGE)
        except OSError as error:
            raise StreamEndedError(f"the stream to the relay was lost in this node: {error}") from error
        except BaseException:
            _reset(sock)
            raise


def _take(message: bytes, client: ReserveClient) -> None:
    if not message:
        raise StreamEndedError("the stream to the relay was lost in this node")
    check_message(message[0], len(message))
    if message[0] == DATA:
        client.receive_data(message[1:])
    elif message[0] == RESET:
        raise StreamEndedError(_meaning(parse_reset(message)))
    else:
        client.finish()


def _reset(sock: trio.socket.SocketType) -> None:
    """Say that nobody waits for the answer; a socket that a message or two were sent to has room for one more."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(sock.fileno())) as plain:
        plain.send(reset_message(ResetCode.NONE))


def _meaning(code: int) -> str:
    for known, words in _MEANINGS.items():
        if code == known:
            return words
    return f"the relay reset the stream ({ResetCode.describe(code)})"
