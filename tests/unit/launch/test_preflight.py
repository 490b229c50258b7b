"""One report with everything that is wrong, before anything is created; exit 66 for an earlier run."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from dsdpo.checkpoint.commit import RUN_FILE, commit, hashed_file, resume_candidates, stage, step_folder
from dsdpo.compat import has_fp16
from dsdpo.config.schema import RunConfig
from dsdpo.errors import CheckpointError, ConfigError, IOFailure
from dsdpo.launch.node_info import facts
from dsdpo.launch.preflight import ClusterRequest, check_device, preflight, reload
from dsdpo.model import adapter_files
from dsdpo.model.files import folder_problems
from dsdpo.runtime.rundir import RunDir
from tests.helpers.fake_model import save_fake_model
from tests.helpers.modelscope_hub import files_of, modelscope_hub
from tests.helpers.zero import count_opens

ADAPTER = "adapter_model.safetensors"


@pytest.fixture
def run(tmp_path: Path) -> dict[str, Any]:
    """The options of a sound run on a local model folder and data set."""
    model = save_fake_model(tmp_path / "model")
    data = tmp_path / "data"
    data.mkdir()
    (data / "pairs.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    (data / "dataset_info.json").write_text(json.dumps({"pairs": {"file_name": "pairs.jsonl", "ranking": True}}))
    return {
        "model_name_or_path": str(model),
        "dataset": "pairs",
        "dataset_dir": str(data),
        "output_dir": str(tmp_path / "runs" / "one"),
    }


def check(tmp_path: Path, run: dict[str, Any], *overrides: str, **arguments: Any) -> RunConfig:
    path = tmp_path / "run.yaml"
    path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in run.items()))
    return preflight(path, list(overrides), **arguments)[0]


def problems(tmp_path: Path, run: dict[str, Any], *overrides: str, **arguments: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check(tmp_path, run, *overrides, **arguments)
    return [str(problem) for problem in caught.value.problems]


def test_a_sound_run_passes_and_nothing_is_created(tmp_path: Path, run: dict[str, Any]) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert check(tmp_path, run).dataset == ["pairs"]
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "run.yaml"])


def test_one_report_lists_faults_of_every_kind(tmp_path: Path, run: dict[str, Any]) -> None:
    ds = tmp_path / "ds.json"
    ds.write_text('{"gradient_clipping": 9, "zero_optimisation": {}}')
    blocked = tmp_path / "a_file"
    blocked.write_text("")
    run |= {
        "model_name_or_path": "./nowhere",
        "dataset": "missing_set",
        "eval_dataset": "../outside.jsonl",
        "output_dir": str(blocked / "out"),
        "deepspeed": str(ds),
        "beta": "big",
        "sede": 1,
        "max_tokens_per_row": 100,
    }
    (tmp_path / "outside.jsonl").write_text("{}\n")
    found = problems(tmp_path, run, "--oops", cluster=ClusterRequest(num_accelerators=0))
    for part in [
        "beta is",
        "unknown option sede",
        "--oops has no value",
        "max_tokens_per_row is 100",
        "gradient_clipping is 9",
        "did you mean zero_optimization",
        "no folder ./nowhere",
        "dataset: missing_set",
        "eval_dataset: ../outside.jsonl",
        "output_dir: ",
        "--num_accelerators is 0",
    ]:
        assert sum(part in problem for problem in found) == 1, (part, found)
    assert len(found) == 11


def test_the_deepspeed_json_is_read_once(tmp_path: Path, run: dict[str, Any]) -> None:
    """By the supervisor, and by a rank before and at the meeting."""
    ds, path = tmp_path / "ds.json", tmp_path / "run.yaml"
    ds.write_text('{"zero_optimization": {"stage": 2}}')
    opens = count_opens(ds)
    check(tmp_path, run | {"deepspeed": str(ds)}, cluster=ClusterRequest())
    assert len(opens) == 1
    config, zero = reload(path, [], 1)
    assert len(opens) == 2 and zero.stage == 2
    assert facts(config, zero)["files"]["deepspeed"] and len(opens) == 2


def test_a_data_folder_that_is_missing_is_told_once(tmp_path: Path, run: dict[str, Any]) -> None:
    found = problems(tmp_path, run | {"dataset_dir": str(tmp_path / "no"), "eval_dataset": "pairs"})
    assert len(found) == 1
    assert found[0].startswith("dataset, eval_dataset: ")


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_model_folder_must_be_complete(tmp_path: Path, run: dict[str, Any], missing: str) -> None:
    (Path(run["model_name_or_path"]) / missing).unlink()
    found = problems(tmp_path, run)
    assert len(found) == 1
    assert missing.split(".")[0].replace("model", "weights") in found[0]


def texts(folder: Path) -> list[str]:
    return [str(problem) for problem in adapter_files.problems(str(folder))]


def save_adapter_file(folder: Path, *lost: str, rank: int = 8) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    matrices = {f"{name}.lora_A.weight": np.zeros((rank, 16)), f"{name}.lora_B.weight": np.zeros((16, rank))}
    save_file({key: value for key, value in matrices.items() if not key.endswith(lost)}, folder / ADAPTER)


@pytest.mark.parametrize(
    ("lost", "rank", "codes"),
    [
        ((), 8, []),
        (("lora_A.weight",), 8, ["adapter-incomplete"]),
        (("lora_B.weight",), 8, ["adapter-incomplete"]),
        (("weight",), 8, []),
        ((), 4, ["adapter-incomplete"]),
    ],
)
def test_matrices_of_an_adapter_are_complete(tmp_path: Path, lost: Any, rank: int, codes: list[str]) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "target_modules": ["q_proj"], "r": 8}')
    save_adapter_file(tmp_path, *lost, rank=rank)
    assert [problem.code for problem in adapter_files.problems(str(tmp_path))] == codes
    save_file({"a": np.zeros(1)}, tmp_path / ADAPTER)
    assert [problem.code for problem in adapter_files.problems(str(tmp_path))] == ["adapter-incomplete"]


def test_an_adapter_to_train_further_must_be_one(tmp_path: Path) -> None:
    assert "is no folder with adapter_config.json" in texts(tmp_path)[0]
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "target_modules": ["q_proj"]}')
    assert "is no folder with adapter_config.json" in texts(tmp_path)[0]
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    assert "is truncated" in texts(tmp_path)[0]
    save_adapter_file(tmp_path)
    assert texts(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b'{"peft_type": "LO', "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"[]", "holds no JSON object"),
        (b"{}", "peft_type is missing"),
        (b'{"peft_type": "LORA", "target_modules": ["lm_head"]}', "reaches the output head"),
    ],
)
def test_an_adapter_that_cannot_be_trained_further_is_told(
    tmp_path: Path, run: dict[str, Any], text: bytes, said: str
) -> None:
    (tmp_path / "adapter_config.json").write_bytes(text)
    save_adapter_file(tmp_path)
    (problem,) = problems(tmp_path, run | {"adapter_name_or_path": str(tmp_path)})
    assert problem.startswith(f"adapter_name_or_path: {tmp_path}/adapter_config.json") and said in problem


def test_each_reason_against_an_adapter_is_listed(tmp_path: Path) -> None:
    settings = {"peft_type": "LORA", "target_modules": ["lm_head"], "modules_to_save": ["embed_tokens"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    save_adapter_file(tmp_path)
    found = texts(tmp_path)
    assert len(found) == 2 and all(f"dsdpo export {tmp_path} --to DIR --merge" in problem for problem in found)


@pytest.mark.parametrize("change", [{"reference": "live"}, {"loss_type": "simpo"}])
def test_a_store_is_filled_only_for_a_cached_reference(tmp_path: Path, run: dict[str, Any], change: Any) -> None:
    assert check(tmp_path, run | change)
    (problem,) = problems(tmp_path, run | change, task="reference")
    assert "this run's reference is" in problem


def test_an_adapter_is_no_model_to_train_but_one_to_evaluate(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    assert [one.code for one in folder_problems(str(tmp_path), "model_name_or_path")] == ["model-is-adapter"]
    assert folder_problems(str(tmp_path), "--model", adapter_allowed=True) == []


@pytest.mark.parametrize("name", ["gpt2", "Qwen/Qwen2.5-0.5B-Instruct", "meta-llama/Llama-2-7b-hf"])
def test_a_hub_id_passes_without_a_look_up(name: str) -> None:
    assert folder_problems(name, "model_name_or_path") == []


@pytest.mark.parametrize("name", ["./gpt2", "../x", "/no/such", "~/no/such", "a/b/c", "sub/model", "my model"])
def test_what_looks_like_a_path_must_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    assert len(folder_problems(name, "model_name_or_path")) == 1


@pytest.mark.start
def test_a_run_says_which_hub_it_asks(
    tmp_path: Path, run: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("modelscope_hub")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "1")
    with modelscope_hub() as hub:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.url)
        monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "cache"))
        hub.repositories["models/org/m"] = {"v1": files_of(Path(run["model_name_or_path"]))}
        asked = run | {"model_name_or_path": "org/m", "model_revision": "v1", "eval_dataset": "org/held-out"}
        assert check(tmp_path, asked).model_source.hub == "modelscope"
        line = "asking ModelScope for org/m, org/held-out (USE_MODELSCOPE_HUB=1)\n"
        assert line in capfd.readouterr().out
        info = {"pairs": {"file_name": "pairs.jsonl"}, "other": {"hf_hub_url": "org/other"}}
        (tmp_path / "data/dataset_info.json").write_text(json.dumps(info))
        assert check(tmp_path, run | {"eval_dataset": "other"})
        assert "asking Hugging Face for other (dataset_info.json)\n" in capfd.readouterr().out
        assert check(tmp_path, run | {"template": "org/t"})
        assert "asking ModelScope for org/t (USE_MODELSCOPE_HUB=1)\n" in capfd.readouterr().out
        assert check(tmp_path, run) and "asking" not in capfd.readouterr().out
        hub.status = 503
        with pytest.raises(IOFailure):
            check(tmp_path, asked | {"model_revision": "v2"})
    monkeypatch.setenv("USE_HF", "1")
    assert len(problems(tmp_path, asked | {"model_revision": "v2"})) >= 1
    with pytest.raises(ConfigError) as caught:
        check(tmp_path, asked)
    assert "hub-environment" in [problem.code for problem in caught.value.problems]
    assert check(tmp_path, run), "no hub is asked"


def save(output_dir: Path, step: int, config: RunConfig, resumed_from: str | None = None) -> Path:
    """A checkpoint by its looks: all that a preflight reads."""
    folder = step_folder(RunDir(output_dir), step)
    staged = stage(folder)
    with hashed_file(staged / RUN_FILE) as file:
        file.write(json.dumps({"config": config.model_dump(mode="json"), "resumed_from": resumed_from}).encode())
    commit(staged, folder, {RUN_FILE: file.record}, {"step": step})
    return folder


def test_an_earlier_run_is_continued_or_exit_66(tmp_path: Path, run: dict[str, Any]) -> None:
    config = check(tmp_path, run)
    output_dir = Path(run["output_dir"])
    for step in (3, 6):
        save(output_dir, step, config)
    assert check(tmp_path, run | {"logging_steps": 7, "deepspeed": None})
    with pytest.raises(CheckpointError, match=r"step-00000006 was .* in 1 point: beta was 0.1, now it is 0.7"):
        check(tmp_path, run | {"beta": 0.7})
    assert check(tmp_path, run | {"beta": 0.7}, task="reference").beta == 0.7
    (output_dir / "checkpoints/step-00000006/run.json").unlink()
    assert check(tmp_path, run)
    (output_dir / "checkpoints/step-00000003/MANIFEST.json").unlink()
    with pytest.raises(CheckpointError, match=r"6: run\.json is missing; step-00000003: it has no MANIFEST") as caught:
        check(tmp_path, run)
    assert caught.value.exit_code == 66
    assert any("cannot be used" in problem for problem in problems(tmp_path, run | {"beta": 0}))


@pytest.mark.parametrize(
    ("was", "becomes"), [(b'"seed": 42', b'"seed": 43'), (b'"config"', b'"confih"'), (b'"config"', b"\0" * 8)]
)
def test_a_damaged_description_is_passed_over(tmp_path: Path, run: dict[str, Any], was: bytes, becomes: bytes) -> None:
    """A flipped bit or a block of zeros; the ranks find it too, and take the checkpoint before."""
    config = check(tmp_path, run)
    older, newer = (save(Path(run["output_dir"]), step, config) / RUN_FILE for step in (3, 6))
    intact = newer.read_bytes()
    newer.write_bytes(intact.replace(was, becomes))
    assert newer.stat().st_size == len(intact) and newer.read_bytes() != intact
    assert check(tmp_path, run)
    with pytest.raises(CheckpointError, match=r"step-00000003 was .* in 1 point: beta was 0.1, now it is 0.7"):
        check(tmp_path, run | {"beta": 0.7})
    older.write_bytes(newer.read_bytes())
    with pytest.raises(CheckpointError, match=r"6: run\.json is damaged.*; step-00000003: run\.json is damaged"):
        check(tmp_path, run)


def test_a_finished_run_is_done_and_another_one_in_its_place_is_66(tmp_path: Path, run: dict[str, Any]) -> None:
    config = check(tmp_path, run)
    output_dir = Path(run["output_dir"])
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "run_config.yaml").write_text(yaml.safe_dump(config.model_dump()))
    RunDir(output_dir).completed.touch()
    assert check(tmp_path, run | {"logging_steps": 7})
    with pytest.raises(CheckpointError, match=r"finished run, and this is another one: seed was 42, now it is 7\."):
        check(tmp_path, run | {"seed": 7})
    for damaged in (b"", b"\xff", b"\0\0", b"seed"):
        (output_dir / "run_config.yaml").write_bytes(damaged)
        assert check(tmp_path, run)


def test_a_learning_rate_changes_with_consent_only(tmp_path: Path, run: dict[str, Any]) -> None:
    save(Path(run["output_dir"]), 3, check(tmp_path, run))
    with pytest.raises(CheckpointError, match="name it in change_on_resume to go on with"):
        check(tmp_path, run | {"learning_rate": 0.5})
    assert check(tmp_path, run | {"learning_rate": 0.5, "change_on_resume": "learning_rate"})


def test_a_checkpoint_that_is_named_counts_until_its_run_has_one(tmp_path: Path, run: dict[str, Any]) -> None:
    config = check(tmp_path, run)
    named = save(tmp_path / "other", 9, config)
    on = config.model_copy(update={"resume_from_checkpoint": str(named)})
    assert resume_candidates(on)[0].step == 9
    own = [save(Path(run["output_dir"]), step, config, resumed_from=str(named)) for step in (10, 11)]
    assert [checkpoint.step for checkpoint in resume_candidates(on)] == [11, 10, 9]
    (own[1] / RUN_FILE).write_bytes((own[1] / RUN_FILE).read_bytes().replace(b'"resumed_from"', b'"resumed_frol"'))
    assert [checkpoint.step for checkpoint in resume_candidates(on)] == [10, 9]
    with pytest.raises(CheckpointError, match="resume_from_checkpoint cannot be used"):
        check(tmp_path, run | {"resume_from_checkpoint": str(tmp_path / "nowhere")})


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_told(tmp_path: Path, run: dict[str, Any]) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    found = problems(tmp_path, run | {"output_dir": str(locked / "out"), "cache_dir": str(locked / "cache")})
    assert [problem.split(":")[0] for problem in found] == ["output_dir", "cache_dir"]


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="needs a folder that refuses files even to root")
def test_a_folder_that_refuses_files_is_told(tmp_path: Path, run: dict[str, Any]) -> None:
    found = problems(tmp_path, run | {"output_dir": "/proc/out", "cache_dir": "/proc/cache"})
    assert [problem.split(":")[0] for problem in found] == ["output_dir", "cache_dir"]


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (ClusterRequest(num_accelerators=2, include="localhost:0"), "only one of"),
        (ClusterRequest(hostfile="/no/hostfile"), "there is no file"),
        (ClusterRequest(master_port=80), "1024 to 65535"),
    ],
)
def test_a_cluster_request_is_checked(tmp_path: Path, run: dict[str, Any], request_: ClusterRequest, said: str) -> None:
    found = problems(tmp_path, run, cluster=request_)
    assert len(found) == 1
    assert said in found[0]


def test_evaluation_needs_held_out_pairs(tmp_path: Path, run: dict[str, Any]) -> None:
    assert "nothing to evaluate on" in problems(tmp_path, run, task="eval")[0]
    assert check(tmp_path, run | {"val_size": 1}, task="eval").val_size == 1


def test_attention_for_cuda_is_refused_on_a_cpu(tmp_path: Path, run: dict[str, Any]) -> None:
    config = check(tmp_path, run | {"attn_implementation": "varlen"})
    check_device(config, cuda=True)
    with pytest.raises(ConfigError, match="no CUDA device"):
        check_device(config, cuda=False)


def test_liger_is_refused_on_a_cpu(tmp_path: Path, run: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsdpo.config.kernels.missing_liger", lambda: "")
    config = check(tmp_path, run | {"kernels": "liger"})
    check_device(config, cuda=True)
    with pytest.raises(ConfigError) as caught:
        check_device(config, cuda=False)
    assert [(problem.code, problem.option) for problem in caught.value.problems] == [("no-cuda", "kernels")]


@pytest.mark.parametrize(("isa", "refused"), [("AVX2", True), ("ALL", False)])
def test_fp16_is_refused_on_a_cpu_without_it(
    tmp_path: Path, run: dict[str, Any], isa: str, refused: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    """Asked in a process of its own, whose oneDNN uses no newer instructions."""
    if not refused and not has_fp16():
        pytest.skip("this CPU has no fp16")
    config = check(tmp_path, run | {"precision": "fp16"})
    check_device(config, cuda=True)
    code = (
        "import sys, pickle; from dsdpo.launch.preflight import check_device; from dsdpo.errors import ConfigError\n"
        "try:\n    check_device(pickle.load(sys.stdin.buffer), cuda=False)\n"
        "except ConfigError as error:\n    print('CODES', [problem.code for problem in error.problems])"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa, "DS_ACCELERATOR": "cpu"}
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, input=pickle.dumps(config), env=environment, stdout=subprocess.PIPE, check=True)
    assert ("CODES ['no-fp16']" in done.stdout.decode()) == refused


def test_no_heavy_library_is_imported(tmp_path: Path, run: dict[str, Any]) -> None:
    check(tmp_path, run)
    code = (
        "import sys; from dsdpo.launch.preflight import preflight; preflight(sys.argv[1], []);"
        "heavy = {'torch', 'transformers', 'datasets', 'deepspeed'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "run.yaml")], check=True, cwd=Path(__file__).parents[3])
