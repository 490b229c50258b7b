"""A step whose examples have no token in the loss updates nothing, and the run goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param

from dsdpo.checkpoint.commit import checkpoints
from dsdpo.config.zero import ZeroConfig
from dsdpo.data.example import TokenizedExample
from dsdpo.engine.engine import start_process_group
from dsdpo.runtime.env import launched
from dsdpo.runtime.rundir import RunDir
from dsdpo.runtime.stop import StopFlag
from dsdpo.train.setup import set_up
from tests.dist.grid import run_config, take_steps
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import ListOfExamples, random_examples, save_model, save_tokenizer, tiny_llama_config

STEPS = 4


def train_with_empty_steps(model: str, folder: str, zero: int) -> dict[str, Any]:
    """Steps of one example, of which the first and the last have no loss token; the weights after each."""
    mesh = launched()
    assert mesh is not None
    place = Path(folder)
    config = run_config(
        model=model,
        folder=place,
        stage=zero,
        train_batch_size=1,
        max_steps=STEPS,
        weight_decay=0.1,
        seed=0,
        save_steps=1,
    ).model_copy(update={"stage": "sft"})
    settings = ZeroConfig.load(config)
    hardware = start_process_group(config, settings, mesh)
    examples = [
        TokenizedExample(
            e.prompt_ids, e.completion_ids, (np.zeros(len(e.completion_ids[0]), dtype=bool),) if i % 2 else None
        )
        for i, e in enumerate(random_examples(STEPS, (1,)))
    ]
    run = set_up(config, settings, mesh, hardware, ListOfExamples(examples), None, StopFlag(RunDir(place)))
    states: list[dict[str, np.ndarray]] = []
    end_step = run.end_step

    def looked_at(*args: Any) -> bool:
        named = run.engine.module.model.named_parameters()
        whole = {name: safe_get_full_fp32_param(p) if zero else p.data for name, p in named if p.requires_grad}
        states.append({name: value.cpu().numpy().copy() for name, value in whole.items()})
        return end_step(*args)

    run.end_step = looked_at  # type: ignore[method-assign]
    take_steps(run)
    run.saver.finish()
    run.reporter.close()
    order = [int(run.order.step_ids(step, 1, config.seed)[0]) % 2 for step in range(STEPS)]
    torch.distributed.destroy_process_group()
    lines = Path(config.output_dir, "metrics.jsonl").read_text().splitlines() if mesh.is_main else []
    saved = [checkpoint.step for checkpoint in checkpoints(RunDir(place / "out")) if not checkpoint.problem]
    return {"states": states, "empty": order, "lines": [json.loads(line) for line in lines], "saved": saved}


@pytest.mark.parametrize(("world", "zero"), [(1, 0), (2, 2), (2, 3)])
def test_it_updates_nothing_and_is_counted(tmp_path: Path, world: int, zero: int) -> None:
    save_model(tmp_path / "model", tiny_llama_config(tied=True))
    save_tokenizer(tmp_path / "model")
    function = "tests.dist.test_empty_step:train_with_empty_steps"
    found = run_ranks(function, world, str(tmp_path / "model"), str(tmp_path / "run"), zero)[0]
    assert found["empty"] == [1, 0, 0, 1] and len(found["lines"]) == STEPS
    assert sorted(found["saved"]) == [1, 2, 3, 4]
    for step in range(STEPS):
        line = found["lines"][step]
        assert ("skipped" in line) == bool(found["empty"][step]) and np.isfinite(line["loss"])
        if step == 0:
            continue
        before, after = found["states"][step - 1 : step + 1]
        same = all(np.array_equal(before[name], after[name]) for name in before)
        assert same == bool(found["empty"][step])
