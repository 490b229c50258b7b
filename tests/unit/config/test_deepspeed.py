"""The DeepSpeed JSON: known keys, and clashes that name both places."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest

from dsdpo.config.deepspeed import check_deepspeed
from dsdpo.config.deepspeed_file import read_settings
from dsdpo.config.deepspeed_keys import BLOCKS, FIXED, IGNORED, OWNED, PASSED, REFUSED, ZERO
from dsdpo.config.load import load
from dsdpo.config.schema import RunConfig
from dsdpo.errors import ConfigError
from dsdpo.runtime.shipped import ds_configs
from tests.helpers.zero import DS_CONFIGS, HF_ZERO3, NVME

KNOWN = {*PASSED, *OWNED, *FIXED, *REFUSED, *IGNORED, *BLOCKS}


def problems(tmp_path: Path, data: object, **options: Any) -> list[str]:
    ds = tmp_path / "ds.json"
    ds.write_text(data if isinstance(data, str) else json.dumps(data))
    run = tmp_path / "run.yaml"
    given = {"model_name_or_path": "m", "dataset": "d", "output_dir": "o", "deepspeed": str(ds)} | options
    run.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in given.items()))
    loaded = load(run)
    assert not loaded.problems
    zero, found = check_deepspeed(loaded)
    assert (zero is None) == bool(found)
    return [str(problem) for problem in found]


def test_our_own_files_have_names_wherever_a_run_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zero3").mkdir()  # a folder is no DeepSpeed JSON
    assert {"zero1", "zero2", "zero3", "zero3_hpz", "zero3_nvme", "zero3_offload"} <= set(ds_configs())
    for name, path in ds_configs().items():
        assert read_settings(name) == json.loads(path.read_text())
        assert name in (RunConfig.model_fields["deepspeed"].description or "")


@pytest.mark.parametrize("name", ["zero4", "stage3", "auto"])
def test_another_name_is_refused_with_those_that_there_are(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_settings(name)
    [problem] = caught.value.problems
    assert problem.code == "deepspeed-name" and all(known in problem.text for known in ds_configs())


def test_a_recorded_path_is_read_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ds_configs").mkdir()
    recorded = '{"zero_optimization": {"stage": 1}}'
    for path in ("ds_configs/zero3.json", "zero2"):
        (tmp_path / path).write_text(recorded)
        assert read_settings(path) == json.loads(recorded)


@pytest.mark.parametrize("path", sorted(DS_CONFIGS.iterdir()), ids=lambda path: path.stem)
def test_our_own_files_hold_engine_keys_only(tmp_path: Path, path: Path) -> None:
    assert set(read_settings(str(path))) <= {ZERO, "aio"}
    assert problems(tmp_path, path.read_text()) == []


def test_a_trainer_users_file_with_auto_passes(tmp_path: Path) -> None:
    assert problems(tmp_path, HF_ZERO3, lr_scheduler_type="linear") == []


@pytest.mark.parametrize(
    ("data", "options"),
    [
        ({"gradient_clipping": 0.5}, {"max_grad_norm": 0.5}),
        ({"train_batch_size": 32}, {}),
        ({"bf16": {"enabled": True}}, {"precision": "bf16"}),
        ({"bf16": {"enabled": False}}, {"precision": "fp32"}),
        ({"bf16": {"enabled": False}, "fp16": {"enabled": True}}, {"precision": "fp16"}),
        ({"fp16": {"enabled": False}}, {"precision": "bf16"}),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "betas": [0.9, 0.999]}}}, {}),
        ({"scheduler": {"type": "WarmupCosineLR"}}, {}),
        ({"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}, {}),
    ],
)
def test_an_equal_value_is_no_clash(tmp_path: Path, data: dict[str, Any], options: dict[str, Any]) -> None:
    assert problems(tmp_path, data, **options) == []


@pytest.mark.parametrize(
    ("data", "options", "said"),
    [
        (
            {"gradient_clipping": 0.5},
            {"max_grad_norm": 1.0},
            ["gradient_clipping is 0.5", "max_grad_norm", "1.0"],
        ),
        ({"train_batch_size": 64}, {}, ["train_batch_size is 64", "it is 32 (default)"]),
        ({"train_micro_batch_size_per_gpu": 1}, {}, ["train_micro_batch_size_per_gpu", "max_tokens_per_row"]),
        ({"gradient_accumulation_steps": 1}, {}, ["gradient_accumulation_steps", "max_tokens_per_row"]),
        ({"bf16": {"enabled": True}}, {"precision": "fp32"}, ["bf16.enabled is True", "precision", "fp32"]),
        ({"bf16": {"enabled": True}}, {}, ["bf16.enabled", "it is auto"]),
        ({"fp16": {"enabled": True}}, {}, ["fp16.enabled", "it is auto"]),
        ({"fp16": {"enabled": True}}, {"precision": "bf16"}, ["fp16.enabled is True", "precision", "bf16"]),
        ({"fp16": {"enabled": False}}, {"precision": "fp16"}, ["fp16.enabled is False", "precision", "fp16"]),
        ({"bf16": {"enabled": True}}, {"precision": "fp16"}, ["bf16.enabled is True", "precision", "fp16"]),
        ({"optimizer": {"params": {"lr": 1e-6}}}, {}, ["optimizer.params.lr", "learning_rate", "1e-05"]),
        ({"optimizer": {"type": "Lamb"}}, {}, ["optimizer.type is 'Lamb'", "AdamW"]),
        ({"scheduler": {"type": "WarmupLR"}}, {}, ["scheduler.type", "lr_scheduler_type"]),
        ({"communication_data_type": "bf16"}, {}, ["communication_data_type", "fp32"]),
    ],
)
def test_a_clash_names_both_places(
    tmp_path: Path, data: dict[str, Any], options: dict[str, Any], said: list[str]
) -> None:
    found = problems(tmp_path, data, **options)
    assert len(found) == 1, found
    assert str(tmp_path / "ds.json") in found[0]
    assert all(part in found[0] for part in said), found[0]
    if options and "auto" not in found[0].split(";")[0]:
        assert "run.yaml:5" in found[0]


@pytest.mark.parametrize(
    "data",
    [
        {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
        {ZERO: {"stage": 3, "offload_param": {"device": "cpu", "nvme_path": "x"}}},
        {ZERO: {"stage": 2, "cpu_offload": True}},
        {ZERO: {"stage": 3, "zero_quantized_weights": True}},
        {ZERO: {"stage": 3, "offload_optimizer": {**NVME, "pipeline_read": True}}},
        {"pipeline": {"stages": 2}},
        {"sparse_attention": {"mode": "fixed"}},
        {"activation_checkpointing": {"partition_activations": True}},
        {"tensorboard": {"enabled": True}},
        {"compile": {"deepcompile": True}},
    ],
)
def test_what_is_not_supported_is_said_clearly(tmp_path: Path, data: dict[str, Any]) -> None:
    found = problems(tmp_path, data)
    assert len(found) == 1, found
    assert " is set; " in found[0]


@pytest.mark.parametrize(
    "data",
    [
        {"fp16": {"enabled": False}},
        {ZERO: {"stage": 3, "zero_hpz_partition_size": 1, "zero_quantized_weights": False}},
        {"activation_checkpointing": {"partition_activations": False, "number_checkpoints": None}},
        {"tensorboard": {"enabled": False, "output_path": "x"}},
    ],
)
def test_a_feature_that_is_switched_off_passes(tmp_path: Path, data: dict[str, Any]) -> None:
    assert problems(tmp_path, data) == []


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"zero_optimisation": {"stage": 3}}, "did you mean zero_optimization?"),
        ({ZERO: {"stage": 3, "overlap_com": True}}, "did you mean overlap_comm?"),
        ({ZERO: {"stage": 3, "stage3_prefetch_bucket": 1}}, "did you mean stage3_prefetch_bucket_size?"),
        ({"optimizer": {"params": {"learning_rate": 1}}}, "unknown key optimizer.params.learning_rate"),
        ({"qqqq": 1}, "delete it"),
        ({ZERO: {"stage": 4}}, "allowed: 0, 1, 2, 3"),
        ({ZERO: {"stage": "auto"}}, "allowed: 0, 1, 2, 3"),
        ({ZERO: {"stage": True}}, "allowed: 0, 1, 2, 3"),
        ({ZERO: True}, "it must be an object"),
        ({ZERO: {"stage": 3, "overlap_comm": "yes"}}, "allowed: true, false or auto"),
        ({ZERO: {"stage": 3, "reduce_bucket_size": "5e8"}}, "allowed: a number, at least 0"),
        ('{"zero_optimization": {"stage": 1, "stage": 2}}', "stage is given twice"),
        ('{"zero_optimization": {"stage": 1}', "no valid JSON"),
        ("[1]", "is a list"),
        ("null", "is null"),
        ("", "it is empty"),
        ('// ours\n{"zero_optimization": {"stage": 1}}', "JSON has no comments"),
        ('{"zero_optimization": /* all */ {"stage": 1}}', "JSON has no comments"),
        ('{"zero_optimization": {"stage": 1},}', "delete the comma"),
        ("{'zero_optimization': {'stage': 1}}", "double quotes"),
        ('{"zero_optimization": {"stage": 1, "overlap_comm": True}}', "true, false or null"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ('{"zero_optimization": {"reduce_bucket_size": 1e400}}', "reduce_bucket_size is inf"),
        ({"steps_per_print": "often"}, "allowed: a whole number, at least 1"),
        ({"wall_clock_breakdown": "no"}, "allowed: true, false or auto"),
        ({"flops_profiler": True}, "it must be an object"),
    ],
)
def test_a_faulty_file_is_told(tmp_path: Path, data: object, said: str) -> None:
    found = problems(tmp_path, data)
    assert len(found) == 1, found
    assert said in found[0]


@pytest.mark.parametrize(
    ("text", "codes"),
    [
        ('{"zero_optimization": {"stage": 3}}', []),
        ('{"steps_per_print": 1, "steps_per_print": 2}', ["deepspeed-duplicate"]),
        ('{"zero_optimization": {"stage": 2, "stage": 3}}', ["deepspeed-duplicate"]),
        ('{"zero_optimization": {"stage": 3}', ["deepspeed-file"]),
        ('{"zero_optimization": {"stage": 3} // all\n}', ["deepspeed-file"]),
        ('{"distributed_type": "FSDP"}', ["accelerate-config"]),
        ('{"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 3}}', []),
        ("[1]", ["deepspeed-file"]),
    ],
)
@pytest.mark.parametrize("typed", [True, False])
def test_json_text_is_no_name_of_a_file(tmp_path: Path, text: str, codes: list[str], typed: bool) -> None:
    """On the command line, and in quotes in the file."""
    path = tmp_path / "run.yaml"
    path.write_text("model_name_or_path: m\ndataset: d\noutput_dir: o\n" + ("" if typed else f"deepspeed: {text!r}\n"))
    loaded = load(path, ["--deepspeed", text] if typed else [])
    zero, found = check_deepspeed(loaded)
    assert [problem.code for problem in [*loaded.problems, *found]] == codes
    assert not any("no file" in str(problem) for problem in found) and (zero is None or zero.stage == 3)


@pytest.mark.parametrize(
    ("zero", "said"),
    [
        (
            {
                "stage": 3,
                "offload_optimizer": {"device": "cpu", "pin_memory": True},
                "offload_param": {"device": "cpu"},
            },
            "",
        ),
        ({"stage": 1, "offload_optimizer": {"device": "cpu", "ratio": 1.0}}, ""),
        ({"stage": 3, "offload_optimizer": None, "offload_param": None}, ""),
        ({"stage": 2, "offload_optimizer": {"device": "disk"}}, "device is 'disk'; allowed: none, cpu, nvme"),
        ({"stage": 0, "offload_optimizer": {"device": "cpu"}}, "needs stage 1 or higher, but stage is 0"),
        ({"stage": 2, "offload_param": {"device": "cpu"}}, "needs stage 3 or higher, but stage is 2"),
        ({"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.3}}, "ratio is 0.3"),
        ({"stage": 3, "offload_optimizer": {"device": "cpu", "pin_mem": True}}, "unknown key"),
        ({"stage": 3, "offload_optimizer": "cpu"}, "must be an object"),
        ({"stage": 3, "offload_optimizer": {**NVME, "buffer_count": 5}, "offload_param": {"device": "cpu"}}, ""),
        ({"stage": 2, "offload_optimizer": NVME}, "to nvme needs stage 3 or higher, but stage is 2"),
        ({"stage": 3, "offload_optimizer": {"device": "nvme"}}, "nvme_path is None; give a folder"),
        ({"stage": 3, "offload_optimizer": {**NVME, "buffer_count": 3}}, "buffer_count is 3; allowed: at least 4"),
        ({"stage": 3, "offload_optimizer": {**NVME, "device": "cpu"}}, "nvme_path is for device nvme"),
        ({"stage": 3, "offload_param": {"device": "nvme"}}, "reads the same one ahead twice, and stops; set cpu"),
        ({"stage": 3, "zero_hpz_partition_size": 8}, ""),
        ({"stage": 2, "zero_hpz_partition_size": 8}, "zero_hpz_partition_size needs stage 3, but stage is 2"),
        ({"stage": 3, "zero_hpz_partition_size": "8"}, "zero_hpz_partition_size is '8'"),
    ],
)
def test_offloading(tmp_path: Path, zero: dict[str, Any], said: str) -> None:
    found = problems(tmp_path, {ZERO: zero})
    assert len(found) == bool(said), found
    assert not said or said in found[0]


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ({"loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 1000, "hysteresis": 2}, ""),
        ({"loss_scale": 0.5, "min_loss_scale": 8, "consecutive_hysteresis": True}, ""),
        ({"loss_scale": "auto", "min_loss_scale": "auto", "auto_cast": False}, ""),
        ({"initial_scale_power": 2, "min_loss_scale": 4}, ""),
        ({"loss_scale": -1}, "loss_scale is -1; allowed: a number from 0"),
        ({"loss_scale": True}, "loss_scale is True"),
        ({"initial_scale_power": 2.5}, "initial_scale_power is 2.5; allowed: a whole number from 0 to 127"),
        ({"initial_scale_power": 128}, "initial_scale_power is 128"),
        ({"loss_scale_window": 0}, "loss_scale_window is 0; allowed: a whole number, at least 1"),
        ({"min_loss_scale": 0.5}, "min_loss_scale is 0.5"),
        ({"hysteresis": "2"}, "hysteresis is '2'"),
        ({"initial_scale_power": 2, "min_loss_scale": 8}, "min_loss_scale is 8, but the scale begins at 4"),
        ({"auto_cast": True}, "auto_cast is True"),
        ({"fp16_master_weights_and_grads": True}, "fp16_master_weights_and_grads is True"),
        ({"scale_window": 100}, "did you mean loss_scale_window?"),
    ],
)
def test_the_loss_scale(tmp_path: Path, block: dict[str, Any], said: str) -> None:
    found = problems(tmp_path, {"fp16": block}, precision="fp16")
    assert len(found) == bool(said), found
    assert not said or said in found[0]


def test_fp16_keys_are_those_of_the_installed_deepspeed() -> None:
    from deepspeed.runtime.precision_config import DeepSpeedFP16Config

    ours = {key.removeprefix("fp16.") for key in KNOWN if key.startswith("fp16.")}
    assert ours == set(DeepSpeedFP16Config.model_fields)


def test_nvme_and_async_save_clash(tmp_path: Path) -> None:
    data = {ZERO: {"stage": 3, "offload_optimizer": NVME}}
    assert problems(tmp_path, data) == []
    found = problems(tmp_path, data, async_save=True)
    assert len(found) == 1 and "set async_save: false" in found[0]


def test_all_problems_come_together(tmp_path: Path) -> None:
    data = {
        "train_batch_size": 1,
        "fp16": {"enabled": True},
        "x_y_z": 1,
        ZERO: {"stage": 9, "offload_param": {"device": "nvme"}},
    }
    assert len(problems(tmp_path, data)) == 5


def test_zero_keys_are_those_of_the_installed_deepspeed() -> None:
    from deepspeed.runtime.config import _REMOVED_ZERO_CONFIG_KEYS
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    fields = {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    blocks = {
        "offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
        "offload_param": DeepSpeedZeroOffloadParamConfig,
    }
    nested = {f"{block}.{name}" for block, config in blocks.items() for name in config.model_fields}
    ours = {key.removeprefix(f"{ZERO}.") for key in KNOWN if key.startswith(f"{ZERO}.")}
    assert ours == fields | nested | set(_REMOVED_ZERO_CONFIG_KEYS)


def test_top_level_keys_cover_those_of_the_installed_deepspeed() -> None:
    from deepspeed.runtime import config

    read = re.findall(r'param_dict(?:\.get\(|\[|,\s+)"?(\w+)', inspect.getsource(config))
    theirs = {getattr(config, name, name) for name in read if name not in ("comm_type", "sort_keys")}
    assert len(theirs) > 25
    assert theirs | set(config._REMOVED_TOP_LEVEL_CONFIG_KEYS) <= KNOWN
