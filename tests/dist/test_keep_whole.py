"""Parameters that ZeRO-3 leaves whole: the same training to the bit, with less done by Python."""

from __future__ import annotations

import cProfile
import pstats
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

from dsdpo.config.zero import ZeroConfig
from dsdpo.data.loader import Batch
from dsdpo.engine.engine import start_process_group
from dsdpo.engine.optimizer import optimizer_step
from dsdpo.runtime.env import launched
from dsdpo.runtime.rundir import RunDir
from dsdpo.runtime.stop import StopFlag
from dsdpo.train.run import Run
from dsdpo.train.setup import set_up
from tests.dist.grid import run_config
from tests.dist.test_elastic import STEPS as END
from tests.dist.test_elastic import assert_same, saved_state, task
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import ListOfExamples, random_pairs, save_model, save_tokenizer, tiny_llama_config

STEPS = 6  # DeepSpeed learns the order of the layers in the first two


def train_and_count(model: str, finetuning: str) -> list[dict[str, Any]]:
    """Train with every parameter partitioned, and as dsdpo does by default.

    Returns, for each: the losses, the sums of the trained weights' bits, and in one more micro-step, which updates
    nothing, the calls of Python functions, and of the one that gathers a layer.
    """
    mesh = launched()
    assert mesh is not None
    found = []
    for persist in (False, True):
        folder = Path(tempfile.mkdtemp())
        changes: dict[str, Any] = {"train_batch_size": 4, "max_steps": STEPS, "save_steps": None, "loss_weights": None}
        config = run_config(
            model, folder, 3, persist=persist, finetuning_type=finetuning, loss_type="simpo", seed=0, **changes
        )
        zero = ZeroConfig.load(config)
        hardware = start_process_group(config, zero, mesh)
        pairs = ListOfExamples(random_pairs(4 * STEPS))
        run = set_up(config, zero, mesh, hardware, pairs, None, StopFlag(RunDir(folder)))
        run.engine.train()
        losses = [_micro_step(run, batch, update=True) for _, batch in run.batches()]
        weights = [
            flat.view(torch.int32).long().sum().item() for flat in run.engine.optimizer.fp32_partitioned_groups_flat
        ]
        profile = cProfile.Profile()
        with counted_fetches() as fetches:
            profile.runcall(_micro_step, run, batch_of(run), update=False)
        stats: Any = pstats.Stats(profile)
        found.append({"losses": losses, "weights": weights, "calls": stats.total_calls, "fetches": len(fetches)})
        run.reporter.close()
        run.engine.destroy()
    torch.distributed.destroy_process_group()
    return found


@contextmanager
def counted_fetches() -> Iterator[list[None]]:
    """How often DeepSpeed gathers a layer's parameters."""
    own, calls = PartitionedParameterCoordinator.fetch_sub_module, []

    def fetch(*args: Any, **keywords: Any) -> None:
        calls.append(None)
        own(*args, **keywords)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(PartitionedParameterCoordinator, "fetch_sub_module", fetch)
        yield calls


def batch_of(run: Run) -> Batch:
    """A batch of the run, once more."""
    return next(iter(run.loader.training_batches(range(1), run.config.train_batch_size, run.config.seed)))


def _micro_step(run: Run, batch: Batch, update: bool) -> float:
    """Train on a batch of one micro-batch. Returns its loss."""
    (micro_batch,) = batch.micro_batches
    loss_of = run.objective.bind(batch, run.reference.logps(batch), run.forward)
    run.engine.set_gradient_accumulation_boundary(update)
    loss = loss_of(micro_batch, run.forward(micro_batch))
    run.engine.backward(loss.total, scale_wrt_gas=False)
    optimizer_step(run.engine)
    return float(loss.total.detach())


@pytest.mark.parametrize("finetuning", ["full", "lora"])
def test_one_rank_gathers_no_layer_and_learns_the_same(tmp_path: Path, finetuning: str) -> None:
    save_model(tmp_path / "model", tiny_llama_config(tied=False, num_hidden_layers=6))
    save_tokenizer(tmp_path / "model")
    (found,) = run_ranks("tests.dist.test_keep_whole:train_and_count", 1, str(tmp_path / "model"), finetuning)
    partitioned, whole = found
    assert whole["losses"] == partitioned["losses"] and whole["weights"] == partitioned["weights"]
    assert partitioned["fetches"] >= 12 and whole["fetches"] == 0
    if sys.version_info < (3, 12):  # from then on cProfile does not see what runs under torch.compiler.disable
        assert whole["calls"] < 0.5 * partitioned["calls"]


@pytest.mark.parametrize("kind", ["full", "lora", "quantized", "reward"])
def test_a_resumed_run_on_one_rank_is_the_same_to_the_bit(tmp_path: Path, kind: str) -> None:
    """As with every parameter partitioned: state and losses, after a checkpoint was read back into whole ones."""
    save_model(tmp_path / "model", tiny_llama_config(hidden_size=36, intermediate_size=52, head_dim=10))
    save_tokenizer(tmp_path / "model")
    tasks = [
        task(tmp_path, kind, "partitioned", stage=3, until=END, save=True),
        task(tmp_path, kind, "whole", stage=3, persist=True, until=2, save=True),
        task(tmp_path, kind, "whole", stage=3, persist=True, until=END, save=True),
    ]
    partitioned, _, resumed = run_ranks("tests.dist.moves:go", 1, tasks)[0]
    assert resumed["losses"] == partitioned["losses"]
    assert_same(saved_state(tmp_path / "whole"), saved_state(tmp_path / "partitioned"))
