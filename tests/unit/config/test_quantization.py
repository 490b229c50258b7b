"""Which settings go with quantized base weights, and what a report says of those that do not."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from dsdpo.config.deepspeed import check_deepspeed
from dsdpo.config.load import load
from dsdpo.config.quantization import Quantization
from dsdpo.config.rules import check_rules
from dsdpo.config.schema import options_with

_RUN = {"model_name_or_path": "m/m", "dataset": "d", "output_dir": "o"}
_OFFLOAD = {"stage": 3, "offload_param": {"device": "cpu"}}

FINE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "none": ({"finetuning_type": "full"}, {"stage": 3}),
    **{f"4 bits, stage {stage}": ({"quantization_bit": 4}, {"stage": stage}) for stage in range(4)},
    **{f"8 bits, stage {stage}": ({"quantization_bit": 8}, {"stage": stage}) for stage in range(3)},
    "fp4": ({"quantization_bit": 4, "quantization_type": "fp4", "double_quantization": False}, {"stage": 2}),
    "noise": ({"quantization_bit": 4, "stage": "sft", "neftune_noise_alpha": 5}, {"stage": 0}),
    "offloaded optimizer": (
        {"quantization_bit": 4},
        {"stage": 3, "offload_optimizer": {"device": "cpu"}, "zero_hpz_partition_size": 2},
    ),
}
WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "full": ({"quantization_bit": 4, "finetuning_type": "full"}, {"stage": 0}, "quantization-full"),
    "8 bits, stage 3": ({"quantization_bit": 8}, {"stage": 3}, "deepspeed-quantization"),
    "offloaded weights": ({"quantization_bit": 4}, _OFFLOAD, "deepspeed-quantization"),
    "type of 8 bits": ({"quantization_bit": 8, "quantization_type": "fp4"}, {"stage": 0}, "quantization-options"),
    "double 8 bits": ({"quantization_bit": 8, "double_quantization": True}, {"stage": 0}, "quantization-options"),
    "type of none": ({"quantization_type": "nf4"}, {"stage": 0}, "quantization-options"),
    "6 bits": ({"quantization_bit": 6}, {"stage": 0}, "value"),
    "unknown type": ({"quantization_bit": 4, "quantization_type": "int4"}, {"stage": 0}, "value"),
}


def codes(folder: Path, options: dict[str, Any], zero: dict[str, Any]) -> list[str]:
    (folder / "run.yaml").write_text(json.dumps(_RUN | options | {"deepspeed": {"zero_optimization": zero}}))
    loaded = load(str(folder / "run.yaml"))
    return [one.code for one in (*loaded.problems, *check_rules(loaded), *check_deepspeed(loaded)[1])]


@pytest.mark.parametrize("name", FINE)
def test_what_can_be_trained(tmp_path: Path, name: str) -> None:
    assert codes(tmp_path, *FINE[name]) == []


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot(tmp_path: Path, name: str) -> None:
    options, zero, code = WRONG[name]
    assert codes(tmp_path, options, zero) == [code]


def test_bitsandbytes_must_be_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    assert codes(tmp_path, {"quantization_bit": 4}, {"stage": 0}) == ["bitsandbytes-missing"]
    assert codes(tmp_path, {}, {"stage": 0}) == []


def test_a_resumed_run_keeps_its_quantization() -> None:
    assert {"quantization_bit", "quantization_type", "double_quantization"} <= set(options_with("fixed"))


def test_options_of_a_run_from_before_there_were_any() -> None:
    assert Quantization.of_saved({"model_name_or_path": "m"}) is None
    assert Quantization.of_saved({"quantization_bit": 4}) == Quantization(4, "nf4", True)
