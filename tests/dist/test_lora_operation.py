"""A LoRA run is the same whether PEFT computes its adapters or the one operation does, however they are partitioned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import save_model, save_tokenizer, tiny_llama_config

RUNS: dict[str, dict[str, Any]] = {
    "ZeRO-1": {"stage": 1},
    "ZeRO-3": {"stage": 3},
    "ZeRO-3, recompute": {"stage": 3, "gradient_checkpointing": True, "max_tokens_per_row": 160},
    "ZeRO-3, nf4": {"stage": 3, "quantization_bit": 4},
}


def test_losses_and_grad_norms_agree_with_pefts(tmp_path: Path) -> None:
    """On two ranks; and layers that share their input are computed together, in layers that ZeRO-3 gathers whole."""
    save_model(tmp_path / "model", tiny_llama_config(hidden_size=64))
    save_tokenizer(tmp_path / "model")
    common = {"model": str(tmp_path / "model"), "finetuning_type": "lora", "cache_dir": str(tmp_path / "cache")}
    cases = [{**common, **changes} for changes in RUNS.values()]
    (fused, calls), (theirs, none) = (run_ranks("tests.dist.lora:run", 2, cases, 17, own)[0] for own in (True, False))
    assert calls[3] == calls[2] > 0 and calls[1] == 2 * calls[3], "q, k, v; gate and up; o and down"
    assert not none
    for name, found, expected in zip(RUNS, fused, theirs, strict=True):
        ours, wanted = (
            np.array([[step["loss"], step["grad_norm"]] for step in run["metrics"]]) for run in (found, expected)
        )
        assert len(wanted) == 5 and np.ptp(wanted[:, 0]) > 0.02, "the steps must move the loss to prove anything"
        np.testing.assert_allclose(ours, wanted, rtol=1e-4, err_msg=name)
