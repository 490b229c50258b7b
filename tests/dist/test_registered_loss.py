"""A loss that the package does not have, registered with one row and one function, trains like a built-in one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dsdpo.config.losses import LOSSES, LossSpec
from dsdpo.config.schema import RunConfig
from dsdpo.objectives.pair_logps import PairLogps
from dsdpo.objectives.registry import loss
from tests.dist.grid import run_cases
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import save_model, save_tokenizer, tiny_llama_config


def train_squared_hinge(case: dict[str, Any]) -> list[dict[str, float]]:
    """Register the loss on this rank and train; returns the metrics of each step."""
    LOSSES["squared_hinge"] = LossSpec("`max(0, 1 - b D)^2`")

    @loss("squared_hinge")
    def squared_hinge(p: PairLogps, o: RunConfig) -> torch.Tensor:
        return torch.relu(1 - o.beta * (p.chosen_logratios - p.rejected_logratios)) ** 2

    return run_cases([case], 8)[0]["metrics"]


def test_a_registered_loss_trains(tmp_path: Path) -> None:
    save_model(tmp_path, tiny_llama_config(tied=True))
    save_tokenizer(tmp_path)
    case = {
        "model": str(tmp_path),
        "loss_type": "squared_hinge",
        "loss_weights": None,
        "reference": "live",
        "learning_rate": 1e-4,
        "warmup_steps": 0,
        "max_steps": 3,
    }
    [steps] = run_ranks("tests.dist.test_registered_loss:train_squared_hinge", 1, case)
    losses = [step["loss"] for step in steps]
    assert len(losses) == 3
    assert losses[0] == pytest.approx(1.0, rel=1e-5), "before the first update policy and reference agree"
    assert losses[0] > losses[1] > losses[2] > 0
