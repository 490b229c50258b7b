"""Each mistake that files can tell: its code, its exit code, all of them in one report, and no launcher is started."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save_file

from dsdpo.cli import main
from dsdpo.errors import ConfigError
from dsdpo.launch import supervisor
from dsdpo.launch.preflight import ClusterRequest, check_device, preflight
from dsdpo.launch.task import Task
from tests.helpers.fake_model import save_fake_model, tensors

ACCELERATE = (
    "compute_environment: LOCAL_MACHINE\nfsdp_config:\n  fsdp_sharding_strategy: FULL_SHARD\ndistributed_type: FSDP\n"
)
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
SHARDS = ("model-1-of-2.safetensors", "model-2-of-2.safetensors")
HPZ3 = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 3}}


def model_settings(**settings: Any) -> Callable[[Path], object]:
    return lambda model: save_fake_model(model, **settings)


def truncate(model: Path) -> None:
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[: len(data) - 20])


def tokenizer_file(content: bytes) -> Callable[[Path], object]:
    return lambda model: (model / "tokenizer.json").write_bytes(content)


def lfs_pointer(model: Path) -> None:
    (model / "model.safetensors").write_text(LFS)


def shards(*present: str) -> Callable[[Path], None]:
    def write(model: Path) -> None:
        (model / "model.safetensors").unlink()
        index = dict.fromkeys(tensors(), SHARDS[0]) | {"model.norm.weight": SHARDS[1]}
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        for name in present:
            save_file(tensors(), model / name)

    return write


def unfinished_run(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    (folder / "run_config.yaml").write_text("stage: dpo\n")


def renamed(name: str) -> Callable[[Path], object]:
    return lambda model: (model / "model.safetensors").rename(model / name)


def broken_link(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to("../blobs/gone")


def cache_folder(model: Path) -> None:
    model.rename(model.with_name("inner"))
    (model / "snapshots").mkdir(parents=True)
    model.with_name("inner").rename(model / "snapshots" / "abc")


def adapter_beside(whole: bool) -> Callable[[Path], None]:
    def write(model: Path) -> None:
        (model / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        if not whole:
            (model / "model.safetensors").rename(model / "adapter_model.safetensors")

    return write


def fewer(part: str) -> Callable[[Path], object]:
    kept = {name: tensor for name, tensor in tensors().items() if part not in name}
    return lambda model: save_file(kept, model / "model.safetensors")


def beside(name: str, text: str) -> Callable[[Path], object]:
    return lambda model: (model / name).write_text(text)


def bin_file(content: bytes) -> Callable[[Path], None]:
    def write(model: Path) -> None:
        (model / "model.safetensors").unlink()
        (model / "pytorch_model.bin").write_bytes(content)

    return write


def config_text(text: str) -> Callable[[Path], object]:
    return lambda model: (model / "config.json").write_text(text)


# name -> (options of run.yaml, what is done to the model's folder, arguments of the command line, code)
MISTAKES: dict[str, tuple[dict[str, Any], Callable[[Path], object] | None, list[str], str]] = {
    "unknown option": ({"sede": 1}, None, [], "unknown-option"),
    "value": ({"beta": "big"}, None, [], "value"),
    "missing option": ({"dataset": None}, None, [], "value"),
    "rule": ({"max_tokens_per_row": 100}, None, [], "row-too-short"),
    "a template that is not there": ({"template": "ours.jinja"}, None, [], "template-missing"),
    "a folder of a template that is not there": ({"template": "./ours"}, None, [], "template-missing"),
    "no value": ({}, None, ["--run_name"], "no-value"),
    "data set": ({"dataset": "nowhere"}, None, [], "dataset"),
    "data folder": ({"dataset_dir": "nowhere"}, None, [], "dataset-dir"),
    "output folder": ({"output_dir": "/proc/out"}, None, [], "unwritable"),
    "template file": ({"template": "nothing.j2"}, None, [], "template-missing"),
    "template folder": ({"template": "./model"}, None, [], "template-none"),
    "template that is no text": ({"template": "./model/model.safetensors"}, None, [], "template-unreadable"),
    "model folder": ({"model_name_or_path": "./nowhere"}, None, [], "model-folder"),
    "hub id, offline": ({"model_name_or_path": "nobody/nothing"}, None, [], "hub"),
    "model type": ({}, model_settings(model_type="bert"), [], "model-type"),
    "experts": ({}, model_settings(model_type="mixtral", num_local_experts=8), [], "model-experts"),
    "window": ({}, model_settings(model_type="mistral", sliding_window=256), [], "model-window"),
    "head size": ({"attn_implementation": "varlen"}, model_settings(head_dim=100), [], "model-heads"),
    "positions": ({"max_length": 4096}, None, [], "model-positions"),
    "learned positions": ({}, model_settings(model_type="opt", max_position_embeddings=512), [], "model-positions"),
    "quantized weights": ({}, model_settings(quantization_config={"load_in_4bit": True}), [], "model-quantized"),
    "kinds of layers that are no list": ({}, model_settings(layer_types=3), [], "model-config"),
    "a kind of layer that is no name": ({}, model_settings(layer_types=[{"a": 1}]), [], "model-config"),
    "phi3's first name of longrope": (
        {"max_length": 8192},
        model_settings(model_type="phi3", max_position_embeddings=131072, rope_scaling={"type": "su"}),
        [],
        "model-positions",
    ),
    "config.json": ({}, config_text('{"model_type": '), [], "model-config"),
    "a pointer to config.json": ({}, config_text("version https://git-lfs.github.com/spec/v1\n"), [], "model-config"),
    "a config.json that is a list": ({}, config_text("[]"), [], "model-config"),
    "no model type": ({}, config_text('{"hidden_size": 16}'), [], "model-config"),
    "a model type that is no text": ({}, model_settings(model_type=["llama"]), [], "model-config"),
    "positions as text": ({}, model_settings(max_position_embeddings="131072"), [], "model-config"),
    "positions as a float": ({}, model_settings(max_position_embeddings=2048.0), [], "model-config"),
    "no positions": ({}, model_settings(max_position_embeddings=None), [], "model-config"),
    "positions of 0": ({}, model_settings(max_position_embeddings=0), [], "model-config"),
    "experts as text": ({}, model_settings(num_experts="8"), [], "model-config"),
    "experts as a float": ({}, model_settings(num_local_experts=8.0), [], "model-config"),
    "experts as a list": ({}, model_settings(n_routed_experts=[8]), [], "model-config"),
    "window as text": ({}, model_settings(model_type="mistral", sliding_window="256"), [], "model-config"),
    "window as a float": ({}, model_settings(model_type="mistral", sliding_window=256.0), [], "model-config"),
    "window as true": ({}, model_settings(model_type="mistral", sliding_window=True), [], "model-config"),
    "a window of -1": ({}, model_settings(model_type="mistral", sliding_window=-1), [], "model-config"),
    "a window of 0": ({}, model_settings(model_type="mistral", sliding_window=0), [], "model-config"),
    "a switch as text": ({}, model_settings(use_sliding_window="false"), [], "model-config"),
    "causal as text": ({}, model_settings(is_causal="false"), [], "model-config"),
    "a softcap as text": ({}, model_settings(attn_logit_softcapping="30"), [], "model-config"),
    "a head size as text": ({"attn_implementation": "varlen"}, model_settings(head_dim="100"), [], "model-config"),
    "heads as null": ({}, model_settings(num_attention_heads=None), [], "model-config"),
    "dropout as text": ({"disable_dropout": False}, model_settings(attention_dropout="0"), [], "model-config"),
    "scaled positions as text": ({}, model_settings(rope_scaling="linear"), [], "model-config"),
    "a factor as text": ({}, model_settings(rope_scaling={"type": "linear", "factor": "4"}), [], "model-config"),
    "one kind of layer": ({}, model_settings(layer_types="full_attention"), [], "model-config"),
    "a model in the model": ({}, model_settings(text_config={"model_type": "llama"}), [], "model-more-than-text"),
    "a typo in lora_target": ({"lora_target": "q_projj,v_proj"}, None, [], "lora-target-unknown"),
    "lora_target of another family": ({}, None, ["--lora_target", "query_key_value"], "lora-target-unknown"),
    "lora_target of a norm": ({"lora_target": ["input_layernorm"]}, None, [], "lora-target-unknown"),
    "lora_target of the head": ({"lora_target": "lm_head"}, None, [], "lora-target"),
    "truncated weights": ({}, truncate, [], "weights-damaged"),
    "a pointer to weights": ({}, lfs_pointer, [], "weights-damaged"),
    "GGUF weights": ({}, renamed("model-q4_0.gguf"), [], "model-folder"),
    "weights of another framework": ({}, renamed("tf_model.h5"), [], "model-folder"),
    "an unfinished download": ({}, renamed("model.safetensors.incomplete"), [], "model-folder"),
    "shards without an index": ({}, renamed("model-00001-of-00002.safetensors"), [], "model-folder"),
    "a variant of the weights": ({}, renamed("model.fp16.safetensors"), [], "model-folder"),
    "a link to no weights": ({}, broken_link, [], "model-folder"),
    "the output_dir of a run that has not ended": ({}, unfinished_run, [], "model-folder"),
    "a folder of the hub's cache": ({}, cache_folder, [], "model-folder"),
    "an adapter with a config.json": ({}, adapter_beside(False), [], "model-is-adapter"),
    "an adapter beside a model": ({}, adapter_beside(True), [], "model-is-adapter"),
    "the address of a model": ({"model_name_or_path": "https://huggingface.co/org/name"}, None, [], "model-folder"),
    "more layers than weights": ({}, model_settings(num_hidden_layers=4), [], "weights-incomplete"),
    "no embedding": ({}, fewer("embed_tokens"), [], "weights-incomplete"),
    "another hidden size": ({}, model_settings(hidden_size=32), [], "weights-mismatch"),
    "another vocabulary": ({}, model_settings(vocab_size=9), [], "weights-mismatch"),
    "an index of more than the shard holds": ({}, shards(*SHARDS), [], "weights-incomplete"),
    "damaged tokenizer_config": ({}, beside("tokenizer_config.json", "{"), [], "tokenizer-damaged"),
    "damaged generation_config": ({}, beside("generation_config.json", '{"a" 1}'), [], "tokenizer-damaged"),
    "a pointer to a template": ({}, beside("chat_template.jinja", LFS), [], "tokenizer-damaged"),
    "a missing shard": ({}, shards("model-1-of-2.safetensors"), [], "weights-missing"),
    "a pointer to a tokenizer": ({}, tokenizer_file(b"version https://git-lfs.github.com\n"), [], "tokenizer-damaged"),
    "truncated tokenizer": ({}, tokenizer_file(b'{"version": "1.0", "tru'), [], "tokenizer-damaged"),
    "empty tokenizer": ({}, tokenizer_file(b""), [], "tokenizer-damaged"),
    "truncated bin": ({}, bin_file(b"PK\x03\x04" + bytes(500)), [], "weights-damaged"),
    "empty bin": ({}, bin_file(b""), [], "weights-damaged"),
    "accelerate config": ({"deepspeed": "accelerate.yaml"}, None, [], "accelerate-config"),
    "key of DeepSpeed": ({"deepspeed": {"zero_optimisation": {}}}, None, [], "deepspeed-unknown-key"),
    "JSON on the command line": ({}, None, ["--deepspeed", '{"zero_optimization": {"stage": 4}}'], "deepspeed-value"),
    "number of ranks": ({"deepspeed": HPZ3}, None, ["--num_accelerators", "2"], "deepspeed-ranks"),
    "cuda": ({"attn_implementation": "flex_attention"}, None, [], "no-cuda"),
    "compiled layers under ZeRO-3": (
        {"kernels": "compile", "deepspeed": {"zero_optimization": {"stage": 3}}},
        None,
        [],
        "kernels-zero3",
    ),
    "launch arguments": ({}, None, ["--master_port", "80"], "cluster"),
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The options of a run without a mistake; a launcher that starts all the same fails the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(supervisor, "run_launcher", lambda *_: pytest.fail("a launcher was started"))
    save_fake_model(tmp_path / "model")
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    (tmp_path / "accelerate.yaml").write_text(ACCELERATE)
    return {"model_name_or_path": "model", "dataset": "pairs.jsonl", "dataset_dir": ".", "output_dir": "runs/one"}


def write(tmp_path: Path, run: dict[str, Any]) -> str:
    text = "".join(f"{key}: {json.dumps(value)}\n" for key, value in run.items())
    (tmp_path / "run.yaml").write_text(text)
    return "run.yaml"


def split(arguments: list[str]) -> tuple[list[str], ClusterRequest]:
    """Overrides, and what of the arguments is the launcher's."""
    if arguments[:1] in (["--num_accelerators"], ["--master_port"]):
        return [], ClusterRequest(**{arguments[0][2:]: int(arguments[1])})
    return arguments, ClusterRequest()


@pytest.mark.parametrize("name", MISTAKES)
def test_each_mistake_is_one_problem_of_its_code(tmp_path: Path, run: dict[str, Any], name: str) -> None:
    options, damage, arguments, code = MISTAKES[name]
    if damage:
        damage(tmp_path / "model")
    overrides, cluster = split(arguments)
    with pytest.raises(ConfigError) as caught:
        supervisor.supervise(Task("train", write(tmp_path, run | options), overrides), cluster)
    assert [problem.code for problem in caught.value.problems] == [code]
    assert caught.value.exit_code == 64 and all(problem.option for problem in caught.value.problems)
    assert not (tmp_path / "runs").exists()


def test_all_mistakes_come_in_one_report(
    tmp_path: Path, run: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    save_fake_model(tmp_path / "model", model_type="mistral", sliding_window=64)
    run |= {"lora_target": "q_projj,v_proj", "max_length": 1024, "deepspeed": "accelerate.yaml", "beta": 0, "sede": 1}
    assert main(["train", write(tmp_path, run), "--dataset", "nowhere", "--master_port", "80"]) == 64
    said = capsys.readouterr().err
    assert "7 problems in the run config:" in said and "\n  7. " in said


def test_one_report_has_each_mistake_once(tmp_path: Path, run: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of options, rules, data, model, adapter, launch and environment; whatever is wrong with one, the others count."""
    save_fake_model(tmp_path / "model", model_type="mixtral", num_local_experts=8, sliding_window=64)
    (tmp_path / "model" / "tokenizer.json").write_text(LFS)
    truncate(tmp_path / "model")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    run |= {"dataset_dir": "nowhere", "output_dir": "/proc/out", "max_time": 90, "sede": 1, "report_to": "neptune"}
    run |= {"max_tokens_per_row": 100, "template": "ours.jinja", "adapter_name_or_path": "model", "eval_steps": 5}
    run |= {"deepspeed": {"zero_optimization": {"stage": 2, "zero_hpz_partition_size": 1}}, "beta": 0}
    path = write(tmp_path, run)
    with pytest.raises(ConfigError) as caught:
        preflight(
            path, ["--seed", str(2**64)], cluster=ClusterRequest(num_accelerators=2, include="a:0", master_port=1)
        )
    found = sorted((problem.code, problem.option) for problem in caught.value.problems)
    assert found == sorted(
        [("value", option) for option in ("max_time", "report_to", "beta", "seed")]
        + [("unknown-option", "sede"), ("row-too-short", "max_tokens_per_row"), ("nothing-held-out", "eval_steps")]
        + [("template-missing", "template"), ("dataset-dir", "dataset"), ("unwritable", "output_dir")]
        + [("weights-damaged", "model_name_or_path"), ("tokenizer-damaged", "model_name_or_path")]
        + [("model-window", "max_length"), ("model-experts", "model_name_or_path")]
        + [("adapter", "adapter_name_or_path"), ("accelerate-launch", "deepspeed")]
        + [("cluster", "include"), ("cluster", "master_port")]
    )


def test_what_files_cannot_tell_passes(tmp_path: Path, run: dict[str, Any]) -> None:
    """A pickle has no header: the ranks look for the modules of lora_target."""
    bin_file(b"\x80\x02old")(tmp_path / "model")
    assert preflight(write(tmp_path, run | {"lora_target": "q_projj"}), [])


@pytest.mark.parametrize(
    ("given", "targets"),
    [("all-linear", ["all"]), ("all", ["all"]), ("q_proj,v_proj", ["q_proj", "v_proj"])]
    + [(name, [name]) for name in ("self_attn.q_proj", "layers.0.mlp.up_proj", "embed_tokens")],
)
def test_names_of_modules_pass(tmp_path: Path, run: dict[str, Any], given: str, targets: list[str]) -> None:
    assert preflight(write(tmp_path, run | {"lora_target": given}), [])[0].lora_target == targets


@pytest.mark.parametrize(("size", "precision", "cuda", "found"), [
    (100, "auto", True, ["model-heads"]), (100, "fp32", True, []), (100, "auto", False, []), (64, "bf16", True, []),
    (100, "fp16", True, []),
])  # fmt: skip
def test_heads_that_a_gpu_cannot_take_are_told_before_a_launch(
    tmp_path: Path, run: dict[str, Any], size: int, precision: str, cuda: bool, found: list[str]
) -> None:
    save_fake_model(tmp_path / "model", head_dim=size)
    config, zero = preflight(write(tmp_path, run | {"precision": precision}), [])
    try:
        check_device(config, cuda, zero, 1)
        codes = []
    except ConfigError as error:
        codes = [problem.code for problem in error.problems]
    assert codes == found


def test_names_that_exist_are_listed(tmp_path: Path, run: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        supervisor.supervise(Task("train", write(tmp_path, run | {"lora_target": "q_projj"}), []), ClusterRequest())
    text = str(caught.value.problems[0])
    assert "did you mean q_proj?" in text and "lm_head" not in text and "`all`" in text
    assert all(name.split(".")[-2] in text for name in tensors() if name.endswith("_proj.weight"))


@pytest.mark.parametrize(
    "settings",
    [
        {"text_config": None, "quantization_config": None, "rope_scaling": None, "layer_types": None},
        {"num_experts": None, "num_local_experts": 0, "sliding_window": None, "head_dim": None},
        {"model_type": "qwen2", "sliding_window": 0, "use_sliding_window": False},
    ],
)
def test_what_is_not_there_may_be_null(tmp_path: Path, run: dict[str, Any], settings: dict[str, Any]) -> None:
    save_fake_model(tmp_path / "model", **settings)
    assert preflight(write(tmp_path, run), [])


def test_several_wrong_values_are_told_each(tmp_path: Path, run: dict[str, Any]) -> None:
    save_fake_model(tmp_path / "model", num_experts="8", max_position_embeddings="64", hidden_size=None)
    with pytest.raises(ConfigError) as caught:
        preflight(write(tmp_path, run), [])
    assert [problem.code for problem in caught.value.problems] == ["model-config"] * 3


def test_the_names_of_peft_are_those_of_the_model(tmp_path: Path, run: dict[str, Any]) -> None:
    name = "layers.0.self_attn.q_proj"
    config, _ = preflight(write(tmp_path, run | {"lora_target": f"base_model.model.model.{name}"}), [])
    assert config.lora_target == [f"model.{name}"]


@pytest.mark.parametrize("wrong", ["model.model.layers.0.self_attn.q_proj", "x.layers.0.self_attn.q_proj"])
def test_a_name_with_another_beginning_is_told(tmp_path: Path, run: dict[str, Any], wrong: str) -> None:
    with pytest.raises(ConfigError) as caught:
        preflight(write(tmp_path, run | {"lora_target": wrong}), [])
    assert [problem.code for problem in caught.value.problems] == ["lora-target-unknown"]


def test_no_heavy_library_is_imported(tmp_path: Path, run: dict[str, Any]) -> None:
    """Also where a mistake is found, and with a DeepSpeed mapping."""
    path = write(tmp_path, run | {"lora_target": "q_projj", "deepspeed": HPZ3})
    code = (
        "import sys; from dsdpo.launch.preflight import preflight\n"
        "from dsdpo.errors import ConfigError\n"
        "try: preflight(sys.argv[1], [])\n"
        "except ConfigError as error: assert error.problems[0].code == 'lora-target-unknown', error\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'deepspeed', 'accelerate'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code, path], check=True)
