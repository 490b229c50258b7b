"""What holds for all tests: parts of a run, and what runs beside what."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.helpers.parts import longest_first, parse_part, part_of, stream_of

# how long an example takes says nothing: machines are slow, and busy
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", metavar="I/N", help="run the I-th of N parts of the tests, of about the same time each")


def pytest_configure(config: pytest.Config) -> None:
    try:
        parse_part(config.getoption("part") or "1/1")
    except ValueError as error:
        raise pytest.UsageError(f"--part: {error}") from None


@pytest.hookimpl(tryfirst=True)  # before -k and -m, or they would change what belongs to a part
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out other parts' tests. Streams that take long come first, or one would be left over at the end."""
    ids = [item.nodeid for item in items]
    mine, parts = parse_part(config.getoption("part") or "1/1")
    part = part_of(ids, parts)
    config.hook.pytest_deselected(items=[item for item, number in zip(items, part) if number != mine])
    items[:] = [items[i] for i in longest_first(ids) if part[i] == mine]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For `-n 3`: streams beside each other, and in each one test after another, on as few as 2 cores.

    Tests of the cluster wait much, for SLURM, and whole runs start one process after another: both leave a core idle.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Streams(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return stream_of(nodeid)

    config.option.loadscopereorder = False  # xdist would start with the most tests
    return Streams(config, log)
