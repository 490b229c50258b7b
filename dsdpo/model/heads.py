"""From hidden states to log-probabilities, without ever holding the logits of a micro-batch; or to values."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PretrainedConfig

from dsdpo.trl_kernel import chunked_logps

# Vocabulary columns computed at a time: [tokens, 8192] in fp32 stays in a CPU's cache and is small on a GPU.
VOCAB_CHUNK = 8192


class LogProbHead(nn.Module):
    """Log-probability of each target token under the model's output head.

    It holds the output embedding's own parameters and is a module of its own, so that DeepSpeed's ZeRO-3 hooks
    gather them for its forward and backward as for any linear layer.
    """

    def __init__(self, output_embeddings: nn.Linear, config: PretrainedConfig) -> None:
        super().__init__()
        self.weight = output_embeddings.weight
        self.bias = output_embeddings.bias
        # Gemma caps, Cohere multiplies by logit_scale, Granite divides by logits_scaling. A type that does not declare
        # one of these ignores it in a config file.
        keys = ("final_logit_softcapping", "logit_scale", "logits_scaling")
        softcap, factor, divisor = (getattr(config, key) if hasattr(type(config), key) else None for key in keys)
        self.softcap: float | None = softcap
        self.logit_scale: float = (factor or 1.0) / (divisor or 1.0)

    def forward(
        self, hidden: torch.Tensor, targets: torch.Tensor, with_log_sum_sq: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probs of the targets, and of interest to WPO, log sum_v p_v^2.

        Args:
            hidden: [C, hidden size].
            targets: int64 [C].
            with_log_sum_sq: whether to give the second one; without gradient.

        Returns:
            fp32 [C], and fp32 [C] or None.
        """
        return chunked_logps(
            hidden, self.weight, self.bias, targets, VOCAB_CHUNK, self.softcap, self.logit_scale, with_log_sum_sq
        )


class ValueHead(nn.Module):
    """A number from a hidden state: the layer `score` of a model for sequence classification with one label.

    Like LogProbHead it holds the parameter itself and is a module of its own, for ZeRO-3's hooks.
    """

    def __init__(self, score: nn.Linear) -> None:
        super().__init__()
        self.weight = score.weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [S, hidden size] -> fp32 [S]."""
        return nn.functional.linear(hidden, self.weight).squeeze(-1).float()
