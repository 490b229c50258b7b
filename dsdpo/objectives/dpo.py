"""Direct preference optimization: losses over log-prob vectors, and nothing else.

In all functions a pair's log-prob is the sum over its completion's tokens, and the reference's log-probs carry no
gradient. Vectors are fp32 [P], one entry per pair.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rewards(logps: torch.Tensor, ref_logps: torch.Tensor, beta: float) -> torch.Tensor:
    """Implicit reward beta * log(pi(y|x) / pi_ref(y|x)), up to a constant of x.

    Equation 5 of Rafailov et al., "Direct Preference Optimization" (2023). Any shape in, the same shape out.
    """
    return beta * (logps - ref_logps)


def sigmoid_loss(margins: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """The DPO loss per pair, from reward margins [P] (reward of chosen minus reward of rejected).

    -log sigmoid(margin): equation 7 of Rafailov et al. (2023). With label_smoothing e it is conservative DPO,
    -(1-e) log sigmoid(margin) - e log sigmoid(-margin): equation 3 of Mitchell, "A note on DPO with noisy
    preferences" (2023).
    """
    return -(1 - label_smoothing) * F.logsigmoid(margins) - label_smoothing * F.logsigmoid(-margins)
