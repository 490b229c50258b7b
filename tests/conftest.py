"""What holds for all tests."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For `-n 2`: two halves beside each other, one test after another in each.

    Tests of the cluster wait much, for SLURM, and whole runs start one process after another: both leave a core idle.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Halves(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "cluster and faults" if nodeid.startswith(("tests/cluster/", "tests/faults/")) else "the rest"

    return Halves(config, log)
