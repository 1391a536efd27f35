"""Standard input and output ⇄ a socket, with half-close: `peerup proxy PEER SERVICE --stdio`.

Theory of operation. Two directions, each a plain blocking loop with a buffer of 256 KiB; the one that reads standard
input has a thread of its own. The end of standard input shuts down the socket's sending side and nothing else, so a
client that sends its question and closes still gets the answer. When the far side has finished, standard output is
closed, and what is left is to send on until standard input ends, too, or the far side is entirely gone, which the
socket tells by a hang-up: then nobody is left to read, and we are done without waiting for input that may never come.

A Unix socket cannot tell an end from a break, so the proxy says in a pipe of its own what came of the tunnel. A tunnel
that broke, or whose proxy died without a word, is a failure and is told as one.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
import threading
from typing import ClassVar

from protocol.errors import PeerupError


class PassOnError(PeerupError):
    """The connection cannot be handed over as a descriptor."""

    code: ClassVar[str] = "no-descriptors"


CHUNK = 256 * 1024
"""Bytes per read: more than a pipe or a Unix socket holds by default, so each call takes all there is."""


FINISHED = "finished"
"""What the pipe says of a tunnel whose both directions came to their end."""

OUTCOME_DEADLINE = 5.0
"""Seconds after the end of both directions within which the outcome must be known; it takes milliseconds."""


def pump(sock: socket.socket, outcome: int, source: int = 0, sink: int = 1) -> int:
    """Move bytes until both directions have ended; 0, or 1 if the tunnel broke.

    Closes the socket, `outcome` and `sink`.
    """
    ended, telling = os.pipe()
    sock.setblocking(True)
    sender = threading.Thread(target=_send, args=(sock, source, telling), daemon=True)
    sender.start()
    try:
        try:
            _receive(sock, sink)
        except ConnectionResetError:
            return _tell_failure(_read_outcome(outcome))
        except BrokenPipeError:
            return 0  # whoever read our output has left; that ends it for both
        with contextlib.suppress(OSError):
            os.close(sink)
        poll = select.poll()
        poll.register(ended, select.POLLIN)
        poll.register(sock.fileno(), 0)  # POLLHUP and POLLERR alone
        poll.poll()
        said = _read_outcome(outcome)
        return 0 if said == FINISHED else _tell_failure(said)
    finally:
        os.close(outcome)
        os.close(ended)
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        sock.close()


def pass_on(sock: socket.socket, sink: int = 1) -> None:
    """Hand the connected socket to whoever is at the other end of `sink`, which must be a Unix socket.

    Raises:
        PassOnError: it is not one.
    """
    try:
        with socket.socket(fileno=os.dup(sink)) as channel:
            socket.send_fds(channel, [b"\0"], [sock.fileno()])
    except OSError as error:
        raise PassOnError(
            f"standard output takes no descriptors ({error.strerror}); --fdpass is for `ssh -o ProxyUseFdpass=yes`"
        ) from error
    finally:
        sock.close()


def _read_outcome(outcome: int) -> str:
    os.set_blocking(outcome, True)
    poll = select.poll()
    poll.register(outcome, select.POLLIN)
    if not poll.poll(OUTCOME_DEADLINE * 1000):
        return "the node does not say what came of the connection"
    return os.read(outcome, 4096).decode(errors="replace")


def _tell_failure(said: str) -> int:
    reason = "the part of the node that carried it ended" if said in ("", FINISHED) else _meaning_first(said)
    sys.stderr.write(f"error: the connection to the service broke off: {reason}\n")
    return 1


def _meaning_first(said: str) -> str:
    """`code: name (meaning)` as `meaning (code: name)`: what a person understands comes first."""
    words, opened, meaning = said.partition(" (")
    return f"{meaning[:-1]} ({words})" if opened and meaning.endswith(")") else said


def _receive(sock: socket.socket, sink: int) -> None:
    buffer = bytearray(CHUNK)
    view = memoryview(buffer)
    while count := sock.recv_into(buffer):
        done = 0
        while done < count:
            done += os.write(sink, view[done:count])


def _send(sock: socket.socket, source: int, telling: int) -> None:
    """Everything from `source`, then the end of it. The far side's refusal to take more ends it as well."""
    with contextlib.suppress(OSError):
        while data := os.read(source, CHUNK):
            sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
    with contextlib.suppress(OSError):
        os.close(telling)
