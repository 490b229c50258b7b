"""What holds for all tests."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For `-n 2`: tests of the cluster mostly wait, for SLURM, beside all others; both one after another."""
    from xdist.scheduler import LoadScopeScheduling

    class TwoParts(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "cluster" if nodeid.startswith("tests/cluster/") else "machine"

    return TwoParts(config, log)
