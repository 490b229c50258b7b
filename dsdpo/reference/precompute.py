"""The pass that computes the reference log-probs which the store lacks, on all ranks, before the first step."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from deepspeed import DeepSpeedEngine, comm

from dsdpo.config.schema import RunConfig
from dsdpo.data.loader import BatchLoader
from dsdpo.engine.engine import Hardware
from dsdpo.errors import IOFailure, NumericError, StopRequested
from dsdpo.model.adapters import reference_weights
from dsdpo.model.load import model_type, weights_digests
from dsdpo.model.lora import uses_fused_lora
from dsdpo.model.packed import PackedInputs
from dsdpo.objectives.sums import completion_sums
from dsdpo.reference.store import ReferenceStore, store_key
from dsdpo.runtime.collectives import any_rank
from dsdpo.runtime.env import Mesh
from dsdpo.runtime.progress import Progress
from dsdpo.runtime.stop import StopFlag

_EXAMPLES_PER_PASS = 64  # per rank, between two looks at the micro-batches' balance
_PASSES_PER_CHUNK = 16  # a killed pass repeats at most this many
_COUNTED_AT_ONCE = 1_000_000
_NOT_ASKED_FOR = np.iinfo(np.int64).max // 2  # beyond every array: to look up such an example is an IndexError
_STORE_FORMAT = 2
_SEEN_WITHIN_S = 60.0


def open_store(config: RunConfig, mesh: Mesh, hardware: Hardware) -> ReferenceStore:
    """The store of this run's reference, keyed by the true weights and by what changes a log-prob."""
    weights = list(weights_digests(config, mesh, hardware.device).values())
    key = store_key(what_changes_a_logp(config, hardware, weights))
    store = ReferenceStore(config.cache_path / "reference" / key)
    store.reload()
    return store


def what_changes_a_logp(config: RunConfig, hardware: Hardware, weights: list[str]) -> dict[str, object]:
    """The settings in a store's key. Kernels count where they are not transformers' own, so that stores from before
    the option are found."""
    kernels = hardware.kernels(config, lambda: model_type(config))
    return {
        "format": _STORE_FORMAT,
        "weights": weights,
        "dtype": str(hardware.dtype),
        "attention": hardware.attention(config.attn_implementation),
        "share_prefix": config.share_prefix,
        **({} if kernels == "none" else {"kernels": kernels}),
        # the base model alone is computed as ever; a continued adapter is rounded otherwise than by PEFT's forward
        **({"lora": "fused"} if config.adapter_name_or_path and uses_fused_lora(config) else {}),
    }


def find_or_compute(
    loader: BatchLoader,
    ids: np.ndarray,
    store: ReferenceStore,
    make_engine: Callable[[], DeepSpeedEngine],
    device: torch.device,
    say: Callable[[str], None],
    stop: StopFlag | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Reference log-probs of examples of a loader's set; what the store lacks is computed by all ranks and stored.

    Args:
        ids: int64, the examples that will be asked for; each once.
        make_engine: gives the untrained policy; without its new adapter, it is the reference. Called when some are
            missing.

    Returns:
        starts, int64 [examples of the set]: where the completions of an example begin among those of `ids`; logps, fp32
        [N, 2], of all completions of `ids`.

    Raises:
        NumericError: the reference gives a log-prob that is not finite.
        StopRequested: a rank was asked to stop; what was stored until then stays.
        IOFailure: ranks do not see what other ranks have stored.
    """
    source = loader.source
    wanted, counts = source.digests(ids), _counts(loader, ids)
    missing = np.flatnonzero(~_seen_by_main(store.find(wanted, counts)[0], device))
    if len(missing):
        say(f"reference: computing {len(missing)} of {len(ids)} examples, {store.folder}")
        _fill(ids[missing], wanted[missing], store, make_engine(), loader, device, stop)
        comm.barrier()
        store.reload()
    else:
        say(f"reference: all {len(ids)} examples found in {store.folder}")
    logps = _find_all(store, wanted, counts)
    bad = np.unique(np.repeat(np.arange(len(ids)), counts)[~np.isfinite(logps).all(axis=1)])
    if len(bad):
        raise NumericError(
            f"the reference gives no finite log-prob for {len(bad)} examples, the first at "
            f"{source.where(int(ids[bad[0]]))}: check the model and the precision, then remove {store.folder}"
        )
    starts = np.full(len(source), _NOT_ASKED_FOR)
    starts[ids] = np.cumsum(counts) - counts
    return starts, logps


def _counts(loader: BatchLoader, ids: np.ndarray) -> np.ndarray:
    """Completions of each example, int64 [B]."""
    parts = [ids[start : start + _COUNTED_AT_ONCE] for start in range(0, len(ids), _COUNTED_AT_ONCE)]
    return np.concatenate([loader.source.lengths(part).counts for part in parts] or [np.zeros(0, dtype=np.int64)])


def _seen_by_main(found: np.ndarray, device: torch.device) -> np.ndarray:
    """Rank 0's view of what the store has, bool [B], on all ranks: they compute what is missing in lock-step.

    While another job fills the store, or on a slow file system, ranks see it differently.
    """
    view = torch.from_numpy(found.astype(np.uint8)).to(device)
    comm.broadcast(view, src=0)
    return view.cpu().numpy().astype(bool)


def _find_all(store: ReferenceStore, wanted: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Log-probs of examples that are in the store; what another node wrote can take a while to be seen.

    Raises:
        IOFailure: some of it is not there.
    """
    deadline = time.monotonic() + _SEEN_WITHIN_S
    while True:
        found, logps = store.find(wanted, counts)
        if found.all():
            return logps
        if time.monotonic() > deadline:
            raise IOFailure(
                f"other ranks have reference log-probs of {(~found).sum()} of {len(wanted)} examples that are not seen "
                f"in {store.folder}: it must lie on a file system that all nodes share; set cache_dir"
            )
        time.sleep(1.0)
        store.reload()


def _fill(
    ids: np.ndarray,
    keys: np.ndarray,
    store: ReferenceStore,
    engine: DeepSpeedEngine,
    loader: BatchLoader,
    device: torch.device,
    stop: StopFlag | None,
) -> None:
    """Compute the examples `ids`, whose digests are `keys`; each rank writes those of its own micro-batches."""
    done: list[np.ndarray] = []
    counts: list[np.ndarray] = []
    values: list[torch.Tensor] = []

    def flush() -> None:
        if done:
            logps = torch.cat(values).cpu().numpy()
            store.write_chunks(keys[np.concatenate(done)], np.concatenate(counts), logps)
        done.clear()
        counts.clear()
        values.clear()

    engine.eval()
    per_pass = _EXAMPLES_PER_PASS * loader.mesh.dp_size
    progress = Progress("reference", len(ids), "examples")
    with torch.no_grad(), reference_weights(engine.module.model), progress:
        for number, batch in enumerate(loader.in_order(ids, per_pass)):
            for micro_batch in batch.micro_batches:
                output = engine(PackedInputs.of(micro_batch, device))
                if len(micro_batch.completions):
                    done.append(number * per_pass + micro_batch.examples)
                    counts.append(batch.lengths.counts[micro_batch.examples])
                    values.append(completion_sums(output, micro_batch.completions)[:, :2])
            progress.advance(len(batch.example_ids))
            if (number + 1) % _PASSES_PER_CHUNK == 0:
                flush()
            if any_rank(bool(stop), device):
                flush()
                raise StopRequested(
                    "stopped on request while the reference was computed; what is stored stays, and the same command "
                    "goes on from there"
                )
    flush()
    engine.train()
