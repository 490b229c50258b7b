"""bench/scaling.py: what it reads and prints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench.models import load_config
from tests.helpers.tiny import tiny_llama_config

ROOT = Path(__file__).parents[2]


def test_a_folder_is_read(tmp_path: Path) -> None:
    tiny_llama_config().save_pretrained(tmp_path)
    assert load_config(str(tmp_path)).hidden_size == 32
    with pytest.raises(SystemExit, match="no folder"):
        load_config(str(tmp_path / "other"))


@pytest.mark.start
def test_what_it_prints() -> None:
    line = [sys.executable, "bench/scaling.py", "llama-2-7b", "--gpus", "8,64"]
    told = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [row.split()[0] for row in told[2:4]] == ["8", "64"]
    assert "nothing is measured" in told[4] and "assumed" in told[5]
    held = subprocess.run([*line, "--memory"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "8 GPUs: " in held and "Adam's moments 6.3" in held
