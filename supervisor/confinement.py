"""Has the kernel enforce what a child's specification says that its process may do.

Theory of operation. A confined process gives up, in this order and for good: Linux capabilities, everything that its
Landlock rules do not allow (:mod:`supervisor.landlock`), everything that its seccomp filter does not
(:mod:`supervisor.seccomp`). It does so when everything is imported and its place in the run directory is made, and
before its actor exists, so nothing that comes in a message is ever handled by a process that may do more.

The supervisors make processes, so they only give up what none of their children needs (:func:`confine_base`,
:func:`confine_supervisor`); a child inherits that and adds its own.

Where the kernel lacks one of the two, the other is used all the same, unless the specification says that confinement
is required. What came of it is told in one of the words of :data:`FULL`, :data:`FILTER_ONLY`, :data:`RULES_ONLY` and
:data:`NONE`, which the supervisor keeps with the actor's state.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import os
import site
import sys
import sysconfig
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from protocol.errors import PeerupError
from protocol.messages import Data
from protocol.messages.confinement import Confinement, ConfinementRule
from supervisor import landlock, seccomp
from supervisor.landlock import LandlockUnavailableError
from supervisor.seccomp import SeccompUnavailableError

FULL: Final = "full"
"""Landlock with all that is asked of it, and seccomp."""

RULES_ONLY: Final = "landlock"
FILTER_ONLY: Final = "seccomp"
NONE: Final = "none"
BASE: Final = "base"
"""A supervisor: what none of its children needs is refused."""

PARTLY: Final = "partial"
"""Both, with a Landlock that does not know ports, signals or abstract sockets yet."""

SYSTEM_DIRECTORIES: Final = ("/usr", "/lib", "/lib32", "/lib64", "/nix/store", "/gnu/store")
"""Libraries, certificates, time zones: readable by everybody on any machine."""

SYSTEM_FILES: Final = (
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/etc/nsswitch.conf",
    "/etc/passwd",
    "/etc/group",
    "/dev/urandom",
)

_UNIX: Final = "unix:/"
_NULL: Final = "/dev/null"
_OWN: Final = "/proc/self/"
"""Means another directory in each process."""
_REGISTRY: Final = landlock.MAKE_SYM | landlock.MAKE_SOCK | landlock.REMOVE_FILE
_CAPABILITY_VERSION: Final = 0x20080522
_CAP_NET_BIND_SERVICE: Final = 1 << 10
_DEEPEST: Final = 32

_libc = ctypes.CDLL(None, use_errno=True)
_Header = ctypes.c_uint32 * 2
_Sets = ctypes.c_uint32 * 6
_pinned: list[int] = []
"""Descriptors of what the kernel would otherwise make anew, without its rule: directories of /proc."""


class NotConfinedError(PeerupError):
    """Confinement is required, and this kernel cannot enforce it."""

    code = "not-confined"


def shortcomings() -> list[str]:
    """What this kernel lacks for confinement, in words; nothing if it has all."""
    found = []
    version = landlock.version()
    if not version:
        found.append("the kernel has no Landlock (Linux 5.13 or newer, with `landlock` in its `lsm=` list)")
    elif version < landlock.NETWORK_VERSION:
        found.append(f"the kernel's Landlock (version {version}) does not govern TCP ports; Linux 6.7 does")
    elif version < landlock.SCOPE_VERSION:
        found.append(f"the kernel's Landlock (version {version}) does not govern signals; Linux 6.12 does")
    if not seccomp.is_available():
        found.append("the kernel takes no seccomp filters, or there is none for this kind of machine")
    return found


def confine_base() -> None:
    """Give up, in a process that makes others, what none of them needs. Without seccomp nothing happens."""
    if seccomp.is_available():
        seccomp.Program(seccomp.base_filter()).install()


def confine_supervisor(spec: Confinement, registry: Collection[str]) -> None:
    """Give up, in the process of a supervisor, every file and port that none of its children needs.

    Its children begin with what is left, so `spec` has what any of them may reach. `registry` are the directories in
    which they become known. Where the kernel has no Landlock nothing happens, unless it is required.

    Raises:
        NotConfinedError: it is required and cannot be had.
    """
    try:
        ruleset = _ruleset(spec)
    except LandlockUnavailableError as error:
        if spec.required:
            raise NotConfinedError(f"security.confinement is `required`, but {error}") from error
        return
    with contextlib.closing(ruleset):
        for path in registry:
            _allow(ruleset, path, _REGISTRY)
        if os.isatty(2):
            # Each child opens the terminal once more for its log, before it is confined itself.
            with contextlib.suppress(OSError):
                _allow(ruleset, os.ttyname(2), landlock.WRITE_FILE)
        ruleset.enforce()


class Prepared:
    """What a supervisor makes ready for a child before the fork: what each process would spend memory of its own on.

    Attributes:
        ruleset: its Landlock rules but for those that mean the process itself; None if the kernel has none.
        program: its seccomp filter; None if there is none.
        problems: why one of them is missing.
    """

    def __init__(self, spec: Confinement) -> None:
        """Raises OSError where this process has no descriptor left."""
        self.spec = spec
        self.ruleset: landlock.Ruleset | None = None
        self.program: seccomp.Program | None = None
        self.problems: list[str] = []
        try:
            self.program = _program(spec.families, spec.terminate, ownership=spec.ownership)
        except SeccompUnavailableError as error:
            self.problems.append(str(error))
        try:
            self.ruleset = _ruleset(spec)
        except LandlockUnavailableError as error:
            self.problems.append(str(error))

    def descriptors(self) -> list[int]:
        """What the child must inherit."""
        return [] if self.ruleset is None else [self.ruleset.fd]

    def close(self) -> None:
        """Forget it, when the child has been made."""
        if self.ruleset is not None:
            self.ruleset.close()


def confine(prepared: Prepared) -> str:
    """Confine this process. It must have one thread; see the module.

    Returns:
        What is in force, as one of the words above.

    Raises:
        NotConfinedError: it is required and cannot be had in full.
    """
    spec, problems = prepared.spec, list(prepared.problems)
    _drop_capabilities(_CAP_NET_BIND_SERVICE if spec.privileged_ports else 0)
    rules = filtered = False
    try:
        if prepared.ruleset is not None:
            for path in spec.read:
                if path.startswith(_OWN):
                    _allow(prepared.ruleset, path, landlock.READ)
            prepared.ruleset.enforce()
            rules = True
    except LandlockUnavailableError as error:
        problems.append(str(error))
    try:
        if prepared.program is not None:
            prepared.program.install()
            filtered = True
    except SeccompUnavailableError as error:
        problems.append(str(error))
    if problems and spec.required:
        raise NotConfinedError(
            "security.confinement is `required`, but this process cannot be confined: " + "; ".join(problems)
        )
    if rules and filtered:
        return FULL if _knows_everything() else PARTLY
    return RULES_ONLY if rules else FILTER_ONLY if filtered else NONE


@functools.cache
def _knows_everything() -> bool:
    return landlock.version() >= landlock.SCOPE_VERSION


def _ruleset(spec: Confinement) -> landlock.Ruleset:
    """The rules, not in force yet."""
    network = (0 if spec.bind is None else landlock.BIND_TCP) | (0 if spec.connect is None else landlock.CONNECT_TCP)
    # Who may end the service may not be kept from reaching processes above its own; the seccomp filter knows which.
    scopes = landlock.SCOPE_ABSTRACT_UNIX | (0 if spec.terminate else landlock.SCOPE_SIGNAL)
    ruleset = landlock.Ruleset(network=network, scopes=scopes)
    try:
        for path in _readable(spec.system, spec.withheld):
            _allow(ruleset, path, landlock.READ)
        for path in spec.read:
            if not path.startswith(_OWN):
                _allow(ruleset, path, landlock.READ)
        _allow(ruleset, _NULL, landlock.READ_FILE | landlock.WRITE_FILE)
        for path in spec.write:
            _allow(ruleset, path, landlock.WRITE)
        for path in spec.sockets:
            _allow(ruleset, path, landlock.MAKE_SOCKETS)
        for port in spec.bind or ():
            ruleset.allow_port(port, landlock.BIND_TCP)
        for port in spec.connect or ():
            ruleset.allow_port(port, landlock.CONNECT_TCP)
    except BaseException:
        ruleset.close()
        raise
    return ruleset


@functools.cache
def _readable(system: tuple[str, ...], withheld: tuple[str, ...]) -> tuple[str, ...]:
    """What the program, the system and these further directories come to without what is withheld."""
    places = (*program_paths(), *SYSTEM_DIRECTORIES, *SYSTEM_FILES, *system)
    hidden = tuple(os.path.realpath(path) for path in withheld)
    return tuple(part for path in dict.fromkeys(places) for part in _without(path, hidden))


def _allow(ruleset: landlock.Ruleset, path: str, rights: int) -> None:
    fd = ruleset.allow_path(path, rights)
    if fd is None:
        return
    if path.startswith(_OWN):
        _pinned.append(fd)
    else:
        os.close(fd)


def _without(path: str, withheld: Collection[str], depth: int = 0) -> Iterator[str]:
    """The path, or, where something withheld is in it, the parts of it that hold none of that."""
    real = os.path.realpath(path)
    if any(_is_within(real, place) for place in withheld):
        return
    if not any(_is_within(place, real) for place in withheld):
        yield path
        return
    if depth > _DEEPEST:
        return
    try:
        names = os.listdir(real)  # noqa: PTH208 - in every process, and Path costs more than the rule
    except OSError:
        return
    for name in names:
        entry = os.path.join(real, name)  # noqa: PTH118 - likewise
        if not os.path.islink(entry):  # noqa: PTH114 - likewise; where a link leads decides itself whether it is readable
            yield from _without(entry, withheld, depth + 1)


def _is_within(path: str, directory: str) -> bool:
    return path == directory or path.startswith(directory.rstrip("/") + "/")


@functools.cache
def program_paths() -> tuple[str, ...]:
    """Where the program and its libraries are: what Python may import later, and what tracebacks quote.

    Of packages that lie outside of the usual directories (an editable installation) only those that are in use; what
    lies beside them is none of ours.
    """
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    places = [sysconfig.get_path(name) for name in names]
    # A virtual environment's own standard library is that of the Python that made it.
    places += [os.path.dirname(os.__file__), f"{sys.base_prefix}/lib", *site.getsitepackages()]  # noqa: PTH120
    if site.ENABLE_USER_SITE:
        places.append(site.getusersitepackages())
    found = dict.fromkeys(place for place in places if place)
    for name, module in list(sys.modules.items()):
        if "." in name or not getattr(module, "__file__", None):
            continue
        origin = Path(module.__file__ or "")
        place = str(origin.parent if hasattr(module, "__path__") else origin)
        if not any(_is_within(place, known) for known in found):
            found[place] = None
    return tuple(found)


@functools.cache
def _program(families: tuple[str, ...], terminate: int, *, ownership: bool) -> seccomp.Program:
    return seccomp.Program(seccomp.actor_filter(families=families, ownership=ownership, terminate=terminate))


def for_child(rule: ConfinementRule, arguments: Mapping[str, Data]) -> Confinement | None:
    """What the rule says of a child with these arguments."""
    spec, value = rule.confinement, arguments.get(rule.socket_argument)
    if spec is None or not isinstance(value, str) or not value.startswith(_UNIX):
        return spec
    directory = os.path.dirname(os.path.realpath(value.removeprefix("unix:")))  # noqa: PTH120 - `unix:/` is `/`
    if any(_is_within(directory, os.path.realpath(place)) for place in spec.withheld):
        return spec
    families = tuple(dict.fromkeys((*spec.families, "unix")))
    return dataclasses.replace(spec, sockets=(*spec.sockets, directory), families=families, ownership=True)


def prepare(specs: Iterable[Confinement] = ()) -> None:
    """Do once, before processes are made, what supervisors would do for each child that is confined so.

    What is kept then, and code that has run, is memory that all processes share.
    """
    _knows_everything()
    for spec in {Confinement(), *specs}:
        Prepared(spec).close()


def _drop_capabilities(keep: int) -> None:
    """Give up all capabilities but these. A process without any, which is the usual case, gains and loses nothing."""
    header, data = _Header(_CAPABILITY_VERSION, 0), _Sets()
    if _libc.capget(header, data) != 0 or not (data[0] or data[1] or data[3] or data[4]):
        return
    for index in range(6):
        data[index] &= keep if index < 3 else 0
    _libc.capset(header, data)
