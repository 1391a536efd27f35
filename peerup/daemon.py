"""The long-running program: `peerup daemon`, also installed as `peerup-supervisor`.

It stays in the foreground, prints `ready` on standard output when the whole tree of actors is up, tells systemd the
same if it asked, and ends with SIGTERM or Ctrl-C. What goes wrong before that ends it with one message and status 1.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import time
from typing import TYPE_CHECKING

import click

from peerup.cli.framework import EXIT_CODES, Failure, Session, examples
from peerup.cli.framework import command as make_command

if TYPE_CHECKING:
    from actors.config.paths import NodeHome
    from actors.config.schema import NodeConfig

LOG_LEVELS = ("trace", "debug", "info", "warning", "error")

STOP_GRACE = 10.0
"""Seconds that the end of everything may take beyond the stop of the tree: killing what is left takes milliseconds."""


@make_command(
    "daemon",
    epilog=examples(
        "peerup daemon",
        "peerup --home ~/nodes/laptop daemon --log-level debug",
        "peerup daemon --log-format json 2>>peerup.log",
    )
    + f"\n\n{EXIT_CODES}",
)
@click.option("--log-level", type=click.Choice(LOG_LEVELS), help="The least that is logged (default: as configured).")
@click.option("--log-format", type=click.Choice(["text", "json"]), help="Form of the log (default: as configured).")
@click.option("--allow-faults", is_flag=True, help="Let `peerup fault` break parts of this node on purpose.")
@click.option("--ready-fd", type=click.IntRange(min=3), metavar="N", help="Also write `ready` to this descriptor.")
def command(
    session: Session, log_level: str | None, log_format: str | None, *, allow_faults: bool, ready_fd: int | None
) -> None:
    """Run the node, in the foreground, until SIGTERM or Ctrl-C.

    Prints `ready` on standard output when all of it is up; the log goes to standard error. Works as a systemd
    service of type notify.
    """
    run(session.home, log_level=log_level, log_format=log_format, allow_faults=allow_faults, ready_fd=ready_fd)


def run(
    home: NodeHome,
    *,
    log_level: str | None = None,
    log_format: str | None = None,
    allow_faults: bool = False,
    ready_fd: int | None = None,
) -> None:
    """Run the node in this home until it is told to stop.

    Raises:
        PeerupError: it cannot start, or could not be kept running.
    """
    from peerup.preload import preload, without_collector

    with without_collector():
        from actors.config.file import load_config
        from peerup.front import stand_in_front
        from peerup.systemd import ServiceManager
        from peerup.tree import OPERATORS, PREDECESSORS, VITAL, Options, build_tree, time_to_drain
        from supervisor.boot import LogSettings
        from supervisor.service import STOP_DEADLINE, Service

    config = load_config(home.config_file)
    for warning in config.warnings:
        click.echo(f"warning: {home.config_file}: {warning}", err=True)
    home.create()
    _check_not_running(home)
    manager = ServiceManager.take_from(os.environ, os.getpid())
    if manager.watchdog is not None:
        faulthandler.enable()  # it ends a process that is hung with SIGABRT; then the log says where that stood
    front = stand_in_front(manager) if config.relay_service.enabled and config.relay_service.drain_time else None
    tell = manager.tell if front is None else front.tell
    left = False
    preload(metrics=config.telemetry.metrics_enabled)
    confined = _check_confinement(config)
    log = LogSettings(
        level=log_level or config.log.level,
        json=(log_format or config.log.format) == "json",
        colour=None,
    )
    announced = False

    def ready() -> None:
        nonlocal announced
        tell("READY=1", "STATUS=running")
        if announced:
            return
        announced = True
        # Whoever started us may have gone; the node runs on all the same.
        with contextlib.suppress(OSError):
            sys.stdout.write("ready\n")
            sys.stdout.flush()
        if ready_fd is not None:
            with contextlib.suppress(OSError):
                os.write(ready_fd, b"ready\n")
                os.close(ready_fd)

    within = STOP_DEADLINE + time_to_drain(config)

    def stopping() -> None:
        # However long the configuration lets a stop take, and whatever the unit says: wait for it, and little longer.
        tell("STOPPING=1", "STATUS=stopping", f"EXTEND_TIMEOUT_USEC={int((within + STOP_GRACE) * 1e6)}")

    def on_left() -> None:
        nonlocal left
        left = True
        assert front is not None
        front.leave()

    options = Options(
        home,
        config,
        service_pid=os.getpid(),
        main_pid=os.getpid() if front is None else front.pid,
        started_at=time.time(),
        allow_faults=allow_faults,
    )
    service = Service(
        str(home.run_dir),
        build_tree(options),
        allow_faults=allow_faults,
        log=log,
        operators=OPERATORS,
        on_ready=ready,
        on_stopping=stopping,
        on_left=None if front is None else on_left,
        predecessors=PREDECESSORS,
        on_alive=lambda: tell("WATCHDOG=1"),
        watchdog=manager.watchdog,
        vital=VITAL,
        stop_deadline=within,
        confined=confined,
    )
    service.run()
    if not left:
        with contextlib.suppress(OSError):
            home.control_socket.unlink()


def _check_confinement(config: NodeConfig) -> bool:
    """Whether the actors are to be confined; what the kernel cannot do for that is said once."""
    from peerup.confinement import DISABLED, REQUIRED
    from supervisor.confinement import shortcomings

    wanted = config.security.confinement
    if wanted == DISABLED:
        return False
    for problem in shortcomings():
        if wanted == REQUIRED:
            raise Failure(
                f"security.confinement is `required`, but {problem}",
                "run it on a newer kernel, or set security.confinement to auto",
                code="not-confined",
            )
        click.echo(f"warning: the parts of this node are not fully confined: {problem}", err=True)
    return True


def _check_not_running(home: NodeHome) -> None:
    """Say at once that a node runs here already, and which; the lock of the run directory would only say so late."""
    if not home.control_socket.exists():
        return  # nobody to ask, and the client's HTTP takes a while to import
    from peerup.client import Client, ClientError

    try:
        status = Client(home.control_socket, timeout=2.0).get("/v1/status")
    except ClientError:
        return
    raise Failure(
        f"a node runs in this home already (pid {status.get('main_pid', status['pid'])})",
        "stop it with `peerup stop`, or choose another home with --home DIR",
        code="already-running",
    )


def main() -> None:
    """Entry point of the `peerup-supervisor` program."""
    option = click.Option(["--home"], envvar="PEERUP_HOME", metavar="DIR", help="The node's directory.")
    program = click.Command(
        "peerup-supervisor",
        callback=command.callback,
        params=[option, *(parameter for parameter in command.params if parameter.name != "home")],
        help=command.help,
        epilog=command.epilog,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
    )
    program(prog_name="peerup-supervisor")
