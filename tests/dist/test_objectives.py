"""Every stage: the same training on any number of ranks, ZeRO stage and layout, with LoRA or in full, and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsdpo.data.order import step_example_ids
from tests.dist.cells import FACTORS, Cell, few, sample, yardstick
from tests.dist.objectives import EXAMPLES
from tests.helpers.objectives import examples_for
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import save_model, save_tokenizer, tiny_llama_config

WORLDS = (1, 2, 3)
STEPS, SAVED_AFTER = 6, 3
RESUMED = [{"until": SAVED_AFTER, "save": True, "zero": 3}, {"zero": 0}]
CELLS = sample()
FEW = few(CELLS)


def _common(folder: Path) -> dict[str, Any]:
    return {
        "model": str(folder / "model"),
        "cache_dir": str(folder / "cache"),
        "train_batch_size": 4,
        "adam_epsilon": 1e-3,  # Adam makes a full step of a gradient that is rounding alone
        "save_steps": None,
        "seed": 42,
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("objectives")
    save_model(folder / "model", tiny_llama_config(tied=False))
    save_tokenizer(folder / "model")
    return folder


def train(place: Path, cells: list[Cell]) -> dict[Cell, list[Any]]:
    """What each rank saw of cells and of their yardsticks."""
    found: dict[Cell, list[Any]] = {}
    names = {name: list(values) for name, values in FACTORS.items()}
    every = list(dict.fromkeys([*map(yardstick, cells), *cells]))
    for world in names["world"]:
        mine = [cell for cell in every if cell[1] == world]
        cases = []
        for number, cell in enumerate(mine):
            values = dict(zip(FACTORS, cell))
            rows = {"max_tokens_per_row": 112 if values["share_prefix"] else 208}
            del values["world"]
            folder = place / f"{world}-{number}-{len(cells)}"
            cases.append({**_common(place), **rows, **values, "folder": str(folder), "max_steps": 4})
        if cases:
            ranks = run_ranks("tests.dist.objectives:train_objectives", world, cases, timeout=1800)
            found |= dict(zip(mine, (list(runs) for runs in zip(*ranks))))
    return found


def numbers(run: dict[str, Any]) -> np.ndarray:
    return np.array([[step["loss"], step["grad_norm"]] for step in run["metrics"]])


def check(results: dict[Cell, list[Any]], cells: list[Cell]) -> None:
    """The yardstick is one rank, without ZeRO or a shared prompt."""
    for cell in cells:
        run, wanted = results[cell][0], results[yardstick(cell)][0]
        assert len(wanted["metrics"]) == 4
        assert np.ptp(numbers(wanted)[:, 0]) > 1e-3, "the steps must move the loss to prove anything"
        where = str(dict(zip(FACTORS, cell)))
        np.testing.assert_allclose(numbers(run), numbers(wanted), rtol=1e-4, err_msg=where)
        found, evaluated = (some["evaluations"][-1] for some in (run, wanted))
        for key in (key for key in evaluated if key.startswith("eval_")):
            np.testing.assert_allclose(found[key], evaluated[key], rtol=1e-4, atol=1e-5, err_msg=f"{where}: {key}")
        assert run["weights"].keys() == wanted["weights"].keys()
        for name, expected in wanted["weights"].items():
            np.testing.assert_allclose(run["weights"][name], expected, atol=1e-5, err_msg=f"{where}: {name}")


def test_a_cell_of_each_objective_agrees_with_one_rank(place: Path) -> None:
    results = train(place, FEW)
    check(results, FEW)
    steps = [rank["examples"] for ranks in results.values() for rank in ranks]
    assert max(len(examples[0]) for examples in steps) > 1, "no step has several micro-batches"
    assert [0] in [examples[1] for examples in steps], "no rank is ever without an example"


@pytest.mark.slow
def test_all_cells_agree_with_one_rank(place: Path) -> None:
    cells = [cell for cell in CELLS if cell not in FEW]
    check(train(place, cells), cells)


def test_references_and_the_first_ranking_loss(place: Path) -> None:
    """Stored and live references agree. The policy is its reference: each of 3! orders is as likely; of 4 answers, the
    two in the middle tie."""
    common = {**_common(place), "zero": 3, "max_tokens_per_row": 112, "max_steps": 4, "masks": False, "weights": True}
    cases = [
        {**common, "objective": objective, "reference": reference, "folder": str(place / f"{objective}-{reference}")}
        for objective in ("ranking", "kto")
        for reference in ("cached", "live")
    ]
    runs = run_ranks("tests.dist.objectives:train_objectives", 2, cases, timeout=600)[0]
    for stored, live in (runs[:2], runs[2:]):
        np.testing.assert_allclose(numbers(stored), numbers(live), rtol=1e-4)
    ids, source = step_example_ids(0, EXAMPLES, 4, seed=42), examples_for("ranking", EXAMPLES)
    losses = {2: np.log(2), 3: np.log(6), 4: np.log(4 * 2 * 2)}
    wanted = np.average([losses[count] for count in source.lengths(ids).counts], weights=source.weights(ids))
    first, of_kto = runs[0]["metrics"][0], runs[2]["metrics"][0]
    assert first["rewards/chosen"] == pytest.approx(0.0, abs=1e-4)
    assert first["loss"] == pytest.approx(wanted, rel=1e-4)
    assert of_kto["loss"] == pytest.approx(0.5, rel=1e-4) and of_kto["kl"] == pytest.approx(0.0, abs=1e-4)


@pytest.fixture(scope="module")
def resumed(place: Path) -> dict[int, dict[str, list[Any]]]:
    """World size -> objective -> its run: whole, its first half, its second half; as rank 0 saw them."""
    found = {}
    for world in WORLDS:
        cases = []
        for objective in OTHERS:
            value = {**_common(place), "objective": objective, "max_steps": STEPS, "max_tokens_per_row": 160}
            value["neftune_noise_alpha"] = 5.0 if objective == "sft" else None
            cases.append({**value, "zero": 0, "folder": str(place / f"{world}-{objective}-whole")})
            cases += [{**value, **part, "folder": str(place / f"{world}-{objective}-resumed")} for part in RESUMED]
        runs = run_ranks("tests.dist.objectives:train_objectives", world, cases, timeout=1800)[0]
        found[world] = {objective: runs[3 * n : 3 * n + 3] for n, objective in enumerate(OTHERS)}
    return found


OTHERS = ("pt", "sft", "kto", "rm")  # pairs are tested in test_elastic


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("objective", OTHERS)
def test_it_trains_and_resumes(resumed: Any, world: int, objective: str) -> None:
    """On another ZeRO stage than it was saved with; `sft` with noise on its embeddings."""
    whole, first, second = resumed[world][objective]
    wanted = numbers(whole)
    assert len(wanted) == STEPS and np.ptp(wanted[:, 0]) > 0.01
    np.testing.assert_allclose(numbers(first), wanted[:SAVED_AFTER], rtol=1e-4)
    np.testing.assert_allclose(numbers(second), wanted, rtol=1e-4)
    np.testing.assert_allclose(wanted, numbers(resumed[1][objective][0]), rtol=1e-4)
    if objective == "rm":
        assert "score.weight" in second["weights"] and second["weights"]["score.weight"].any()
        assert not any("lm_head" in name for name in second["weights"]), "nothing uses it"
