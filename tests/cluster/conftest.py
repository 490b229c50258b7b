"""A real cluster, and real hosts, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import hosts as two_hosts
from tests.cluster import slurm as slurm_cluster
from tests.cluster.hosts import Hosts
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


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    """Two hosts, h1 and h2, made for one test."""
    if reason := two_hosts.missing():
        pytest.skip(reason)
    folder = tmp_path / "hosts"
    folder.mkdir()
    with Hosts(folder) as both:
        yield both
