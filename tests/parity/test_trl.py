"""The same numbers as TRL's DPOTrainer, on SmolLM2 and real hh-rlhf pairs, in fp32."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from trl import DPOConfig, DPOTrainer

from dsdpo.data.dropped import Dropped
from dsdpo.data.example import Example, TokenizedExample
from dsdpo.data.formats.record import to_example
from dsdpo.data.packing import build_micro_batch
from dsdpo.data.templates import EncodedExample, ExampleEncoder
from dsdpo.model.attention.register import NAMES
from dsdpo.model.packed import PackedInputs, PackedModel
from dsdpo.objectives.pair_logps import PairFacts
from dsdpo.objectives.sums import completion_sums
from tests.helpers.objective import preference_objective
from tests.helpers.real import hh_rows, smollm2

PAIRS = 8
ROW_PAIRS = 4
BETA = 0.1
CPU = torch.device("cpu")


def load(model: Path, attention: str, perturbed: bool) -> PreTrainedModel:
    """SmolLM2; as the policy with noise on every weight, so that it differs from the reference."""
    loaded = AutoModelForCausalLM.from_pretrained(model, attn_implementation=attention, dtype=torch.float32)
    if perturbed:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in loaded.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05 * parameter.abs().mean())
    return loaded.eval()


@dataclass
class Numbers:
    """What both sides must agree on."""

    logps: torch.Tensor
    ref_logps: torch.Tensor
    loss: float
    gradients: dict[str, torch.Tensor]
    token_ids: list[tuple[list[int], list[int], list[int]]]


@pytest.fixture(scope="module")
def pairs() -> list[Example]:
    accepted = []
    for row in hh_rows(2 * PAIRS, longest=300):
        with suppress(Dropped):
            accepted.append(to_example(row, "hh_rlhf", {}, {}, allow_empty_rejected=False))
    return accepted[:PAIRS]


@pytest.fixture(scope="module")
def encoded(pairs: list[Example]) -> list[Any]:
    return ExampleEncoder(AutoTokenizer.from_pretrained(smollm2()), "default").encode(pairs)


@pytest.fixture(scope="module")
def trl(pairs: list[Example], encoded: list[Any], tmp_path_factory: pytest.TempPathFactory) -> Numbers:
    """TRL's numbers, computed by TRL on our token ids; `token_ids` are TRL's own."""
    model = smollm2()
    policy, reference = load(model, "sdpa", perturbed=True), load(model, "sdpa", perturbed=False)
    rows = [dict(zip(("prompt", "chosen", "rejected"), (p.prompt, *p.completions))) for p in pairs]
    trainer = DPOTrainer(
        policy,
        reference,
        args=DPOConfig(
            output_dir=str(tmp_path_factory.mktemp("trl")),
            beta=BETA,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=PAIRS,
            max_length=1024,
            report_to="none",
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    keys = ("prompt_ids", "chosen_ids", "rejected_ids")
    batch = trainer.data_collator([dict(zip(keys, map(list, (e.prompt_ids, *e.completion_ids)))) for e in encoded])
    logps = torch.stack(trainer.compute_ref_log_probs(policy, batch), dim=1)
    ref_logps = torch.stack(trainer.compute_ref_log_probs(reference, batch), dim=1)
    loss = trainer.compute_loss(policy, batch)
    loss.backward()
    gradients = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    token_ids = [tuple(row[key] for key in keys) for row in trainer.train_dataset]
    return Numbers(logps.detach(), ref_logps, loss.item(), gradients, token_ids)


@pytest.fixture(scope="module", params=[True, False], ids=["shared prefix", "plain rows"])
def ours(request: pytest.FixtureRequest, encoded: list[EncodedExample]) -> Numbers:
    model = smollm2()
    policy = PackedModel(load(model, NAMES["sdpa"], perturbed=True))
    reference = PackedModel(load(model, NAMES["sdpa"], perturbed=False))
    objective = preference_objective({"sigmoid": 1.0}, beta=BETA)
    examples = [TokenizedExample(np.array(e.prompt_ids), tuple(map(np.array, e.completion_ids))) for e in encoded]
    logps, ref_logps, loss = [], [], 0.0
    for start in range(0, PAIRS, ROW_PAIRS):
        micro_batch = build_micro_batch(examples[start : start + ROW_PAIRS], range(ROW_PAIRS), request.param)
        inputs = PackedInputs.of(micro_batch, CPU)
        with torch.no_grad():
            ref_logps.append(completion_sums(reference(inputs), micro_batch.completions))
        logps.append(completion_sums(policy(inputs), micro_batch.completions))
        tokens = torch.from_numpy(micro_batch.completions[:, 2]).view(-1, 2).float()
        facts = PairFacts(tokens, torch.full((ROW_PAIRS,), torch.nan), tokens[:, 0].mean().item())
        part = objective.losses(logps[-1], ref_logps[-1], facts).losses.sum() / PAIRS
        part.backward()
        loss += part.item()
    gradients = {name: p.grad for name, p in policy.model.named_parameters() if p.grad is not None}
    return Numbers(
        torch.cat(logps).detach().sum(1).view(-1, 2),
        torch.cat(ref_logps).sum(1).view(-1, 2),
        loss,
        gradients,
        [(e.prompt_ids, *e.completion_ids) for e in encoded],
    )


def test_token_ids(trl: Numbers, ours: Numbers) -> None:
    """Equal but for one token: TRL also learns the newline that this template writes behind a reply's end."""
    newline = 198
    for (prompt, chosen, rejected), mine in zip(trl.token_ids, ours.token_ids, strict=True):
        assert chosen[-1] == rejected[-1] == newline
        assert [prompt, chosen[:-1], rejected[:-1]] == [list(part) for part in mine]


def test_log_probs_of_policy_and_reference(trl: Numbers, ours: Numbers) -> None:
    torch.testing.assert_close(ours.logps, trl.logps, rtol=1e-3, atol=0)
    torch.testing.assert_close(ours.ref_logps, trl.ref_logps, rtol=1e-3, atol=0)
    assert (trl.logps - trl.ref_logps).abs().mean() > 1.0, "the policy must differ from the reference"


def test_loss(trl: Numbers, ours: Numbers) -> None:
    assert ours.loss == pytest.approx(trl.loss, rel=1e-3)


def test_gradient_of_every_parameter(trl: Numbers, ours: Numbers) -> None:
    assert ours.gradients.keys() == trl.gradients.keys()
    for name, expected in trl.gradients.items():
        difference = (ours.gradients[name] - expected).norm() / expected.norm()
        assert difference < 1e-3, f"{name}: relative difference {difference:.2e}"
