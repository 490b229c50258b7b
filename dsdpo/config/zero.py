"""The values of the user's DeepSpeed JSON, and the configs for `deepspeed.initialize` that follow from them.

A process reads the JSON once, and hands a ZeroConfig on. `config/deepspeed.py` checks it.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from dsdpo.config.deepspeed_file import is_ours, named, read_settings
from dsdpo.config.deepspeed_keys import HPZ, IGNORED, OFFLOAD_OPTIMIZER, OFFLOAD_PARAM, OWNED, REFUSED, ZERO
from dsdpo.config.precision import FP16, Precision, ScaleRule
from dsdpo.config.schema import RunConfig
from dsdpo.errors import Problem

AUTO = "auto"
_REWRITTEN = ("optimizer", "scheduler", "bfloat16", FP16)  # blocks that the run config and `engine_config` replace


@dataclass(frozen=True)
class ZeroConfig:
    """What the DeepSpeed JSON of a run says; all at their defaults where the run names none.

    Attributes:
        stage: ZeRO stage that the user asks for, 0 to 3.
        offload_optimizer: where the optimizer's state lies between steps: `none` (the GPU), `cpu` or `nvme`.
        offload_param: the same for parameters: `none` or `cpu`.
        nvme_path: folder of this run alone below the user's `nvme_path`; None unless the optimizer's state lies on
            NVMe. DeepSpeed names the files in it by rank and parameter: two runs in one folder would overwrite each
            other.
        hpz_size: ranks that share a second copy of the parameters' shards (ZeRO++ hpZ); 1 without it.
        raw: the whole JSON. Not to be changed.
        path: file that it was read from, its name among ours, or words for the mapping in the run config; None without
            one.
    """

    stage: int
    offload_optimizer: str
    offload_param: str
    nvme_path: Path | None
    hpz_size: int
    raw: dict[str, Any]
    path: str | None

    @classmethod
    def load(cls, config: RunConfig) -> ZeroConfig:
        """Read the JSON that a run names. Raises ConfigError when it cannot be read."""
        return cls.of(config, read_settings(config.deepspeed) if config.deepspeed else {})

    @classmethod
    def of(cls, config: RunConfig, raw: dict[str, Any]) -> ZeroConfig:
        """The values of a JSON without problems."""
        zero, optimizer = raw.get(ZERO, {}), block_of(raw, OFFLOAD_OPTIMIZER)
        hpz_size = zero.get("zero_hpz_partition_size", 1)
        return cls(
            stage=zero.get("stage", 0),
            offload_optimizer=_device(optimizer),
            offload_param=_device(block_of(raw, OFFLOAD_PARAM)),
            nvme_path=_folder_of(config, optimizer) if _device(optimizer) == "nvme" else None,
            hpz_size=1 if hpz_size == AUTO else max(1, int(hpz_size)),
            raw=raw,
            path=named(config.deepspeed) if config.deepspeed else None,
        )

    def effective_stage(self, precision: Precision) -> int:
        """The stage that is run: stage 0 in 16 bit becomes 1, since only from there on are master weights fp32."""
        return self.stage or int(precision != "fp32")

    @property
    def scale_rule(self) -> ScaleRule:
        """For the loss scale of a run in fp16."""
        return ScaleRule.of(self.raw)

    def rank_problems(self, world_size: int) -> list[Problem]:
        """What the JSON asks of the number of ranks.

        DeepSpeed makes one smaller group of all ranks where they are too few, and fails an assertion where they do not
        divide.
        """
        if world_size % self.hpz_size == 0:
            return []
        fitting = [str(n) for n in range(1, world_size + 1) if world_size % n == 0]
        where = " in a copy of it (`dsdpo files --to DIR`)" if is_ours(str(self.path)) else ""
        text = (
            f"{self.path}: {HPZ} is {self.hpz_size}, but {world_size} ranks train, which do not form groups of "
            f"{self.hpz_size}; allowed for {world_size}: {', '.join(fitting)}. Set the number of GPUs of a node, or "
            f"delete the key{where}"
        )
        return [Problem("deepspeed-ranks", "deepspeed", text)]


def block_of(data: dict[str, Any], key: str) -> dict[str, Any]:
    """The block `zero_optimization.offload_…`; empty where there is none."""
    zero = data.get(ZERO, {})
    block = zero.get(key.rpartition(".")[2], {}) if isinstance(zero, dict) else {}
    return block if isinstance(block, dict) else {}


def is_off(value: Any) -> bool:
    """True for a feature block that its JSON switches off: false, none, an object that is not enabled."""
    if isinstance(value, dict):
        switch = next((value[key] for key in ("enabled", "device") if key in value), None)
        return is_off(switch) if switch is not None else all(is_off(item) for item in value.values())
    return value is None or value is False or value in (AUTO, "none", 0) or (value == 1 and value is not True)


def _device(block: dict[str, Any]) -> str:
    device = block.get("device", "none")
    return "none" if device == AUTO else str(device)


def _folder_of(config: RunConfig, offload: dict[str, Any]) -> Path:
    run = sha256(str(Path(config.output_dir).absolute()).encode()).hexdigest()[:12]
    return Path(offload["nvme_path"]) / f"dsdpo-{run}"


def engine_config(config: RunConfig, zero: ZeroConfig, dp_size: int, precision: Precision) -> dict[str, Any]:
    """The complete config for `deepspeed.initialize`. Batch sizes count micro-batches of one rank.

    The caller sets the accumulation boundary itself and passes its own optimizer; in 16 bit gradients accumulate and
    travel in fp32. In fp16 DeepSpeed gets a constant loss scale, which `engine/loss_scale.py` sets for each step.
    Assumes a config that passed `check_deepspeed`.

    Args:
        dp_size: number of data-parallel ranks: each has one row of a micro-step.
    """
    user = _without(zero.raw)
    if zero.nvme_path is not None:
        user[ZERO]["offload_optimizer"]["nvme_path"] = str(zero.nvme_path)
    return {
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": False,
        **user,
        "train_batch_size": dp_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.max_grad_norm,
        "bf16": {**user.get("bf16", {}), "enabled": precision == "bf16"},
        **({FP16: {"enabled": True, "loss_scale": zero.scale_rule.first}} if precision == FP16 else {}),
        "zero_optimization": {**user.get(ZERO, {}), "stage": zero.effective_stage(precision)},
        "data_types": {**user.get("data_types", {}), "grad_accum_dtype": "fp32"},
        **({"communication_data_type": "fp32"} if precision != "fp32" else {}),
    }


def reference_engine_config(config: RunConfig, zero: ZeroConfig, dp_size: int, precision: Precision) -> dict[str, Any]:
    """The same for a frozen model beside the policy: always stage 3, with the user's block if it is of stage 3."""
    settings = engine_config(config, zero, dp_size, precision)
    block = settings["zero_optimization"] if settings["zero_optimization"]["stage"] == 3 else {"stage": 3}
    settings["zero_optimization"] = {key: value for key, value in block.items() if key != "offload_optimizer"}
    return settings


def _without(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`data` less what is "auto", owned by the run config or switched off."""
    kept = {}
    for key, value in data.items():
        name = prefix + key
        if value == AUTO or any(name in keys for keys in (REFUSED, IGNORED, OWNED, _REWRITTEN)):
            continue
        if name in (OFFLOAD_OPTIMIZER, OFFLOAD_PARAM) and is_off(value):
            continue
        kept[key] = _without(value, f"{name}.") if isinstance(value, dict) else value
    return kept
