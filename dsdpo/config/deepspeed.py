"""The user's DeepSpeed JSON: checked against the run config, then completed for `deepspeed.initialize`.

The JSON holds engine keys only. What the run config decides (batch size, precision, optimizer, schedule,
clipping) may stand there as "auto" or with an equal value; another value is a clash that names both places.
DeepSpeed itself ignores unknown keys, so a misspelt one would go unnoticed: here it is an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

from dsdpo.config.deepspeed_keys import (
    BLOCKS,
    FIXED,
    FLAGS,
    HPZ,
    NO_PARAM_SWAP,
    OFFLOAD_OPTIMIZER,
    OFFLOAD_PARAM,
    OWNED,
    PASSED,
    REFUSED,
    SIZES,
    ZERO,
)
from dsdpo.config.load import LoadResult
from dsdpo.config.names import did_you_mean
from dsdpo.config.schema import RunConfig
from dsdpo.errors import ConfigError

AUTO = "auto"
_NVME_BUFFERS = 4


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises ConfigError for a missing or malformed file or duplicate keys."""
    duplicates: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen = dict(pairs)
        keys = [key for key, _ in pairs]
        duplicates.extend(key for key in seen if keys.count(key) > 1)
        return seen

    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=unique)
    except FileNotFoundError:
        raise ConfigError(f"deepspeed: there is no file {path}; give a DeepSpeed JSON") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"deepspeed: {path} is not a readable JSON file: {error}") from None
    if duplicates:
        raise ConfigError([f"{path}: {key} is given twice in one block; keep one of them" for key in duplicates])
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: found a {type(data).__name__}; a DeepSpeed JSON is an object")
    return data


def check_deepspeed(loaded: LoadResult) -> list[str]:
    """Every problem of the JSON that the run config names, alone and against the run config."""
    if loaded.config is None or "deepspeed" in loaded.faulty or not loaded.config.deepspeed:
        return []
    path = loaded.config.deepspeed
    try:
        data = read_json(path)
    except ConfigError as error:
        return error.problems
    problems = [_check_leaf(key, value, loaded) for key, value in _leaves(data)]
    problems += _check_offload(data) + _check_hpz(data) + _check_nvme(data, loaded.config.async_save)
    return [f"{path}: {problem}" for problem in problems if problem]


def _leaves(data: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if prefix + key in BLOCKS and isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _check_leaf(key: str, value: Any, loaded: LoadResult) -> str:
    if key == f"{ZERO}.stage":
        return "" if value in (0, 1, 2, 3) and type(value) is int else f"{key} is {value!r}; allowed: 0, 1, 2, 3"
    if key in REFUSED:
        return "" if _is_off(value) else f"{key} is set; {REFUSED[key]}"
    if key in BLOCKS:
        return "" if value == AUTO and key != ZERO else f"{key} is {value!r}; it must be an object {{...}}"
    if key not in PASSED and key not in OWNED and key not in FIXED:
        return _unknown(key)
    if value == AUTO:
        return ""
    if key in OWNED:
        return _check_owned(key, value, loaded)
    if key in FIXED:
        fine = value == FIXED[key]
        return "" if fine else f"{key} is {value!r}; training always uses {FIXED[key]!r}; delete the key"
    return _check_passed(key, value)


def _block(data: dict[str, Any], key: str) -> dict[str, Any]:
    """The block `zero_optimization.offload_…`; empty where there is none."""
    zero = data.get(ZERO, {})
    block = zero.get(key.rpartition(".")[2], {}) if isinstance(zero, dict) else {}
    return block if isinstance(block, dict) else {}


def _check_offload(data: dict[str, Any]) -> list[str]:
    """Devices of the offload blocks, and whether the stage has them."""
    problems = []
    for key, lowest in ((OFFLOAD_OPTIMIZER, {"cpu": 1, "nvme": 3}), (OFFLOAD_PARAM, {"cpu": 3})):
        device = _block(data, key).get("device", "none")
        stage = data.get(ZERO, {}).get("stage", 0) if isinstance(data.get(ZERO), dict) else 0
        if key == OFFLOAD_PARAM and device == "nvme":
            problems.append(f"{key}.device is nvme, but {NO_PARAM_SWAP}; set cpu")
        elif device not in ("none", AUTO, *lowest):
            problems.append(f"{key}.device is {device!r}; allowed: none, {', '.join(lowest)}")
        elif device in lowest and isinstance(stage, int) and stage < lowest[device]:
            problems.append(
                f"{key} to {device} needs stage {lowest[device]} or higher, but stage is {stage}; change one"
            )
    return problems


def _check_nvme(data: dict[str, Any], async_save: bool) -> list[str]:
    """What offloading the optimizer to NVMe needs; its keys where they mean nothing."""
    block = _block(data, OFFLOAD_OPTIMIZER)
    if block.get("device") != "nvme":
        idle = [key for key in ("nvme_path", "buffer_count") if block.get(key, AUTO) != AUTO]
        return [f"{OFFLOAD_OPTIMIZER}.{key} is for device nvme, which is not set; delete the key" for key in idle]
    problems = []
    path, count = block.get("nvme_path"), block.get("buffer_count", _NVME_BUFFERS)
    if not isinstance(path, str) or path in ("", AUTO):
        problems.append(f"{OFFLOAD_OPTIMIZER}.nvme_path is {path!r}; give a folder that every node has on its own disk")
    if isinstance(count, (int, float)) and count < _NVME_BUFFERS:
        problems.append(
            f"{OFFLOAD_OPTIMIZER}.buffer_count is {count}; allowed: at least {_NVME_BUFFERS}, for weights, gradients "
            "and two moments of a sub-group"
        )
    if async_save:
        problems.append(
            f"{OFFLOAD_OPTIMIZER}.device is nvme, but async_save would copy all of the optimizer's state to the host's "
            "memory; set async_save: false, or device to cpu"
        )
    return problems


def _check_hpz(data: dict[str, Any]) -> list[str]:
    zero = data.get(ZERO, {})
    size = zero.get("zero_hpz_partition_size", AUTO) if isinstance(zero, dict) else AUTO
    if size != AUTO and (type(size) is not int or size < 0):
        return [f"{HPZ} is {size!r}; allowed: the number of GPUs of a node, 1 for none, or auto"]
    if size not in (AUTO, 0, 1) and zero.get("stage", 0) != 3:
        return [f"{HPZ} needs stage 3, but stage is {zero.get('stage', 0)}; change one"]
    return []


def _check_owned(key: str, value: Any, loaded: LoadResult) -> str:
    option, wanted = OWNED[key]
    if option in loaded.faulty or loaded.config is None:
        return ""
    expected = wanted(loaded.config)
    if expected is not None and value == expected and isinstance(value, bool) == isinstance(expected, bool):
        return ""
    ours = getattr(loaded.config, option)
    return (
        f"{key} is {value!r}, but {option} in the run config decides this, and it is "
        f"{'empty' if ours is None else ours} ({loaded.where(option)}); "
        'write "auto" in the JSON or delete the key there'
    )


def _check_passed(key: str, value: Any) -> str:
    if key in FLAGS and not isinstance(value, bool):
        return f"{key} is {value!r}; allowed: true, false or auto"
    if key in SIZES and (isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0):
        return f"{key} is {value!r}; allowed: a number, at least 0, or auto"
    return ""


def _unknown(key: str) -> str:
    block, _, name = key.rpartition(".")
    prefix = f"{block}." if block else ""
    known = [k.removeprefix(prefix) for k in (*PASSED, *OWNED, *FIXED, *REFUSED, *BLOCKS) if k.startswith(prefix)]
    hint = did_you_mean(name, [k for k in known if "." not in k])
    return f"unknown key {key}; {hint or 'DeepSpeed would ignore it: delete it'}"


def _is_off(value: Any) -> bool:
    """True for a feature block that its JSON switches off: false, none, an object that is not enabled."""
    if isinstance(value, dict):
        switch = next((value[key] for key in ("enabled", "device") if key in value), None)
        return _is_off(switch) if switch is not None else all(_is_off(item) for item in value.values())
    return value is None or value is False or value in (AUTO, "none", 0) or (value == 1 and value is not True)


def zero_stage(config: RunConfig) -> int:
    """ZeRO stage of the user's JSON; 0 without one. Raises ConfigError when it cannot be read."""
    return int(read_json(config.deepspeed).get(ZERO, {}).get("stage", 0)) if config.deepspeed else 0


def effective_stage(config: RunConfig, bf16: bool) -> int:
    """The stage that is run: stage 0 in bf16 becomes 1, since only from there on are master weights fp32."""
    return zero_stage(config) or int(bf16)


def offloads_optimizer(config: RunConfig) -> bool:
    """Whether the optimizer's state lies in the CPU's memory or on NVMe: then DeepSpeed's own Adam works on it."""
    block = _block(read_json(config.deepspeed), OFFLOAD_OPTIMIZER) if config.deepspeed else {}
    return block.get("device") in ("cpu", "nvme")


def swap_folder(config: RunConfig) -> Path | None:
    """Where this run keeps the optimizer's state on NVMe, a folder of its own below `nvme_path`; None: it does not.

    DeepSpeed names the files in it by rank and parameter alone: two runs in one folder would overwrite each other.
    """
    block = _block(read_json(config.deepspeed), OFFLOAD_OPTIMIZER) if config.deepspeed else {}
    if block.get("device") != "nvme":
        return None
    run = sha256(str(Path(config.output_dir).absolute()).encode()).hexdigest()[:12]
    return Path(block["nvme_path"]) / f"dsdpo-{run}"


def hpz_size(config: RunConfig) -> int:
    """Ranks that share a second copy of the parameters' shards (ZeRO++ hpZ); 1 without it."""
    size = read_json(config.deepspeed).get(ZERO, {}).get("zero_hpz_partition_size", 1) if config.deepspeed else 1
    return 1 if size == AUTO else max(1, int(size))


def check_world_size(config: RunConfig, world_size: int) -> None:
    """What the JSON asks of the number of ranks. Raises ConfigError.

    DeepSpeed makes one smaller group of all ranks where they are too few, and fails an assertion where they do not
    divide.
    """
    size = hpz_size(config)
    if world_size % size == 0:
        return
    fitting = [str(n) for n in range(1, world_size + 1) if world_size % n == 0]
    raise ConfigError(
        f"{config.deepspeed}: {HPZ} is {size}, but {world_size} ranks train, which do not form groups of {size}; "
        f"allowed for {world_size}: {', '.join(fitting)}. Set the number of GPUs of a node, or delete the key"
    )


def engine_config(config: RunConfig, world_size: int, bf16: bool) -> dict[str, Any]:
    """The complete config for `deepspeed.initialize`. A row is one micro-batch: batch sizes count rows.

    The caller sets the accumulation boundary itself and passes its own optimizer; in bf16 gradients
    accumulate and travel in fp32. Assumes a config that passed `check_deepspeed`.
    """
    user = _without(read_json(config.deepspeed)) if config.deepspeed else {}
    if folder := swap_folder(config):
        user[ZERO]["offload_optimizer"]["nvme_path"] = str(folder)
    return {
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": False,
        **user,
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.max_grad_norm,
        "bf16": {**user.get("bf16", {}), "enabled": bf16},
        "zero_optimization": {**user.get(ZERO, {}), "stage": effective_stage(config, bf16)},
        "data_types": {**user.get("data_types", {}), "grad_accum_dtype": "fp32"},
        **({"communication_data_type": "fp32"} if bf16 else {}),
    }


def reference_engine_config(config: RunConfig, world_size: int, bf16: bool) -> dict[str, Any]:
    """The same for a frozen model beside the policy: always stage 3, with the user's block if it is of stage 3."""
    settings = engine_config(config, world_size, bf16)
    zero = settings["zero_optimization"] if settings["zero_optimization"]["stage"] == 3 else {"stage": 3}
    settings["zero_optimization"] = {key: value for key, value in zero.items() if key != "offload_optimizer"}
    return settings


def _without(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`data` less what is "auto", owned by the run config or switched off."""
    kept = {}
    for key, value in data.items():
        name = prefix + key
        if value == AUTO or name in REFUSED or name in OWNED or name in ("optimizer", "scheduler", "bfloat16"):
            continue
        if name in (OFFLOAD_OPTIMIZER, OFFLOAD_PARAM) and _is_off(value):
            continue
        kept[key] = _without(value, f"{name}.") if isinstance(value, dict) else value
    return kept
