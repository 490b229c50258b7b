"""Checks of the user's DeepSpeed JSON, alone and against the run config.

The JSON holds engine keys only. What the run config decides (batch size, precision, optimizer, schedule,
clipping) may stand there as "auto" or with an equal value; another value is a clash that names both places.
DeepSpeed itself ignores unknown keys, so a misspelt one would go unnoticed: here it is an error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from dsdpo.config import kernels, quantization
from dsdpo.config.aliases import did_you_mean
from dsdpo.config.deepspeed_file import named, read_settings
from dsdpo.config.deepspeed_keys import (
    BLOCKS,
    COUNTS,
    FIXED,
    FLAGS,
    HPZ,
    IGNORED,
    LOSS_SCALES,
    NO_PARAM_SWAP,
    OFFLOAD_OPTIMIZER,
    OFFLOAD_PARAM,
    OWNED,
    PASSED,
    REFUSED,
    SETTINGS,
    SIZES,
    ZERO,
)
from dsdpo.config.load import LoadResult
from dsdpo.config.precision import FP16, ScaleRule
from dsdpo.config.zero import AUTO, ZeroConfig, block_of, is_off
from dsdpo.errors import ConfigError, Problem

_NVME_BUFFERS = 4


def check_deepspeed(loaded: LoadResult) -> tuple[ZeroConfig | None, list[Problem]]:
    """Read the JSON that the run config names, and check it alone and against the run config.

    Returns:
        What the JSON says, an empty one where none is named; None with problems, or where its name is faulty.
        Every problem.
    """
    config = loaded.config
    if config is None or "deepspeed" in loaded.faulty:
        return None, []
    if not config.deepspeed:
        return ZeroConfig.of(config, {}), []
    try:
        data = read_settings(config.deepspeed)
    except ConfigError as error:
        return None, error.problems
    found = [_check_leaf(key, value, loaded) for key, value in _leaves(data)]
    found += _check_offload(data) + _check_hpz(data) + _check_nvme(data, config.async_save)
    found += _check_scales(data) if not any(found) else []
    problems = [replace(one, text=f"{named(config.deepspeed)}: {one.text}") for one in found if one]
    if problems:
        return None, problems
    zero = ZeroConfig.of(config, data)
    for option, checks in {"quantization_bit": quantization, "kernels": kernels}.items():
        problems += [] if option in loaded.faulty else checks.zero_problems(config, zero)
    return None if problems else zero, problems


def _leaves(data: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if prefix + key in BLOCKS and isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _problem(code: str, text: str) -> Problem:
    return Problem(f"deepspeed-{code}", "deepspeed", text)


def _check_leaf(key: str, value: Any, loaded: LoadResult) -> Problem | None:
    if key == f"{ZERO}.stage":
        fine = value in (0, 1, 2, 3) and type(value) is int
        return None if fine else _problem("value", f"{key} is {value!r}; allowed: 0, 1, 2, 3")
    if key in IGNORED:
        return None
    if key in REFUSED:
        return None if is_off(value) else _problem("refused", f"{key} is set; {REFUSED[key]}")
    if key in BLOCKS:
        fine = (value == AUTO and key != ZERO) or (value is None and key in (OFFLOAD_OPTIMIZER, OFFLOAD_PARAM))
        return None if fine else _problem("value", f"{key} is {value!r}; it must be an object {{...}}")
    if key not in PASSED and key not in OWNED and key not in FIXED:
        return _problem("unknown-key", _unknown(key))
    if value == AUTO:
        return None
    if key in OWNED:
        return _check_owned(key, value, loaded)
    if key in FIXED:
        fine, text = value == FIXED[key], f"{key} is {value!r}; training always uses {FIXED[key]!r}; delete the key"
        return None if fine else _problem("fixed", text)
    return _check_passed(key, value)


def _check_offload(data: dict[str, Any]) -> list[Problem]:
    """Devices of the offload blocks, and whether the stage has them."""
    problems = []
    for key, lowest in ((OFFLOAD_OPTIMIZER, {"cpu": 1, "nvme": 3}), (OFFLOAD_PARAM, {"cpu": 3})):
        device = block_of(data, key).get("device", "none")
        stage = data.get(ZERO, {}).get("stage", 0) if isinstance(data.get(ZERO), dict) else 0
        if key == OFFLOAD_PARAM and device == "nvme":
            problems.append(f"{key}.device is nvme, but {NO_PARAM_SWAP}; set cpu")
        elif device not in ("none", AUTO, *lowest):
            problems.append(f"{key}.device is {device!r}; allowed: none, {', '.join(lowest)}")
        elif device in lowest and isinstance(stage, int) and stage < lowest[device]:
            problems.append(
                f"{key} to {device} needs stage {lowest[device]} or higher, but stage is {stage}; change one"
            )
    return [_problem("offload", text) for text in problems]


def _check_nvme(data: dict[str, Any], async_save: bool) -> list[Problem]:
    """What offloading the optimizer to NVMe needs; its keys where they mean nothing."""
    block = block_of(data, OFFLOAD_OPTIMIZER)
    if block.get("device") != "nvme":
        idle = [key for key in ("nvme_path", "buffer_count") if block.get(key, AUTO) != AUTO]
        texts = [f"{OFFLOAD_OPTIMIZER}.{key} is for device nvme, which is not set; delete the key" for key in idle]
        return [_problem("nvme", text) for text in texts]
    problems = []
    path, count = block.get("nvme_path"), block.get("buffer_count", _NVME_BUFFERS)
    if not isinstance(path, str) or path in ("", AUTO):
        problems.append(f"{OFFLOAD_OPTIMIZER}.nvme_path is {path!r}; give a folder that every node has on its own disk")
    if _is_number(count) and count < _NVME_BUFFERS:
        problems.append(
            f"{OFFLOAD_OPTIMIZER}.buffer_count is {count}; allowed: at least {_NVME_BUFFERS}, for weights, gradients "
            "and two moments of a sub-group"
        )
    if async_save:
        problems.append(
            f"{OFFLOAD_OPTIMIZER}.device is nvme, but async_save would copy all of the optimizer's state to the host's "
            "memory; set async_save: false, or device to cpu"
        )
    return [_problem("nvme", text) for text in problems]


def _check_hpz(data: dict[str, Any]) -> list[Problem]:
    zero = data.get(ZERO, {})
    size = zero.get("zero_hpz_partition_size", AUTO) if isinstance(zero, dict) else AUTO
    if size != AUTO and (type(size) is not int or size < 0):
        return [_problem("hpz", f"{HPZ} is {size!r}; allowed: the number of GPUs of a node, 1 for none, or auto")]
    if size not in (AUTO, 0, 1) and zero.get("stage", 0) != 3:
        return [_problem("hpz", f"{HPZ} needs stage 3, but stage is {zero.get('stage', 0)}; change one")]
    return []


def _check_scales(data: dict[str, Any]) -> list[Problem]:
    """Whether the loss scale begins above its lowest value."""
    rule = ScaleRule.of(data)
    if rule.first >= rule.lowest:
        return []
    text = (
        f"{FP16}.min_loss_scale is {rule.lowest:g}, but the scale begins at {rule.first:g}; lower it, or raise "
        f"{FP16}.initial_scale_power"
    )
    return [_problem("value", text)]


def _check_owned(key: str, value: Any, loaded: LoadResult) -> Problem | None:
    option, wanted = OWNED[key]
    if option in loaded.faulty or loaded.config is None:
        return None
    expected = wanted(loaded.config)
    if expected is not None and value == expected and isinstance(value, bool) == isinstance(expected, bool):
        return None
    ours = getattr(loaded.config, option)
    return _problem(
        "clash",
        f"{key} is {value!r}, but {option} in the run config decides this, and it is "
        f"{'empty' if ours is None else ours} ({loaded.where(option)}); "
        'write "auto" in the JSON or delete the key there',
    )


def _check_passed(key: str, value: Any) -> Problem | None:
    if key in FLAGS and not isinstance(value, bool):
        return _problem("value", f"{key} is {value!r}; allowed: true, false or auto")
    if key in SIZES and not (_is_number(value) and value >= 0):
        return _problem("value", f"{key} is {value!r}; allowed: a number, at least 0, or auto")
    if key in COUNTS and not (_is_number(value) and value >= 1 and value == int(value)):
        return _problem("value", f"{key} is {value!r}; allowed: a whole number, at least 1, or auto")
    if key in LOSS_SCALES:
        kind, highest = LOSS_SCALES[key]
        if not (_is_number(value) and 0 <= value <= highest and kind(value) == value):
            what = "a whole number" if kind is int else "a number"
            return _problem("value", f"{key} is {value!r}; allowed: {what} from 0 to {highest:g}, or auto")
    if key in SETTINGS and not isinstance(value, dict):
        return _problem("value", f"{key} is {value!r}; it must be an object {{...}}")
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _unknown(key: str) -> str:
    block, _, name = key.rpartition(".")
    prefix = f"{block}." if block else ""
    keys = (*PASSED, *OWNED, *FIXED, *REFUSED, *IGNORED, *BLOCKS)
    known = [k.removeprefix(prefix) for k in keys if k.startswith(prefix)]
    hint = did_you_mean(name, [k for k in known if "." not in k])
    return f"unknown key {key}; {hint + ' ' if hint else ''}DeepSpeed would ignore it: correct or delete it"
