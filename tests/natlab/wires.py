"""Cables of the laboratory: a plain pair of interfaces, or one whose frames the forwarder carries.

A plain cable is a veth pair: no delay, many gigabits. A shaped one has a TAP interface at either end, whose frames
`forwarder.py` reads, delays, loses and writes to the other. Where /dev/net/tun may not be opened (mode 0600, not root)
the ends are veth pairs whose other halves are in a namespace of their own, read and written by packet sockets; slower
to make, otherwise the same.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

from tests.natlab.forwarder import Shape
from tests.natlab.namespaces import LabError, Namespace

TUNSETIFF = 0x400454CA
IFF_TAP = 0x0002
IFF_NO_PI = 0x1000
ETH_P_ALL = 3
SOL_PACKET = 263
PACKET_IGNORE_OUTGOING = 23
PACKET_BUFFER = 4 * 1024 * 1024
ANSWER_TIMEOUT = 20.0  # the forwarder answers in well under a millisecond; a machine that is far too busy takes seconds

Device = Literal["tap", "packet"]
ToNetwork = Literal["out", "in", "both"]
End = tuple[Namespace, str]  # where an interface is to be, and its name
Ends = tuple[End, End]


class Attendant:
    """The forwarder process of one laboratory, seen from the test.

    It ends, and kills what still runs in the guarded namespaces, as soon as this process closes its socket or dies.
    """

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(ANSWER_TIMEOUT)
        with theirs:
            self._process = subprocess.Popen(
                # Isolated and without site packages: it is up in a few hundredths of a second.
                [sys.executable, "-I", "-S", str(Path(__file__).with_name("forwarder.py")), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C at the terminal is for the tests, which then close the laboratory
            )

    @property
    def pid(self) -> int:
        """The process id of the forwarder, for measurements."""
        return self._process.pid

    def guard(self, *namespaces: Namespace) -> None:
        """Have everything that runs in these namespaces killed at the end."""
        self._control.send(json.dumps({"do": "guard", "namespaces": [each.inode for each in namespaces]}).encode())

    def ask(self, order: dict[str, Any], descriptors: Iterable[int] = ()) -> Any:
        """Send an order and return its answer; what was ordered is then in force.

        Raises:
            LabError: the forwarder has ended.
        """
        try:
            socket.send_fds(self._control, [json.dumps(order).encode()], list(descriptors))
            answer = self._control.recv(65536)
        except ConnectionError as error:
            raise LabError(f"the forwarder has ended with {self._process.poll()}") from error
        if not answer:
            raise LabError(f"the forwarder has ended with {self._process.wait(5)}")
        return json.loads(answer)

    def close(self) -> None:
        """Let it kill what is left, and wait until it is done."""
        with self._control, contextlib.suppress(OSError):  # it may have ended already
            self._control.shutdown(socket.SHUT_WR)
            while self._control.recv(65536):  # until it closes its end
                pass
        self._process.wait()


class Link:
    """A cable with delay, loss and bandwidth, a node's uplink: `lab.host("a", link=lab.link(delay=0.02))`.

    `out` is from the node to the network, `in` from the network to the node. Values can change at any time.

    Attributes:
        mtu: of the interfaces at both ends; routers answer "fragmentation needed" as they should. See
            `Shape.black_hole` for a path that does not.
    """

    def __init__(self, number: int, seed: int, device: Device, *, mtu: int, out: Shape, back: Shape) -> None:
        self._number = number
        self._seed = seed
        self._device: Device = device
        self._shapes = {"out": out.check(), "in": back.check()}
        self._attendant: Attendant | None = None
        self._wires: Namespace | None = None
        self._halves: list[str] = []
        self.mtu = mtu

    @property
    def out(self) -> Shape:
        """How frames from the node to the network travel now."""
        return self._shapes["out"]

    @property
    def back(self) -> Shape:
        """How frames from the network to the node travel now."""
        return self._shapes["in"]

    def change(self, direction: ToNetwork = "both", **values: Any) -> None:
        """Change properties of `Shape`, in one direction or both; the others stay as they are.

        It is in force on return. Frames already under way arrive when they were going to.
        """
        for each in ("out", "in"):
            if direction in {each, "both"}:
                self._shapes[each] = self._shapes[each]._replace(**values).check()
        if self._attendant is not None:
            self._attendant.ask({"do": "shape", "wire": self._number, "shapes": self._described()})

    def cut(self) -> None:
        """Lose everything from now on; both ends believe that the cable is fine (a radio out of reach)."""
        self.change(cut=True)

    def mend(self) -> None:
        """Carry frames again."""
        self.change(cut=False)

    def counters(self) -> tuple[dict[str, int], dict[str, int]]:
        """What travelled so far, out and in: `passed`, `lost` and `overflowed` frames, and `bytes` that passed."""
        out, back = self._connected().ask({"do": "count", "wire": self._number})
        return out, back

    def _described(self) -> list[dict[str, Any]]:
        return [shape._asdict() for shape in self._shapes.values()]

    def _connected(self) -> Attendant:
        if self._attendant is None:
            raise LabError("this link is not the uplink of any node yet")
        return self._attendant

    def connect(self, attendant: Attendant, ends: Ends, wires: Callable[[], Namespace]) -> None:
        """Make the two interfaces, first the node's, then the network's, and let frames travel between them.

        Args:
            wires: the namespace for the other halves of veth pairs, if there are no TAP interfaces.
        """
        if self._attendant is not None:
            raise LabError("a link has two ends only; make another one with lab.link()")
        with contextlib.ExitStack() as stack:
            if self._device == "tap":
                descriptors = [_tap(stack, namespace, name) for namespace, name in ends]
            else:
                self._wires = wires()
                self._halves = [f"w{2 * self._number + end}" for end in range(2)]
                descriptors = [
                    _packet_end(stack, end, half, self._wires) for end, half in zip(ends, self._halves, strict=True)
                ]
            order = {"do": "wire", "wire": self._number, "seed": self._seed, "shapes": self._described()}
            attendant.ask(order, descriptors)
        self._attendant = attendant

    def wait_running(self) -> None:
        """Wait until what is between the two ends carries frames; the ends themselves must be up."""
        if self._wires is not None:
            self._wires.wait_running(self._halves)


def plain_cable(ends: Ends) -> None:
    """Make a veth pair with its ends in two namespaces."""
    (one, name), (other, other_name) = ends
    one.ip(f"link add name {name} type veth peer name {other_name} netns {other.path}")


def best_device() -> Device:
    """`tap` if /dev/net/tun may be used here, else `packet`."""
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        if error.errno in {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENODEV, errno.ENXIO}:
            return "packet"
        raise
    return "tap"


def _tap(stack: contextlib.ExitStack, namespace: Namespace, name: str) -> int:
    with namespace.enter():
        descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        stack.callback(os.close, descriptor)
        fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
    return descriptor


def _packet_end(stack: contextlib.ExitStack, end: End, half: str, wires: Namespace) -> int:
    namespace, name = end
    namespace.ip(f"link add name {name} type veth peer name {half} netns {wires.path}")
    # Without this the frames that we read have no checksums yet, and several packets in one.
    namespace.run(["ethtool", "-K", name, "tx", "off", "tso", "off", "gso", "off"])
    wires.ip(f"link set {half} up")
    packets = stack.enter_context(wires.socket(socket.AF_PACKET, socket.SOCK_RAW, 0))
    packets.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    packets.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, PACKET_BUFFER)
    packets.bind((half, ETH_P_ALL))
    packets.setblocking(False)
    return packets.fileno()
