"""A policy that is narrowed while the switchboard's mailbox is full is in force as soon as there is room."""

import dataclasses

import trio

from actors.gate.actor import Gate
from actors.switchboard import publishers as publishers_module
from actors.switchboard.actor import Switchboard
from protocol.messages.gate import Reload
from protocol.messages.keyring import SignPeerRecord
from protocol.messages.reachability import AnnounceAddresses
from protocol.messages.switchboard import Connect, ReadStatus
from protocol.multiaddr import Multiaddr
from tests.actors.local_node import FakeKeyring, two_nodes, until


async def test_a_peer_that_was_removed_meanwhile_is_cut_off(monkeypatch, tmp_path):
    monkeypatch.setattr(publishers_module, "ASK_AGAIN", float("inf"))  # nothing but the gate's own word helps
    keys = tmp_path / "authorized_keys"
    async with two_nodes() as (alice, bob):
        keys.write_text(f"{alice.peer}\n")
        keys.chmod(0o600)
        await bob.stop("gate")
        await bob.start(Gate(str(keys), watch=False), "gate")
        await until(lambda: "switchboard" in bob.actors["gate"].describe()["subscribers"])
        await alice.ask("switchboard", Connect(bob.peer))
        await until(lambda: bob.connections("alice"))

        may_sign, signing = trio.Event(), trio.Event()
        sign = FakeKeyring.sign_record

        async def wait(keyring, request):
            signing.set()
            await may_sign.wait()
            return await sign(keyring, request)

        entry = FakeKeyring.handlers[SignPeerRecord.KIND]
        monkeypatch.setitem(FakeKeyring.handlers, SignPeerRecord.KIND, dataclasses.replace(entry, function=wait))
        bob.tell("switchboard", AnnounceAddresses((Multiaddr("/ip4/192.0.2.1/tcp/4001"),)))
        await signing.wait()  # the switchboard is busy with that now
        for _ in range(Switchboard.mailbox_limit):
            bob.tell("switchboard", ReadStatus())
        keys.write_text("")
        await bob.ask("gate", Reload())
        await until(lambda: bob.actors["gate"].describe()["behind"] == ["switchboard"])
        assert bob.connections("alice")
        may_sign.set()
        await until(lambda: not bob.connections("alice"))
        await until(lambda: bob.actors["gate"].describe()["behind"] == [])
