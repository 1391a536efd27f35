"""The laboratory's own process: it carries frames with delay and loss, and it ends what outlives the test.

This file runs by itself as `python -I -S forwarder.py FD`, so it imports nothing of ours. FD is one end of a Unix
SOCK_SEQPACKET pair; each message on it is one JSON object, with descriptors where a wire is made:

    {"do": "guard", "namespaces": [inode, …]}                    no answer
    {"do": "wire", "wire": id, "seed": …, "shapes": [{…}, {…}]}  two descriptors: the frames of either end
    {"do": "shape", "wire": id, "shapes": [{…} or null, …]}      from now on (frames under way keep their time)
    {"do": "count", "wire": id}                                  answers with the counters of both directions

When the other end closes, for whatever reason, every process that is still in a guarded namespace is killed, and this
process ends. So nothing stays after a test that was itself killed, without any name to look for.

The tests import `Shape` and `Lane` from here; the main loop below only moves bytes.
"""

from __future__ import annotations

import heapq
import json
import os
import random
import select
import signal
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

MAX_FRAME = 65536
BURST = 64  # frames taken from one end before the others get their turn
ETHERNET_HEADER = 14


class Shape(NamedTuple):
    """How one direction of a wire treats frames. The default is a perfect wire.

    Attributes:
        delay: seconds each frame takes.
        jitter: up to this many seconds more, drawn evenly for each frame. Frames stay in order unless `reorder`.
        loss: the share of frames that get lost, 0 to 1.
        burst: how many frames in a row are lost on average (Gilbert's model, at least 1); 0 is independent losses.
        duplicate: the share of frames that arrive twice.
        reorder: let jitter change the order.
        rate: bits per second, 0 for as fast as it goes.
        queue: bytes that wait for their turn at `rate`; what does not fit is dropped at the tail.
        black_hole: frames whose packet is longer than this many bytes vanish without a word; 0 is never.
        cut: everything vanishes.
    """

    delay: float = 0.0
    jitter: float = 0.0
    loss: float = 0.0
    burst: float = 0.0
    duplicate: float = 0.0
    reorder: bool = False
    rate: float = 0.0
    queue: int = 256 * 1024
    black_hole: int = 0
    cut: bool = False

    def check(self) -> Shape:
        """This shape, if it makes sense.

        Raises:
            ValueError: says which value does not.
        """
        if not (0 <= self.loss <= 1 and 0 <= self.duplicate <= 1):
            raise ValueError(f"loss and duplicate are shares between 0 and 1: {self}")
        if min(self.delay, self.jitter, self.rate, self.queue, self.black_hole) < 0:
            raise ValueError(f"a wire has no negative times, rates or sizes: {self}")
        if self.burst and (self.burst < 1 or self.loss > self.burst * (1 - self.loss)):
            raise ValueError(f"no bursts of this length give this loss: {self}")
        return self


class Lane:
    """One direction of a wire: decides for each frame when it arrives, or that it does not.

    The same seed gives the n-th frame the same fate, whatever its time, and changing one property does not shift the
    chances of another, because each has its own source of chance.
    """

    def __init__(self, shape: Shape, seed: str) -> None:
        self.shape = shape
        self.passed = 0
        self.lost = 0
        self.overflowed = 0
        self.bytes = 0
        self._loss = random.Random(f"{seed}/loss")
        self._jitter = random.Random(f"{seed}/jitter")
        self._duplicate = random.Random(f"{seed}/duplicate")
        self._in_burst = False
        self._busy_until = 0.0
        self._last_due = 0.0

    def arrivals(self, size: int, now: float) -> Iterator[float]:
        """When a frame of `size` bytes that enters at `now` arrives: no time, one, or two."""
        shape = self.shape
        chances = (self._loss.random(), self._jitter.random(), self._duplicate.random())
        if shape.cut or (shape.black_hole and size - ETHERNET_HEADER > shape.black_hole) or self._is_lost(chances[0]):
            self.lost += 1
            return
        due = now
        if shape.rate:
            start = max(now, self._busy_until)
            if (start - now) * shape.rate / 8 + size > shape.queue:
                self.overflowed += 1
                return
            due = self._busy_until = start + size * 8 / shape.rate
        due += shape.delay + shape.jitter * chances[1]
        if not shape.reorder:
            due = self._last_due = max(due, self._last_due)
        self.passed += 1
        self.bytes += size
        yield due
        if chances[2] < shape.duplicate:
            yield due

    def _is_lost(self, chance: float) -> bool:
        shape = self.shape
        if not shape.burst or not shape.loss:
            self._in_burst = chance < shape.loss
        elif self._in_burst:
            self._in_burst = chance >= 1 / shape.burst
        else:  # the chance to enter a burst that gives `loss` on average
            self._in_burst = chance < shape.loss / (shape.burst * (1 - shape.loss))
        return self._in_burst

    def counters(self) -> dict[str, int]:
        """What happened so far, in frames and bytes."""
        return {"passed": self.passed, "lost": self.lost, "overflowed": self.overflowed, "bytes": self.bytes}


class Forwarder:
    """The main loop: a control socket and the two ends of any number of wires."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._parent = os.getppid()  # the test itself, one of whose threads may just be inside; never killed
        self._guarded: set[int] = set()
        self._wires: dict[int, tuple[Lane, Lane]] = {}
        self._ways: dict[int, tuple[Lane, int]] = {}  # descriptor -> how its frames travel, and to which descriptor
        self._heap: list[tuple[float, int, int, bytes]] = []  # due, number (keeps order), descriptor, frame
        self._number = 0

    def run(self) -> None:
        """Forward until the control socket ends."""
        while True:
            timeout = max(0.0, self._heap[0][0] - time.monotonic()) if self._heap else None
            # select and not epoll: its time-out has microseconds.
            ready, _, _ = select.select([self._control.fileno(), *self._ways], [], [], timeout)
            for end in ready:
                if end != self._control.fileno():
                    self._take(end)
                elif not self._obey():
                    return
            now = time.monotonic()
            while self._heap and self._heap[0][0] <= now:
                _, _, end, frame = heapq.heappop(self._heap)
                self._put(end, frame)

    def _take(self, end: int) -> None:
        lane, other = self._ways[end]
        for _ in range(BURST):
            try:
                frame = os.read(end, MAX_FRAME)
            except OSError:  # nothing more now, or the interface is down: its frames are lost, as on a real one
                return
            now = time.monotonic()
            for due in lane.arrivals(len(frame), now):
                if due <= now and not self._heap:
                    self._put(other, frame)
                else:
                    self._number += 1
                    heapq.heappush(self._heap, (due, self._number, other, frame))

    def _put(self, end: int, frame: bytes) -> None:
        try:
            os.write(end, frame)
        except OSError:  # down, or full: a wire does not wait
            return

    def _obey(self) -> bool:
        try:
            text, descriptors, _, _ = socket.recv_fds(self._control, 65536, 2)
        except ConnectionError:
            return False
        if not text:
            return False
        order = json.loads(text)
        match order["do"]:
            case "guard":
                self._guarded.update(order["namespaces"])
                return True
            case "wire":
                one, other = descriptors
                ahead, back = (
                    Lane(Shape(**shape), f"{order['seed']}/{order['wire']}/{way}")
                    for way, shape in zip(("ahead", "back"), order["shapes"], strict=True)
                )
                self._wires[order["wire"]] = (ahead, back)
                self._ways[one] = (ahead, other)
                self._ways[other] = (back, one)
                answer: Any = {}
            case "shape":
                for lane, shape in zip(self._wires[order["wire"]], order["shapes"], strict=True):
                    if shape is not None:
                        lane.shape = Shape(**shape)
                answer = {}
            case "count":
                answer = [lane.counters() for lane in self._wires[order["wire"]]]
            case unknown:
                raise ValueError(f"unknown order {unknown!r}")
        try:
            self._control.send(json.dumps(answer).encode())
        except ConnectionError:
            return False
        return True

    def kill_the_guarded(self, within: float = 5.0) -> None:
        """Kill every process in the guarded namespaces, and what they start meanwhile, until none is left."""
        deadline = time.monotonic() + within
        while time.monotonic() < deadline:
            found = [pid for pid in _pids() if _namespace_of(pid) in self._guarded and pid != self._parent]
            if not found:
                return
            for pid in found:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.002)


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208 - pathlib would double the start-up


def _namespace_of(pid: int) -> int:
    try:
        return os.stat(f"/proc/{pid}/ns/net").st_ino  # noqa: PTH116 - likewise
    except OSError:  # gone, a zombie, or somebody else's
        return 0


def main() -> None:
    """Serve the control socket whose descriptor is the only argument."""
    with socket.socket(fileno=int(sys.argv[1])) as control:
        forwarder = Forwarder(control)
        try:
            forwarder.run()
        finally:
            forwarder.kill_the_guarded()


if __name__ == "__main__":
    main()
