"""Parts of the tests: together they are all, none is in two, and they take about the same time."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import pytest

from tests.helpers.parts import SECONDS, group_of, longest_first, parse_part, part_of, seconds_of, stream_of
from tests.helpers.ranks import ROOT

KILLS = [f"tests/faults/test_kills.py::test_a_kill[{number}]" for number in range(60)]
IDS = [f"{file}::test_{name}" for file in [*SECONDS, "tests/unit/test_cli.py"] for name in "ab"] + KILLS


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 7])
def test_every_test_is_in_one_part(parts: int) -> None:
    part = part_of(IDS, parts)
    assert len(part) == len(IDS) and set(part) == set(range(parts))
    assert part == part_of(IDS, parts), "the same each time"
    by_group = {(group_of(nodeid), number) for nodeid, number in zip(IDS, part)}
    assert len(by_group) == len({group for group, _ in by_group}), "a group stays together"


def test_quarters_take_about_the_same_time() -> None:
    part = part_of(IDS, 4)
    times = [sum(seconds_of(nodeid for nodeid, n in zip(IDS, part) if n == number).values()) for number in range(4)]
    assert sum(times) == sum(seconds_of(IDS).values())
    assert max(times) <= max(max(SECONDS.values()), 1.1 * sum(times) / 4)


def test_the_order_keeps_streams_together_and_all_tests() -> None:
    order = longest_first(IDS)
    assert sorted(order) == list(range(len(IDS)))
    streams = [stream_of(IDS[i]) for i in order]
    changes = sum(a != b for a, b in pairwise(streams))
    assert changes == len(set(streams)) - 1 and streams[0] == "tests/cluster"


def test_files_with_a_time_are_there() -> None:
    assert all((ROOT / file).exists() for file in SECONDS)


@pytest.mark.parametrize("text", ["0/4", "5/4", "2", "a/b", ""])
def test_a_part_that_is_none_is_told(text: str) -> None:
    with pytest.raises(ValueError, match="such as 2/4"):
        parse_part(text)


def test_pytest_collects_each_test_in_one_part() -> None:
    """With -k beside it, which leaves the parts as they are."""
    line = [sys.executable, "-m", "pytest", "--collect-only", "-n0", "-k", "not zzz"]
    line += [f"tests/unit/{name}.py" for name in ("test_errors", "runtime/test_lock", "runtime/test_files")]

    def collected(*more: str) -> list[str]:
        done = subprocess.run([*line, *more], cwd=ROOT, capture_output=True, text=True)
        return sorted(line for line in done.stdout.splitlines() if "::" in line)

    everything, first = collected(), collected("--part", "1/2")
    assert 0 < len(first) < len(everything)
    assert first == [nodeid for nodeid, part in zip(everything, part_of(everything, 2)) if part == 0]
