"""What the process of an actor may do once it is confined: plain data, for the supervisor floor to have enforced."""

from __future__ import annotations

from protocol.messages.codec import record


@record
class Confinement:
    """All that one actor's process may reach; the kernel refuses everything else. The default is nearly nothing.

    Every actor may besides: read the installed program and the system's libraries, use what its supervisor gave it,
    exchange messages with other actors, and make threads. None may run programs, make processes, look into other
    processes, or use anything of the kernel that no actor needs (:mod:`supervisor.seccomp`).

    Attributes:
        read: files that may be read; of a directory, all that is in it.
        system: directories of the system that may be read as well, without what is withheld.
        withheld: files and directories that neither `system` nor the directories of every actor include.
        write: directories in which files may also be made, written, renamed and removed.
        sockets: directories in which Unix sockets may be made and removed.
        lent: files that the supervisor opens for reading on the actor's behalf, by whatever way their names lead at
            that moment; so nothing else in their directories needs to be readable.
        families: kinds of sockets besides those for messages: `inet` (TCP and UDP), `netlink` (the kernel's word about
            addresses and routes), `unix` (streams and datagrams, such as those of services that resolve names).
        bind: TCP ports that may be bound; 0 is any that the kernel picks, and None means all ports.
        connect: TCP ports that may be connected to; None means all.
        terminate: the process that may be sent SIGTERM; 0 for none. Others can never be sent a signal.
        ownership: whether modes and owners of open files may be changed.
        privileged_ports: whether the right to bind ports below 1024 is kept, if the node has it.
        required: whether the actor must not run where the kernel cannot enforce all this.
    """

    read: tuple[str, ...] = ()
    system: tuple[str, ...] = ()
    withheld: tuple[str, ...] = ()
    write: tuple[str, ...] = ()
    sockets: tuple[str, ...] = ()
    lent: tuple[str, ...] = ()
    families: tuple[str, ...] = ()
    bind: tuple[int, ...] | None = ()
    connect: tuple[int, ...] | None = ()
    terminate: int = 0
    ownership: bool = False
    privileged_ports: bool = False
    required: bool = False


@record
class ConfinementRule:
    """How children that a supervisor is asked to start are confined.

    Attributes:
        pattern: their names, with `*` for anything.
        confinement: what they may do; None: no limits.
        socket_argument: the argument of the child that may say `unix:/path`. It may then also make and remove a Unix
            socket in that directory, unless that is withheld, and set the mode of what it has open.
    """

    pattern: str
    confinement: Confinement | None
    socket_argument: str = ""
