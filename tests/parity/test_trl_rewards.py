"""The same loss and gradients as TRL's RewardTrainer, on SmolLM2 and real hh-rlhf pairs, in fp32."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from trl import RewardConfig, RewardTrainer

from dsdpo.data.dropped import Dropped
from dsdpo.data.example import TokenizedExample
from dsdpo.data.formats.record import to_example
from dsdpo.data.loader import BatchLoader
from dsdpo.data.templates import ExampleEncoder
from dsdpo.model.attention.register import NAMES
from dsdpo.model.packed import PackedInputs, PackedModel
from dsdpo.runtime.env import Mesh
from tests.helpers.objective import reward_objective
from tests.helpers.real import hh_rows, smollm2
from tests.helpers.tiny import ListOfExamples

PAIRS = 6
CENTERING = 0.05
MARGINS = np.linspace(-0.5, 1.5, PAIRS)


def load(folder: Path, attention: str) -> PreTrainedModel:
    torch.manual_seed(0)  # the head is new
    loaded = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, attn_implementation=attention, dtype=torch.float32
    )
    torch.nn.init.normal_(loaded.score.weight, std=0.05, generator=torch.Generator().manual_seed(1))
    return loaded.eval()


@pytest.fixture(scope="module")
def encoded() -> list[Any]:
    pairs = []
    for row in hh_rows(2 * PAIRS, longest=300):
        with suppress(Dropped):
            pairs.append(to_example(row, "hh_rlhf", {}, {}, allow_empty_rejected=False))
    return ExampleEncoder(AutoTokenizer.from_pretrained(smollm2()), "default").encode(pairs[:PAIRS])


@pytest.mark.parametrize("share_prefix", [True, False])
def test_loss_and_gradients(encoded: list[Any], tmp_path: Path, share_prefix: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    tokenizer.pad_token = tokenizer.unk_token  # transformers takes the reward of the last token that is no padding
    stock = load(smollm2(), "sdpa")
    rows = [
        {"chosen_ids": e.prompt_ids + e.completion_ids[0], "rejected_ids": e.prompt_ids + e.completion_ids[1]}
        for e in encoded
    ]
    trainer = RewardTrainer(
        stock,
        args=RewardConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=PAIRS,
            center_rewards_coefficient=CENTERING,
            pad_token=tokenizer.pad_token,
            disable_dropout=True,
            report_to="none",
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    batch = trainer.data_collator([{**row, "margin": margin} for row, margin in zip(rows, MARGINS)])
    wanted = trainer.compute_loss(stock.eval(), batch)
    wanted.backward()

    objective = reward_objective(margin_from_scores=True, center_rewards_coefficient=CENTERING)
    examples = [TokenizedExample(np.array(e.prompt_ids), tuple(map(np.array, e.completion_ids))) for e in encoded]
    scores = np.stack([MARGINS, np.zeros(PAIRS)], axis=1).ravel()
    source = ListOfExamples(examples, scores=scores)
    packed = PackedModel(load(smollm2(), NAMES["sdpa"]), "value")
    step = BatchLoader(source, Mesh(0, 1, 0), 500, share_prefix).batch(np.arange(PAIRS))
    assert len(step.micro_batches) > 1
    loss_of, loss = objective.bind(step, None, lambda _: None), 0.0  # type: ignore[arg-type,return-value]
    for micro_batch in step.micro_batches:
        part = loss_of(micro_batch, packed(PackedInputs.of(micro_batch, torch.device("cpu")))).total / PAIRS
        part.backward()
        loss += part.item()
    assert loss == pytest.approx(wanted.item(), rel=1e-5)
    gradients = {name: p.grad for name, p in stock.named_parameters() if p.grad is not None}
    ours = {name: p.grad for name, p in packed.model.named_parameters() if p.grad is not None}
    assert ours.keys() == gradients.keys() and "score.weight" in ours
    for name, expected in gradients.items():
        assert (ours[name] - expected).norm() / expected.norm() < 1e-3, name
