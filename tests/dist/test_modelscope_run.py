"""A whole run on a model and a set of ModelScope, which a hub on this machine serves to its client."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.helpers.modelscope_hub import ModelScope, files_of, modelscope_hub
from tests.helpers.tiny import save_model, save_pairs, save_tokenizer, tiny_llama_config

pytest.importorskip("modelscope_hub")
RUN = {
    "model_name_or_path": "org/tiny",
    "model_revision": "v1",
    "dataset": "org/pairs",
    "dataset_dir": ".",
    "output_dir": "out",
    "template": "none",
    "max_length": 64,
    "train_batch_size": 4,
    "max_steps": 2,
    "start_timeout": 300,
    "change_on_resume": "max_steps",
}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[ModelScope]:
    with modelscope_hub() as hub:
        for seed, revision in enumerate(("v1", "master")):
            save_model(tmp_path / revision, tiny_llama_config(), seed)
            save_tokenizer(tmp_path / revision)
            hub.repositories.setdefault("models/org/tiny", {})[revision] = files_of(tmp_path / revision)
        save_pairs(tmp_path / "pairs.jsonl", 8)
        files = {"train.jsonl": (tmp_path / "pairs.jsonl").read_bytes()}
        hub.repositories["datasets/org/pairs"] = {"master": files}
        yield hub


def dsdpo(hub: ModelScope, folder: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    """Exit code and output of a command, with Hugging Face out of reach."""
    places = {"MODELSCOPE_ENDPOINT": hub.url, "MODELSCOPE_CACHE": str(folder / "cache"), "HF_HOME": str(folder / "hf")}
    places |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "DS_ACCELERATOR": "cpu", "NO_PROXY": "*"}
    command = [sys.executable, "-m", "dsdpo", *arguments]
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(command, cwd=folder, env={**os.environ, **places, **environment}, text=True, **both)  # type: ignore[call-overload]
    return done.returncode, done.stdout


@pytest.mark.slow
def test_a_run_is_of_its_hub_and_revision(hub: ModelScope, tmp_path: Path) -> None:
    """Two ranks train; the run resumes without a network, and not on another revision; its base is found again."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(RUN))
    code, said = dsdpo(hub, tmp_path, "train", "run.yaml", "--num_accelerators", "2", USE_MODELSCOPE_HUB="1")
    assert code == 0 and "asking ModelScope for org/tiny, org/pairs (USE_MODELSCOPE_HUB=1)" in said, said
    assert sorted(hub.asked_files).count("model.safetensors") == 1, "one process fetches"
    settings = json.loads((tmp_path / "out/final/adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("org/tiny", "v1")
    assert yaml.safe_load((tmp_path / "out/run_config.yaml").read_text())["hub"] == "modelscope"
    hub.status = 503
    more = ("train", "run.yaml", "--hub", "modelscope", "--max_steps")
    code, said = dsdpo(hub, tmp_path, *more, "3", HF_HUB_OFFLINE="1")
    assert code == 0 and "resumed after step 2" in said, said
    hub.status = 0
    code, said = dsdpo(hub, tmp_path, *more, "4", "--model_revision", "master")
    assert code == 66 and "the content of model" in said, said
    code, said = dsdpo(hub, tmp_path, "export", "out", "--merge", "--to", "merged")
    assert code == 0 and (tmp_path / "merged/model.safetensors").is_file(), said
