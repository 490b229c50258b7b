import math

import pytest
import torch

from dsdpo.objectives.dpo import rewards, sigmoid_loss
from dsdpo.objectives.preference import STATS, PreferenceObjective
from dsdpo.objectives.sft import sft_loss


def test_no_change_from_the_reference_costs_log_2() -> None:
    logps = torch.tensor([-5.0, -7.0, -1.0, -30.0])
    losses, stats = PreferenceObjective({"sigmoid": 1.0}, beta=0.1, label_smoothing=0.0)(logps, logps, 1.0)
    assert torch.allclose(losses, torch.full((2,), math.log(2)))
    assert dict(zip(STATS, stats.tolist()))["rewards/margins"] == 0


def test_sigmoid_loss_in_closed_form() -> None:
    margins = torch.tensor([-2.0, 0.0, 3.0], dtype=torch.float64)
    for e in (0.0, 0.1, 0.3):
        expected = [-(1 - e) * math.log(1 / (1 + math.exp(-m))) - e * math.log(1 / (1 + math.exp(m))) for m in margins]
        assert sigmoid_loss(margins, e).tolist() == pytest.approx(expected)


def test_label_smoothing_has_its_minimum_at_the_margin_it_believes_in() -> None:
    """With a share e of wrong labels the best margin is log((1-e)/e), not infinity."""
    e = 0.2
    margin = torch.tensor([math.log((1 - e) / e)], requires_grad=True)
    sigmoid_loss(margin, e).sum().backward()
    assert margin.grad is not None and abs(margin.grad.item()) < 1e-6


def test_sigmoid_loss_stays_finite() -> None:
    assert torch.isfinite(sigmoid_loss(torch.tensor([-1e4, 1e4]), 0.1)).all()


def test_sft_mean_over_pairs_is_the_mean_over_tokens() -> None:
    tokens = torch.tensor([2.0, 8.0, 5.0])
    logps = torch.tensor([-1.0, -9.0, -4.0])
    assert sft_loss(logps, tokens.mean().item()).mean().item() == pytest.approx(14.0 / 15.0)


def test_weights_and_stats() -> None:
    logps = torch.tensor([-4.0, -6.0, -5.0, -3.0], requires_grad=True)
    ref = torch.tensor([-5.0, -5.0, -4.0, -4.0])
    objective = PreferenceObjective({"sigmoid": 2.0, "sft": 0.5}, beta=0.5, label_smoothing=0.0)
    losses, stats = objective(logps, ref, mean_chosen_tokens=3.0)
    margins = rewards(logps, ref, 0.5).view(2, 2) @ torch.tensor([1.0, -1.0])
    expected = 2.0 * sigmoid_loss(margins) + 0.5 * sft_loss(logps[::2], 3.0)
    assert torch.allclose(losses, expected)
    named = dict(zip(STATS, stats.tolist()))
    assert named["rewards/accuracies"] == 1.0
    assert named["rewards/chosen"] == pytest.approx(0.5 * (1 - 1))
    assert named["rewards/rejected"] == pytest.approx(0.5 * (-1 + 1))
    assert named["logps/chosen"] == pytest.approx(-9.0)
    losses.sum().backward()
    assert logps.grad is not None and (logps.grad != 0).all()


def test_an_empty_row_has_no_loss_but_a_gradient_path() -> None:
    logps = torch.tensor([-1.0, -2.0], requires_grad=True)
    losses, stats = PreferenceObjective({"sigmoid": 1.0, "sft": 1.0}, 0.1, 0.0)(logps[:0], torch.empty(0), 4.0)
    losses.sum().backward()
    assert losses.shape == (0,) and not stats.any()
    assert logps.grad is not None and not logps.grad.any()
