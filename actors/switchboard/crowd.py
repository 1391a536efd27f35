"""Callers that wait, by where they come from: whose turn it is, and who goes when there are too many.

Theory of operation. A caller's :class:`Source` has three levels, each within the one before: the *region*, what a
provider hands out; the *network*, what one customer has; the *home*, one subnet of it. At each level the members take
turns, and at each level whoever has most is the first to lose some. So neither a thousand callers from one address nor
callers from a thousand networks of one IPv6 allocation count for more than one member of the level above them.

    region    2001:db8::/32, or 192.0.2.0/24
    network   2001:db8:1::/48, or 192.0.2.1
    home      2001:db8:1:2::/64

A member that has not had a turn lately comes before those that have, three times out of four. An honest peer calls
once; who comes back again and again because nothing came of it waits behind it.

All operations take a time that does not depend on how many wait.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Generic, NamedTuple, TypeVar

IPV4_REGION = 24
"""Bits of an IPv4 address that its region has: the smallest block that is routed by itself."""
IPV6_REGION = 32
"""Bits of an IPv6 address that its region has: what a provider is given, or a reseller of addresses rents out."""
IPV6_NETWORK = 48
"""Bits that tell one network from another: a customer has up to 65,536 subnets of its own."""
IPV6_HOME = 64
"""Bits that tell one subnet from another: all addresses behind them are one home's."""
SEEN_TURN = 4
"""Each so-manieth turn is one of those who had a turn lately, however many have not."""
REMEMBERED = 8192
"""Members of all levels that had a turn lately; the one whose turn was longest ago is forgotten first."""

T = TypeVar("T")


class Source(NamedTuple):
    """What a caller counts for. Without a region or a home the network is all that there is."""

    network: str
    home: str = ""
    region: str = ""


def source_of(address: str) -> Source:
    """The source that a caller from this IP address counts for; an IPv4 address is a network of its own."""
    if ":" not in address:
        return Source(address, region=str(ipaddress.IPv4Network((address, IPV4_REGION), strict=False)))
    bare, _, zone = address.partition("%")
    network, home, region = (
        f"{ipaddress.IPv6Network((bare, bits), strict=False)}{f'%{zone}' if zone else ''}"
        for bits in (IPV6_NETWORK, IPV6_HOME, IPV6_REGION)
    )
    return Source(network, home, region)


class _Group(Generic[T]):
    """A member of one level: its members one level below, or, in a home, its callers, the oldest first."""

    __slots__ = ("_by_size", "_largest", "callers", "fresh", "seen", "size", "turns")

    def __init__(self) -> None:
        self.size = 0
        self.callers: OrderedDict[T, None] = OrderedDict()
        self.fresh: OrderedDict[str, _Group[T]] = OrderedDict()
        self.seen: OrderedDict[str, _Group[T]] = OrderedDict()
        self.turns = 0
        self._by_size: dict[int, OrderedDict[str, None]] = {}
        self._largest = 0

    def get(self, key: str) -> _Group[T] | None:
        return self.fresh.get(key) or self.seen.get(key)

    def __getitem__(self, key: str) -> _Group[T]:
        return self.fresh[key] if key in self.fresh else self.seen[key]

    def members(self) -> Iterator[_Group[T]]:
        yield from self.fresh.values()
        yield from self.seen.values()

    def resized(self, key: str, by: int) -> None:
        """A member has one caller more, or one less, and is forgotten with the last."""
        member = self[key]
        self.size += by
        before = member.size - by
        if before:
            del self._by_size[before][key]
            if not self._by_size[before]:
                del self._by_size[before]
        if member.size:
            self._by_size.setdefault(member.size, OrderedDict())[key] = None
        else:
            self.fresh.pop(key, None)
            self.seen.pop(key, None)
        self._largest = max(self._largest, member.size)
        if self._largest not in self._by_size:
            self._largest -= 1  # sizes change by one

    def largest(self) -> str:
        """The member with most callers; of several the one that has had so many for longest."""
        return next(iter(self._by_size[self._largest]))

    def in_turn(self) -> Iterator[str]:
        """Members, in the order in which they get their turn."""
        seen_first = self.turns % SEEN_TURN == SEEN_TURN - 1
        yield from self.seen if seen_first else self.fresh
        yield from self.fresh if seen_first else self.seen


class Crowd(Generic[T]):
    """See the module. `T` is hashable, and no caller is in it twice.

    Attributes:
        networks: how many have a caller here.
    """

    def __init__(self) -> None:
        self._root: _Group[T] = _Group()
        self._seen: OrderedDict[tuple[str, ...], None] = OrderedDict()
        self.networks = 0

    def __len__(self) -> int:
        return self._root.size

    def __iter__(self) -> Iterator[T]:
        """All callers."""
        for region in self._root.members():
            for network in region.members():
                for home in network.members():
                    yield from home.callers

    def count(self, source: Source) -> int:
        """Callers of the network of this source."""
        region = self._root.get(region_of(source))
        network = None if region is None else region.get(source.network)
        return 0 if network is None else network.size

    def add(self, source: Source, caller: T) -> None:
        """One more, behind the others of its home."""
        group = self._root
        path: tuple[str, ...] = ()
        for key in _keys(source):
            path = (*path, key)
            member = group.get(key)
            if member is None:
                member = _Group()
                (group.seen if path in self._seen else group.fresh)[key] = member
            group = member
        group.callers[caller] = None
        self._resize(source, +1)

    def remove(self, source: Source, caller: T) -> bool:
        """Take this one out; False: it is not here."""
        home = self._home(source)
        if home is None or caller not in home.callers:
            return False
        del home.callers[caller]
        self._resize(source, -1)
        return True

    def next(self, may: Callable[[str, str], bool]) -> tuple[Source, T] | None:
        """Take out the caller whose turn it is, of the members that may have one now; None if there is none.

        `may` is asked with a region, which may or may not, and then with it and a network (else an empty text); a
        network that may has its turn.
        """
        for region in self._root.in_turn():
            if may(region, ""):
                for network in self._root[region].in_turn():
                    if may(region, network):
                        return self._take(region, network)
        return None

    def has_region(self, region: str) -> bool:
        """Whether somebody of this region waits."""
        return self._root.get(region) is not None

    def drop_oldest(self, within: Source | None = None) -> T:
        """Take out who came first of the home that has most, in the network and the region that have most.

        `within` names another network.
        """
        keys: list[str] = [] if within is None else [region_of(within), within.network]
        group = self._root
        for level in range(_LEVELS):
            if level >= len(keys):
                keys.append(group.largest())
            group = group[keys[level]]
        region, network, home = keys
        caller = next(iter(group.callers))
        self.remove(Source(network, home, region), caller)
        return caller

    def drop_for(self, source: Source, *, within_network: bool = False) -> T | None:
        """Take out who has to make room for a caller of this source; None: it is this caller who has to go.

        It is who came last of the members that have more callers than the newcomer's would have with it.
        """
        keys: list[str] = []
        group, own = self._root, True
        for level, key in enumerate(_keys(source)):
            following = group.get(key) if own else None
            if not (within_network and level <= _NETWORK_LEVEL):
                largest = group.largest()
                if not own or group[largest].size > (0 if following is None else following.size) + 1:
                    key, following, own = largest, group[largest], False  # noqa: PLW2901  # another way down
            if following is None:
                return None
            keys.append(key)
            group = following
        if own:
            return None
        region, network, home = keys
        caller = next(reversed(group.callers))
        self.remove(Source(network, home, region), caller)
        return caller

    def clear(self) -> None:
        """Forget all callers."""
        self._root = _Group()
        self.networks = 0

    def _home(self, source: Source) -> _Group[T] | None:
        group: _Group[T] | None = self._root
        for key in _keys(source):
            group = None if group is None else group.get(key)
        return group

    def _take(self, region: str, network: str) -> tuple[Source, T]:
        group = self._root[region][network]
        home = next(group.in_turn())
        caller = next(iter(group[home].callers))
        source = Source(network, home, region)
        parent = self._root
        path: tuple[str, ...] = ()
        for key in _keys(source):
            path = (*path, key)
            following = parent[key]
            parent.turns += 1
            parent.fresh.pop(key, None)
            parent.seen[key] = following
            parent.seen.move_to_end(key)
            self._seen[path] = None
            self._seen.move_to_end(path)
            parent = following
        while len(self._seen) > REMEMBERED:
            self._seen.popitem(last=False)
        self.remove(source, caller)
        return source, caller

    def _resize(self, source: Source, by: int) -> None:
        groups = [self._root]
        for key in _keys(source):
            groups.append(groups[-1][key])
        home = groups[-1]
        home.size += by
        self.networks += self._networks_change(groups[_NETWORK_LEVEL + 1], by)
        for parent, key in zip(reversed(groups[:-1]), reversed(_keys(source)), strict=True):
            parent.resized(key, by)

    @staticmethod
    def _networks_change(network: _Group[T], by: int) -> int:
        """Whether a network comes (1) or goes (-1) when it has one caller more, or one less."""
        if by > 0:
            return 1 if network.size == 0 else 0
        return -1 if network.size == 1 else 0


def region_of(source: Source) -> str:
    """The region of a source; a network without one is a region of its own."""
    return source.region or source.network


_LEVELS = 3
_NETWORK_LEVEL = 1


def _keys(source: Source) -> tuple[str, str, str]:
    return region_of(source), source.network, source.home
