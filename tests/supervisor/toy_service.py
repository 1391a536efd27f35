"""The program that the tests run as a service: `python -m tests.supervisor.toy_service RUN_DIRECTORY SPEC [...]`."""

from __future__ import annotations

import base64
import pickle
import sys
from typing import NoReturn

from protocol.errors import PeerupError
from protocol.messages import decode_body
from supervisor.boot import LogSettings
from supervisor.service import Service
from tests.supervisor.process_harness import VISITOR, RootSpec


def _refuse(*_: object, **__: object) -> NoReturn:
    raise AssertionError("pickle is used")


def main() -> None:
    path, encoded, *options = sys.argv[1:]
    # Nothing in the runtime may ever use it, in any process: children inherit this.
    pickle.loads = pickle.load = pickle.Unpickler = pickle.dumps = pickle.dump = _refuse  # type: ignore[misc, assignment]
    root = decode_body(RootSpec.KIND, base64.b64decode(encoded))
    assert isinstance(root, RootSpec)
    service = Service(
        path,
        root.root,
        preload=("trio", "tests.supervisor.toy_actors"),
        allow_faults="--allow-faults" in options,
        log=LogSettings(level="debug"),
        operators=(VISITOR,),
        factories=("tests.supervisor.", "supervisor."),
        on_ready=lambda: print("ready", flush=True),
        on_stopping=lambda: print("stopping", flush=True),
    )
    try:
        service.run()
    except PeerupError as error:
        print(f"{error.code}: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
