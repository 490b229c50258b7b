"""A packed row in, the log-probabilities of its completions out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from dsdpo.config.rules import HEAD
from dsdpo.data.packing import Row
from dsdpo.errors import ConfigError
from dsdpo.model.attention.masks import PackedLayout
from dsdpo.model.heads import LogProbHead


@dataclass
class RowTensors:
    """A `Row` on the device; shapes as there, ids and positions with a leading batch axis of 1."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    layout: PackedLayout
    score_from: torch.Tensor
    targets: torch.Tensor
    part_lengths: torch.Tensor

    @classmethod
    def from_row(cls, row: Row, device: torch.device) -> RowTensors:
        """Copy a row to `device`."""
        arrays = (row.input_ids[None], row.position_ids[None], row.score_from, row.targets, row.part_lengths)
        ids, positions, score_from, targets, part_lengths = (
            torch.from_numpy(array).to(device, non_blocking=True) for array in arrays
        )
        return cls(ids, positions, PackedLayout(row.segments, device), score_from, targets, part_lengths)


class PackedModel(nn.Module):
    """A causal language model seen as a function of packed rows.

    Args:
        model: a transformers model, or a PEFT model around one, loaded with one of our attention backends.
        weighting: whether to give what `wpo_weights` needs.

    Raises:
        ConfigError: an adapter tunes the output head, whose base weights alone would be read.
    """

    def __init__(self, model: nn.Module, weighting: bool = False) -> None:
        super().__init__()
        self.weighting = weighting
        self.model = model
        causal_lm: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator, assignment]
        head = causal_lm.get_output_embeddings()
        if isinstance(head, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            raise ConfigError(
                f"the adapter tunes {HEAD}: train one that leaves it alone, or merge it into its base first"
            )
        self.head = LogProbHead(head, causal_lm.config)
        self.config = causal_lm.config
        # Not registered as a submodule: it is part of `model`, and a parameter shall have one name.
        self._backbone = (causal_lm.base_model,)

    def forward(self, row: RowTensors) -> torch.Tensor:
        """Log-probs of each completion, in sums over its tokens: fp32 [n, 2], or [n, 3] with `weighting`.

        Column 0 sums the tokens at places that the pair's other completion has too, column 1 those beyond its end.
        Column 2 sums log(p_t / sum_v p_v^2) over all tokens, without gradient.

        The first completion token is predicted from the prompt's last hidden state, used by both completions. The sums
        are taken in a fixed order, so that the same row gives the same bits.
        """
        hidden = self._backbone[0](
            input_ids=row.input_ids, position_ids=row.position_ids, packed_layout=row.layout, use_cache=False
        ).last_hidden_state[0]
        logps, log_sum_sq = self.head(hidden.index_select(0, row.score_from), row.targets, self.weighting)
        sums = _segment_sums(logps, row.part_lengths.flatten()).view(-1, 2)
        if log_sum_sq is None:
            return sums
        aligned = _segment_sums((logps - log_sum_sq).detach(), row.part_lengths.sum(1))
        return torch.cat([sums, aligned[:, None]], dim=1)


def _segment_sums(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Sums over consecutive pieces of `values`, fp32 [C]; int64 lengths [S] add up to C and may be 0. Returns [S]."""
    return torch.segment_reduce(values, "sum", lengths=lengths, unsafe=True)
