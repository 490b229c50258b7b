"""Each completion computed alone by transformers: its prompt and it, one sequence, no padding."""

from __future__ import annotations

import numpy as np
import torch
from transformers import PreTrainedModel

from dsdpo.data.example import TokenizedExample


def sequence(example: TokenizedExample, completion: int) -> torch.Tensor:
    """int64 [1, p + n]."""
    return torch.from_numpy(np.concatenate([example.prompt_ids, example.completion_ids[completion]]))[None]


def logps_alone(model: PreTrainedModel, example: TokenizedExample, completion: int) -> torch.Tensor:
    """Log-probs of the scored tokens of a completion, from full logits."""
    ids = sequence(example, completion)
    logps = model(ids).logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    whole = torch.cat([torch.zeros(1), logps])  # nothing predicts the first token, which is never scored
    return whole[len(example.prompt_ids) :][torch.from_numpy(example.is_scored(completion))]


def value_alone(
    model: PreTrainedModel, score: torch.Tensor, example: TokenizedExample, completion: int
) -> torch.Tensor:
    """score [1, hidden size] of the last hidden state: a scalar."""
    return model.base_model(sequence(example, completion)).last_hidden_state[0, -1] @ score[0]
