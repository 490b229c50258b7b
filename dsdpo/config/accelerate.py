"""Settings of accelerate: its DeepSpeed settings are followed, and what would be lost is named.

`accelerate launch` is a launcher like any other here. What its config file says of training reaches the ranks as
environment variables. They set what the run itself does not; where one differs from the run, that is an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsdpo.config.precision import precision_of
from dsdpo.config.schema import RunConfig
from dsdpo.errors import Problem

# Keys that only a config file of accelerate has; `mixed_precision` alone could be anybody's.
_ITS_KEYS = ("compute_environment", "distributed_type", "deepspeed_config", "fsdp_config", "machine_rank")
_UNSET = ("", "none", "auto", "no", "false")
# FSDP's sharding strategies, by name and number, and `fsdp_reshard_after_forward` of its second version
_NO_SHARD = ("NO_SHARD", "3")
_GRADIENTS_ALONE = ("SHARD_GRAD_OP", "2", "_HYBRID_SHARD_ZERO2", "HYBRID_SHARD_ZERO2", "5", "FALSE")
_NAMES = {("cpu", 3): "zero3_offload", ("nvme", 3): "zero3_nvme"}


def run_options(data: Any) -> dict[str, Any]:
    """Options of ours that a config of accelerate sets. Empty where it is none, or asks for something else than
    DeepSpeed or plain data parallelism, which `foreign_settings` tells.
    """
    if not isinstance(data, dict) or not any(key in data for key in _ITS_KEYS):
        return {}
    precision = str(data.get("mixed_precision") or "no").lower()
    if data.get("fsdp_config") or str(data.get("distributed_type")).upper() == "FSDP" or precision == "fp8":
        return {}
    block = data.get("deepspeed_config")
    block = block if isinstance(block, dict) else {}
    found: dict[str, Any] = {"deepspeed": block.get("deepspeed_config_file") or _zero(block)}
    if precision in ("bf16", "fp16"):
        found["precision"] = precision
    if (clipping := _number(str(block.get("gradient_clipping")))) is not None:
        found["max_grad_norm"] = clipping
    return found


def _zero(block: Mapping[str, Any]) -> dict[str, Any] | None:
    """The DeepSpeed settings that stand in accelerate's own file; None where nothing is sharded."""
    stage = int(block.get("zero_stage") or 0) if str(block.get("zero_stage") or 0).isdigit() else 0
    if stage == 0:
        return None
    zero: dict[str, Any] = {"stage": stage}
    for part in ("optimizer", "param"):
        device = str(block.get(f"offload_{part}_device") or "none").lower()
        if device not in _UNSET and (part == "optimizer" or stage == 3):
            zero[f"offload_{part}"] = {"device": device}
            if path := block.get(f"offload_{part}_nvme_path"):
                zero[f"offload_{part}"]["nvme_path"] = path
    return {"zero_optimization": zero}


def launch_options(environment: Mapping[str, str]) -> dict[str, Any]:
    """The same of `accelerate launch`; empty without one."""
    if not any(name.startswith("ACCELERATE_DEEPSPEED") or name == "ACCELERATE_MIXED_PRECISION" for name in environment):
        return {}
    names = {"zero_stage": "ZERO_STAGE", "deepspeed_config_file": "CONFIG_FILE"}
    names |= {f"offload_{part}_device": f"OFFLOAD_{part.upper()}_DEVICE" for part in ("optimizer", "param")}
    block = {key: environment.get(f"ACCELERATE_DEEPSPEED_{name}") for key, name in names.items()}
    block["gradient_clipping"] = environment.get("ACCELERATE_GRADIENT_CLIPPING")
    found = run_options({"mixed_precision": environment.get("ACCELERATE_MIXED_PRECISION"), "deepspeed_config": block})
    return {key: value for key, value in found.items() if value is not None}


def foreign_settings(data: Any) -> str:
    """The end of a sentence that begins with a file's name, where the file is a config of accelerate; else empty."""
    if not isinstance(data, dict) or not any(key in data for key in _ITS_KEYS):
        return ""
    block = data.get("deepspeed_config")
    block = block if isinstance(block, dict) else {}
    if file := block.get("deepspeed_config_file"):
        said = f"its deepspeed_config_file is {file}: name that file in deepspeed"
    elif data.get("fsdp_config") or str(data.get("distributed_type")).upper() == "FSDP":
        said = _of_fsdp(data.get("fsdp_config"))
    else:
        stage = block.get("zero_stage", 0)
        ours = name_of_stage(stage, block.get("offload_optimizer_device"))
        said = f"its zero_stage {stage} is {ours} here: set deepspeed: {ours}" if ours else "it shards nothing"
    precision = str(data.get("mixed_precision") or "no").lower()
    if precision in ("bf16", "fp16"):
        said += f", and set precision: {precision}"
    elif precision == "fp8":
        said += "; fp8 is not supported: set precision: bf16"
    return f"is an accelerate config; {said}{_of_ranks(data)}"


def _of_fsdp(block: Any) -> str:
    """What to name for a block `fsdp_config` of either version."""
    block = block if isinstance(block, dict) else {}
    wanted = str(block.get("fsdp_sharding_strategy", block.get("fsdp_reshard_after_forward", "FULL_SHARD"))).upper()
    stage = 0 if wanted in _NO_SHARD else 2 if wanted in _GRADIENTS_ALONE else 3
    ours = name_of_stage(stage, "cpu" if str(block.get("fsdp_offload_params")).lower() == "true" else None)
    return f"its FSDP sharding ({wanted}) is {ours} here: set deepspeed: {ours}" if ours else "it shards nothing"


def _of_ranks(data: Mapping[str, Any]) -> str:
    """How to start as many ranks: accelerate counts those of all machines together."""
    ranks, machines = data.get("num_processes"), data.get("num_machines") or 1
    if not isinstance(ranks, int) or not isinstance(machines, int) or ranks < 1 or ranks % machines:
        return ""
    nodes = f", and --hostfile names the {machines} nodes" if machines > 1 else ""
    return f"; --num_accelerators {ranks // machines} starts as many ranks on a node{nodes}"


def name_of_stage(stage: Any, offload: Any = None) -> str:
    """The name of the file in ds_configs for a ZeRO stage; empty for stage 0."""
    number = int(stage) if str(stage).isdigit() else 0
    name = _NAMES.get((str(offload).lower(), number), f"zero{number}")
    return name if 1 <= number <= 3 else ""


def launch_problems(
    config: RunConfig, settings: dict[str, Any], environment: Mapping[str, str], cuda: bool
) -> list[Problem]:
    """Settings of `accelerate launch` from which the run differs, and which it would drop.

    Args:
        settings: the content of the run's DeepSpeed JSON.
        environment: with the variables that `accelerate launch` has set.
        cuda: whether the run will compute on GPUs.
    """
    given = {
        name.removeprefix("ACCELERATE_"): value
        for name, value in environment.items()
        if name.startswith(("ACCELERATE_", "PARALLELISM_CONFIG_")) and value.lower() not in _UNSET
    }
    found = [
        *_precision(config, given, cuda),
        *_sharding(config, settings, given),
        *_steps(config, given),
    ]
    return [Problem("accelerate-launch", option, f"accelerate launch: {text}") for option, text in found]


def _precision(config: RunConfig, given: Mapping[str, str], cuda: bool) -> list[tuple[str, str]]:
    wanted = given.get("MIXED_PRECISION", "").lower()
    if not wanted:
        return []
    ours = precision_of(config.precision, cuda)
    if wanted == ours:
        return []
    remedy = "only bf16, fp16 and fp32 are supported"
    if wanted in ("bf16", "fp16"):
        remedy = f"set precision: {wanted}, or mixed_precision: no there"
    return [("precision", f"mixed_precision is {wanted}, but precision is {config.precision} ({ours} here); {remedy}")]


def _sharding(config: RunConfig, settings: dict[str, Any], given: Mapping[str, str]) -> list[tuple[str, str]]:
    found = []
    for name, what in (("USE_FSDP", "FSDP"), ("USE_MEGATRON_LM", "Megatron-LM")):
        if name in given:
            found.append(f"it asks for {what}, but ranks run DeepSpeed; take it out there, and set deepspeed to shard")
    for name, value in given.items():
        part = name.removeprefix("PARALLELISM_CONFIG_")
        if part != name and part.endswith(("TP_SIZE", "CP_SIZE", "SP_SIZE")) and value != "1":
            found.append(f"{part.lower()} is {value}, but ranks are data-parallel alone; set it to 1 there")
    zero = settings.get("zero_optimization", {})
    if file := given.get("DEEPSPEED_CONFIG_FILE"):
        if _content(file) != settings:
            ours = f"deepspeed is {_name(config)}" if config.deepspeed else "deepspeed is empty"
            found.append(f"deepspeed_config_file is {file}, but {ours}; set deepspeed: {file}")
        return [("deepspeed", text) for text in found]
    stage = str(zero.get("stage", 0))
    if given.get("DEEPSPEED_ZERO_STAGE", stage) != stage:
        wanted = given["DEEPSPEED_ZERO_STAGE"]
        remedy = name_of_stage(wanted, given.get("DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE"))
        remedy = f"set deepspeed: {remedy}, or zero_stage {stage} there" if remedy else f"set zero_stage {stage} there"
        ours = f"that of {_name(config)}" if config.deepspeed else "deepspeed is empty"
        found.append(f"zero_stage is {wanted}, but the run's stage is {stage} ({ours}); {remedy}")
    for block in ("optimizer", "param"):
        wanted = given.get(f"DEEPSPEED_OFFLOAD_{block.upper()}_DEVICE", "none").lower()
        own = zero.get(f"offload_{block}")
        ours = str(own.get("device", "none")) if isinstance(own, dict) else "none"
        if wanted not in (*_UNSET, ours):
            text = f"offload_{block}_device is {wanted}, but that of the run is {ours}; set it in the DeepSpeed JSON"
            found.append(f"{text}, such as zero3_offload")
    return [("deepspeed", text) for text in found]


def _steps(config: RunConfig, given: Mapping[str, str]) -> list[tuple[str, str]]:
    found = []
    if (count := given.get("GRADIENT_ACCUMULATION_STEPS", "1")) != "1":
        text = f"gradient_accumulation_steps is {count}, but train_batch_size ({config.train_batch_size} examples per "
        found.append(("train_batch_size", f"{text}step over all ranks) decides here; set it to 1 or auto there"))
    clipping = given.get("GRADIENT_CLIPPING", "")
    if clipping and _number(clipping) != config.max_grad_norm:
        text = f"gradient_clipping is {clipping}, but max_grad_norm is {config.max_grad_norm}; make them equal"
        found.append(("max_grad_norm", text))
    return found


def _name(config: RunConfig) -> str:
    is_path = isinstance(config.deepspeed, str) and not config.deepspeed.lstrip().startswith("{")
    return str(config.deepspeed) if is_path else "the mapping in the run config"


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _content(path: str) -> Any:
    """What a JSON file holds; None where it cannot be read."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
