"""A run of an earlier version continues: today's code reads its checkpoint, its reference store and its prepared set.

tests/fixtures/make_earlier_run.py made the folder. It has no metrics.jsonl: a resumed run writes only its own steps.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.golden.runs import ROOT, train

FIXTURE = ROOT / "tests" / "fixtures" / "v0_1_0_pairs"
SAVED_STEP = 2
CHECKPOINT_ERROR = 66


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A copy of the folder, in which a run may continue."""
    return Path(shutil.copytree(FIXTURE, tmp_path / "run"))


def resume(place: Path, ranks: int) -> tuple[int, str]:
    """The same command again, on a number of ranks: exit code and output."""
    log = place.with_suffix(".log")
    code = train(ROOT, Path("run.yaml"), ranks, log, cwd=place)
    return code, log.read_text(errors="replace")


def stored(place: Path) -> list[str]:
    """The chunks of the reference store."""
    return sorted(str(path.relative_to(place)) for path in (place / "cache" / "reference").rglob("*.safetensors"))


def records(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("ranks", [2, 1])
def test_an_earlier_run_continues(place: Path, ranks: int) -> None:
    """From its checkpoint, with its stored reference; on one rank the data are prepared anew."""
    chunks = stored(place)
    assert chunks
    if ranks == 1:
        shutil.rmtree(place / "cache" / "prepared")
    code, output = resume(place, ranks)
    assert code == 0, output[-4000:]
    expected = [record for record in records(place / "expected.jsonl") if record["step"] > SAVED_STEP]
    found = records(place / "out" / "metrics.jsonl")
    assert [record["step"] for record in found] == [record["step"] for record in expected] == [3, 4]
    for key in ("loss", "logps/chosen", "logps/rejected"):
        np.testing.assert_allclose([r[key] for r in found], [r[key] for r in expected], rtol=1e-5, err_msg=key)
    assert stored(place) == chunks, "reference log-probs that the store holds were computed again"
    assert (place / "out" / "final" / "adapter_model.safetensors").exists()


def test_a_damaged_checkpoint_of_an_earlier_run_is_refused(place: Path) -> None:
    """As a damaged checkpoint of today is: nothing is trained, nothing is removed."""
    folder = place / "out" / "checkpoints" / f"step-{SAVED_STEP:08d}"
    file = folder / "rank-00000-of-00002.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    code, output = resume(place, 1)
    assert code == CHECKPOINT_ERROR, output[-4000:]
    assert file.name in output
    assert file.read_bytes() == content and not (place / "out" / "final").exists()
