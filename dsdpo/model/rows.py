"""A packed row in, the log-probability of each completion out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from dsdpo.data.packing import Row
from dsdpo.model.heads import LogProbHead
from dsdpo.model.layout import RowLayout


@dataclass
class RowTensors:
    """A `Row` on the device; shapes as there, ids and positions with a leading batch axis of 1."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    layout: RowLayout
    score_from: torch.Tensor
    targets: torch.Tensor
    completion: torch.Tensor
    n_completions: int

    @classmethod
    def from_row(cls, row: Row, device: torch.device) -> RowTensors:
        """Copy a row to `device`."""
        arrays = (row.input_ids[None], row.position_ids[None], row.score_from, row.targets, row.completion)
        ids, positions, score_from, targets, completion = (
            torch.from_numpy(array).to(device, non_blocking=True) for array in arrays
        )
        layout = RowLayout(row.segments, device)
        return cls(ids, positions, layout, score_from, targets, completion, row.n_completions)


class RowModel(nn.Module):
    """A causal language model seen as a function of packed rows.

    Args:
        model: a transformers model, or a PEFT model around one, loaded with one of our attention backends.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        causal_lm: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator, assignment]
        self.head = LogProbHead(causal_lm.get_output_embeddings(), causal_lm.config)
        self.config = causal_lm.config
        # Not registered as a submodule: it is part of `model`, and a parameter shall have one name.
        self._backbone = (causal_lm.base_model,)

    def forward(self, row: RowTensors) -> torch.Tensor:
        """Sum of log-probs of each completion's tokens: fp32 [n_completions].

        The first completion token is predicted from the prompt's last hidden state, used by both completions.
        """
        hidden = self._backbone[0](
            input_ids=row.input_ids, position_ids=row.position_ids, row_layout=row.layout, use_cache=False
        ).last_hidden_state[0]
        logps = self.head(hidden.index_select(0, row.score_from), row.targets)
        return logps.new_zeros(row.n_completions).index_add(0, row.completion, logps)
