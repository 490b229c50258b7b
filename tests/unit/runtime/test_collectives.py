"""What the ranks tell each other: the same on all of them, errors too, and no manifests to spare."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dsdpo.checkpoint.commit import RUN_FILE, commit, hashed_file, stage, step_folder
from dsdpo.checkpoint.resume import find_resume_point
from dsdpo.config.schema import RunConfig
from dsdpo.config.zero import ZeroConfig
from dsdpo.engine.engine import start_process_group
from dsdpo.errors import CheckpointError, ConfigError, Problem, config_error
from dsdpo.runtime.collectives import raise_on_any_rank, run_on_main
from dsdpo.runtime.env import launched
from dsdpo.runtime.rundir import RunDir
from tests.helpers.ranks import run_ranks

SHARD = "rank-00000-of-00001.safetensors"
MANIFEST_BYTES = 200_000
IDENTITY = {"dtype": "float32", "fingerprints": {"data": "d"}}


def save(config: RunConfig, step: int) -> Path:
    """A checkpoint with a long manifest and next to nothing else."""
    folder = step_folder(RunDir(Path(config.output_dir)), step)
    staged = stage(folder)
    run = IDENTITY | {"config": config.model_dump(mode="json"), "resumed_from": None}
    records = {}
    for name, content in {RUN_FILE: json.dumps(run).encode(), SHARD: b"x"}.items():
        with hashed_file(staged / name) as file:
            file.write(content)
        records[name] = file.record
    commit(staged, folder, records, {"step": step, "parameters": "p" * MANIFEST_BYTES})
    return folder


def agree(config: RunConfig) -> tuple[dict[str, Any], list[int], list[int]]:
    """Runs on every rank: what it is told, and the sizes of what finding a checkpoint gathers and sends."""
    mesh = launched()
    assert mesh is not None
    start_process_group(config, ZeroConfig.load(config), mesh)
    told: dict[str, Any] = {
        "value": run_on_main(mesh.is_main, lambda: {"rank": mesh.rank, "path": Path("a")}),
        "error on main": _error(lambda: run_on_main(mesh.is_main, _fail)),
        "error on 0": _error(lambda: raise_on_any_rank(_fail if mesh.is_main else int)),
        "error on 1": _error(lambda: raise_on_any_rank(_fail if mesh.rank == 1 else int)),
        "config error on 1": _error(lambda: raise_on_any_rank(_refuse if mesh.rank == 1 else int)),
    }
    gathered, sent = [], []
    gather, broadcast = torch.distributed.all_gather_object, torch.distributed.broadcast_object_list

    def count_gathered(object_list: list[Any], obj: Any, group: Any = None) -> None:
        gathered.append(len(pickle.dumps(obj)))
        gather(object_list, obj, group)

    def count_sent(object_list: list[Any], **arguments: Any) -> None:
        broadcast(object_list, **arguments)
        sent.append(len(pickle.dumps(object_list)))

    torch.distributed.all_gather_object, torch.distributed.broadcast_object_list = count_gathered, count_sent
    start = find_resume_point(config, mesh, IDENTITY | {"config": config.model_dump(mode="json")})
    assert start.checkpoint is not None
    told["start"] = (start.step, start.remarks, len(start.checkpoint.manifest["parameters"]))
    torch.distributed.destroy_process_group()
    return told, gathered, sent


def _fail() -> int:
    raise CheckpointError("damaged")


def _refuse() -> int:
    raise config_error("model-config", "model_name_or_path", "no")


def _error(work: Callable[[], object]) -> str | list[Problem] | None:
    try:
        work()
    except CheckpointError as error:
        return str(error)
    except ConfigError as error:
        return error.problems
    return None


@pytest.mark.parametrize("world_size", [1, 2])
def test_all_ranks_are_told_the_same_and_one_manifest_at_a_time(tmp_path: Path, world_size: int) -> None:
    config = RunConfig(model_name_or_path="m", dataset=["d"], output_dir=str(tmp_path / "out"))
    folders = [save(config, step) for step in range(1, 9)]
    (folders[-1] / SHARD).write_bytes(b"y")
    refused = Problem("model-config", "model_name_or_path", "rank 1: no")
    remark = f"checkpoint passed over: step-00000008: {SHARD} is damaged: its sha256 is not that of MANIFEST.json"
    for told, gathered, sent in run_ranks("tests.unit.runtime.test_collectives:agree", world_size, config):
        assert told == {
            "value": {"rank": 0, "path": Path("a")},
            "error on main": "damaged",
            "error on 0": "damaged",
            "error on 1": "rank 1: damaged" if world_size == 2 else None,
            "config error on 1": [refused] if world_size == 2 else None,
            "start": (7, [remark], MANIFEST_BYTES),
        }
        assert max(gathered) < 1000, "each GPU holds it as many times as there are ranks"
        assert max(sent) < 1.1 * MANIFEST_BYTES and sum(sent) < 2.2 * MANIFEST_BYTES, "of the two that were tried"
