"""What holds for all tests."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For `-n 3`: folders of tests beside each other, one test after another in each, on as few as 2 cores.

    Tests of the cluster wait much, for SLURM, and whole runs start one process after another: both leave a core idle.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Folders(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            folder = nodeid.split("/")[1]
            return folder if folder in ("cluster", "dist", "faults") else "unit and parity"

    return Folders(config, log)
