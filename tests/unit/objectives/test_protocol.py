"""Objectives of any K over micro-batches: the loss and gradients of each completion computed alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from deepspeed import comm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from dsdpo.config.losses import RANKINGS
from dsdpo.data.loader import Batch, BatchLoader
from dsdpo.data.packing import MicroBatch
from dsdpo.model.attention.register import NAMES
from dsdpo.model.packed import ModelOutput, PackedInputs, PackedModel
from dsdpo.objectives.base import Objective
from dsdpo.objectives.sums import completion_sums
from dsdpo.runtime.env import Mesh
from tests.helpers.alone import logps_alone, value_alone
from tests.helpers.objective import (
    kto_objective,
    preference_objective,
    ranking_objective,
    reward_objective,
    supervised_objective,
)
from tests.helpers.objectives import examples_for
from tests.helpers.tiny import ListOfExamples, save_model, tiny_llama_config

CPU = torch.device("cpu")
N = 6
BETA = 0.5
OBJECTIVES: dict[str, Objective] = {
    "sft": supervised_objective(),
    "dpo": preference_objective({"sigmoid": 1.0}, beta=BETA),
    "kto": kto_objective(beta=BETA, desirable_weight=0.7, undesirable_weight=1.3),
    **{name: ranking_objective(name, beta=BETA) for name in RANKINGS},
    "rm": reward_objective(margin_from_scores=True, center_rewards_coefficient=0.1),
}
Gradients = dict[str, torch.Tensor]


def load(folder: Path, attention: str, head: str) -> PreTrainedModel:
    kind = AutoModelForCausalLM if head == "logprob" else AutoModelForSequenceClassification
    more = {} if head == "logprob" else {"num_labels": 1}
    return kind.from_pretrained(folder, attn_implementation=attention, dtype=torch.float32, **more).eval()


def gradients(model: torch.nn.Module) -> Gradients:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def score_weight() -> torch.Tensor:
    return torch.randn(1, 32, generator=torch.Generator().manual_seed(1))


def expected(stage: str, stock: PreTrainedModel, source: ListOfExamples) -> tuple[float, Gradients]:
    """The loss of all examples by its formula, each completion computed alone."""
    examples, weights = [source.example(i) for i in range(N)], source.weights(np.arange(N))
    if stage == "sft":
        logps = [
            torch.cat([logps_alone(stock, example, k) for k in range(len(example.completion_ids))])
            for example in examples
        ]
        parts = [-float(weight) * some.sum() for weight, some in zip(weights, logps)]
        loss = torch.stack(parts).sum() / sum(weight * len(some) for weight, some in zip(weights, logps))
    elif stage == "kto":
        # the reference of `found` is half the policy
        sums = [[logps_alone(stock, example, k).sum() for k in range(2)] for example in examples]
        ratios = torch.stack([own - own.detach() / 2 for own, _ in sums])
        baseline = max(0.0, sum(other.item() / 2 for _, other in sums) / N)
        labels = source.scores(np.arange(N)).reshape(-1, 2)[:, 0]
        parts = []
        for weight, ratio, label in zip(weights, ratios, labels):
            distance = ratio - baseline if label else baseline - ratio
            parts.append(float(weight) * (0.7 if label else 1.3) * (1 - 1 / (1 + (-BETA * distance).exp())))
        loss = torch.stack(parts).sum() / weights.sum()
    elif stage == "dpo":
        parts = []
        for weight, example in zip(weights, examples):
            better, worse = (logps_alone(stock, example, k).sum() for k in range(2))
            distance = (better - better.detach() / 2) - (worse - worse.detach() / 2)
            parts.append(float(weight) * (1 + (-BETA * distance).exp()).log())
        loss = torch.stack(parts).sum() / weights.sum()
    elif stage in RANKINGS:
        parts, scores, starts = [], source.scores(np.arange(N)), source.lengths(np.arange(N)).starts
        for weight, example, start in zip(weights, examples, starts):
            k = len(example.completion_ids)
            sums = torch.stack([logps_alone(stock, example, i).sum() for i in range(k)])
            rewards = BETA * (sums - sums.detach() * 0.5)  # the reference of `found` is half the policy
            parts.append(float(weight) * ranking_loss(stage, rewards, list(scores[start : start + k])))
        loss = torch.stack(parts).sum() / weights.sum()
    else:
        stock.score.weight.data = score_weight()
        scores = source.scores(np.arange(N)).reshape(-1, 2)
        parts = []
        for weight, example, (high, low) in zip(weights, examples, scores):
            better, worse = (value_alone(stock, stock.score.weight, example, k) for k in range(2))
            loss = (1 + (worse - better + high - low).exp()).log() + 0.1 * (better + worse) ** 2
            parts.append(float(weight) * loss)
        loss = torch.stack(parts).sum() / weights.sum()
    loss.backward()
    return loss.item(), gradients(stock)


def ranking_loss(name: str, rewards: torch.Tensor, scores: list[float]) -> torch.Tensor:
    """By its formula, pair by pair."""
    k = len(rewards)
    ties = k > 2 and not np.isnan(scores).any()
    worse = {(i, j) for i in range(k) for j in range(i + 1, k) if not (ties and scores[i] == scores[j])}
    if name == "plackett_luce":
        lower = [[j for j in range(k) if (i, j) in worse] for i in range(k)]
        chances = [rewards[i].exp() / rewards[[i, *lower[i]]].exp().sum() for i in range(k)]
        return -torch.stack(chances).log().sum()
    if name == "best_worst":
        beaten, beating = {j for _, j in worse}, {i for i, _ in worse}
        worse = {(i, j) for i, j in worse if i not in beaten and j not in beating}
    return torch.stack([(1 + (rewards[j] - rewards[i]).exp()).log() for i, j in worse]).mean()


def reference_of(batch: Batch, packed: PackedModel) -> torch.Tensor:
    """fp32 [N, 2]: half the log-probs of the policy."""
    found = torch.zeros(len(batch.lengths.completions), 2)
    with torch.no_grad():
        for micro_batch in batch.micro_batches:
            sums = completion_sums(packed(PackedInputs.of(micro_batch, CPU)), micro_batch.completions)
            found[torch.from_numpy(batch.completion_indices(micro_batch))] = sums / 2
    return found


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    comm.init_distributed(
        "gloo", auto_mpi_discovery=False, init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    yield
    comm.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("max_tokens", [210, 4096])
@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("stage", OBJECTIVES)
def test_packed_equals_each_completion_alone(tmp_path: Path, stage: str, share_prefix: bool, max_tokens: int) -> None:
    """Over two data-parallel ranks, of which each computes its own micro-batches here, one after the other.

    The objective that asks the other ranks for theirs has one rank here; tests/dist has more.
    """
    save_model(tmp_path, tiny_llama_config(tied=False))
    objective, source = OBJECTIVES[stage], examples_for("ranking" if stage in RANKINGS else stage, N)
    wanted_loss, wanted = expected(stage, load(tmp_path, "eager", objective.head), source)
    packed = PackedModel(load(tmp_path, NAMES["sdpa"], objective.head), objective.head)
    if stage == "rm":
        packed.model.score.weight.data = score_weight()

    def forward(micro_batch: MicroBatch) -> ModelOutput:
        return packed(PackedInputs.of(micro_batch, CPU))

    loss, reported, empty = 0.0, 0.0, 0
    ranks = 1 if stage == "kto" else 2
    for rank in range(ranks):
        batch = BatchLoader(source, Mesh(rank, ranks, rank), max_tokens, share_prefix).batch(np.arange(N))
        reference = reference_of(batch, packed) if objective.needs_reference else None
        loss_of = objective.bind(batch, reference, forward)
        for micro_batch in batch.to_compute(objective.first_alone):
            found = loss_of(micro_batch, forward(micro_batch))
            (found.total / objective.denominator(batch)).backward()
            assert found.per_example.shape == micro_batch.examples.shape
            assert found.metrics.shape == (len(objective.metrics), len(micro_batch.examples))
            loss += found.total.item() / objective.denominator(batch)
            reported += found.metrics[0].sum().item() / N
            empty += len(micro_batch.examples) == 0
    assert loss == pytest.approx(wanted_loss, rel=1e-5) and reported == pytest.approx(loss, rel=1e-5)
    computed = gradients(packed.model)
    assert computed.keys() == wanted.keys()
    size = torch.stack([gradient.norm() for gradient in wanted.values()]).max()
    for name, gradient in wanted.items():
        assert (computed[name] - gradient).norm() < 1e-4 * gradient.norm() + 1e-6 * size, name
