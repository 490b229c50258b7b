"""A small form of `make pipeline`: four stages, each on what the one before it left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.real import ROOT, smollm2

STAGES = ("pt", "sft", "rm", "dpo")


@pytest.mark.slow
@pytest.mark.start
def test_four_stages_one_after_another(tmp_path: Path) -> None:
    model = smollm2()
    place = tmp_path / "checkout"
    place.mkdir()
    for name in ("demo", "configs", "ds_configs", "dsdpo", "data"):
        (place / name).symlink_to(ROOT / name)
    environment = {**os.environ, "PYTHONPATH": str(place), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "demo.pipeline", "--folder", str(place), "--model", str(model)]
    sizes = ["--rows", "32", "--heldout", "8", "--num_accelerators", "2"]
    done = subprocess.run([*command, *sizes], cwd=place, env=environment, capture_output=True, text=True, check=False)
    assert "The pipeline took" in done.stdout, done.stdout[-4000:] + done.stderr[-4000:]
    for stage in STAGES:
        run = place / "outputs" / "pipeline" / stage
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert sum("eval_loss" in line for line in lines) == 1 and sum("loss" in line for line in lines) == 4
        assert len((run / "evaluation" / "eval_examples.jsonl").read_text().splitlines()) == 8
    assert "architectures" in json.loads((place / "outputs/pipeline/rm/final/config.json").read_text())
