"""Reference log-probs for the training step: from the store, which a pass over the data fills, or computed live."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol, TypeAlias

import numpy as np
import torch
from deepspeed import DeepSpeedEngine, comm

from dsdpo.config.schema import RunConfig
from dsdpo.config.zero import ZeroConfig
from dsdpo.data.loader import Batch, PairLoader
from dsdpo.engine.engine import Hardware, build_reference_engine, held_here
from dsdpo.errors import IOFailure, NumericError, StopRequested
from dsdpo.model.adapters import reference_weights
from dsdpo.model.attention.register import choose
from dsdpo.model.load import weights_digests
from dsdpo.model.packed import RowTensors
from dsdpo.reference.store import ReferenceStore, store_key
from dsdpo.runtime.collectives import any_rank
from dsdpo.runtime.env import Mesh
from dsdpo.runtime.stop import StopFlag

_PAIRS_PER_PASS = 64  # per data-parallel rank, between two looks at the rows' balance
_PASSES_PER_CHUNK = 16  # a killed pass repeats at most this many
_STORE_FORMAT = 2
_SEEN_WITHIN_S = 60.0


Stop: TypeAlias = StopFlag | None


class Reference(Protocol):
    """Where the training step gets reference log-probs from."""

    def of_step(self, batch: Batch) -> list[torch.Tensor | None]:
        """For each of this rank's rows: fp32 [2P, 2], chosen and rejected in turn, in the two sums of `PackedModel`.

        None where there is no reference. A collective call when the reference is live.
        """
        ...


class NoReference:
    """For losses that need none."""

    def of_step(self, batch: Batch) -> list[torch.Tensor | None]:
        """None for each row."""
        return [None] * len(batch.rows)


class StoredReference:
    """Reference log-probs for the pairs of one prepared set, all in memory: 16 bytes a pair.

    Args:
        logps: fp32 [N, 2, 2], of chosen and rejected of pair i.
        device: where the training step wants them.
    """

    def __init__(self, logps: np.ndarray, device: torch.device) -> None:
        self._logps = logps
        self._device = device

    def of_step(self, batch: Batch) -> list[torch.Tensor | None]:
        """Looked up."""
        return [self._of_row(batch.pair_ids[row.pairs]) for row in batch.rows]

    def _of_row(self, pair_ids: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(self._logps[pair_ids].reshape(-1, 2)).to(self._device, non_blocking=True)


class LiveReference:
    """Computed in every step, by the policy's own engine without its adapter or by a frozen engine beside it.

    Args:
        engine: of the policy, when it has an adapter; else one of `build_reference_engine`.
        device: of the engine.
    """

    def __init__(self, engine: DeepSpeedEngine, device: torch.device) -> None:
        self._engine = engine
        self._device = device

    def of_step(self, batch: Batch) -> list[torch.Tensor | None]:
        """A forward pass without gradients over each row, in eval mode."""
        engine, trains = self._engine, self._engine.training
        engine.eval()
        with torch.no_grad(), reference_weights(engine.module.model):
            found = [engine(RowTensors.from_row(row, self._device))[: 2 * len(row.pairs), :2] for row in batch.rows]
        engine.train(trains)
        return list(found)


def reference_source(
    config: RunConfig,
    zero: ZeroConfig,
    mesh: Mesh,
    hardware: Hardware,
    engine: DeepSpeedEngine,
    say: Callable[[str], None],
    stop: Stop = None,
) -> Callable[[PairLoader, np.ndarray], Reference]:
    """How a run gets the reference of a set: a function of the set's loader and the pairs that will be asked for.

    Args:
        engine: the untrained policy.
        say: where progress is told.
        stop: true once this rank is asked to stop.
    """
    if config.reference_kind == "none":
        return lambda loader, ids: NoReference()
    if config.reference_kind == "live":
        frozen = engine
        if config.finetuning_type != "lora":
            frozen = build_reference_engine(config, zero, mesh, hardware)
            say(f"reference: a frozen engine, {held_here(frozen)}")
        live = LiveReference(frozen, hardware.device)
        return lambda loader, ids: live
    store = open_store(config, mesh, hardware)
    return lambda loader, ids: reference_for(loader, ids, store, lambda: engine, hardware.device, say, stop)


def open_store(config: RunConfig, mesh: Mesh, hardware: Hardware) -> ReferenceStore:
    """The store of this run's reference, keyed by the true weights and by what changes a log-prob."""
    key = store_key(
        {
            "format": _STORE_FORMAT,
            "weights": list(weights_digests(config, mesh).values()),
            "dtype": str(hardware.dtype),
            "attention": choose(config.attn_implementation, hardware.device, hardware.bf16),
            "share_prefix": config.share_prefix,
        }
    )
    store = ReferenceStore(config.cache_path / "reference" / key)
    store.reload()
    return store


def reference_for(
    loader: PairLoader,
    ids: np.ndarray,
    store: ReferenceStore,
    make_engine: Callable[[], DeepSpeedEngine],
    device: torch.device,
    say: Callable[[str], None],
    stop: Stop = None,
) -> StoredReference:
    """Reference log-probs of pairs of a loader's set; what the store lacks is computed by all ranks and stored.

    Args:
        ids: int64, the pairs that will be asked for; each once.
        make_engine: gives the untrained policy; without its new adapter, it is the reference. Called when pairs lack.

    Raises:
        NumericError: the reference gives a log-prob that is not finite.
        StopRequested: a rank was asked to stop; what was stored until then stays.
        IOFailure: ranks do not see what other ranks have stored.
    """
    pairs = loader.pairs
    wanted = pairs.digests(ids)
    missing = np.flatnonzero(~_seen_by_main(store.find(wanted)[0], device))
    if len(missing):
        say(f"reference: computing {len(missing)} of {len(ids)} pairs, {store.folder}")
        _fill(ids[missing], wanted[missing], store, make_engine(), loader, device, stop)
        comm.barrier()
        store.reload()
    else:
        say(f"reference: all {len(ids)} pairs found in {store.folder}")
    logps = _find_all(store, wanted)
    bad = np.flatnonzero(~np.isfinite(logps).all(axis=(1, 2)))
    if len(bad):
        raise NumericError(
            f"the reference gives no finite log-prob for {len(bad)} pairs, the first at "
            f"{pairs.where(int(ids[bad[0]]))}: check the model and the precision, then remove {store.folder}"
        )
    everything = np.full((len(pairs), 2, 2), np.nan, dtype=np.float32)
    everything[ids] = logps
    return StoredReference(everything, device)


def _seen_by_main(found: np.ndarray, device: torch.device) -> np.ndarray:
    """Rank 0's view of what the store has, bool [N], on all ranks: they compute what lacks in lock-step.

    While another job fills the store, or on a slow file system, ranks see it differently.
    """
    view = torch.from_numpy(found.astype(np.uint8)).to(device)
    comm.broadcast(view, src=0)
    return view.cpu().numpy().astype(bool)


def _find_all(store: ReferenceStore, wanted: np.ndarray) -> np.ndarray:
    """Log-probs of pairs that are in the store; what another node wrote can take a while to be seen.

    Raises:
        IOFailure: some of it is not there.
    """
    deadline = time.monotonic() + _SEEN_WITHIN_S
    while True:
        found, logps = store.find(wanted)
        if found.all():
            return logps
        if time.monotonic() > deadline:
            raise IOFailure(
                f"other ranks have reference log-probs of {(~found).sum()} of {len(wanted)} pairs that are not seen in "
                f"{store.folder}: it must lie on a file system that all nodes share; set cache_dir"
            )
        time.sleep(1.0)
        store.reload()


def _fill(
    ids: np.ndarray,
    keys: np.ndarray,
    store: ReferenceStore,
    engine: DeepSpeedEngine,
    loader: PairLoader,
    device: torch.device,
    stop: Stop,
) -> None:
    """Compute the pairs `ids`, whose digests are `keys`; each rank writes chunks of those in its own rows."""
    done: list[np.ndarray] = []
    values: list[torch.Tensor] = []

    def flush() -> None:
        if done:
            store.write_chunk(keys[np.concatenate(done)], torch.cat(values).view(-1, 2, 2).cpu().numpy())
        done.clear()
        values.clear()

    engine.eval()
    per_pass = _PAIRS_PER_PASS * loader.mesh.dp_size
    with torch.no_grad(), reference_weights(engine.module.model):
        for number, batch in enumerate(loader.in_order(ids, per_pass)):
            for row in batch.rows:
                outputs = engine(RowTensors.from_row(row, device))
                if len(row.pairs):
                    done.append(number * per_pass + row.pairs)
                    values.append(outputs[:, :2])
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
