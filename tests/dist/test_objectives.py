"""Objectives other than pairs': the same training on any number of ranks, ZeRO stage and layout, and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsdpo.data.order import step_example_ids
from tests.dist.objectives import EXAMPLES
from tests.helpers.objectives import examples_for
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import save_model, save_tokenizer, tiny_llama_config

WORLDS = (1, 2, 3)
STEPS, SAVED_AFTER = 6, 3
LAYOUTS: dict[str, dict[str, Any]] = {
    "shared": {"share_prefix": True, "max_tokens_per_row": 112},
    "plain": {"share_prefix": False, "max_tokens_per_row": 208},
}
KINDS: dict[str, dict[str, Any]] = {
    "likelihood": {"objective": "likelihood", "max_tokens_per_row": 52},
    "ranking, stored": {"objective": "dpo", "loss_type": "plackett_luce", "reference": "cached"},
    "ranking, live": {"objective": "dpo", "loss_type": "plackett_luce", "reference": "live"},
}
CASES = [(kind, stage, layout) for kind in KINDS for stage in (0, 3) for layout in LAYOUTS]
RESUMED = [{"until": SAVED_AFTER, "save": True, "stage": 3}, {"stage": 0}]


def train(folder: Path, world: int) -> tuple[dict[Any, list[Any]], list[list[Any]]]:
    """What each rank saw: case -> its run; the runs of the value head: whole, its first half, its second half."""
    common = {
        "model": str(folder / "model"),
        "cache_dir": str(folder / f"cache-{world}"),
        "train_batch_size": 4,
        "adam_epsilon": 1e-3,  # Adam makes a full step of a gradient that is rounding alone
        "save_steps": None,
        "seed": 42,
    }
    cases = []
    for name in CASES:
        kind, stage, layout = name
        run = folder / f"{world}-{'-'.join(map(str, name)).replace(', ', '-')}"
        cases.append({**common, **LAYOUTS[layout], **KINDS[kind], "stage": stage, "folder": str(run), "max_steps": 4})
    value = {**common, "objective": "rm", "max_steps": STEPS, "max_tokens_per_row": 160}
    cases.append({**value, "stage": 0, "folder": str(folder / f"{world}-whole")})
    cases += [{**value, **part, "folder": str(folder / f"{world}-resumed")} for part in RESUMED]
    ranks = run_ranks("tests.dist.objectives:train_objectives", world, cases, timeout=1800)
    by_case = [list(runs) for runs in zip(*ranks)]
    return dict(zip(CASES, by_case)), by_case[len(CASES) :]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[dict[Any, list[Any]], list[list[Any]]]]:
    folder = tmp_path_factory.mktemp("objectives")
    save_model(folder / "model", tiny_llama_config(tied=False))
    save_tokenizer(folder / "model")
    return {world: train(folder, world) for world in WORLDS}


def numbers(run: dict[str, Any]) -> np.ndarray:
    return np.array([[step["loss"], step["grad_norm"]] for step in run["metrics"]])


@pytest.mark.parametrize("kind", KINDS)
def test_losses_grad_norms_and_weights_agree(results: Any, kind: str) -> None:
    """The yardstick is one rank, without ZeRO or a shared prompt."""
    yardstick = results[1][0][kind, 0, "plain"][0]
    wanted, evaluated = numbers(yardstick), yardstick["evaluations"][-1]
    assert len(wanted) == 4 and np.ptp(wanted[:, 0]) > 0.01, "the steps must move the loss to prove anything"
    for world in WORLDS:
        for stage in (0, 3):
            for layout in LAYOUTS:
                run, where = results[world][0][kind, stage, layout][0], f"{world} ranks, ZeRO {stage}, {layout}"
                np.testing.assert_allclose(numbers(run), wanted, rtol=1e-4, err_msg=where)
                found = run["evaluations"][-1]["eval_loss"]
                np.testing.assert_allclose(found, evaluated["eval_loss"], rtol=1e-4, err_msg=where)
                assert run["weights"].keys() == yardstick["weights"].keys()
                for name, expected in yardstick["weights"].items():
                    np.testing.assert_allclose(run["weights"][name], expected, atol=1e-5, err_msg=f"{where}: {name}")


def test_stored_and_live_references_agree(results: Any) -> None:
    for world in WORLDS:
        found = [numbers(results[world][0][f"ranking, {kind}", 3, "shared"][0]) for kind in ("stored", "live")]
        np.testing.assert_allclose(*found, rtol=1e-4)


def test_the_first_ranking_loss_is_that_of_all_orders_alike(results: Any) -> None:
    """The policy is its reference: each of 3! orders is as likely; of 4 answers, the two in the middle tie."""
    ids, source = step_example_ids(0, EXAMPLES, 4, seed=42), examples_for("dpo", EXAMPLES)
    losses = {2: np.log(2), 3: np.log(6), 4: np.log(4 * 2 * 2)}
    wanted = np.average([losses[count] for count in source.lengths(ids).counts], weights=source.weights(ids))
    first = results[1][0]["ranking, stored", 0, "plain"][0]["metrics"][0]
    assert first["rewards/chosen"] == pytest.approx(0.0, abs=1e-4)
    assert first["loss"] == pytest.approx(wanted, rel=1e-4)


def test_the_cases_cover_several_micro_steps_and_ranks_without_examples(results: Any) -> None:
    for kind in KINDS:
        alone, three = (results[world][0][kind, 3, "shared"] for world in (1, 3))
        assert len(alone[0]["examples"][0]) > 1
        assert sorted(sum(rank["examples"][1]) for rank in three) == [0, 0, 1]


@pytest.mark.parametrize("world", WORLDS)
def test_a_value_head_trains_and_resumes(results: Any, world: int) -> None:
    """On another ZeRO stage than it was saved with."""
    whole, first, second = (runs[0] for runs in results[world][1])
    wanted = numbers(whole)
    assert len(wanted) == STEPS and np.ptp(wanted[:, 0]) > 0.01
    np.testing.assert_allclose(numbers(first), wanted[:SAVED_AFTER], rtol=1e-4)
    np.testing.assert_allclose(numbers(second), wanted, rtol=1e-4)
    np.testing.assert_allclose(wanted, numbers(results[1][1][0][0]), rtol=1e-4)
    assert "score.weight" in second["weights"] and second["weights"]["score.weight"].any()
    assert not any("lm_head" in name for name in second["weights"]), "nothing uses it"
