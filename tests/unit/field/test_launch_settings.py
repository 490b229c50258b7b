"""Settings that were lost, or found wrong only after ranks had started: each ends before a launcher, with its code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dsdpo.config.schema import RunConfig
from dsdpo.config.zero import ZeroConfig
from dsdpo.errors import ConfigError
from dsdpo.launch.preflight import preflight
from dsdpo.launch.task import small_set_remark
from tests.helpers.fake_model import save_fake_model

FSDP = "distributed_type: FSDP\nfsdp_config:\n  fsdp_sharding_strategy: FULL_SHARD\nmixed_precision: bf16\n"
TWO = "compute_environment: LOCAL_MACHINE\ndeepspeed_config:\n  zero_stage: 2\nmixed_precision: 'no'\n"
NAMES_A_FILE = "deepspeed_config:\n  deepspeed_config_file: ds_configs/mine.json\ndistributed_type: DEEPSPEED\n"
PLAIN = "zero_optimization:\n  stage: 3\n"
ACCELERATE, NO_TARGET = [("accelerate-config", "deepspeed")], [("lora-target-unknown", "lora_target")]
ACCUMULATION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
BATCH = [("accelerate-launch", "train_batch_size")]
UNKNOWN = [("deepspeed-unknown-key", "deepspeed")]
OTHER_STAGE = [("accelerate-launch", "deepspeed")]
STAGE3 = '{"zero_optimization": {"stage": 3}}'

# files of the folder, variables of the environment, arguments of the command line, codes and options
TABLE: dict[str, tuple[dict[str, str], dict[str, str], list[str], list[tuple[str, str]]]] = {
    "an FSDP config": ({"a.yaml": FSDP}, {}, ["--deepspeed", "a.yaml"], ACCELERATE),
    "a stage 2 config": ({"a.yml": TWO}, {}, ["--deepspeed", "a.yml"], []),
    "one that names a JSON": ({"a": NAMES_A_FILE}, {}, ["--deepspeed", "a"], ACCELERATE),
    "one as JSON": ({"a.json": '{"distributed_type": "NO"}'}, {}, ["--deepspeed", "a.json"], ACCELERATE),
    "DeepSpeed's keys as YAML": ({"z.yaml": PLAIN}, {}, ["--deepspeed", "z.yaml"], [("deepspeed-file", "deepspeed")]),
    "a name": ({}, {}, ["--deepspeed", "zero2"], []),
    "no such name": ({}, {}, ["--deepspeed", "zero4"], [("deepspeed-name", "deepspeed")]),
    "a file of that name": ({"zero2": '{"zero": 1}'}, {}, ["--deepspeed", "zero2"], UNKNOWN),
    "no such JSON": ({}, {}, ["--deepspeed", "z.json"], [("deepspeed-file", "deepspeed")]),
    "half a mapping": ({}, {}, ["--deepspeed", '{"zero_optimization": '], [("deepspeed-file", "deepspeed")]),
    "a typo in a mapping": ({}, {}, ["--deepspeed", '{"zero": {}}'], [("deepspeed-unknown-key", "deepspeed")]),
    "fp16": ({}, {}, ["--deepspeed", '{"fp16": {"enabled": true}}'], [("deepspeed-clash", "deepspeed")]),
    "no offload": ({}, {}, ["--deepspeed", '{"zero_optimization": {"stage": 3, "offload_optimizer": null}}'], []),
    "offload auto": ({}, {}, ["--deepspeed", '{"zero_optimization": {"stage": 3, "offload_param": "auto"}}'], []),
    "a mapping": ({}, {}, ["--deepspeed", STAGE3], []),
    "stage 2 by the launcher": ({}, {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, [], []),
    "another stage": ({}, {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, ["--deepspeed", STAGE3], OTHER_STAGE),
    "the same stage": ({}, {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, ["--deepspeed", STAGE3], []),
    "fp16 by the launcher": ({}, {"ACCELERATE_MIXED_PRECISION": "fp16"}, [], []),
    "no precision by the launcher": ({}, {"ACCELERATE_MIXED_PRECISION": "no"}, [], []),
    "FSDP by the launcher": ({}, {"ACCELERATE_USE_FSDP": "true"}, [], [("accelerate-launch", "deepspeed")]),
    "accumulation by the launcher": ({}, {ACCUMULATION: "4"}, [], BATCH),
    "PEFT's word for all": ({}, {}, ["--lora_target", "all-linear"], []),
    "all-linear and more": ({}, {}, ["--lora_target", "all-linear,q_proj"], [("lora-target", "lora_target")]),
    "GPT-NeoX's name": ({}, {}, ["--lora_target", "query_key_value"], NO_TARGET),
    "one of two": ({}, {}, ["--lora_target", "v_proj,out_proj"], NO_TARGET),
    "a block": ({}, {}, ["--lora_target", "self_attn"], NO_TARGET),
    "a pattern": ({}, {}, ["--lora_target", ".*q_proj"], NO_TARGET),
}  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    save_fake_model(tmp_path / "model")
    (tmp_path / "six.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    (tmp_path / "run.yaml").write_text(
        "model_name_or_path: model\ndataset: six.jsonl\ndataset_dir: .\noutput_dir: out\n"
    )
    return tmp_path


@pytest.mark.parametrize("name", TABLE)
def test_it_is_told_before_a_launch(place: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    files, environment, arguments, expected = TABLE[name]
    for file, text in files.items():
        (place / file).write_text(text)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    try:
        preflight("run.yaml", arguments)
        found = []
    except ConfigError as error:
        found = [(problem.code, problem.option) for problem in error.problems]
    assert found == expected


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_mapping_is_what_its_file_would_be(place: Path, stage: int) -> None:
    """In the YAML and on the command line; what is written down of the run gives the same again."""
    settings: dict[str, Any] = {"zero_optimization": {"stage": stage, "reduce_bucket_size": 5e8}}
    (place / "zero.json").write_text(json.dumps(settings))
    text = (place / "run.yaml").read_text()
    from_file = preflight("run.yaml", ["--deepspeed", "zero.json"])[1]
    typed = preflight("run.yaml", ["--deepspeed", json.dumps(settings)])
    (place / "run.yaml").write_text(
        f"{text}deepspeed:\n  zero_optimization: {{stage: {stage}, reduce_bucket_size: 5e8}}\n"
    )
    config, written = preflight("run.yaml", [])
    assert from_file.raw == typed[1].raw == written.raw == settings
    assert from_file.stage == typed[1].stage == written.stage == stage
    again = RunConfig.model_validate(json.loads(json.dumps(config.model_dump(mode="json"))))
    assert ZeroConfig.load(again).raw == settings


@pytest.mark.parametrize(("examples", "batch_size", "remarks"), [(6, 32, True), (31, 32, True), (32, 32, False)])
def test_fewer_examples_than_a_step_are_a_remark(examples: int, batch_size: int, remarks: bool) -> None:
    assert bool(small_set_remark(examples, batch_size)) == remarks
