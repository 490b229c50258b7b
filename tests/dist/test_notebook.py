"""The cells of docs/quickstart.ipynb, run one after another as they stand, on a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.dist.test_configs import CHATML, QWEN
from tests.helpers.ranks import ROOT
from tests.helpers.tiny import save_model
from tests.unit.data.conftest import make_tokenizer

NOTEBOOK = json.loads((ROOT / "docs" / "quickstart.ipynb").read_text())
RUN = """
import json, os, sys
before = dict(os.environ)
notebook, scope = json.load(open(sys.argv[1])), {"__name__": "__main__"}
for number, cell in enumerate(notebook["cells"]):
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), scope)
assert dict(os.environ) == before, "training has changed this process"
"""


def code_cells() -> list[dict[str, Any]]:
    return [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_it_is_stored_without_outputs() -> None:
    assert NOTEBOOK["nbformat"] == 4 and len({cell["id"] for cell in NOTEBOOK["cells"]}) == len(NOTEBOOK["cells"])
    assert len(code_cells()) >= 5
    assert not [cell for cell in code_cells() if cell["outputs"] or cell["execution_count"] is not None]
    assert not [line for cell in NOTEBOOK["cells"] for line in cell["source"] if len(line.rstrip("\n")) > 120]


@pytest.mark.start
def test_its_cells_run(tmp_path: Path) -> None:
    """In a folder of its own, outside of the repository; the ranks are those of the real launcher.

    Without DS_ACCELERATOR, which `dsdpo train` sets for its own process where there is no GPU.
    """
    save_model(tmp_path / "model", QWEN)
    make_tokenizer("chatml", CHATML).save_pretrained(tmp_path / "model")
    environment = {**os.environ, "QUICKSTART_MODEL": str(tmp_path / "model"), "PYTHONPATH": str(ROOT)}
    environment |= {"MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    environment.pop("DS_ACCELERATOR", None)
    line = [sys.executable, "-c", RUN, str(ROOT / "docs" / "quickstart.ipynb")]
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    folder = tmp_path / "quickstart"
    assert len((folder / "pairs.jsonl").read_text().splitlines()) == 35
    assert (folder / "run" / "COMPLETED").exists() and (folder / "run/final/adapter_config.json").exists()
    assert (folder / "loss.png").stat().st_size > 5000
    assert "eval_loss" in done.stdout and done.stdout.count("What is the capital of") >= 3
