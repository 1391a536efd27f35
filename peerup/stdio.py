"""Standard input and output ⇄ a socket, with half-close: `peerup proxy PEER SERVICE --stdio`.

Theory of operation. Two directions, each a plain loop with a buffer of 256 KiB; the one that reads standard input has a
thread of its own. The end of standard input shuts down the socket's sending side and nothing else, so a client that
sends its question and closes still gets the answer. When the far side has finished, standard output is closed, and what
is left is to send on until standard input ends, too, or the far side is entirely gone, which the socket tells by a
hang-up: then nobody is left to read, and we are done without waiting for input that may never come.

Standard input and output may be anything, and may have been set not to block by whoever else has them: where they say
that they would block, we wait until they do not.

The status tells what the far service got. A Unix socket cannot tell an end from a break, nor that bytes have arrived
somewhere else, so the proxy says in a pipe of its own what came of the tunnel: `finished` when the kernel at the far
service's end has confirmed everything. However long that takes, it is waited for. A tunnel that broke, or whose proxy
died without a word, is a failure and is told as one; and so are input that cannot be read, and output that nobody takes
any more. Whatever ends this program before the end of input is a break for the far service, never an end.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
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

OUTPUT_GONE = 128 + signal.SIGPIPE
"""The status of a program that has lost the reader of its output, as a shell tells it."""


def pump(sock: socket.socket, outcome: int, source: int = 0, sink: int = 1) -> int:
    """Move bytes until both directions have ended, and all that was sent has arrived; 0, or why not.

    1: the tunnel broke, or the input could not be read; `OUTPUT_GONE`: nobody takes the output any more.

    Closes the socket, `outcome` and `sink`.
    """
    ended, telling = os.pipe()
    sock.setblocking(True)
    problems: list[OSError] = []
    sender = threading.Thread(target=_send, args=(sock, source, telling, problems), daemon=True)
    sender.start()
    try:
        try:
            _receive(sock, sink)
        except ConnectionResetError:
            return _tell_failure(_read_outcome(outcome))
        except BrokenPipeError:
            return OUTPUT_GONE
        with contextlib.suppress(OSError):
            os.close(sink)
        poll = select.poll()
        poll.register(ended, select.POLLIN)
        poll.register(sock.fileno(), 0)  # POLLHUP and POLLERR alone
        poll.poll()
        if problems:
            return _tell_unreadable(problems[0])
        said = _read_outcome(outcome)
        return 0 if said == FINISHED else _tell_failure(said)
    finally:
        os.close(outcome)
        os.close(ended)
        sock.close()  # not shut down: before the end of input this is a break


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
    return os.read(outcome, 4096).decode(errors="replace")


def _tell_unreadable(error: OSError) -> int:
    sys.stderr.write(f"error: standard input cannot be read: {error.strerror}; the connection was broken off\n")
    return 1


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
            try:
                done += os.write(sink, view[done:count])
            except BlockingIOError:
                _wait(sink, select.POLLOUT)


def _send(sock: socket.socket, source: int, telling: int, problems: list[OSError]) -> None:
    """Everything from `source`, then the end of it. The far side's refusal to take more ends it as well."""
    while True:
        try:
            data = os.read(source, CHUNK)
        except BlockingIOError:
            _wait(source, select.POLLIN)
            continue
        except OSError as error:
            problems.append(error)
            break
        try:
            if not data:
                sock.shutdown(socket.SHUT_WR)
                break
            sock.sendall(data)
        except OSError:
            break  # the socket hangs up, which is noticed and explained elsewhere
    with contextlib.suppress(OSError):
        os.close(telling)
    if problems:
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RD)  # nobody waits for an answer any more


def _wait(descriptor: int, events: int) -> None:
    """Until it can be read or written, or never will be."""
    poll = select.poll()
    poll.register(descriptor, events)
    poll.poll()
