"""What accelerate would do, and this run would not, is told with both values."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dsdpo.config.accelerate import foreign_settings, launch_problems, name_of_stage
from dsdpo.config.schema import RunConfig
from dsdpo.runtime.shipped import ds_configs

LAUNCH = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_DEEPSPEED": "true", "PATH": "/bin"}


def codes(environment: dict[str, str], cuda: bool = False, zero: dict[str, Any] | None = None, **options: Any) -> Any:
    """Options that the problems are about."""
    options = {"deepspeed": {"zero_optimization": zero} if zero else None} | options
    config = RunConfig(model_name_or_path="m", dataset=["d"], output_dir="o", **options)
    settings = config.deepspeed if isinstance(config.deepspeed, dict) else {}
    found = launch_problems(config, settings, LAUNCH | environment, cuda)
    assert all(problem.code == "accelerate-launch" for problem in found)
    return [problem.option for problem in found]


@pytest.mark.parametrize(
    ("environment", "cuda", "zero", "options", "found"),
    [
        ({}, False, None, {}, []),
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, False, None, {}, ["deepspeed"]),
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, False, {"stage": 2}, {}, ["deepspeed"]),
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, False, {"stage": 3}, {}, []),
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, False, None, {}, []),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, False, {"stage": 3}, {}, ["deepspeed"]),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none"}, False, {"stage": 3}, {}, []),
        ({"ACCELERATE_DEEPSPEED_CONFIG_FILE": "other.json"}, False, {"stage": 3}, {}, ["deepspeed"]),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, False, None, {}, ["precision"]),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, True, None, {}, []),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, False, None, {"precision": "bf16"}, []),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, True, None, {"precision": "fp32"}, ["precision"]),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, True, None, {"precision": "bf16"}, ["precision"]),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, True, None, {}, ["precision"]),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, True, None, {"precision": "fp16"}, []),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, True, None, {"precision": "fp16"}, ["precision"]),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, True, None, {}, ["precision"]),
        ({"ACCELERATE_USE_FSDP": "true"}, False, None, {}, ["deepspeed"]),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, False, None, {}, ["deepspeed"]),
        ({"PARALLELISM_CONFIG_TP_SIZE": "2"}, False, None, {}, ["deepspeed"]),
        ({"PARALLELISM_CONFIG_TP_SIZE": "1"}, False, None, {}, []),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "8"}, False, None, {}, ["train_batch_size"]),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}, False, None, {}, []),
        ({"ACCELERATE_GRADIENT_CLIPPING": "1.0"}, False, None, {}, []),
        ({"ACCELERATE_GRADIENT_CLIPPING": "0.5"}, False, None, {}, ["max_grad_norm"]),
    ],
)
def test_settings_of_a_launch_that_differ_are_told(
    environment: dict[str, str], cuda: bool, zero: dict[str, Any] | None, options: dict[str, Any], found: list[str]
) -> None:
    assert codes(environment, cuda, zero, **options) == found


def test_the_file_that_accelerate_names_may_be_the_runs_own(tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    environment = {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path), "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
    assert codes(environment, zero={"stage": 3}) == []
    assert codes(environment, zero={"stage": 2}) == ["deepspeed"]


def test_every_message_names_both_values() -> None:
    config = RunConfig(model_name_or_path="m", dataset=["d"], output_dir="o")
    (problem,) = launch_problems(config, {}, {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, False)
    assert "zero_stage is 3" in str(problem) and "stage is 0" in str(problem)
    assert "set deepspeed: zero3" in str(problem)


@pytest.mark.parametrize("offload", ["none", "cpu", "nvme"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_name_of_a_stage_is_one(stage: int, offload: str) -> None:
    assert name_of_stage(stage, offload) in ds_configs()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 3}}, "deepspeed: zero3"),
        ({"deepspeed_config": {"zero_stage": 2}, "mixed_precision": "bf16"}, "precision: bf16"),
        ({"deepspeed_config": {"zero_stage": 3, "offload_optimizer_device": "cpu"}}, "deepspeed: zero3_offload"),
        ({"deepspeed_config": {"deepspeed_config_file": "mine.json"}}, "mine.json"),
        ({"distributed_type": "FSDP", "num_processes": 4}, "--num_accelerators 4"),
        ({"distributed_type": "FSDP", "num_processes": 32, "num_machines": 4}, "--num_accelerators 8"),
        ({"distributed_type": "FSDP", "num_processes": 32, "num_machines": 4}, "the 4 nodes"),
        ({"fsdp_config": {"fsdp_sharding_strategy": "SHARD_GRAD_OP"}}, "deepspeed: zero2"),
        ({"fsdp_config": {"fsdp_sharding_strategy": 1}}, "deepspeed: zero3"),
        ({"fsdp_config": {"fsdp_sharding_strategy": "NO_SHARD"}}, "shards nothing"),
        ({"fsdp_config": {"fsdp_version": 2, "fsdp_reshard_after_forward": False}}, "deepspeed: zero2"),
        (
            {"fsdp_config": {"fsdp_reshard_after_forward": True, "fsdp_offload_params": True}},
            "deepspeed: zero3_offload",
        ),
        ({"deepspeed_config": {}, "fsdp_config": {}, "mixed_precision": "fp16"}, "set precision: fp16"),
        ({"deepspeed_config": {}, "fsdp_config": {}, "mixed_precision": "fp8"}, "fp8 is not supported"),
        ({"compute_environment": "LOCAL_MACHINE"}, "shards nothing"),
        ({"zero_optimization": {"stage": 3}}, ""),
        ([], ""),
    ],
)
def test_a_config_of_accelerate_is_recognized(data: Any, said: str) -> None:
    found = foreign_settings(data)
    assert said in found and bool(found) == bool(said)


@pytest.mark.start
def test_the_names_are_those_that_accelerate_sets(tmp_path: Path) -> None:
    """Its own launcher says in a child process what it was told."""
    config = tmp_path / "accelerate.yaml"
    config.write_text(
        "distributed_type: DEEPSPEED\nnum_processes: 1\nmachine_rank: 0\nmixed_precision: bf16\nuse_cpu: true\n"
        "deepspeed_config:\n  zero_stage: 3\n  gradient_accumulation_steps: 4\n  gradient_clipping: 0.5\n"
        "  offload_optimizer_device: cpu\n  zero3_init_flag: true\n"
    )
    script = tmp_path / "show.py"
    script.write_text(
        "import json, os\nprint('FOUND' + json.dumps({k: v for k, v in os.environ.items() if k.startswith('ACC')}))\n"
    )
    command = [sys.executable, "-c", "from accelerate.commands.accelerate_cli import main; main()", "launch"]
    command += ["--config_file", str(config), str(script)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONWARNINGS": "ignore"}
    )
    line = next((line for line in done.stdout.splitlines() if line.startswith("FOUND")), "")
    assert line, done.stderr[-2000:]
    found = codes(json.loads(line.removeprefix("FOUND")))
    assert sorted(found) == ["deepspeed", "deepspeed", "max_grad_norm", "precision", "train_batch_size"]
