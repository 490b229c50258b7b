"""The ranks' first meeting, between real processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.ranks import ROOT, free_port, rank_environment, run_commands
from tests.helpers.tiny import save_model, save_pairs, save_tokenizer, tiny_llama_config


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("meeting")
    save_model(folder / "model", tiny_llama_config())
    save_tokenizer(folder / "model")
    save_pairs(folder / "pairs.jsonl", 16)
    (folder / "run.yaml").write_text(
        f"model_name_or_path: {folder}/model\ndataset: pairs.jsonl\ndataset_dir: {folder}\nmax_length: 64\n"
        f"train_batch_size: 8\nmax_steps: 2\nprecision: fp32\nsave_steps:\ncache_dir: {folder}/cache\n"
    )
    return folder


def rank_line(rank: int, port: int, out: Path, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """Command line and environment of one of two ranks, as a launcher on a node of its own starts it."""
    line = ["train", str(out.parent / "run.yaml"), "--output_dir", str(out), *arguments]
    return line, {**rank_environment(rank, 2, port), "LOCAL_RANK": "0"}


def test_ranks_that_agree_train(place: Path) -> None:
    port = free_port()
    (code, output), (other, silent) = run_commands(*(rank_line(rank, port, place / "fine") for rank in (0, 1)))
    assert (code, other) == (0, 0), output + silent
    assert f"2 ranks on CPUs, on 1 node: {socket.gethostname()}" in output
    assert (place / "fine" / "COMPLETED").exists()


def test_a_setting_that_differs_on_a_rank_is_told_by_rank_0(place: Path) -> None:
    port = free_port()
    here, there = rank_line(0, port, place / "unlike"), rank_line(1, port, place / "unlike", "--beta", "0.5")
    (code, output), (other, silent) = run_commands(here, there)
    assert (code, other) == (64, 64), output + silent
    assert f"1. {socket.gethostname()}: run config: beta is 0.5, on {socket.gethostname()} it is 0.1" in output
    assert "beta" not in silent and not (place / "unlike" / "checkpoints").exists()


def test_what_is_wrong_on_another_rank_is_told_by_rank_0(place: Path) -> None:
    port = free_port()
    here = rank_line(0, port, place / "lacking")
    there = rank_line(1, port, place / "lacking", "--model_name_or_path", str(place / "away"))
    (code, output), (other, _) = run_commands(here, there)
    assert (code, other) == (64, 64)
    assert f"{socket.gethostname()}: model_name_or_path: there is no folder" in output


def test_ranks_that_do_not_share_output_dir_are_told(place: Path) -> None:
    port = free_port()
    here, there = rank_line(0, port, place / "one"), rank_line(1, port, place / "two")
    (code, output), (other, _) = run_commands(here, there)
    assert (code, other) == (64, 64)
    assert "two is not the folder that rank 0 writes to" in output


def test_a_rank_that_does_not_come_is_named(place: Path) -> None:
    started = time.monotonic()
    [(code, output)] = run_commands(rank_line(0, free_port(), place / "alone", "--start_timeout", "3"))
    assert code == 71 and "rank 1 of 2 did not come within 3 s" in output
    assert time.monotonic() - started < 120


def test_a_rank_0_that_does_not_answer_is_told_by_the_others(place: Path) -> None:
    port = free_port()
    [(code, output)] = run_commands(rank_line(1, port, place / "headless", "--start_timeout", "3"))
    assert code == 71 and f"got no answer from rank 0 at 127.0.0.1:{port}" in output


def test_a_port_in_use_is_told(place: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        [(code, output)] = run_commands(rank_line(0, port, place / "taken", "--start_timeout", "3"))
    assert code == 74 and f"port {port} of {socket.gethostname()}" in output and "--master_port" in output


@pytest.mark.slow
def test_torchrun(place: Path) -> None:
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    line += ["-m", "dsdpo", "train", str(place / "run.yaml"), "--output_dir", str(place / "torchrun")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(line, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (place / "torchrun" / "COMPLETED").exists()
