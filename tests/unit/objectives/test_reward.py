"""What stage rm refuses, and what its options mean."""

from __future__ import annotations

import numpy as np
import pytest

from dsdpo.config.stages import STAGES
from dsdpo.data.loader import BatchLoader
from dsdpo.errors import DataError
from dsdpo.objectives.stages import OBJECTIVES
from dsdpo.runtime.env import Mesh
from tests.helpers.objective import reward_objective
from tests.helpers.tiny import ListOfExamples, random_examples, random_pairs


def batch_of(source: ListOfExamples) -> object:
    return BatchLoader(source, Mesh(0, 1, 0), 4096, True).batch(np.arange(len(source)))


def test_a_margin_needs_scores_on_both_sides() -> None:
    scores = np.array([1.0, 0.0, 2.0, np.nan])
    source = ListOfExamples(random_pairs(2), scores=scores)
    with pytest.raises(DataError, match="example 1"):
        reward_objective(margin_from_scores=True).bind(batch_of(source), None, lambda _: None)  # type: ignore[arg-type]


def test_three_answers_are_no_pair() -> None:
    source = ListOfExamples(random_examples(2, (2, 3)))
    with pytest.raises(DataError, match="example 1"):
        reward_objective().bind(batch_of(source), None, lambda _: None)  # type: ignore[arg-type]


def test_each_stage_has_an_objective_with_its_head() -> None:
    assert STAGES.keys() == OBJECTIVES.keys()
    assert STAGES["rm"].head == reward_objective().head
