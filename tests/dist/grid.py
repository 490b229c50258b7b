"""Training the same few steps in many settings; runs on every rank of a group."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsdpo.config.schema import RunConfig
from dsdpo.config.zero import ZeroConfig
from dsdpo.data.loader import BatchLoader
from dsdpo.data.packing import Segment
from dsdpo.engine.engine import build_engine, build_reference_engine, start_process_group
from dsdpo.errors import NumericError
from dsdpo.model.attention.register import PackedLayout
from dsdpo.reference import precompute
from dsdpo.reference.source import StoredReference, reference_source
from dsdpo.reference.store import ReferenceStore
from dsdpo.runtime.env import launched
from dsdpo.runtime.files import write_atomically
from dsdpo.runtime.rundir import RunDir
from dsdpo.runtime.stop import StopFlag
from dsdpo.train.loop import train
from dsdpo.train.run import Run
from dsdpo.train.setup import set_up
from tests.helpers.tiny import ListOfExamples, random_pairs

STEPS = 5


def zero_json(
    folder: Path, stage: int, offload: bool = False, persist: bool = False, more: dict[str, Any] | None = None
) -> str:
    """A DeepSpeed JSON of one ZeRO stage in which even tiny parameters are partitioned, unless they `persist`."""
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3 and not persist:
        zero["stage3_param_persistence_threshold"] = 0
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    if offload and stage == 3:
        zero["offload_param"] = {"device": "cpu"}
    text = json.dumps({"zero_optimization": {**zero, **(more or {})}})
    path = folder / f"zero{stage}-{sha256(text.encode()).hexdigest()[:8]}.json"
    write_atomically(path, text)  # ranks of a group may share the folder
    return str(path)


def run_config(
    model: str,
    folder: Path,
    stage: int = 0,
    offload: bool = False,
    persist: bool = False,
    zero: dict[str, Any] | None = None,
    **changes: Any,
) -> RunConfig:
    """A short run on a tiny model; `zero` are more keys of the JSON's block."""
    settings: dict[str, Any] = {
        "model_name_or_path": model,
        "finetuning_type": "full",
        "lora_rank": 4,
        "dataset": "memory",
        "max_length": 64,
        "max_tokens_per_row": 512,
        "train_batch_size": 8,
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "linear",
        "warmup_steps": 1,
        "beta": 0.5,
        "max_grad_norm": 0.5,
        "loss_type": "sigmoid,sft",
        "loss_weights": [1.0, 0.3],
        "precision": "fp32",
        "deepspeed": zero_json(folder, stage, offload, persist, zero),
        "output_dir": str(folder / "out"),
        "disable_tqdm": True,
        **changes,
    }
    return RunConfig(**settings)


def logits_of(engine: Any, ids: list[int]) -> torch.Tensor:
    """The engine's own logits [T, V] for one sequence; a collective call under ZeRO-3."""
    layout = PackedLayout([Segment(0, len(ids))], torch.device("cpu"))
    engine.eval()
    with torch.no_grad():
        positions = torch.arange(len(ids))[None]
        output = engine.module.model(input_ids=torch.tensor([ids]), position_ids=positions, packed_layout=layout)
    return output.logits[0]


def take_steps(run: Run) -> int:
    """Train without what follows the last step. Returns how many steps have been taken."""
    run.finish = run.flush  # type: ignore[method-assign]
    train(run)
    return run.done


def train_and_export(cases: list[dict[str, Any]], folders: list[str], ids: list[int]) -> list[Any]:
    """Train each case for a few steps, export it to its folder, and return the engine's logits for `ids`."""
    mesh = launched()
    assert mesh is not None
    logits = []
    for case, folder in zip(cases, folders, strict=True):
        config = run_config(folder=Path(folder), **case)
        zero = ZeroConfig.load(config)
        hardware = start_process_group(config, zero, mesh)
        pairs = ListOfExamples(random_pairs(17))
        run = set_up(config, zero, mesh, hardware, pairs, None, StopFlag(RunDir(Path(folder))))
        take_steps(run)
        run.saver.save(config.max_steps or 0)
        run.export()
        run.reporter.close()
        logits.append(logits_of(run.engine, ids).numpy())
        run.engine.destroy()
    torch.distributed.destroy_process_group()
    return logits


def fill_store(folder: str, runs: list[dict[str, Any]]) -> list[tuple[int, np.ndarray | str]]:
    """Ask for the reference of some pairs in several runs, one after another.

    Args:
        folder: shared by the ranks.
        runs: changes to `run_config`, and: `pairs`, how many the run has; `store`, a name: runs of one name share it;
            `damage`, whether chunks of the store are damaged first; `blind`, a rank that sees the store only at its
            second look; `die_after` so many chunks the ranks die, as by a power cut.

    Returns:
        For each run: how many pairs all ranks computed together, and the reference as the run got it, or the error.
    """
    mesh = launched()
    assert mesh is not None
    precompute._EXAMPLES_PER_PASS, precompute._PASSES_PER_CHUNK = 2, 1
    write_chunks = ReferenceStore.write_chunks
    results: list[tuple[int, np.ndarray | str]] = []
    for run in runs:
        changes = dict(run)
        n_pairs, die_after = changes.pop("pairs"), changes.pop("die_after", None)
        store = Path(folder, changes.pop("store", "store"))
        damage, blind = changes.pop("damage", False), changes.pop("blind", None)
        config = run_config(folder=Path(tempfile.mkdtemp()), cache_dir=str(store), max_tokens_per_row=128, **changes)
        zero = ZeroConfig.load(config)
        hardware = start_process_group(config, zero, mesh)
        if damage and mesh.is_main:
            _damage_chunks(store)
        engine = build_engine(config, zero, mesh, hardware)
        written = _Counted(write_chunks, die_after)
        ReferenceStore.write_chunks = written.write_chunks  # type: ignore[method-assign]
        if blind == mesh.rank:
            ReferenceStore.reload = _blind_once(ReferenceStore.reload)  # type: ignore[method-assign]
        source = reference_source(config.reference_kind, config, zero, mesh, hardware, engine, lambda line: None)
        loader = BatchLoader(ListOfExamples(random_pairs(n_pairs)), mesh, 128, config.share_prefix)
        try:
            reference = source(loader, np.arange(n_pairs))
            assert isinstance(reference, StoredReference)
            found: np.ndarray | str = reference._logps.reshape(-1, 2, 2)
        except NumericError as error:
            found = str(error)
        total = torch.tensor(written.pairs)
        torch.distributed.all_reduce(total)
        results.append((int(total), found))
        engine.destroy()
    torch.distributed.destroy_process_group()
    return results


class _Counted:
    """ReferenceStore.write_chunks that counts pairs, and ends the process at the chunk after `die_after`."""

    def __init__(self, write_chunks: Any, die_after: int | None) -> None:
        self.pairs, self.chunks, self.die_after = 0, 0, die_after
        self._write_chunks = write_chunks

    @property
    def write_chunks(self) -> Any:
        def write(store: ReferenceStore, digests: np.ndarray, counts: np.ndarray, logps: np.ndarray) -> None:
            if self.chunks == self.die_after:
                os._exit(9)
            self._write_chunks(store, digests, counts, logps)
            self.chunks, self.pairs = self.chunks + 1, self.pairs + len(digests)

        return write


def _blind_once(reload: Any) -> Any:
    """ReferenceStore.reload whose first call finds nothing and puts the true one back."""

    def look(store: ReferenceStore) -> None:
        ReferenceStore.reload = reload  # type: ignore[method-assign]

    return look


def _damage_chunks(store: Path) -> None:
    """Flip a bit of one chunk, cut another short."""
    first, second, *_ = sorted(store.glob("reference/*/*.safetensors"))
    content = bytearray(first.read_bytes())
    content[-3] ^= 4
    first.write_bytes(content)
    second.write_bytes(second.read_bytes()[:20])


def parameter_bytes(folder: str, model: str) -> tuple[int, int]:
    """What this rank holds of the parameters of policy and live reference between two ZeRO-3 steps, in bytes."""
    mesh = launched()
    assert mesh is not None
    config = run_config(model, Path(folder), stage=3, reference="live")
    zero = ZeroConfig.load(config)
    hardware = start_process_group(config, zero, mesh)
    engines = build_engine(config, zero, mesh, hardware), build_reference_engine(config, zero, mesh, hardware)
    held = [sum(p.data.nbytes + p.ds_tensor.nbytes for p in engine.module.parameters()) for engine in engines]
    torch.distributed.destroy_process_group()
    return held[0], held[1]


def second_copies(folder: str, model: str, hpz: int) -> list[dict[str, int]]:
    """Elements that this rank keeps of the second copy of the parameters, under hpZ, of policy and live reference.

    Returns:
        For each: `first` and `second`, what it holds of the one and the other copy; `whole`, the parameters' elements.
    """
    mesh = launched()
    assert mesh is not None
    config = run_config(model, Path(folder), stage=3, reference="live", zero={"zero_hpz_partition_size": hpz})
    zero = ZeroConfig.load(config)
    hardware = start_process_group(config, zero, mesh)
    found = []
    for engine in (build_engine(config, zero, mesh, hardware), build_reference_engine(config, zero, mesh, hardware)):
        parameters = list(engine.module.parameters())
        found.append(
            {
                "first": sum(p.ds_tensor.numel() for p in parameters),
                "second": sum(p.ds_secondary_tensor.numel() for p in parameters),
                "whole": sum(p.ds_numel for p in parameters),
            }
        )
    torch.distributed.destroy_process_group()
    return found


def run_cases(cases: list[dict[str, Any]], n_pairs: int) -> list[dict[str, Any]]:
    """Train each case (changes to `run_config`) for a few steps in one process group.

    Returns, for each case: the metrics of each step, this rank's example ids of each step, micro-steps of each step.
    """
    mesh = launched()
    assert mesh is not None
    pairs = ListOfExamples(random_pairs(n_pairs))
    results = []
    for case in cases:
        folder = Path(tempfile.mkdtemp())
        config = run_config(folder=folder, **case)
        zero = ZeroConfig.load(config)
        hardware = start_process_group(config, zero, mesh)
        run = set_up(config, zero, mesh, hardware, pairs, None, StopFlag(RunDir(folder)))
        batches = list(run.loader.training_batches(range(STEPS), config.train_batch_size, config.seed))
        take_steps(run)
        run.reporter.close()
        metrics = Path(config.output_dir, "metrics.jsonl")
        results.append(
            {
                "metrics": [json.loads(line) for line in metrics.read_text().splitlines()] if mesh.is_main else [],
                "example_ids": [
                    [i for m in b.micro_batches for i in b.example_ids[m.examples].tolist()] for b in batches
                ],
                "micro_steps": [len(b.micro_batches) for b in batches],
            }
        )
        run.engine.destroy()
        shutil.rmtree(folder)
    torch.distributed.destroy_process_group()
    return results
