"""Training has not changed since a base commit: golden runs there and here have the same numbers and weights.

GOLDEN_BASE names another commit, GOLDEN_MODE=tolerance allows rounding.
"""

from __future__ import annotations

import os

import pytest

from tests.golden.cases import CASES, Case
from tests.golden.compare import Golden, row
from tests.golden.differences import MODES, Mode
from tests.golden.runs import resolve

BASE = os.environ.get("GOLDEN_BASE", "836f89ad0641a4f3304f54acf34094a4e4dde141")
MODE: Mode = MODES[os.environ.get("GOLDEN_MODE", "exact")]


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Golden:
    commit = resolve(BASE)
    if commit is None:
        pytest.skip(f"the history of this checkout does not hold commit {BASE}: git fetch --unshallow gets it")
    return Golden(commit, tmp_path_factory.mktemp("golden"))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_training_is_that_of_the_base_commit(golden: Golden, case: Case) -> None:
    found = golden.compare(case, MODE)
    assert not found.differences, row(case.name, found)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name in ("lora", "lora-live")], ids=lambda case: case.name
)
def test_the_default_kernels_change_rounding_alone(golden: Golden, case: Case) -> None:
    """LoRA is computed as one operation then."""
    found = golden.compare(case, "tolerance")
    assert not found.differences, row(case.name, found)
