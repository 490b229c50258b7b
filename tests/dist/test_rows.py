"""The first step corrects the longest row: on all ranks alike, before the second is planned, and kept on resume.

What the allocator says is given here; that DeepSpeed's optimizers are asked at their update is real.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import save_model, save_tokenizer, tiny_llama_config


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_first_step_corrects_the_row(tmp_path: Path, stage: int) -> None:
    """900 MB at 2 MB a token are 450 tokens; 475 MB, where another process has half of the GPU, at 1.9 MB are 250: the
    smaller, in steps of 128."""
    save_model(tmp_path / "model", tiny_llama_config())
    save_tokenizer(tmp_path / "model")
    model = str(tmp_path / "model")
    ranks = run_ranks("tests.dist.rows:corrected", 2, str(tmp_path), model, stage, [2_000_000, 1_900_000])
    for told in ranks:
        assert (told["before"], told["after"]) == (256, 128)
        assert max(tokens for step, tokens in told["seen"] if step == 0) > 128, "or nothing is proved"
        assert max(tokens for step, tokens in told["seen"] if step > 0) <= 128
        assert told["resumed"] == (3, 128, False)
        there, later, gradients = told["gradients"]
        assert there + later == pytest.approx(gradients, rel=0.01)
        _, recompute, facts, is_estimate = told["on_gpu"]
        assert recompute == "none" and is_estimate and facts["zero_stage"] == stage
    assert ranks[0]["on_gpu"] == ranks[1]["on_gpu"], "each has other memory"
    assert len(ranks[0]["seen"]) == len(ranks[1]["seen"])
