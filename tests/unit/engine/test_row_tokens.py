"""How long rows are where no GPU's memory decides. The rest is in tests/unit/plan and tests/dist/test_rows.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dsdpo.config.schema import RunConfig
from dsdpo.engine.engine import Hardware
from dsdpo.engine.row_tokens import find_rows, row_without_gradients

NO_ENGINE: Any = None


@pytest.mark.parametrize(("least", "trains", "evaluates"), [(100, 8192, 256), (9000, 9000, 9000)])
def test_auto_has_no_limit_for_examples(least: int, trains: int, evaluates: int) -> None:
    config = RunConfig(model_name_or_path="m", dataset=["d"], output_dir="o", max_length=64, max_tokens_per_row="auto")
    rows = find_rows(config, NO_ENGINE, Hardware(torch.device("cpu"), "fp32"), least, 1)
    assert (rows.tokens, row_without_gradients(config, least)) == (trains, evaluates)


def test_a_length_that_is_set_stays() -> None:
    config = RunConfig(model_name_or_path="m", dataset=["d"], output_dir="o", max_length=64, max_tokens_per_row=512)
    rows = find_rows(config, NO_ENGINE, Hardware(torch.device("cpu"), "fp32"), 100, 1)
    assert (rows.tokens, rows.is_estimate, row_without_gradients(config, 100)) == (512, False, 512)
