"""What a step computes depends on the data-parallel ranks alone."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from dsdpo.config.zero import ZeroConfig
from dsdpo.engine.engine import start_process_group
from dsdpo.runtime.env import Mesh
from dsdpo.runtime.rundir import RunDir
from dsdpo.runtime.stop import StopFlag
from dsdpo.train.setup import set_up
from tests.dist.grid import STEPS, run_config, take_steps
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import ListOfExamples, random_pairs, save_model, save_tokenizer, tiny_llama_config


def train_as(places: list[Mesh], folder: Path) -> list[list[dict[str, float]]]:
    """Train on one process that takes itself for each of `places`. Returns the metrics of all steps and evaluations."""
    found = []
    for number, mesh in enumerate(places):
        out = folder / f"run-{number}"
        out.mkdir()
        config = run_config(str(folder / "model"), out, eval_steps=2, max_tokens_per_row=128, save_steps=None)
        zero = ZeroConfig.load(config)
        hardware = start_process_group(config, zero, mesh)
        pairs, held_out = ListOfExamples(random_pairs(17)), ListOfExamples(random_pairs(9, seed=1))
        run = set_up(config, zero, mesh, hardware, pairs, held_out, StopFlag(RunDir(out)))
        take_steps(run)
        run.reporter.close()
        found.append([json.loads(line) for line in Path(config.output_dir, "metrics.jsonl").read_text().splitlines()])
        run.engine.destroy()
    torch.distributed.destroy_process_group()
    return found


def test_one_of_two_sequence_parallel_ranks_steps_as_one_rank_alone(tmp_path: Path) -> None:
    """Batches, scale of the loss and sums: to the bit."""
    save_model(tmp_path / "model", tiny_llama_config())
    save_tokenizer(tmp_path / "model")
    places = [Mesh(0, 1, 0), Mesh(0, 2, 0, sp_size=2)]
    [(alone, shared)] = run_ranks("tests.dist.test_mesh:train_as", 1, places, tmp_path)
    assert len(alone) == len(shared) > STEPS
    measured = {"step_time", "memory_peak_gb", "logical_tokens_per_second", "physical_tokens_per_second"}
    for one, other in zip(alone, shared):
        assert one.keys() == other.keys()
        assert {key: one[key] for key in one.keys() - measured} == {key: other[key] for key in one.keys() - measured}
