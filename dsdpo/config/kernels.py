"""Which settings go with the kernels of the decoder layers, and whether Liger is installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util

from dsdpo.config.loss_rules import Given, Rule
from dsdpo.config.schema import RunConfig
from dsdpo.config.zero import ZeroConfig
from dsdpo.errors import Problem

LIGER_FROM = (
    0,
    8,
    5,
)  # the first one that the tests ran with; earlier ones turn Phi-3's partial rotary positions wrong
LIGER_REMEDY = "run `pip install 'dsdpo[cuda]'`"


def missing_liger() -> str:
    """Why Liger's kernels cannot be used here, as far as packages tell; an empty string where they can."""
    found = next((d.version for d in importlib.metadata.distributions(name="liger-kernel")), None)
    if found is None:
        return "the package liger-kernel is not installed"
    release = tuple(int(part) for part in found.split(".")[:3] if part.isdigit())
    if release < LIGER_FROM:
        return f"liger-kernel is {found}, older than {'.'.join(map(str, LIGER_FROM))}"
    return (
        "" if importlib.util.find_spec("triton") else "the package triton, which liger-kernel needs, is not installed"
    )


def liger_installed(config: RunConfig, given: Given) -> str:
    """A rule: the packages of `kernels: liger`."""
    missing = missing_liger() if config.kernels == "liger" else ""
    return missing and f"kernels is liger, but {missing}; {LIGER_REMEDY}, or set kernels: auto"


def _not_compiled(config: RunConfig, given: Given) -> str:
    if config.kernels != "compile":
        return ""
    if config.quantization_bit is not None:
        return (
            f"kernels is compile, which has not been compared over quantized weights (quantization_bit is "
            f"{config.quantization_bit}); set kernels: auto, liger or none"
        )
    if config.finetuning_type == "full" and config.reference_kind == "live":
        return (
            "kernels is compile, but the frozen reference of reference: live is sharded with ZeRO-3, where layers are "
            "not compiled; set reference: cached, or kernels: auto, liger or none"
        )
    return ""


KERNEL_RULES: list[Rule] = [
    ("liger-missing", ("kernels",), liger_installed),
    ("kernels-compile", ("kernels", "quantization_bit", "finetuning_type", "reference"), _not_compiled),
]


def zero_problems(config: RunConfig, zero: ZeroConfig) -> list[Problem]:
    """What of a DeepSpeed JSON does not go with the run's kernels."""
    if config.kernels != "compile" or zero.stage != 3:
        return []
    text = (
        f"{zero.path}: stage is 3, which gathers and releases the weights that a compiled layer would keep; set "
        "kernels: auto, liger or none, or stage 2 or lower"
    )
    return [Problem("kernels-zero3", "kernels", text)]
