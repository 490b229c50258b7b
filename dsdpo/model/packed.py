"""A micro-batch in, what its completions come to out: log-probs of their tokens, or a value for each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from dsdpo.config.rules import HEAD
from dsdpo.data.packing import MicroBatch
from dsdpo.errors import config_error
from dsdpo.model.attention.masks import PackedLayout
from dsdpo.model.gather import RowGather
from dsdpo.model.heads import LogProbHead, ValueHead
from dsdpo.model.noise import embedding_noise


@dataclass
class PackedInputs:
    """A `MicroBatch` on the device; shapes as there, ids and positions with a leading batch axis of 1.

    Attributes:
        predicting: gives the hidden states that predict a scored token, those at `loss_positions`.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    layout: PackedLayout
    predicting: RowGather
    target_ids: torch.Tensor
    last_positions: torch.Tensor
    noise: tuple[torch.Tensor, torch.Tensor] | None = None

    @classmethod
    def of(cls, micro_batch: MicroBatch, device: torch.device) -> PackedInputs:
        """Copy a micro-batch to `device`."""
        arrays = (
            micro_batch.input_ids[None],
            micro_batch.position_ids[None],
            micro_batch.target_ids,
            micro_batch.last_positions,
        )
        ids, positions, target_ids, last_positions = (
            torch.from_numpy(array).to(device, non_blocking=True) for array in arrays
        )
        layout = PackedLayout(micro_batch.segments, device)
        predicting = RowGather(micro_batch.loss_positions, len(micro_batch.input_ids), device)
        noise = None
        if micro_batch.noise is not None:
            keys, scales = (torch.from_numpy(x).to(device, non_blocking=True) for x in micro_batch.noise)
            noise = keys, scales
        return cls(ids, positions, layout, predicting, target_ids, last_positions, noise)


class ModelOutput(NamedTuple):
    """What a model gives for a micro-batch; None for what its head does not compute.

    Attributes:
        token_logps: fp32 [C], log-probs of the scored tokens.
        token_log_sum_sq: fp32 [C], log sum_v p_v^2 where they are predicted, without gradient; for `wpo_weights`.
        values: fp32 [S], a number for each completion.
    """

    token_logps: torch.Tensor | None = None
    token_log_sum_sq: torch.Tensor | None = None
    values: torch.Tensor | None = None


class PackedModel(nn.Module):
    """A language model seen as a function of micro-batches.

    Args:
        model: a transformers model as `dsdpo.model.load.load_model` gives it, or a PEFT model around one.
        head: `logprob` gives log-probs of the scored tokens, `value` a number from the last token of each completion.
        weighting: whether `logprob` gives `token_log_sum_sq` too.

    Raises:
        ConfigError: an adapter tunes the output head, whose base weights alone would be read.
    """

    def __init__(
        self, model: nn.Module, head: Literal["logprob", "value"] = "logprob", weighting: bool = False
    ) -> None:
        super().__init__()
        self.weighting = weighting
        self.model = model
        causal_lm: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator, assignment]
        output_layer: Any = causal_lm.get_output_embeddings() if head == "logprob" else causal_lm.score
        if isinstance(output_layer, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            text = f"the adapter tunes {HEAD}: train one that leaves it alone, or merge it into its base first"
            raise config_error("adapter", "adapter_name_or_path", text)
        self.config = causal_lm.config
        self.head: LogProbHead | ValueHead
        if head == "logprob":
            self.head = LogProbHead(output_layer, causal_lm.config)
        else:
            self.head = ValueHead(output_layer)
        # Not registered as a submodule: it is part of `model`, and a parameter shall have one name.
        self._backbone = (causal_lm.base_model,)
        self._noise: tuple[torch.Tensor, torch.Tensor] | None = None
        causal_lm.get_input_embeddings().register_forward_hook(self._add_noise)

    def _add_noise(self, module: nn.Module, args: Any, embeddings: torch.Tensor) -> torch.Tensor:
        if self._noise is None:
            return embeddings
        return embeddings + embedding_noise(*self._noise, embeddings.shape[-1]).to(embeddings.dtype)

    def forward(self, inputs: PackedInputs) -> ModelOutput:
        """Log-probs of the scored tokens, or values of the completions.

        The first token of a completion is predicted from the prompt's last hidden state, which all completions use.
        """
        self._noise = inputs.noise
        hidden = self._backbone[0](
            input_ids=inputs.input_ids,
            position_ids=inputs.position_ids,
            packed_layout=inputs.layout,
            use_cache=False,
        ).last_hidden_state.squeeze(0)
        if isinstance(self.head, ValueHead):
            return ModelOutput(values=self.head(hidden.index_select(0, inputs.last_positions)))
        return ModelOutput(*self.head(inputs.predicting(hidden), inputs.target_ids, self.weighting))
