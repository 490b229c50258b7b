"""What holds for all tests."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For `-n 3`: what is below beside each other, and in each one test after another, on as few as 2 cores.

    Tests of the cluster wait much, for SLURM, and whole runs start one process after another: both leave a core idle.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Streams(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            folder, _, file = nodeid.partition("::")[0].removeprefix("tests/").partition("/")
            return {"cluster": folder, "faults": folder, "dist": file}.get(folder, "unit and parity")

    return Streams(config, log)
