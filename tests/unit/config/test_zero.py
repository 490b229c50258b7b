"""The values of the DeepSpeed JSON, and the configs that the engines get."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest

from dsdpo.config.deepspeed_keys import ZERO
from dsdpo.config.precision import Precision
from dsdpo.config.schema import RunConfig
from dsdpo.config.zero import ZeroConfig, engine_config, reference_engine_config
from dsdpo.errors import ConfigError
from tests.helpers.zero import DS_CONFIGS, HF_ZERO3, NVME


def config_of(path: Path | None, **options: Any) -> RunConfig:
    named = {"deepspeed": str(path)} if path else {}
    return RunConfig(model_name_or_path="m", dataset=["d"], output_dir="o", **named, **options)


def named(tmp_path: Path, data: object, **options: Any) -> RunConfig:
    """A run whose DeepSpeed JSON is `data`."""
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(data))
    return config_of(path, **options)


OFF, CPU = {"device": "none"}, {"device": "cpu"}


@pytest.mark.parametrize(
    ("data", "optimizer", "param", "hpz_size"),
    [
        ({}, "none", "none", 1),
        (HF_ZERO3, "none", "none", 1),
        ({ZERO: {"stage": 1, "offload_optimizer": {"device": "auto"}}}, "none", "none", 1),
        ({ZERO: {"stage": 3, "offload_optimizer": CPU, "offload_param": OFF}}, "cpu", "none", 1),
        ({ZERO: {"stage": 3, "offload_optimizer": NVME, "offload_param": CPU}}, "nvme", "cpu", 1),
        ({ZERO: {"stage": 3, "zero_hpz_partition_size": 8}}, "none", "none", 8),
        ({ZERO: {"stage": 3, "zero_hpz_partition_size": 0}}, "none", "none", 1),
        ({ZERO: {"stage": 3, "zero_hpz_partition_size": "auto"}}, "none", "none", 1),
    ],
)
def test_values(tmp_path: Path, data: dict[str, Any], optimizer: str, param: str, hpz_size: int) -> None:
    zero = ZeroConfig.load(named(tmp_path, data))
    assert (zero.offload_optimizer, zero.offload_param, zero.hpz_size) == (optimizer, param, hpz_size)
    assert zero.stage == data.get(ZERO, {}).get("stage", 0)
    assert (zero.nvme_path is not None) == (optimizer == "nvme")
    assert (zero.raw, zero.path) == (data, str(tmp_path / "ds.json"))


def test_a_run_without_a_json() -> None:
    config = config_of(None)
    zero = ZeroConfig.load(config)
    assert zero == ZeroConfig(0, "none", "none", None, 1, {}, None)
    assert engine_config(config, zero, 2, "fp32")[ZERO] == {"stage": 0}
    assert [zero.effective_stage(precision) for precision in get_args(Precision)] == [0, 1, 1]


@pytest.mark.parametrize("path", sorted(DS_CONFIGS.iterdir()), ids=lambda path: path.stem)
def test_our_own_files_have_the_stage_of_their_name(path: Path) -> None:
    assert ZeroConfig.load(config_of(path)).stage == int(path.stem[4])


@pytest.mark.parametrize(
    ("zero", "expected"),
    [
        ({"stage": 2, "reduce_bucket_size": 5}, {"stage": 3}),
        ({"stage": 3, "offload_optimizer": CPU, "offload_param": CPU}, {"stage": 3, "offload_param": CPU}),
    ],
)
def test_a_frozen_reference_is_of_stage_3(tmp_path: Path, zero: dict[str, Any], expected: dict[str, Any]) -> None:
    config = named(tmp_path, {ZERO: zero})
    values = ZeroConfig.load(config)
    assert reference_engine_config(config, values, 2, "fp32")[ZERO] == expected
    assert values.raw == {ZERO: zero}


def test_each_run_has_its_own_folder_on_nvme(tmp_path: Path) -> None:
    """DeepSpeed's names in it are the same in every run."""
    config = named(tmp_path, {ZERO: {"stage": 3, "offload_optimizer": NVME}})
    zero, other = ZeroConfig.load(config), ZeroConfig.load(config.model_copy(update={"output_dir": "other"}))
    assert zero.nvme_path is not None and other.nvme_path is not None and zero.nvme_path != other.nvme_path
    assert zero.nvme_path.parent == other.nvme_path.parent == Path(NVME["nvme_path"])
    assert engine_config(config, zero, 1, "bf16")[ZERO]["offload_optimizer"]["nvme_path"] == str(zero.nvme_path)
    assert zero.raw[ZERO]["offload_optimizer"] == NVME


@pytest.mark.parametrize(
    ("size", "world_size", "said"),
    [(1, 5, ""), (4, 8, ""), (8, 8, ""), (8, 4, "4 ranks train"), (8, 12, "allowed for 12: 1, 2, 3, 4, 6, 12")],
)
def test_hpz_fits_the_number_of_ranks(tmp_path: Path, size: int, world_size: int, said: str) -> None:
    zero = ZeroConfig.load(named(tmp_path, {ZERO: {"stage": 3, "zero_hpz_partition_size": size}}))
    found = zero.rank_problems(world_size)
    assert [problem.code for problem in found] == (["deepspeed-ranks"] if said else [])
    assert all(f"partition_size is {size}, but " in str(problem) and said in str(problem) for problem in found)


def test_one_of_ours_is_changed_in_a_copy() -> None:
    for path, is_ours in ((Path("zero3_hpz"), True), (DS_CONFIGS / "zero3_hpz.json", False)):
        [problem] = ZeroConfig.load(config_of(path)).rank_problems(3)
        assert ("dsdpo files --to" in problem.text) == is_ours


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no file"):
        ZeroConfig.load(config_of(tmp_path / "no.json"))


@pytest.mark.parametrize(
    ("stage", "precision", "effective"),
    [(0, "fp32", 0), (0, "bf16", 1), (0, "fp16", 1), (1, "bf16", 1), (3, "bf16", 3), (3, "fp16", 3)],
)
def test_stage_0_in_16_bit_runs_as_stage_1(tmp_path: Path, stage: int, precision: Precision, effective: int) -> None:
    config = named(tmp_path, {ZERO: {"stage": stage}})
    zero = ZeroConfig.load(config)
    assert (zero.stage, zero.effective_stage(precision)) == (stage, effective)
    assert engine_config(config, zero, 2, precision)[ZERO]["stage"] == effective


@pytest.mark.parametrize("precision", get_args(Precision))
def test_the_engine_gets_a_complete_config(tmp_path: Path, precision: Precision) -> None:
    config = named(tmp_path, HF_ZERO3, max_grad_norm=0.3)
    final = engine_config(config, ZeroConfig.load(config), 4, precision)
    assert "auto" not in json.dumps(final)
    assert (final["train_batch_size"], final["train_micro_batch_size_per_gpu"]) == (4, 1)
    assert final["gradient_accumulation_steps"] == 1
    assert final["gradient_clipping"] == 0.3
    assert final["bf16"] == {"enabled": precision == "bf16"}
    assert final.get("fp16") == ({"enabled": True, "loss_scale": 2.0**16} if precision == "fp16" else None)
    assert final["data_types"]["grad_accum_dtype"] == "fp32"
    assert final.get("communication_data_type") == ("fp32" if precision != "fp32" else None)
    assert final["steps_per_print"] == 2000
    assert not {"optimizer", "scheduler"} & set(final)
    assert final[ZERO] == {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "stage3_max_live_parameters": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    }


@pytest.mark.parametrize("path", sorted(DS_CONFIGS.iterdir()), ids=lambda path: path.stem)
@pytest.mark.parametrize("precision", get_args(Precision))
def test_deepspeed_itself_accepts_the_engine_config(path: Path, precision: Precision) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    config = config_of(path)
    parsed = DeepSpeedConfig(engine_config(config, ZeroConfig.load(config), 1, precision))
    assert parsed.zero_optimization_stage == int(path.stem[4])
    assert parsed.bfloat16_config.enabled is (precision == "bf16")
    assert parsed.float16_config.enabled is (precision == "fp16")
    assert parsed.gradient_clipping == 1.0
