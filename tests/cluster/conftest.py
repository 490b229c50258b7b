"""A real cluster for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster import slurm as slurm_cluster
from tests.cluster.slurm import Slurm


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """One SLURM cluster for all tests."""
    if reason := slurm_cluster.missing():
        pytest.skip(reason)
    with Slurm(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def tidy(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test leaves no jobs and no dead nodes to the next one, however it ends."""
    yield
    if "slurm" in request.fixturenames:
        request.getfixturevalue("slurm").tidy()
