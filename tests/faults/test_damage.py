"""Damaged checkpoints, folders that refuse, other runs: the stated exit code and message, and nothing is lost."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from dsdpo.checkpoint.commit import checkpoints
from dsdpo.runtime.rundir import RunDir
from tests.faults.place import Place, same_weights
from tests.helpers.disks import mounted
from tests.helpers.tiny import save_model, tiny_llama_config

STOPPED = ["--max_steps", "6", "--save_steps", "2"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("damage"))


@pytest.fixture(scope="module")
def whole(place: Place) -> Path:
    """A run on two ranks with checkpoints after steps 2, 4 and 6, finished."""
    code, output = place.run_ranks("whole", "--deepspeed", place.zero(3), *STOPPED)
    assert code == 0, output
    assert [c.step for c in checkpoints(RunDir(place.folder / "whole"))] == [6, 4, 2]
    return place.folder / "whole"


@pytest.fixture
def run(place: Place, whole: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """What is left of that run when it is killed after step 4's checkpoint."""
    out = place.folder / f"copy-{abs(hash(request.node.name)) % 10**8}"
    shutil.copytree(whole, out)
    for path in ("COMPLETED", "EXIT"):
        (out / path).unlink(missing_ok=True)
    shutil.rmtree(out / "final")
    shutil.rmtree(out / "checkpoints" / "step-00000006")
    yield out
    shutil.rmtree(out)


def digest(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


HARMS: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
    "bit-flipped": flip,
    "zero-length": lambda path: os.truncate(path, 0),
}


@pytest.mark.parametrize(("harm", "rank"), list(zip(HARMS, (0, 1, 0, 1))))
def test_a_harmed_shard_is_passed_over(place: Place, whole: Path, run: Path, harm: str, rank: int) -> None:
    """The run goes on from the checkpoint before."""
    HARMS[harm](run / "checkpoints" / "step-00000004" / f"rank-{rank:05d}-of-00002.safetensors")
    code, output = place.run_ranks(run.name, "--deepspeed", place.zero(3), *STOPPED)
    assert code == 0 and "resumed after step 2" in output and "step-00000004: rank-" in output, output
    assert same_weights(run, whole)


def test_a_flipped_bit_in_the_description_is_passed_over(place: Place, whole: Path, run: Path) -> None:
    """Of the settings that it holds, so that it would tell of another run."""
    path = run / "checkpoints" / "step-00000004" / "run.json"
    path.write_bytes(path.read_bytes().replace(b'"seed": 42', b'"seed": 43'))
    code, output = place.run_ranks(run.name, "--deepspeed", place.zero(3), *STOPPED)
    assert code == 0 and "resumed after step 2" in output and "step-00000004: run.json is damaged" in output, output
    assert same_weights(run, whole)


@pytest.mark.parametrize("harm", HARMS)
def test_nothing_usable_is_66_and_no_fresh_start(place: Place, run: Path, harm: str) -> None:
    for folder in (run / "checkpoints").iterdir():
        HARMS[harm](folder / "rank-00001-of-00002.safetensors")
    before = digest(run)
    run_again = place.run if harm == "bit-flipped" else place.run_ranks  # once with supervisor and launcher
    code, output = run_again(run.name, "--deepspeed", place.zero(3), *STOPPED)
    assert code == 66 and "cannot be used" in output and "rank-00001-of-00002" in output, output
    after = digest(run)
    assert {name: after[name] for name in before if name.startswith("checkpoints")} == {
        name: before[name] for name in before if name.startswith("checkpoints")
    }
    assert "metrics.jsonl" not in before or after["metrics.jsonl"] == before["metrics.jsonl"]


@pytest.mark.parametrize("name", ["MANIFEST.json", "run.json"])
def test_a_missing_manifest(place: Place, whole: Path, run: Path, name: str) -> None:
    (run / "checkpoints" / "step-00000004" / name).unlink()
    code, output = place.run_ranks(run.name, "--deepspeed", place.zero(3), *STOPPED)
    assert code == 0 and "resumed after step 2" in output and name in output, output
    assert same_weights(run, whole)


def test_a_named_checkpoint_with_a_fault_is_66(place: Place, run: Path) -> None:
    named = run / "checkpoints" / "step-00000004"
    flip(named / "rank-00000-of-00002.safetensors")
    code, output = place.run_ranks(
        run.name, "--deepspeed", place.zero(3), *STOPPED, "--resume_from_checkpoint", str(named)
    )
    assert code == 66 and "is damaged" in output, output
    code, output = place.run_supervisor(run.name, *STOPPED, "--resume_from_checkpoint", str(run / "nowhere"))
    assert code == 66 and "no MANIFEST.json" in output, output


def test_going_back_to_an_earlier_checkpoint(place: Place, whole: Path, run: Path) -> None:
    named = ["--resume_from_checkpoint", str(run / "checkpoints" / "step-00000002")]
    code, output = place.run_ranks(run.name, "--deepspeed", place.zero(3), *STOPPED, *named)
    assert code == 0 and "resumed after step 2" in output, output
    assert (run / "checkpoints" / "step-00000004.superseded").exists(), "nothing is lost"
    assert same_weights(run, whole)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--learning_rate", "0.5"], "learning_rate was 0.01, now it is 0.5 (name it in change_on_resume"),
        (["--seed", "7", "--max_length", "60"], "max_length was 64, now it is 60; seed was 42, now it is 7"),
        (["--lora_rank", "4"], "lora_rank was 8, now it is 4"),
        (["--loss_type", "ipo"], "loss_type was ['sigmoid'], now it is ['ipo']"),
    ],
)
def test_another_run_is_66_with_every_difference(place: Place, run: Path, change: list[str], said: str) -> None:
    before = digest(run)
    code, output = place.run_supervisor(run.name, *STOPPED, *change)
    assert code == 66 and said in output, output
    assert digest(run) == before


def test_a_learning_rate_may_change_with_consent(place: Place, run: Path) -> None:
    consent = ["--learning_rate", "0.005", "--change_on_resume", "learning_rate"]
    code, output = place.run_ranks(run.name, "--deepspeed", place.zero(3), *STOPPED, *consent)
    assert code == 0 and "resumed after step 4" in output, output


@pytest.mark.parametrize("what", ["model", "data"])
def test_other_content_under_the_same_name_is_66(place: Place, run: Path, what: str) -> None:
    settings = yaml.safe_load((place.folder / "run.yaml").read_text())
    other = place.folder / "other"
    shutil.rmtree(other, ignore_errors=True)
    shutil.copytree(place.folder / "model", other)
    if what == "model":
        save_model(other, tiny_llama_config(), seed=5)
        change = ["--model_name_or_path", str(other)]
    else:
        rows = (place.folder / "pairs.jsonl").read_text().splitlines()
        (other / "pairs.jsonl").write_text("\n".join(reversed(rows)))
        change = ["--dataset_dir", str(other)]
    assert settings["dataset"] == "pairs.jsonl"
    before = digest(run / "checkpoints")
    code, output = place.run_ranks(run.name, "--deepspeed", place.zero(3), *STOPPED, *change)
    assert code == 66 and f"the content of {what} was" in output, output
    assert digest(run / "checkpoints") == before


def test_a_finished_run_is_left_alone(place: Place, whole: Path) -> None:
    before = digest(whole)
    code, output = place.run_supervisor("whole", "--deepspeed", place.zero(3), *STOPPED)
    assert code == 0 and "nothing to do" in output
    assert digest(whole) == before


@pytest.mark.slow
def test_fresh_moves_the_earlier_run_aside_when_confirmed(place: Place, whole: Path, run: Path) -> None:
    before = digest(run)
    arguments = ["--deepspeed", place.zero(3), *STOPPED, "--fresh"]
    code, output = place.run_supervisor(run.name, *arguments)
    assert code == 66 and "--yes" in output and digest(run) == before
    code, output = place.run(run.name, *arguments, "--yes")
    assert code == 0 and "resumed" not in output, output
    assert same_weights(run, whole)
    [aside] = run.glob("replaced-*")
    assert before.items() <= digest(aside).items()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", "size=40m") as folder:
        yield folder


def fill(path: Path) -> None:
    """Leave no room."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT)
    with suppress(OSError):
        while True:
            os.write(file, b"x" * 4096)
    os.close(file)


def test_a_full_disk_is_told_before_the_steps_that_would_fill_it(place: Place, small_disk: Path) -> None:
    """An estimate in front of every interval."""
    (small_disk / "filler").write_bytes(b"x" * 30_000_000)
    code, output = place.run_ranks(str(small_disk / "out"), *STOPPED)
    assert code == 74 and "the next checkpoint takes" in output and "step 1/6" not in output, output


def test_a_disk_that_fills_during_a_save_leaves_the_earlier_checkpoints(place: Place, small_disk: Path) -> None:
    """Another job takes the room between the estimate and the write: once the second save has begun."""
    out = small_disk / "out"
    run = place.start(str(out), *STOPPED, ranks=1, DSDPO_FAULT="save:staged@2=10")
    assert run.until((out / "checkpoints" / "step-00000004.tmp").exists, "the second save")
    fill(small_disk / "filler")
    code, output = run.wait()
    assert code == 74 and "No space left" in output, output
    (small_disk / "filler").unlink()
    assert [c.step for c in checkpoints(RunDir(out)) if not c.problem] == [2]
    code, output = place.run_ranks(str(out), *STOPPED, ranks=1)
    assert code == 0 and "resumed after step 2" in output, output


@pytest.mark.slow
def test_a_save_beside_the_training_that_fails_is_an_error(place: Place, small_disk: Path) -> None:
    out = small_disk / "out"
    more = ["--max_steps", "5000", "--save_steps", "50", "--async_save", "true"]
    run = place.start(str(out), *more, ranks=1, DSDPO_FAULT="save:staged@1=10")
    assert run.until((out / "checkpoints" / "step-00000050.tmp").exists, "the save")
    fill(small_disk / "filler")
    code, output = run.wait()
    assert code == 74 and "No space left" in output, output
    assert not checkpoints(RunDir(out))


def test_a_read_only_folder(place: Place, tmp_path: Path) -> None:
    """A mount, since root may write into a folder without the right to."""
    with mounted(tmp_path / "disk", "ro") as folder:
        code, output = place.run_supervisor(str(folder / "out"), *STOPPED)
        assert code in (64, 74) and "Read-only" in output, output


def test_the_list_of_checkpoints_names_what_is_wrong(place: Place, run: Path) -> None:
    flip(run / "checkpoints" / "step-00000004" / "rank-00000-of-00002.safetensors")
    (run / "checkpoints" / "step-00000006.tmp").mkdir()

    def listed(*more: str) -> tuple[int, str]:
        line = ["python", "-m", "dsdpo", "checkpoints", str(run), *more]
        done = subprocess.run(line, capture_output=True, text=True)
        return done.returncode, done.stdout

    assert listed()[0] == 0
    code, text = listed("--verify")
    assert code == 66 and "step        4" in text and "NOT USABLE" in text and "verified" in text
    code, text = listed("--prune", "2")
    assert code == 0 and "step-00000006.tmp" in text
    assert json.loads((run / "checkpoints" / "step-00000002" / "MANIFEST.json").read_text())["step"] == 2
