"""From an address, which may hold a name, to the concrete ones behind it that may be dialled."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence

import trio

from actors.switchboard.errors import AddressError
from actors.switchboard.own_machine import OwnMachine
from actors.switchboard.transports import resolve
from protocol.multiaddr import Multiaddr

MAX_ANSWERS = 256
"""Addresses that are remembered as what name servers answered for names of the configuration."""


class Resolver:
    """See the module.

    Args:
        may_lead_here: whether an address may be dialled though it leads to this machine.
        here: what is known of this machine's addresses, now.
        ask: asks the name servers.
    """

    def __init__(
        self,
        may_lead_here: Callable[[Multiaddr], bool],
        here: Callable[[], OwnMachine],
        ask: Callable[[Multiaddr], Awaitable[Sequence[Multiaddr]]] = resolve,
    ) -> None:
        self._may_lead_here = may_lead_here
        self._here = here
        self._ask = ask
        self._answers: OrderedDict[Multiaddr, None] = OrderedDict()

    async def resolve(self, address: Multiaddr) -> Sequence[Multiaddr]:
        """The concrete addresses behind one, without those that lead to this machine by somebody else's word.

        Raises:
            AddressError: unknown name, no answer in time, or nothing that may be dialled.
        """
        if address.is_relayed:
            await trio.lowlevel.checkpoint()
            return [address]  # the relay's own address is resolved when the relay is dialled
        found = await self._ask(address)
        if self._may_lead_here(address) or address in self._answers:
            for each in found:
                self._remember(each)
            return found
        here = self._here()
        reasons = {each: here.why_not(each) for each in found}
        usable = [each for each in found if not reasons[each]]
        if not usable:
            raise AddressError(f"not dialled: {next(iter(reasons.values()))}, and not in the configuration")
        return usable

    def _remember(self, answer: Multiaddr) -> None:
        self._answers[answer] = None
        self._answers.move_to_end(answer)
        if len(self._answers) > MAX_ANSWERS:
            self._answers.popitem(last=False)
