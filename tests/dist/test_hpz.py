"""ZeRO++ hpZ, a second copy of the parameters in each group of ranks: the same training, and no stale weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.dist.grid import STEPS
from tests.dist.test_elastic import assert_same, saved_state
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import save_model, save_tokenizer, tiny_llama_config

WORLD, GROUP = 4, 2
HPZ: dict[str, Any] = {"zero": {"zero_hpz_partition_size": GROUP}}
PLAIN: dict[str, Any] = {}
SAVED_AFTER = 2
KINDS: dict[str, dict[str, Any]] = {
    "full, cached": {"finetuning_type": "full"},
    "full, live": {"finetuning_type": "full", "reference": "live"},
    "lora, live": {"finetuning_type": "lora", "reference": "live", "learning_rate": 0.01},
    "full, persist": {"finetuning_type": "full", "persist": True},
    "full, offload": {"finetuning_type": "full", "offload": True},
    "lora, recompute": {"finetuning_type": "lora", "gradient_checkpointing": True, "max_tokens_per_row": 160},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose sizes four ranks do not divide."""
    folder = tmp_path_factory.mktemp("hpz")
    save_model(folder / "model", tiny_llama_config(hidden_size=36, intermediate_size=50, head_dim=10, vocab_size=97))
    save_tokenizer(folder / "model")
    return folder


def test_each_rank_keeps_its_share_of_its_group(base: Path) -> None:
    """Of policy and reference: a quarter of the parameters as under plain ZeRO-3, and half of them once more."""
    for rank in run_ranks("tests.dist.grid:second_copies", WORLD, str(base), str(base / "model"), GROUP):
        for held in rank:
            assert held["first"] == pytest.approx(held["whole"] / WORLD, rel=0.01)
            assert held["second"] == pytest.approx(held["whole"] / GROUP, rel=0.01)


def test_losses_and_grad_norms_are_those_of_plain_zero3(base: Path) -> None:
    common = {"model": str(base / "model"), "stage": 3, "cache_dir": str(base / "cache")}
    cases = [{**common, **kind, **where} for kind in KINDS.values() for where in (PLAIN, HPZ)]
    found = run_ranks("tests.dist.grid:run_cases", WORLD, cases, 17)[0]
    for kind, plain, grouped in zip(KINDS, found[::2], found[1::2]):
        wanted, ours = ([(s["loss"], s["grad_norm"]) for s in result["metrics"]] for result in (plain, grouped))
        assert len(wanted) == STEPS and np.ptp(wanted, axis=0)[0] > 0.05
        np.testing.assert_allclose(ours, wanted, rtol=1e-5, err_msg=kind)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_checkpoints_go_between_hpz_and_plain_zero3(base: Path, kind: str) -> None:
    """Under hpZ to the bit; to and from plain ZeRO-3 the same state, and the next loss is that of its weights."""
    common = {
        "model": str(base / "model"),
        "stage": 3,
        "finetuning_type": kind,
        "learning_rate": 0.01,
        "max_steps": STEPS,
    }

    def task(run: str, where: dict[str, Any], until: int, **more: Any) -> dict[str, Any]:
        return {**common, **where, "folder": str(base / f"{kind}-{run}"), "until": until, "save": True, **more}

    def on_from(run: str) -> dict[str, Any]:
        checkpoint = base / f"{kind}-{run}/out/checkpoints/step-{SAVED_AFTER:08d}"
        return {"resume_from_checkpoint": str(checkpoint), "state": True}

    tasks = [
        task("whole", HPZ, STEPS),
        task("grouped", HPZ, SAVED_AFTER),
        task("plain", PLAIN, SAVED_AFTER),
        task("grouped-on", HPZ, STEPS, **on_from("grouped")),
        task("to-hpz", HPZ, STEPS, **on_from("plain")),
        task("to-plain", PLAIN, STEPS, **on_from("grouped")),
    ]
    whole, _, _, on, to_hpz, to_plain = run_ranks("tests.dist.moves:go", WORLD, tasks)[0]
    assert on["losses"] == whole["losses"][SAVED_AFTER:]
    assert_same(saved_state(base / f"{kind}-grouped-on"), saved_state(base / f"{kind}-whole"))
    for source, found in (("plain", to_hpz), ("grouped", to_plain)):
        assert_same(found["state"], saved_state(base / f"{kind}-{source}"))
        np.testing.assert_allclose(found["losses"], on["losses"], rtol=1e-5, err_msg=source)
