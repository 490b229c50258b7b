"""Promises 1 and 2: the same batches, losses and gradients on any number of ranks, ZeRO stage and row layout."""

from __future__ import annotations

from itertools import chain
from typing import Any

import numpy as np
import pytest

from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import save_model, save_tokenizer, tiny_llama_config

N_PAIRS = 17  # steps of 8, 8 and 1 pairs: in the third, ranks stand idle
WORLD_SIZES = (1, 2, 3)
MODELS = {"tied": True, "untied": False}
FINETUNING = ("full", "lora")
LAYOUTS: dict[str, dict[str, Any]] = {
    "one row": {},
    "several rows": {"max_tokens_per_row": 160},
    "plain rows": {"share_prefix": False},
    "plain several": {"share_prefix": False, "max_tokens_per_row": 160},
    "recompute": {"gradient_checkpointing": "full", "max_tokens_per_row": 160},
    "selective": {"gradient_checkpointing": "selective", "max_tokens_per_row": 160},
}
CASES = [
    (model, finetuning, stage, layout)
    for model in MODELS
    for finetuning in FINETUNING
    for stage in (0, 1, 2, 3)
    for layout in LAYOUTS
]


@pytest.fixture(scope="module")
def results(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[int, dict[tuple[str, ...], list[dict[str, Any]]]]:
    """world size -> case -> what each rank saw."""
    folder = tmp_path_factory.mktemp("models")
    for name, tied in MODELS.items():
        save_model(folder / name, tiny_llama_config(tied))
        save_tokenizer(folder / name)
    cases = [
        {
            "model": str(folder / model),
            "finetuning_type": finetuning,
            "stage": stage,
            "cache_dir": str(folder / "cache"),
            **LAYOUTS[layout],
        }
        for model, finetuning, stage, layout in CASES
    ]
    by_world = {world: run_ranks("tests.dist.grid:run_cases", world, cases, N_PAIRS) for world in WORLD_SIZES}
    return {world: dict(zip(CASES, zip(*ranks))) for world, ranks in by_world.items()}  # type: ignore[misc]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("finetuning", FINETUNING)
def test_losses_and_grad_norms_agree(results: Any, model: str, finetuning: str) -> None:
    """Within 1e-4 relative over all world sizes, stages and layouts; the plain rows of stage 0 are the yardstick."""
    yardstick = results[1][model, finetuning, 0, "plain rows"][0]["metrics"]
    wanted = np.array([[step["loss"], step["grad_norm"]] for step in yardstick])
    assert len(wanted) == 5 and np.ptp(wanted[:, 0]) > 0.05, "the steps must move the loss to prove anything"
    for world in WORLD_SIZES:
        for stage in (0, 1, 2, 3):
            for layout in LAYOUTS:
                steps = results[world][model, finetuning, stage, layout][0]["metrics"]
                found = np.array([[step["loss"], step["grad_norm"]] for step in steps])
                np.testing.assert_allclose(found, wanted, rtol=1e-4, err_msg=f"{world} ranks, ZeRO {stage}, {layout}")


def test_the_same_pairs_in_every_step(results: Any) -> None:
    """Whatever the ranks and rows, step s has the same pairs, each exactly once."""
    seen = set()
    for cases in results.values():
        for ranks in cases.values():
            steps = zip(*(rank["example_ids"] for rank in ranks))
            seen.add(tuple(tuple(sorted(chain(*step))) for step in steps))
    assert len(seen) == 1
    first_epoch = seen.pop()[:3]
    assert sorted(i for step in first_epoch for i in step) == list(range(N_PAIRS))


def test_the_cases_cover_several_micro_steps_and_idle_ranks(results: Any) -> None:
    """The grid proves nothing about accumulation or dummy rows unless they occur in it."""
    assert max(results[1]["tied", "full", 3, "several rows"][0]["micro_steps"]) > 1
    pairs_in_third_step = [len(rank["example_ids"][2]) for rank in results[3]["tied", "full", 3, "one row"]]
    assert sorted(pairs_in_third_step) == [0, 0, 1]
