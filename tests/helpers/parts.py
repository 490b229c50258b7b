"""Which tests run one after another in one process, how long they take, and which quarter they belong to."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Seconds on 2 cores of what takes more than the default, to start with the longest and to cut quarters of one length.
# A file that is missing here changes the balance, and nothing else.
DEFAULT_SECONDS = 10
SECONDS = {
    "tests/cluster/test_fixtures.py": 200,
    "tests/cluster/test_hosts.py": 400,
    "tests/cluster/test_jobs.py": 1100,
    "tests/dist/test_ds_configs.py": 60,
    "tests/dist/test_elastic.py": 90,
    "tests/dist/test_export.py": 30,
    "tests/dist/test_hh_rlhf.py": 30,
    "tests/dist/test_hpz.py": 30,
    "tests/dist/test_notebook.py": 30,
    "tests/dist/test_nvme.py": 40,
    "tests/dist/test_package.py": 20,
    "tests/dist/test_quantized.py": 90,
    "tests/dist/test_quantized_load.py": 120,
    "tests/dist/test_reference_store.py": 20,
    "tests/dist/test_references.py": 60,
    "tests/dist/test_rendezvous.py": 40,
    "tests/dist/test_same_training.py": 60,
    "tests/dist/test_whole_runs.py": 160,
    "tests/faults/test_damage.py": 180,
    "tests/faults/test_stops.py": 500,
    "tests/parity/test_bench.py": 100,
    "tests/parity/test_families.py": 60,
    "tests/parity/test_quantized.py": 30,
    "tests/parity/test_trl.py": 60,
    "tests/parity/test_trl_losses.py": 200,
}
KILL_SECONDS = 30
_KILL = re.compile(r"(tests/faults/test_kills\.py)::test_a_kill\[(\d+)\]")
_KILL_GROUPS = 6  # the settings of test_kills: those of one group share a run that nobody kills


def group_of(nodeid: str) -> str:
    """The group of tests that a test belongs to: its file, but for kills, of which there can be many."""
    if kill := _KILL.match(nodeid):
        return f"{kill[1]}, group {int(kill[2]) % _KILL_GROUPS}"
    return nodeid.partition("::")[0]


def stream_of(nodeid: str) -> str:
    """Tests of one stream never run beside each other. Those of the cluster share one SLURM, and its time limits."""
    return "tests/cluster" if nodeid.startswith("tests/cluster/") else group_of(nodeid)


def seconds_of(nodeids: Iterable[str]) -> dict[str, float]:
    """What each group among these tests takes."""
    seconds: dict[str, float] = {}
    for nodeid in nodeids:
        group = group_of(nodeid)
        if _KILL.match(nodeid):
            seconds[group] = seconds.get(group, 0) + KILL_SECONDS
        else:
            seconds[group] = SECONDS.get(group, DEFAULT_SECONDS)
    return seconds


def longest_first(nodeids: list[str]) -> list[int]:
    """An order for tests: streams by their time, and inside one as they come. Returns positions in `nodeids`."""
    seconds = seconds_of(nodeids)
    streams: dict[str, dict[str, float]] = {}
    for nodeid in nodeids:
        streams.setdefault(stream_of(nodeid), {})[group_of(nodeid)] = seconds[group_of(nodeid)]
    taken = {stream: sum(groups.values()) for stream, groups in streams.items()}
    return sorted(range(len(nodeids)), key=lambda i: (-taken[stream_of(nodeids[i])], stream_of(nodeids[i]), i))


def part_of(nodeids: list[str], parts: int) -> list[int]:
    """The part, 0 to parts - 1, of each test: whole groups, the longest first, each to the part with least to do."""
    seconds = seconds_of(nodeids)
    totals, part = [0.0] * parts, {}
    for group in sorted(seconds, key=lambda group: (-seconds[group], group)):
        part[group] = min(range(parts), key=lambda i: (totals[i], i))
        totals[part[group]] += seconds[group]
    return [part[group_of(nodeid)] for nodeid in nodeids]


def parse_part(text: str) -> tuple[int, int]:
    """`2/4` -> (1, 4): the part's number from 0, and how many there are. Raises ValueError."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise ValueError(f"a part is I/N with I from 1 to N, such as 2/4; found {text!r}")
    return int(found[1]) - 1, int(found[2])
