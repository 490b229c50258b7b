"""Whole runs with compiled layers, and runs on a GPU that repeat bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.ranks import run_as_ranks
from tests.helpers.runs import save_run

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data, and run.yaml."""
    return save_run(tmp_path_factory.mktemp("kernels"), max_steps=4)


def losses(output_dir: Path) -> list[float]:
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.start
@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_compiled_layers_train_the_same(place: Path, stage: int) -> None:
    """LoRA on two ranks, with recomputed layers: the same losses to rounding, and a reference store of its own."""
    (place / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    found = {}
    for kernels in ("none", "compile"):
        out = place / f"{kernels}-{stage}"
        options = {"kernels": kernels, "gradient_checkpointing": True, "deepspeed": place / "zero.json"}
        more = [part for key, value in {**options, "output_dir": out}.items() for part in (f"--{key}", str(value))]
        code, output = run_as_ranks(2, "train", str(place / "run.yaml"), *more)
        assert code == 0, output
        assert ("kernels compile" in output) == (kernels == "compile")
        found[kernels] = losses(out)
    assert len(found["none"]) == 4 and found["none"][-1] != found["none"][0]
    assert found["compile"] == pytest.approx(found["none"], abs=1e-5)
    assert len(list((place / "cache" / "reference").glob("*/*.safetensors"))) >= 2


@pytest.mark.gpu
@pytest.mark.start
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("training", ["lora", "full"])
def test_a_deterministic_run_repeats_bit_for_bit(place: Path, training: str) -> None:
    """On one GPU, in bf16, with the kernels that `auto` takes."""
    weights = []
    for turn in ("one", "two"):
        out = place / f"{training}-{turn}"
        options = {"finetuning_type": training, "deterministic": True, "precision": "bf16", "output_dir": out}
        more = [part for key, value in options.items() for part in (f"--{key}", str(value))]
        line = [sys.executable, "-m", "dsdpo", "train", str(place / "run.yaml"), "--num_accelerators", "1", *more]
        environment = {key: value for key, value in os.environ.items() if key != "DS_ACCELERATOR"}
        done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        weights.append(next((out / "final").glob("*model.safetensors")).read_bytes())
    assert losses(place / f"{training}-one") == losses(place / f"{training}-two")
    assert weights[0] == weights[1]
