"""Whole runs as a user types them: the supervisor, the real `deepspeed` launcher, two ranks, a tiny model."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from dsdpo.checkpoint.commit import checkpoints
from dsdpo.compat import can_swap
from dsdpo.runtime.rundir import RunDir
from tests.helpers.disks import mounted
from tests.helpers.nvme import built_async_io
from tests.helpers.ranks import free_port, run_as_ranks
from tests.helpers.runs import save_run

ROOT = Path(__file__).parents[2]
METRICS = {
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "grad_norm",
    "learning_rate",
    "logical_tokens_per_second",
    "physical_tokens_per_second",
    "step_time",
    "memory_peak_gb",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data, and run.yaml."""
    folder = tmp_path_factory.mktemp("runs")
    zero3 = str(ROOT / "ds_configs" / "zero3.json")
    return save_run(
        folder, val_size=8, max_steps=6, precision="fp32", deepspeed=zero3, output_dir=str(folder / "first")
    )


def start(place: Path, *arguments: str, command: str = "train") -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    line = [sys.executable, "-m", "dsdpo", command, str(place / "run.yaml"), "--num_accelerators", "2", *arguments]
    return subprocess.Popen(
        line, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def run(place: Path, *arguments: str, command: str = "train") -> tuple[int, str]:
    """Exit code and output."""
    process = start(place, *arguments, command=command)
    output, _ = process.communicate(timeout=600)
    return process.returncode, output


def run_forked(place: Path, *arguments: str, command: str = "train") -> tuple[int | None, str]:
    """As `run`, by two ranks alone: for what is not about supervisor and launcher."""
    return run_as_ranks(2, command, str(place / "run.yaml"), *arguments)


def metrics_of(output_dir: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Lines of training steps, and of evaluations."""
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [x for x in lines if "loss" in x], [x for x in lines if "eval_loss" in x]


@pytest.fixture(scope="module")
def first(place: Path) -> tuple[int, str]:
    arguments = ["--eval_steps", "2", "--save_steps", "4", "--report_to", "tensorboard", "--plot_loss", "true"]
    return run(place, *arguments)


def test_a_run_leaves_everything_behind(place: Path, first: tuple[int, str]) -> None:
    code, output = first
    assert code == 0, output
    out = place / "first"
    steps, evaluations = metrics_of(out)
    assert [x["step"] for x in steps] == list(range(1, 7))
    assert all(x.keys() >= METRICS for x in steps)
    assert [x["step"] for x in evaluations] == [2, 4, 6]
    assert {f"eval_{name}" for name in ("loss", "rewards/accuracies", "rewards/margins")} <= evaluations[0].keys()
    assert (out / "final" / "adapter_model.safetensors").exists()
    assert [(c.step, c.problem) for c in checkpoints(RunDir(out))] == [(6, ""), (4, "")]
    assert (out / "COMPLETED").exists() and (out / "loss.png").stat().st_size > 5000
    assert list((out / "tensorboard").iterdir())
    assert yaml.safe_load((out / "run_config.yaml").read_text())["learning_rate"] == 0.01
    card = (out / "final" / "README.md").read_text()
    assert "library_name: peft" in card and "fingerprint" in card and "| held-out loss |" in card
    assert "![loss](loss.png)" in card and (out / "final" / "loss.png").exists()


def test_the_output_names_loss_accuracy_margin_speed_and_time_left(first: tuple[int, str]) -> None:
    line = next(line for line in first[1].splitlines() if line.startswith("step 3/6"))
    assert all(word in line for word in ("loss", "acc", "margin", "tok/s", "left"))


def test_at_step_1_the_policy_is_the_reference(place: Path, first: tuple[int, str]) -> None:
    assert metrics_of(place / "first")[0][0]["loss"] == pytest.approx(np.log(2), abs=1e-5)


def test_a_finished_output_dir_is_not_touched(place: Path, first: tuple[int, str]) -> None:
    before = (place / "first" / "metrics.jsonl").read_text()
    code, output = run(place)
    assert code == 0 and "finished: nothing to do" in output
    assert (place / "first" / "metrics.jsonl").read_text() == before


def test_eval_of_the_trained_weights_gives_the_last_evaluation(place: Path, first: tuple[int, str]) -> None:
    final = str(place / "first" / "final")
    code, output = run_forked(place, "--model", final, "--output_dir", str(place / "eval"), command="eval")
    assert code == 0, output
    found = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
    expected = metrics_of(place / "first")[1][-1]
    assert found["examples"] == 8
    assert found["loss"] == pytest.approx(expected["eval_loss"], abs=1e-5)
    assert found["rewards/margins"] == pytest.approx(expected["eval_rewards/margins"], abs=1e-4)


def test_another_beta_finds_its_reference_in_the_store(place: Path, first: tuple[int, str]) -> None:
    code, output = run_forked(place, "--beta", "0.3", "--max_steps", "1", "--output_dir", str(place / "beta"))
    assert code == 0 and "found in" in output and "computing" not in output


def test_a_loss_that_is_not_finite_ends_with_70_and_names_step_and_pairs(place: Path) -> None:
    out = place / "nan"
    code, output = run(place, "--learning_rate", "1e30", "--output_dir", str(out))
    assert code == 70, output
    assert "step 2: " in output and "pairs.jsonl:" in output
    assert not (out / "final").exists() and not (out / "COMPLETED").exists()
    assert not checkpoints(RunDir(out)), "nothing that is not finite is saved"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_request_saves_and_ends_with_75(place: Path, number: signal.Signals) -> None:
    out = place / number.name
    process = start(place, "--max_steps", "100000", "--output_dir", str(out))
    deadline = time.monotonic() + 600
    while not (out / "metrics.jsonl").exists() or len((out / "metrics.jsonl").read_text().splitlines()) < 3:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.2)
    process.send_signal(number)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 75, output
    assert not checkpoints(RunDir(out))[0].problem and not (out / "final").exists() and not (out / "COMPLETED").exists()


def test_under_torchrun_it_is_a_rank_and_prepares_by_itself(place: Path) -> None:
    out = place / "torchrun"
    line = ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port()), "-m", "dsdpo", "train"]
    arguments = [str(place / "run.yaml"), "--output_dir", str(out), "--cache_dir", str(place / "other-cache")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", *line, *arguments],
        cwd=ROOT,
        env=environment,
        text=True,
        capture_output=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (out / "COMPLETED").exists()
    assert done.stdout.count("32 of them in this split") == 1, "only the main rank reports"
    np.testing.assert_allclose(
        [x["loss"] for x in metrics_of(out)[0]], [x["loss"] for x in metrics_of(place / "first")[0]], rtol=1e-4
    )


def test_hpz_that_does_not_fit_the_ranks_is_told(place: Path) -> None:
    """The number of ranks is not known before they are started."""
    out = place / "hpz"
    arguments = ["--deepspeed", str(ROOT / "ds_configs" / "zero3_hpz.json"), "--output_dir", str(out)]
    code, output = run_forked(place, *arguments)
    assert code == 64, output
    assert "zero_hpz_partition_size is 8, but 2 ranks train" in output and "allowed for 2: 1, 2." in output


@pytest.mark.slow
@pytest.mark.skipif(not can_swap(), reason="libaio with its headers is not installed (libaio-dev)")
def test_a_run_that_offloads_to_nvme_leaves_nothing_there(place: Path) -> None:
    built_async_io()
    settings = json.loads((ROOT / "ds_configs" / "zero3_nvme.json").read_text())
    settings["zero_optimization"]["offload_optimizer"]["nvme_path"] = str(place / "disk")
    (place / "nvme.json").write_text(json.dumps(settings))
    arguments = ["--deepspeed", str(place / "nvme.json"), "--output_dir", str(place / "nvme"), "--save_steps", "4"]
    code, output = run(place, *arguments)
    assert code == 64 and f"has no folder {place / 'disk'};" in output, output
    with mounted(place / "disk", "size=4k"):
        code, output = run(place, *arguments)
        assert code == 74 and f"GiB on {socket.gethostname()}, but {place / 'disk'} has 0.00 GiB free" in output, output
    code, output = run(place, *arguments)
    assert code == 0, output
    assert [(c.step, c.problem) for c in checkpoints(RunDir(place / "nvme"))] == [(6, ""), (4, "")]
    assert list((place / "disk").iterdir()) == []
