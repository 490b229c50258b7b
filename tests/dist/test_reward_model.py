"""A trained reward model is an ordinary one: plain transformers gives the rewards of the trained engine, in batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from dsdpo.export.huggingface import export
from tests.dist.grid import STEPS
from tests.dist.rewards import SCORED
from tests.helpers.alone import sequence
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import random_pairs, save_model, save_tokenizer, tiny_llama_config

CASES = [(finetuning, stage) for finetuning in ("full", "lora") for stage in (0, 3)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, tuple[Path, np.ndarray]]:
    """case -> (output_dir, rewards of the engine), from 2 ranks."""
    folder = tmp_path_factory.mktemp("rewards")
    save_model(folder / "model", tiny_llama_config(tied=False))
    save_tokenizer(folder / "model")
    outputs = [folder / f"{finetuning}-{stage}" for finetuning, stage in CASES]
    for output in outputs:
        output.mkdir()
    common = {"model": str(folder / "model"), "learning_rate": 0.02}
    settings = [{**common, "finetuning_type": finetuning, "stage": stage} for finetuning, stage in CASES]
    rewards = run_ranks("tests.dist.rewards:train_rewards", 2, settings, [str(output) for output in outputs])[0]
    return {case: (output / "out", found) for case, output, found in zip(CASES, outputs, rewards)}


def rewards_of(folder: Path) -> np.ndarray:
    """Of a padded batch: transformers takes the reward of the last token that is no padding."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if (folder / "adapter_config.json").exists():
        base = AutoModelForSequenceClassification.from_pretrained(folder.parents[2] / "model", num_labels=1)
        base.config.pad_token_id = tokenizer.pad_token_id
        model: Any = PeftModel.from_pretrained(base, folder)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        assert model.config.num_labels == 1 and model.config.pad_token_id == tokenizer.pad_token_id
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    ids = [sequence(pair, side)[0] for pair in random_pairs(SCORED) for side in (0, 1)]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(some) for some in ids], batch_first=True)
    with torch.no_grad():
        return model.eval()(input_ids=padded, attention_mask=mask).logits.view(-1, 2).numpy()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_plain_transformers_gives_the_engines_rewards(trained: Any, case: Any, tmp_path: Path) -> None:
    """Of the weights at the end, of a checkpoint, and merged."""
    output_dir, expected = trained[case]
    assert np.ptp(expected) > 0.1, "training must have moved the rewards to prove anything"
    np.testing.assert_allclose(rewards_of(output_dir / "final"), expected, atol=1e-4)
    step = output_dir.parent / "x" / "step"  # the base is looked for from there
    export(output_dir, step, merge=False, step=STEPS)
    np.testing.assert_allclose(rewards_of(step), expected, atol=1e-4)
    if case[0] == "lora":
        export(output_dir, tmp_path / "merged", merge=True)
        np.testing.assert_allclose(rewards_of(tmp_path / "merged"), expected, atol=1e-4)


def test_the_zero_stage_does_not_matter(trained: Any) -> None:
    """The head is drawn alike."""
    for finetuning in ("full", "lora"):
        np.testing.assert_allclose(trained[finetuning, 0][1], trained[finetuning, 3][1], atol=1e-4)
