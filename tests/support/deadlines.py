"""Async tests end at a deadline of their own, with the places where their tasks stood.

pytest-timeout raises an exception from a signal handler, wherever the process happens to be. In an async test that
hangs this is inside trio's own loop, which does not survive it: the report says nothing about the test, and the next
async test fails as well. So for these tests the signal first comes GRACE seconds before their time is up, and has trio
cancel the test as a deadline of its own would. The clock is the real one whatever clock the test runs under. Where not
even that ends the test (a shielded task, a task that blocks the loop), the signal comes again, pytest-timeout does what
it always did, and what is left of trio's loop is cleared away for the next test.
"""

from __future__ import annotations

import inspect
import signal
import threading
import traceback
import warnings
from collections.abc import Iterator

import pytest
import pytest_timeout
import trio

GRACE = 15.0
"""Seconds between the cancellation of a test and the moment when it is ended by force; a quarter of the time if that is
less. Stopping real nodes takes a few seconds."""


class TestHungError(Exception):
    """An async test did not end in time."""


class _Deadline:
    """The deadline of one test."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._places: str | None = None
        self._scope: trio.CancelScope | None = None
        self._token: trio.lowlevel.TrioToken | None = None

    def run(self, test, *, clock=None, instruments=()):
        """In place of `trio.run`."""
        try:
            return trio.run(self._bounded, test, clock=clock, instruments=instruments)
        except BaseException as error:
            _close_loop(error)
            if self._places is not None and not isinstance(error, TestHungError):
                error.add_note(f"{self._hung()}")
            raise
        finally:
            self._token = None

    def passed(self) -> None:
        """From the signal handler: have the test cancelled, if a trio loop runs."""
        if self._token is not None:
            self._token.run_sync_soon(self._cancel)

    async def _bounded(self, test):
        self._token = trio.lowlevel.current_trio_token()
        try:
            with trio.CancelScope() as self._scope:
                await test()
        except Exception as error:
            if self._places is None:
                raise
            raise self._hung() from error
        if self._places is not None:
            raise self._hung()

    def _hung(self) -> TestHungError:
        return TestHungError(f"not finished after {self.seconds:g} s; its tasks:\n{self._places}")

    def _cancel(self) -> None:
        assert self._scope is not None
        self._places = "\n".join(_places())
        self._scope.cancel()


def _close_loop(error: BaseException) -> None:
    """If this exception tore trio's loop apart, close what is left of it.

    Otherwise that happens whenever it is collected as garbage, and then it ends the loop of a later test.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code is inspect.unwrap(trio.run).__code__:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Trio guest run got abandoned", RuntimeWarning)
                frame.f_locals["gen"].close()


def _places() -> Iterator[str]:
    """Where each task of this loop stands, innermost frame last; trio's and pytest's own frames left out."""
    root = trio.lowlevel.current_root_task()
    tasks = [] if root is None else [root]
    while tasks:
        task = tasks.pop(0)
        tasks += [child for nursery in task.child_nurseries for child in nursery.child_tasks]
        frames = [
            f"    {frame.f_code.co_filename}:{line} in {frame.f_code.co_name}"
            for frame, line in task.iter_await_frames()
            if "/site-packages/" not in frame.f_code.co_filename and frame.f_code.co_filename != __file__
        ]
        if frames:
            yield "\n".join([f"  {task.name}", *frames])


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """After pytest-trio has marked the async tests: have each run with its deadline."""
    for item in items:
        if item.get_closest_marker("trio") is None:
            continue
        settings = pytest_timeout._get_item_settings(item)
        if settings.timeout:
            deadline = item.deadline = _Deadline(settings.timeout - min(GRACE, settings.timeout / 4))
            item.add_marker(pytest.mark.trio(run=deadline.run), append=False)


def pytest_timeout_set_timer(item: pytest.Item, settings: pytest_timeout.Settings) -> bool | None:
    """In place of pytest-timeout's own, for async tests."""
    deadline: _Deadline | None = getattr(item, "deadline", None)
    if deadline is None or settings.method != "signal" or threading.current_thread() is not threading.main_thread():
        return None  # not ours

    def first(*_: object) -> None:
        signal.signal(signal.SIGALRM, last)
        signal.setitimer(signal.ITIMER_REAL, settings.timeout - deadline.seconds)
        deadline.passed()

    def last(*_: object) -> None:
        pytest_timeout.timeout_sigalrm(item, settings)

    def cancel() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)

    item.cancel_timeout = cancel
    signal.signal(signal.SIGALRM, first)
    signal.setitimer(signal.ITIMER_REAL, deadline.seconds)
    return True
