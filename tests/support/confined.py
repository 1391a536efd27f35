"""Code that confines its process, run in a child of the test."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable
from typing import Any


def in_child(function: Callable[[], Any]) -> Any:
    """What the function returned, as plain data, in a child process that ends with it."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writing, json.dumps(function()).encode())
            os._exit(0)
        except BaseException:  # noqa: BLE001  # whatever it is, the test's own code must not go on here
            traceback.print_exc()
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        said = file.read()
    _, status = os.waitpid(pid, 0)
    assert status == 0, "the child has failed; see its traceback"
    return json.loads(said)
