"""Whole nodes inside one trio run: real actors, real sockets, messages through memory instead of processes."""

import contextlib
import functools
import hashlib
import os
import random
import time

import trio

import actors.proxy.client
import actors.proxy.service
import actors.switchboard.actor
from actors.proxy.client import ProxyClient
from actors.proxy.service import ServiceServer
from actors.reactor import Reactor
from actors.switchboard.actor import Switchboard
from protocol.keys import PrivateKey
from protocol.messages import Descriptor, Request
from protocol.messages.config import AddressEntry, ConfigSnapshot, SubscribeConfig
from protocol.messages.gate import Decided, PolicyPublished, SubscribePolicy, TunnelEnded
from protocol.messages.keyring import (
    Identity,
    ReadIdentity,
    Signature,
    SignedPeerRecord,
    SignNoiseStaticKey,
    SignPeerRecord,
)
from protocol.messages.system import SaveCheckpoint
from protocol.multiaddr import Multiaddr
from protocol.noise import SIGNATURE_PREFIX
from protocol.peer_record import seal_peer_record
from protocol.policy import PeerRule, Policy, ServiceRule
from supervisor.actor import Actor, Checkpoint, handles
from supervisor.cell import Cell
from supervisor.port import NameState, NotDeliveredError

# A reactor expects to be the only one of its process, and sleeps in place of trio; here there are several.
for _module in (actors.proxy.client, actors.proxy.service, actors.switchboard.actor):
    _module.Reactor = functools.partial(Reactor, direct=False)


def key_of(name):
    return PrivateKey.from_seed(hashlib.sha256(name.encode()).digest())


def peer_of(name):
    return key_of(name).peer_id


class FakeKeyring(Actor):
    def __init__(self, key):
        self.key = key

    @handles(ReadIdentity)
    async def read_identity(self, request):
        return Identity(self.key.peer_id, self.key.public_key.to_protobuf())

    @handles(SignNoiseStaticKey)
    async def sign_noise(self, request):
        return Signature(self.key.public_key.to_protobuf(), self.key.sign(SIGNATURE_PREFIX + request.static_key))

    @handles(SignPeerRecord)
    async def sign_record(self, request):
        return SignedPeerRecord(seal_peer_record(self.key, request.addresses, request.seq))


class FakeGate(Actor):
    """Publishes what the test says, and keeps what it is told."""

    def __init__(self):
        self.policy = Policy(1, gating=True, peers=(), services=())
        self.subscribers = set()
        self.decided = []
        self.ended = []

    def publish(self, *, peers=None, services=None, gating=True, expires=None):
        """`peers`: names that are authorised. `services`: name to None or names of allowed peers."""
        if peers is None:
            rules = self.policy.peers
        else:
            rules = tuple(
                PeerRule(peer_of(name), line, (expires or {}).get(name), name) for line, name in enumerate(peers, 1)
            )
        if services is None:
            served = self.policy.services
        else:
            served = tuple(
                ServiceRule(name, None if allowed is None else tuple(peer_of(one) for one in allowed))
                for name, allowed in services.items()
            )
        self.policy = Policy(self.policy.version + 1, gating=gating, peers=rules, services=served)
        for subscriber in self.subscribers:
            self.context.tell(subscriber, PolicyPublished(self.policy))

    @handles(SubscribePolicy)
    async def subscribe(self, request):
        self.subscribers.add(self.context.current_sender)
        return PolicyPublished(self.policy)

    @handles(Decided)
    async def note_decision(self, message):
        self.decided.append(message)

    @handles(TunnelEnded)
    async def note_tunnel(self, message):
        self.ended.append(message)


class FakeConfig(Actor):
    def __init__(self):
        self.addresses = {}
        self.relays = ()
        self.subscribers = set()

    def snapshot(self):
        entries = tuple(
            AddressEntry(peer_of(name), tuple(Multiaddr(address) for address in addresses))
            for name, addresses in self.addresses.items()
        )
        relays = tuple(Multiaddr(address) for address in self.relays)
        return ConfigSnapshot(version=1, gating=True, services=(), names=(), addresses=entries, relays=relays)

    def say_where(self, name, *addresses):
        self.addresses[name] = addresses
        self.tell()

    def tell(self):
        for subscriber in self.subscribers:
            self.context.tell(subscriber, self.snapshot())

    @handles(SubscribeConfig)
    async def subscribe(self, request):
        self.subscribers.add(self.context.current_sender)
        return self.snapshot()


class Asker(Actor):
    """The test's own voice."""


class MemoryPort:
    """Carries envelopes of one actor of a node; they arrive in the next turn of the loop."""

    def __init__(self, node, name):
        self.node = node
        self.name = name

    def send(self, envelope, descriptors):
        if envelope.target != "root" and envelope.target not in self.node.receivers:
            raise NotDeliveredError(f"there is no {envelope.target}")
        copies = [Descriptor(dup(descriptor)) for descriptor in descriptors]
        self.node.token.run_sync_soon(self.node.deliver, envelope, copies)

    def state(self, name):
        return self.node.state(name)

    def watch(self, name):
        self.node.watchers.setdefault(name, set()).add(self.name)


def dup(descriptor):
    return os.dup(descriptor.fileno())


class LocalNode:
    """One node. `async with LocalNode.open("alice") as alice:` starts everything but proxies and services."""

    def __init__(self, name, nursery):
        self.name = name
        self.peer = peer_of(name)
        self.nursery = nursery
        self.token = trio.lowlevel.current_trio_token()
        self.receivers = {}
        self.actors = {}
        self.scopes = {}
        self.incarnations = {}
        self.watchers = {}
        self.checkpoints = {}
        self.starting = set()
        self.gate = FakeGate()
        self.config = FakeConfig()
        self.failures = []

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, name, listen=("/ip4/127.0.0.1/tcp/0",), **options):
        async with trio.open_nursery() as nursery:
            node = cls(name, nursery)
            await node.start(Asker(), "test")
            await node.start(FakeKeyring(key_of(name)), "keyring")
            await node.start(node.gate, "gate")
            await node.start(node.config, "config")
            node.options = options
            node.listen = listen
            await node.start_switchboard()
            try:
                yield node
            finally:
                with trio.CancelScope(shield=True, deadline=trio.current_time() + 10):
                    for actor in reversed(list(node.receivers)):
                        await node.stop(actor)
                nursery.cancel_scope.cancel()

    async def start_switchboard(self):
        self.switchboard = Switchboard(self.listen, **self.options)
        ready = await self.start(self.switchboard, "switchboard")
        self.address = ready["listen"][0] if ready["listen"] else None

    async def proxy(self, peer, service, listen="127.0.0.1:0", **options):
        """A client-side proxy; `(host, port)` where it listens."""
        actor = ProxyClient(str(peer_of(peer)), peer, service, listen, **options)
        ready = await self.start(actor, f"proxy/{peer}/{service}")
        if listen is None:
            return None
        host, _, port = ready["listen"].rpartition(":")
        return host, int(port)

    async def serve(self, service, port, host="127.0.0.1", **options):
        await self.start(ServiceServer(service, f"{host}:{port}", **options), f"service/{service}")

    async def start(self, actor, name):
        """Run an actor; what its `start` returned."""
        incarnation = self.incarnations[name] = self.incarnations.get(name, 0) + 1
        ready = trio.Event()
        result = {}

        def on_ready(state):
            result.update(state)
            ready.set()

        cell = Cell(
            actor,
            name,
            incarnation,
            MemoryPort(self, name),
            supervisor="root",
            now=time.monotonic,
            wall=time.time,
            random=random.Random(f"{self.name} {name}"),
            on_ready=on_ready,
        )
        self.receivers[name] = cell.exchange
        self.actors[name] = actor
        self.starting.add(name)
        scope = self.scopes[name] = trio.CancelScope()
        cell_done = trio.Event()
        self.cells = getattr(self, "cells", {})
        self.cells[name] = (cell, cell_done)
        left = self.checkpoints.pop(name, None)

        async def live():
            try:
                with scope:
                    await cell.run(left)
            finally:
                cell_done.set()
                if self.receivers.get(name) is cell.exchange:
                    del self.receivers[name]
                    for watcher in self.watchers.get(name, ()):
                        if watcher in self.receivers:
                            self.receivers[watcher].name_down(name, "ended")
                ready.set()

        self.nursery.start_soon(live)
        await ready.wait()
        if name not in self.receivers:
            await trio.sleep_forever()  # its failure is on the way to the test and ends this
        self.starting.discard(name)
        for watcher in self.watchers.get(name, ()):
            if watcher in self.receivers and incarnation > 1:
                self.receivers[watcher].name_up(name, incarnation)
        return result

    async def stop(self, name):
        if name in self.receivers:
            cell, done = self.cells[name]
            cell.request_stop("the test is over")
            await done.wait()

    async def kill(self, name):
        """End an actor as SIGKILL does: it says nothing, and its descriptors close."""
        actor, (_, done) = self.actors[name], self.cells[name]
        self.scopes[name].cancel()
        await done.wait()
        if getattr(actor, "_doors", None) is not None:
            actor._doors.close_all()
        actor._reactor.close()
        if getattr(actor, "_listener", None) is not None:
            actor._listener.close()
        if getattr(actor, "_lease", None) is not None:
            os.close(actor._lease)

    def state(self, name):
        if name in self.starting:
            return NameState.STARTING
        return NameState.READY if name in self.receivers else NameState.UNKNOWN

    def deliver(self, envelope, descriptors):
        if envelope.target == "root":
            self.root_gets(envelope, descriptors)
            return
        receiver = self.receivers.get(envelope.target)
        if receiver is not None:
            receiver.deliver(envelope, descriptors)

    def root_gets(self, envelope, descriptors):
        from protocol.messages import decode_body

        if envelope.kind == SaveCheckpoint.KIND:
            saved = decode_body(envelope.kind, envelope.body, descriptors)
            self.checkpoints[envelope.sender] = Checkpoint(saved.state, saved.descriptors)

    async def ask(self, target, request):
        assert isinstance(request, Request)
        return await self.actors["test"].context.ask(target, request, timeout=20)

    def tell(self, target, message):
        self.actors["test"].context.tell(target, message)

    def connections(self, peer):
        return list(self.switchboard._table.of(peer_of(peer)))


@contextlib.asynccontextmanager
async def two_nodes(first="alice", second="bob", services=None, **options):
    """Two nodes that authorise each other, and of which the first knows where the second is."""
    async with LocalNode.open(first, **options) as a, LocalNode.open(second, **options) as b:
        a.gate.publish(peers=[second], services={})
        b.gate.publish(peers=[first], services=services or {})
        a.config.say_where(second, b.address)
        await until(lambda: a.switchboard._reach.book.addresses(b.peer))
        await until(lambda: b.switchboard._publishers.policy.policy.version == b.gate.policy.version)
        await until(lambda: a.switchboard._publishers.policy.policy.version == a.gate.policy.version)
        yield a, b


async def until(condition, seconds=10):
    """Wait until something holds; fail when it does not in time."""
    with trio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110  # what is waited for is the state of actors, which have no events
            await trio.sleep(0.002)


@contextlib.asynccontextmanager
async def tcp_server(handler):
    """A TCP server on loopback; yields its port. `handler(stream)` runs for each connection."""
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, handler, 0)
        listeners = [one for one in listeners if one.socket.family == trio.socket.AF_INET]
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()


async def echo(stream):
    """Echoes until end of file, then finishes."""
    try:
        async for data in stream:
            await stream.send_all(data)
        await stream.send_eof()
    except trio.BrokenResourceError:
        pass
