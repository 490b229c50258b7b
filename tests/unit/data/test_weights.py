"""The weight of an example, from a column that the entry names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsdpo.config.schema import RunConfig
from dsdpo.data import registry
from dsdpo.data.dropped import Dropped
from dsdpo.data.formats.record import to_example

PAIR = {"prompt": "Hi", "chosen": "Yes.", "rejected": "No."}


def weight_of(columns: dict[str, str], **more: Any) -> float:
    return to_example({**PAIR, **more}, "trl", columns, {}, allow_empty_rejected=False).weight


@pytest.mark.parametrize(("value", "weight"), [(2, 2.0), (0.25, 0.25), ("1.5", 1.5), (None, 1.0), ("", 1.0)])
def test_a_number_above_0(value: Any, weight: float) -> None:
    assert weight_of({"weight": "w"}, w=value) == weight


@pytest.mark.parametrize("value", [0, -1, "much", True, float("nan"), float("inf"), [1]])
def test_anything_else_drops_the_record(value: Any) -> None:
    with pytest.raises(Dropped) as caught:
        weight_of({"weight": "w"}, w=value)
    assert caught.value.code == "bad_weight"


def test_a_record_may_lack_it_and_no_column_is_taken_by_its_name() -> None:
    assert weight_of({"weight": "w"}) == 1.0
    assert weight_of({}, weight=3) == 1.0


def test_losses_across_pairs_take_none(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c", "w": 2}\n')
    info = '{"a": {"file_name": "a.jsonl", "ranking": true, "formatting": "trl", "columns": {"weight": "w"}}}'
    (tmp_path / "dataset_info.json").write_text(info)
    given = {"model_name_or_path": "-", "dataset": "a", "dataset_dir": str(tmp_path), "output_dir": "-"}
    for loss, codes in (("sigmoid", []), ("aot", ["weight"]), ("aot_unpaired", ["weight"])):
        found = registry.problems(RunConfig(**given, loss_type=loss), frozenset())
        assert [problem.code for problem in found] == codes


def test_a_mean_over_examples_takes_weights_into_account() -> None:
    from dsdpo.data.loader import MeanOver
    from tests.helpers.tiny import ListOfExamples, random_pairs

    weights = np.array([1.0, 3.0])
    lengths = ListOfExamples(random_pairs(2)).lengths(np.arange(2))
    first = lengths.loss_tokens[::2]
    over = MeanOver(lengths, weights, np.full(4, np.nan))
    assert over.mean_first_loss_tokens == pytest.approx((first[0] + 3 * first[1]) / 4) and over.mean_weight == 2.0
