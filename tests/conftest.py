"""What holds for all tests."""

from __future__ import annotations

from pathlib import Path

import pytest

CLUSTER = Path(__file__).parent / "cluster"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For `-n 2 --dist loadgroup`: tests of the cluster mostly wait, for SLURM, beside all others one after another."""
    for item in items:
        name = "cluster" if CLUSTER in item.path.parents else "machine"
        item.add_marker(pytest.mark.xdist_group(name))
