"""The objective as a whole. That each loss is TRL's own is proved in tests/parity."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dsdpo.config.losses import LOSSES, LossSpec, loss_table
from dsdpo.config.schema import RunConfig
from dsdpo.data.loader import Batch, BatchLoader
from dsdpo.errors import DataError
from dsdpo.model.packed import ModelOutput
from dsdpo.objectives.pair_logps import PairFacts, PairLogps
from dsdpo.objectives.preference import METRICS
from dsdpo.objectives.preference_losses import divergence_scores, sft_loss, smoothed_logistic
from dsdpo.objectives.registry import LOSS_FUNCTIONS, loss
from dsdpo.objectives.sums import completion_sums
from dsdpo.runtime.env import Mesh
from tests.helpers.objective import preference_objective as objective
from tests.helpers.tiny import ListOfExamples, random_examples, random_pairs

ROOT = Path(__file__).parents[3]
OPTIONS = {"beta": 0.3, "label_smoothing": 0.1}


def facts(pairs: int, seed: int = 0) -> PairFacts:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 20, (pairs, 2), generator=generator).float()
    return PairFacts(tokens, torch.rand(pairs, generator=generator) + 0.1, tokens[:, 0].mean().item())


def outputs(pairs: int, seed: int = 0, columns: int = 2) -> torch.Tensor:
    return -10 * torch.rand(2 * pairs, columns, generator=torch.Generator().manual_seed(seed))


def named(metrics: torch.Tensor) -> dict[str, float]:
    return dict(zip(METRICS, metrics.mean(1).tolist()))


def test_no_change_from_the_reference_costs_log_2() -> None:
    policy = outputs(2)
    losses, metrics = objective({"sigmoid": 1.0}).losses(policy, policy, facts(2))
    assert torch.allclose(losses, torch.full((2,), math.log(2)))
    assert named(metrics)["rewards/margins"] == 0


def test_the_logistic_loss_in_closed_form() -> None:
    margins = torch.tensor([-2.0, 0.0, 3.0], dtype=torch.float64)
    for e in (0.0, 0.1, 0.3):
        expected = [-(1 - e) * math.log(1 / (1 + math.exp(-m))) - e * math.log(1 / (1 + math.exp(m))) for m in margins]
        assert smoothed_logistic(margins, e).tolist() == pytest.approx(expected)
    assert torch.isfinite(smoothed_logistic(torch.tensor([-1e4, 1e4]), 0.1)).all()


def test_label_smoothing_has_its_minimum_at_the_margin_it_believes_in() -> None:
    """With a share e of wrong labels the best margin is log((1-e)/e), not infinity."""
    e = 0.2
    margin = torch.tensor([math.log((1 - e) / e)], requires_grad=True)
    smoothed_logistic(margin, e).sum().backward()
    assert margin.grad is not None and abs(margin.grad.item()) < 1e-6


def test_sft_mean_over_pairs_is_the_mean_over_tokens() -> None:
    tokens = torch.tensor([2.0, 8.0, 5.0])
    logps = torch.tensor([-1.0, -9.0, -4.0])
    assert sft_loss(logps, tokens.mean().item()).mean().item() == pytest.approx(14.0 / 15.0)


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"])
def test_a_divergence_score_is_the_derivative_of_its_generator(kind: str) -> None:
    """f'(u) by automatic differentiation of f, up to a constant."""
    alpha = 0.4
    generators = {
        "reverse_kl": lambda u: u * u.log(),
        "forward_kl": lambda u: u - u.log(),
        "js_divergence": lambda u: u * u.log() - (u + 1) * ((u + 1) / 2).log(),
        "alpha_divergence": lambda u: (u**alpha / alpha - u) / (alpha - 1),
    }
    u = torch.tensor([0.2, 0.9, 1.0, 3.0], dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(generators[kind](u).sum(), u)
    found = divergence_scores(u.detach().log(), kind, alpha)
    torch.testing.assert_close(found - found[0], expected - expected[0])


def test_alpha_divergence_is_reverse_kl_at_1_and_stays_finite() -> None:
    h = torch.tensor([-300.0, 0.0, 300.0])
    assert torch.equal(divergence_scores(h, "alpha_divergence", 1.0), h)
    assert torch.isfinite(divergence_scores(h, "alpha_divergence", 2.0)).all()


def test_weights_add_up() -> None:
    policy, reference = outputs(5, 1), outputs(5, 2)
    parts = [objective({name: 1.0}, **OPTIONS).losses(policy, reference, facts(5)).losses for name in ("ipo", "sft")]
    mixed = objective({"ipo": 2.0, "sft": 0.5}, **OPTIONS).losses(policy, reference, facts(5)).losses
    torch.testing.assert_close(mixed, 2.0 * parts[0] + 0.5 * parts[1])


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_rewards_the_chosen_side_or_anchors_it(name: str) -> None:
    """Finite, differentiable; and except for aot, whose entries are quantiles, a pair's loss is its own."""
    policy, reference = outputs(6, 1).requires_grad_(), outputs(6, 2)
    loss = objective({name: 1.0}, **OPTIONS)
    losses = loss.losses(policy, reference, facts(6)).losses
    assert losses.shape == (6,) and torch.isfinite(losses).all()
    (gradient,) = torch.autograd.grad(losses.sum(), policy)
    assert torch.isfinite(gradient).all() and gradient[::2].any()
    if not LOSSES[name].spans_batch:
        part = PairFacts(*(x[2:4] for x in facts(6)[:2]), facts(6).mean_chosen_tokens)
        alone = loss.losses(policy[4:8], reference[4:8], part).losses
        torch.testing.assert_close(alone, losses[2:4])


@pytest.mark.parametrize("name", LOSSES)
def test_what_needs_no_reference_is_known(name: str) -> None:
    policy = outputs(4, 1)
    loss = objective({name: 1.0}, **OPTIONS)
    found = [loss.losses(policy, outputs(4, s), facts(4)).losses for s in (2, 3)]
    assert torch.equal(*found) == (not LOSSES[name].reference)


def test_ld_alpha_weighs_the_tail_of_policy_and_reference() -> None:
    policy, reference = outputs(4, 1), outputs(4, 2)
    weighed = objective({"sigmoid": 1.0}, ld_alpha=0.25).losses(policy, reference, facts(4))
    scale = torch.tensor([1.0, 0.25])
    plain = objective({"sigmoid": 1.0}).losses(policy * scale, reference * scale, facts(4))
    torch.testing.assert_close(weighed.losses, plain.losses)
    sft = objective({"sft": 1.0}, ld_alpha=0.25).losses(policy, reference, facts(4)).losses
    assert torch.equal(sft, objective({"sft": 1.0}).losses(policy, reference, facts(4)).losses)


def test_wpo_weighs_each_pair_without_gradient() -> None:
    policy, reference = outputs(3, 1, columns=3).requires_grad_(), outputs(3, 2)
    weighed = objective({"hinge": 1.0}, use_weighting=True).losses(policy, reference, facts(3)).losses
    plain = objective({"hinge": 1.0}).losses(policy, reference, facts(3)).losses
    weights = (policy[:, 2] / facts(3).tokens.flatten()).exp().view(-1, 2).prod(1)
    torch.testing.assert_close(weighed, plain * weights)
    (gradient,) = torch.autograd.grad(weighed.sum(), policy)
    assert not gradient[:, 2].any()


def test_the_docs_have_the_table_of_the_losses() -> None:
    assert loss_table() in (ROOT / "docs" / "losses.md").read_text(), "put in what python -m dsdpo.config.losses prints"


def test_every_loss_has_a_row_and_a_function() -> None:
    assert LOSSES.keys() == LOSS_FUNCTIONS.keys()


@pytest.fixture
def squared_hinge() -> Iterator[None]:
    """A loss from outside the package, while a test runs: one row and one function."""
    LOSSES["squared_hinge"] = LossSpec("`max(0, 1 - b D)^2`", spans_batch=True)

    @loss("squared_hinge")
    def squared_hinge(p: PairLogps, o: RunConfig) -> torch.Tensor:
        return torch.relu(1 - o.beta * (p.chosen_logratios - p.rejected_logratios)) ** 2

    yield
    del LOSSES["squared_hinge"], LOSS_FUNCTIONS["squared_hinge"]


def test_a_registered_loss_is_computed(squared_hinge: None) -> None:
    squared, hinge = (objective({name: 1.0}, beta=0.3) for name in ("squared_hinge", "hinge"))
    found, plain = (o.losses(outputs(4, 1), outputs(4, 2), facts(4)).losses for o in (squared, hinge))
    assert torch.equal(found, plain**2) and found.any()
    assert squared.spans_batch and not hinge.spans_batch


def test_a_loss_needs_a_row_and_a_name_of_its_own() -> None:
    with pytest.raises(ValueError, match="no row"):
        loss("no_such_loss")
    with pytest.raises(ValueError, match="has a function already"):
        loss("sigmoid")


def test_simpo_and_odpo_margins() -> None:
    """Both are the logistic loss, shifted: at the margin they ask for, the loss is log 2."""
    tokens = torch.tensor([[4.0, 8.0]])
    policy = torch.tensor([[-2.0, 0.0], [-8.0, 0.0]])  # per token -0.5 and -1
    known = PairFacts(tokens, torch.tensor([3.0]), 4.0)
    simpo = objective({"simpo": 1.0}, beta=2.0, simpo_gamma=1.0).losses(policy, None, known).losses
    assert simpo.item() == pytest.approx(math.log(2))
    zero = torch.zeros(2, 2)
    odpo = objective({"odpo": 1.0}, beta=math.log(3) / 6).losses(policy, zero, known).losses
    assert odpo.item() == pytest.approx(math.log(2))


def test_orpo_compares_odds() -> None:
    tokens = torch.tensor([[1.0, 1.0]])
    policy = torch.log(torch.tensor([[0.8], [0.5]])) * torch.tensor([[1.0, 0.0]])  # odds 4 and 1
    known = PairFacts(tokens, tokens[:, 0], 1.0)
    found = objective({"orpo": 1.0}, beta=0.7).losses(policy, None, known).losses
    assert found.item() == pytest.approx(-math.log(0.8) - 0.7 * math.log(4 / 5))


def test_metrics() -> None:
    policy = torch.tensor([[-4.0, 0.0], [-6.0, 0.0], [-5.0, 0.0], [-3.0, 0.0]])
    reference = torch.tensor([[-5.0, 0.0], [-5.0, 0.0], [-4.0, 0.0], [-4.0, 0.0]])
    metrics = named(objective({"sigmoid": 1.0}, beta=0.5).losses(policy, reference, facts(2)).metrics)
    assert metrics["rewards/accuracies"] == 0.5
    assert (metrics["rewards/chosen"], metrics["rewards/rejected"], metrics["rewards/margins"]) == (0.0, 0.0, 0.0)
    assert metrics["logps/chosen"] == pytest.approx(-4.5)


def test_rewards_without_a_reference() -> None:
    """Per token where the loss sees it so; with a reference, for a mix, they are log-ratios as ever."""
    policy, reference, known = outputs(3, 1), outputs(3, 2), facts(3)
    sums, ref_sums = (x.sum(1)[::2] for x in (policy, reference))
    for weights, ref, expected in (
        ({"simpo": 1.0}, None, sums / known.tokens[:, 0]),
        ({"cpo": 1.0}, None, sums),
        ({"simpo": 1.0, "sigmoid": 1.0}, reference, sums - ref_sums),
    ):
        metrics = objective(weights, beta=0.5).losses(policy, ref, known).metrics
        torch.testing.assert_close(metrics[METRICS.index("rewards/chosen")], 0.5 * expected)


def test_no_pair_has_no_loss_but_a_gradient_path() -> None:
    policy = outputs(1).requires_grad_()
    loss = objective({"sigmoid": 1.0, "sft": 1.0})
    losses, metrics = loss.losses(policy[:0], torch.empty(0, 2), facts(0)._replace(mean_chosen_tokens=4.0))
    losses.sum().backward()
    assert losses.shape == (0,) and metrics.shape == (len(METRICS), 0)
    assert policy.grad is not None and not policy.grad.any()


# --- over a batch ---


def batch(source: ListOfExamples, max_tokens: int = 4096) -> Batch:
    return BatchLoader(source, Mesh(0, 1, 0), max_tokens, share_prefix=True).batch(np.arange(len(source)))


def test_facts_are_those_of_the_examples() -> None:
    pairs, scores = random_pairs(5, seed=3), np.arange(10.0) ** 2
    scores[6] = np.nan
    found = PairFacts.of(batch(ListOfExamples(pairs, scores)), np.array([3, 0, 4]), torch.device("cpu"))
    tokens = [[len(ids) for ids in pair.completion_ids] for pair in pairs]
    assert found.tokens.tolist() == [tokens[i] for i in (3, 0, 4)]
    assert found.score_gaps[0].isnan() and found.score_gaps[1:].tolist() == [-1.0, 64.0 - 81.0]
    assert found.mean_chosen_tokens == np.mean([chosen for chosen, _ in tokens])


def test_micro_batches_add_up_to_the_batch_and_weights_scale_each_pair() -> None:
    """The reported loss is the one that is trained."""
    pairs, weights = random_pairs(6, seed=1), np.array([1.0, 0.5, 0.0, 2.0, 3.0, 1.0])
    reference = outputs(6, 2)
    loss = objective({"sigmoid": 1.0})
    plain, weighted = (batch(ListOfExamples(pairs, weights=w), max_tokens=120) for w in (None, weights))
    assert len(plain.micro_batches) > 1

    def forward(micro_batch: Any) -> ModelOutput:
        return ModelOutput(-micro_batch_ids(micro_batch))

    def losses(some: Batch) -> tuple[torch.Tensor, torch.Tensor, float]:
        found, reported, total = torch.zeros(6), torch.zeros(6), 0.0
        loss_of = loss.bind(some, reference, forward)
        for micro_batch in some.micro_batches:
            result = loss_of(micro_batch, forward(micro_batch))
            found[micro_batch.examples], reported[micro_batch.examples] = result.per_example, result.metrics[0]
            total += result.total.item()
        return found, reported, total

    per_example, _, _ = losses(plain)
    found, reported, total = losses(weighted)
    torch.testing.assert_close(found, per_example * torch.from_numpy(weights).float())
    assert total == pytest.approx(found.sum().item()) and loss.denominator(weighted) == weights.sum()
    assert reported.mean().item() == pytest.approx(total / weights.sum())


def micro_batch_ids(micro_batch: Any) -> torch.Tensor:
    """A number for each scored token."""
    return torch.from_numpy(micro_batch.target_ids).float() / 50


def test_pairs_alone_are_compared() -> None:
    mixed = batch(ListOfExamples(random_examples(4, (2, 3))))
    with pytest.raises(DataError, match="example 1 has not two completions"):
        objective({"sigmoid": 1.0}).bind(mixed, None, lambda micro_batch: ModelOutput())
    weighted = batch(ListOfExamples(random_pairs(2), weights=np.array([1.0, 0.5])))
    with pytest.raises(DataError, match="weight"):
        objective({"aot": 1.0}).bind(weighted, None, lambda micro_batch: ModelOutput())


def test_sums_of_completions() -> None:
    """Column 0 over as many scored tokens as each completion of the example has, column 1 over the rest."""
    completions = np.array([[0, 0, 3], [0, 1, 1], [0, 2, 2], [1, 0, 2], [2, 0, 0], [2, 1, 1]])
    logps = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0])
    found = completion_sums(ModelOutput(logps, torch.ones(9)), completions)
    assert found[:, :2].tolist() == [[1, 6], [8, 0], [16, 32], [192, 0], [0, 0], [0, 256]]
    assert found[:, 2].tolist() == [4, 7, 46, 190, 0, 255]
    assert completion_sums(ModelOutput(logps[:1]), np.zeros((0, 3), dtype=np.int64)).shape == (0, 2)
