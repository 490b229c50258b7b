"""Log-probs of tokens, summed for each completion."""

from __future__ import annotations

import numpy as np
import torch

from dsdpo.model.packed import ModelOutput


def completion_sums(output: ModelOutput, completions: np.ndarray) -> torch.Tensor:
    """Sums over the scored tokens of each completion, in a fixed order: the same micro-batch gives the same bits.

    Args:
        output: of a model with a `logprob` head.
        completions: int64 [S, 3] of the micro-batch.

    Returns:
        fp32 [S, 2], or [S, 3] with `token_log_sum_sq`. Column 0 sums the log-probs of as many scored tokens as the
        example's completion with the fewest has, column 1 those of the rest. Column 2 sums log(p_t / sum_v p_v^2) over
        all tokens, without gradient.
    """
    assert output.token_logps is not None, "sums of log-probs need a logprob head"
    tokens = completions[:, 2]
    first = np.flatnonzero(completions[:, 1] == 0)
    shared = np.repeat(np.minimum.reduceat(tokens, first), np.diff(np.append(first, len(tokens))))
    parts = np.stack([shared, tokens - shared], axis=1)
    sums = segment_sums(output.token_logps, parts.ravel()).view(-1, 2)
    if output.token_log_sum_sq is None:
        return sums
    aligned = segment_sums((output.token_logps - output.token_log_sum_sq).detach(), tokens)
    return torch.cat([sums, aligned[:, None]], dim=1)


def segment_sums(values: torch.Tensor, lengths: np.ndarray) -> torch.Tensor:
    """Sums over consecutive pieces of `values`, fp32 [C]. lengths: int64 [S], each may be 0; values beyond their sum,
    of a micro-batch without examples, belong to nothing. Returns [S]."""
    on_device = torch.from_numpy(lengths).to(values.device, non_blocking=True)
    return torch.segment_reduce(values, "sum", lengths=on_device, unsafe=True)
