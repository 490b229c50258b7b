"""Which settings go with quantized base weights."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsdpo.config.deepspeed_keys import OFFLOAD_PARAM
from dsdpo.config.loss_rules import Given, Rule
from dsdpo.config.schema import RunConfig
from dsdpo.config.zero import ZeroConfig
from dsdpo.errors import Problem

_OF_FOUR_BITS = ("quantization_type", "double_quantization")


@dataclass(frozen=True)
class Quantization:
    """How the frozen weights of linear layers are quantized.

    Attributes:
        bits: 4 or 8.
        kind: of 4 bits, `nf4` or `fp4`.
        double: of 4 bits, whether the scales are quantized too.
    """

    bits: int
    kind: str
    double: bool

    @classmethod
    def of(cls, config: RunConfig) -> Quantization | None:
        """Of a run; None where its weights are not quantized."""
        if config.quantization_bit is None:
            return None
        return cls(config.quantization_bit, config.quantization_type, config.double_quantization)

    @classmethod
    def of_saved(cls, settings: Mapping[str, Any]) -> Quantization | None:
        """The same by a run_config.yaml, which may be older than the options."""
        kind, double = (settings.get(key, RunConfig.model_fields[key].default) for key in _OF_FOUR_BITS)
        bits = settings.get("quantization_bit")
        return None if bits is None else cls(bits, kind, double)


def _needs_lora(config: RunConfig, given: Given) -> str:
    if config.quantization_bit is None or config.finetuning_type == "lora":
        return ""
    return (
        f"quantization_bit is {config.quantization_bit}, but finetuning_type is full, and quantized weights cannot be "
        "trained; set finetuning_type: lora, or delete quantization_bit"
    )


def _four_bit_options(config: RunConfig, given: Given) -> str:
    useless = [key for key in _OF_FOUR_BITS if key in given]
    if config.quantization_bit == 4 or not useless:
        return ""
    bits = "empty" if config.quantization_bit is None else config.quantization_bit
    return f"{', '.join(useless)} set, but quantization_bit is {bits}; delete that, or set quantization_bit: 4"


def _installed(config: RunConfig, given: Given) -> str:
    if config.quantization_bit is None or importlib.util.find_spec("bitsandbytes") is not None:
        return ""
    return (
        f"quantization_bit is {config.quantization_bit}, but bitsandbytes is not installed here; run "
        "`pip install 'dsdpo[qlora]'`"
    )


QUANTIZATION_RULES: list[Rule] = [
    ("quantization-full", ("quantization_bit", "finetuning_type"), _needs_lora),
    ("quantization-options", ("quantization_bit", *_OF_FOUR_BITS), _four_bit_options),
    ("bitsandbytes-missing", ("quantization_bit",), _installed),
]


def zero_problems(config: RunConfig, zero: ZeroConfig) -> list[Problem]:
    """What of a DeepSpeed JSON does not go with the run's quantized weights."""
    if config.quantization_bit is None:
        return []
    texts = []
    if config.quantization_bit == 8 and zero.stage == 3:
        texts.append(
            "stage is 3, which shards floating point weights, and those of quantization_bit: 8 are integers; set "
            "quantization_bit: 4, or stage 2 or lower"
        )
    if zero.offload_param != "none":
        texts.append(
            f"{OFFLOAD_PARAM}.device is {zero.offload_param}, which is not supported with quantized weights; delete "
            "the block (stage 3 shards 4-bit weights over the GPUs), or quantization_bit"
        )
    return [Problem("deepspeed-quantization", "deepspeed", f"{zero.path}: {text}") for text in texts]
