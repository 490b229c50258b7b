"""Going on from a checkpoint: which one, whether it belongs to this run, and its state into the engine."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from safetensors import safe_open

from dsdpo.checkpoint.commit import (
    Checkpoint,
    clear_unfinished,
    none_usable,
    read,
    read_run,
    resume_candidates,
    supersede_later,
    verify,
)
from dsdpo.checkpoint.fragments import Fragments, rank_file
from dsdpo.checkpoint.identity import config_diff, refusal
from dsdpo.checkpoint.random_state import random_keys, seed_anew, set_random_state
from dsdpo.config.schema import RunConfig
from dsdpo.engine.zero_state import iter_state_shards, set_adam_step, sync_model_weights, trainable_shapes
from dsdpo.errors import CheckpointError, IOFailure
from dsdpo.runtime.collectives import all_gather_object, raise_on_any_rank, run_on_main
from dsdpo.runtime.env import Mesh
from dsdpo.runtime.rundir import RunDir


@dataclass(frozen=True)
class ResumePoint:
    """Where a process begins.

    Attributes:
        identity: of this run.
        checkpoint: to go on from, or None.
        run: what its run.json says; empty without a checkpoint.
        remarks: lines for the reader.
    """

    identity: dict[str, Any]
    checkpoint: Checkpoint | None
    run: dict[str, Any]
    remarks: list[str]

    @property
    def step(self) -> int:
        """Optimizer steps taken before."""
        return self.checkpoint.step if self.checkpoint else 0

    def row_tokens(self, mesh: Mesh, facts: dict[str, Any], found: int) -> int | None:
        """The longest row of the processes before, of rows that come from memory; None where there were none, or with
        another number of ranks.

        Args:
            facts: what the length depends on. Where they were others, or not recorded, it is `found` at most.
        """
        before = self.run.get("row_tokens")
        if before is None or self.run.get("world_size") != mesh.world_size:
            return None
        return before if self.run.get("row_facts") == facts else min(before, found)


NO_RESUME_POINT = ResumePoint({}, None, {}, [])


def find_resume_point(config: RunConfig, mesh: Mesh, identity: dict[str, Any]) -> ResumePoint:
    """Find the checkpoint that the config names, or the newest that is whole.

    Every byte is read and hashed, each rank taking its share of the files. Manifests grow with the number of ranks that
    saved: only those that are tried are sent, one at a time. A collective call.

    Args:
        identity: of this run, as `run_metadata.identity` gives it.

    Raises:
        CheckpointError: the one that is named, or every one that there is, is damaged; or the run is another one.
        IOFailure: the file system could not read one that may be whole: passed over, it would be set aside.
    """
    found = run_on_main(mesh.is_main, lambda: _look(config))
    faults = []
    for folder in found:
        checkpoint = run_on_main(mesh.is_main, partial(_read_surely, folder))
        files = sorted(checkpoint.manifest.get("files", {}))[mesh.rank :: mesh.world_size]
        problems = [problem for problem in all_gather_object(verify(checkpoint, files)) if problem]
        if problems:
            faults.append(f"{checkpoint.path.name}: {problems[0]}")
            continue
        run, more = run_on_main(mesh.is_main, partial(_own_run, checkpoint, config, identity))
        remarks = [*(f"checkpoint passed over: {fault}" for fault in faults), *more]
        return ResumePoint({**identity, "resumed_from": run["resumed_from"]}, checkpoint, run, remarks)
    if found:
        raise none_usable(config, faults)
    return ResumePoint({**identity, "resumed_from": None}, None, {}, [])


def _look(config: RunConfig) -> list[Path]:
    clear_unfinished(RunDir(Path(config.output_dir)))
    return [checkpoint.path for checkpoint in resume_candidates(config)]


def _read_surely(folder: Path) -> Checkpoint:
    checkpoint = read(folder)
    if checkpoint.uncertain:
        raise IOFailure(
            f"{folder}: {checkpoint.problem}; the same command tries again, or goes on from an earlier one where you "
            "move this one away"
        )
    return checkpoint


def _own_run(checkpoint: Checkpoint, config: RunConfig, now: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What run.json of a checkpoint says, where it belongs to this run, and remarks. Raises CheckpointError."""
    run = read_run(checkpoint.path)
    lines = config_diff(run["config"], now["config"], config.change_on_resume)
    remarks = []
    if run["dtype"] != now["dtype"]:
        lines.append(f"precision was {run['dtype']}, now it is {now['dtype']}")
    for what in sorted(run["fingerprints"].keys() | now["fingerprints"].keys()):
        was, is_now = run["fingerprints"].get(what, "none"), now["fingerprints"].get(what, "none")
        if was == is_now:
            continue
        changed = what if what == "quantization" else f"the content of {what}"
        line = f"{changed} was {was}, now it is {is_now}"
        if what == "data":
            difference = _earlier_reading(run, now)
            if not difference:
                remarks.append(_SAME_DATA.format(now["examples"]))
                continue
            line = f"{line}{difference}"
        lines.append(line)
    if lines:
        raise CheckpointError(refusal(str(checkpoint.path), lines))
    supersede_later(RunDir(Path(config.output_dir)), checkpoint)
    if config.resume_from_checkpoint:
        run["resumed_from"] = str(Path(config.resume_from_checkpoint).resolve())
    return run, remarks


_SAME_DATA = "the run was begun by an earlier version; its {} examples come from the same files and settings"


def _earlier_reading(run: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs in the data of a run that an earlier version began; "" where the run can continue.

    It can where the inputs are the same and give as many examples.
    """
    if run.get("template_date", now.get("template_date")) != now.get("template_date"):
        return f" (the chat template wrote the date {run['template_date']}, now it is {now['template_date']})"
    if "template_date" not in run and now.get("template_date") and 3 not in now["earlier_fingerprints"]:
        return (
            " (the chat template writes the date, and an earlier version took that of the day on which the data were "
            "prepared; set template_date to that day)"
        )
    if run["fingerprints"].get("data") not in now["earlier_fingerprints"].values():
        return " (other files or settings)"
    made = run["order"].get("examples", run["order"].get("pairs"))
    if made != now["examples"]:
        return (
            f" (an earlier version made {made} examples of the same files, this one makes "
            f"{now['examples']}; dropped_rows.jsonl beside the prepared data says why. Finish the run with the version "
            "that began it)"
        )
    return ""


def restore(engine: DeepSpeedEngine, checkpoint: Checkpoint, config: RunConfig, mesh: Mesh) -> None:
    """Put a checkpoint's state into an engine that has not trained yet, whatever its ranks and ZeRO stage.

    A collective call.

    Raises:
        CheckpointError: the model has other trainable parameters, or a file cannot be read.
    """
    step = run_on_main(mesh.is_main, lambda: int(read_run(checkpoint.path)["adam_step"]))
    raise_on_any_rank(lambda: _fill(engine, checkpoint, step))
    sync_model_weights(engine)
    engine.global_steps = checkpoint.step
    raise_on_any_rank(lambda: _restore_random(checkpoint, config, mesh))


def _fill(engine: DeepSpeedEngine, checkpoint: Checkpoint, adam_step: int) -> None:
    set_adam_step(engine, adam_step)
    manifest = checkpoint.manifest
    with Fragments(checkpoint.path, manifest["parameters"], manifest["world_size"]) as fragments, torch.no_grad():
        fragments.check(trainable_shapes(engine))
        for pieces in iter_state_shards(engine, changes=True):
            fragments.fill(pieces)


def _restore_random(checkpoint: Checkpoint, config: RunConfig, mesh: Mesh) -> None:
    if checkpoint.manifest["world_size"] != mesh.world_size:
        seed_anew(config.seed, checkpoint.step, mesh.rank)
        return
    with safe_open(checkpoint.path / rank_file(mesh.rank, mesh.world_size), framework="pt") as file:
        set_random_state({key: file.get_tensor(key) for key in random_keys(set(file.keys()))})
