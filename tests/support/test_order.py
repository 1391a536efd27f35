from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.conftest import slow_files_first

FILES = {"a": "qqqq", "b": "qsq", "c": "q" * 9, "d": "ss", "e": "sqqq", "f": "qq"}
"""Of each file, which tests are slow."""


def some_tests() -> list[SimpleNamespace]:
    return [
        SimpleNamespace(
            name=f"{file}{number}",
            path=Path(file),
            get_closest_marker=lambda name, kind=kind: name == "slow" and kind == "s",
        )
        for file, kinds in FILES.items()
        for number, kind in enumerate(kinds)
    ]


@pytest.mark.parametrize("shares", [1, 2, 3, 5, 40])
def test_each_share_begins_with_slow_files_and_every_test_is_there_once(shares: int) -> None:
    given = some_tests()
    ordered = slow_files_first(given, shares)
    names = [test.name for test in ordered]
    assert sorted(names) == sorted(test.name for test in given)
    for file, kinds in FILES.items():  # a file's tests stay in order, and together where a file is slow
        places = [names.index(name) for name in (f"{file}{n}" for n in range(len(kinds)))]
        assert places == sorted(places)
        if "s" in kinds:
            assert places[-1] - places[0] == len(places) - 1


def test_two_processes_begin_with_slow_files_and_end_with_quick_ones() -> None:
    names = [test.name for test in slow_files_first(some_tests(), 2)]
    half = len(names) // 2
    first, second = "".join(name[0] for name in names[:half]), "".join(name[0] for name in names[half:])
    assert (first, second) == ("bbbaaaaccccc", "ddeeeeccccff")
