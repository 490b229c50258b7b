"""The pass that fills the reference store: the untrained policy over every pair that the store lacks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from deepspeed import DeepSpeedEngine, comm

from dsdpo.config.schema import RunConfig
from dsdpo.data.loader import PairLoader
from dsdpo.data.packing import Row
from dsdpo.dist import Ranks
from dsdpo.errors import NumericError
from dsdpo.model.adapters import adapters_off
from dsdpo.model.attention import choose
from dsdpo.model.load import weights_digest
from dsdpo.model.rows import RowTensors
from dsdpo.reference.store import ReferenceStore, store_key
from dsdpo.train.engine import Hardware

_PAIRS_PER_PASS = 64  # per rank, between two looks at the rows' balance
_PASSES_PER_CHUNK = 16  # a killed pass repeats at most this many
_STORE_FORMAT = 1


class Reference:
    """Reference log-probs for the pairs of one prepared set, all in memory: 8 bytes a pair.

    Args:
        logps: fp32 [N, 2], chosen and rejected of pair i.
        device: where the training step wants them.
    """

    def __init__(self, logps: np.ndarray, device: torch.device) -> None:
        self._logps = logps
        self._device = device

    def of(self, pair_ids: np.ndarray, row: Row) -> torch.Tensor:
        """Of a row's pairs: fp32 [2P], chosen and rejected in turn."""
        return torch.from_numpy(self._logps[pair_ids[row.pairs]].reshape(-1)).to(self._device, non_blocking=True)


def open_store(config: RunConfig, ranks: Ranks, hardware: Hardware) -> ReferenceStore:
    """The store of this run's reference, keyed by the true weights and by what changes a log-prob."""
    weights = [weights_digest(config.model_name_or_path) if ranks.is_main else None]
    comm.broadcast_object_list(weights, src=0)
    key = store_key(
        {
            "format": _STORE_FORMAT,
            "weights": weights[0],
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
) -> Reference:
    """Reference log-probs of pairs of a loader's set; what the store lacks is computed by all ranks and stored.

    Args:
        ids: int64, the pairs that will be asked for; each once.
        make_engine: gives the untrained policy; with its adapters off, it is the reference. Called when pairs lack.

    Raises:
        NumericError: the reference gives a log-prob that is not finite.
    """
    pairs = loader.pairs
    wanted = pairs.digests(ids)
    found, logps = store.find(wanted)
    missing = np.flatnonzero(~found)
    if len(missing):
        say(f"reference: computing {len(missing)} of {len(ids)} pairs, {store.folder}")
        _fill(ids[missing], wanted[missing], store, make_engine(), loader, device)
        comm.barrier()
        store.reload()
        found, logps = store.find(wanted)
    else:
        say(f"reference: all {len(ids)} pairs found in {store.folder}")
    bad = np.flatnonzero(~np.isfinite(logps).all(axis=1))
    if len(bad):
        raise NumericError(
            f"the reference gives no finite log-prob for {len(bad)} pairs, the first at "
            f"{pairs.where(int(ids[bad[0]]))}: check the model and the precision, then remove {store.folder}"
        )
    everything = np.full((len(pairs), 2), np.nan, dtype=np.float32)
    everything[ids] = logps
    return Reference(everything, device)


def _fill(
    ids: np.ndarray,
    keys: np.ndarray,
    store: ReferenceStore,
    engine: DeepSpeedEngine,
    loader: PairLoader,
    device: torch.device,
) -> None:
    """Compute the pairs `ids`, whose digests are `keys`; each rank writes chunks of those in its own rows."""
    done: list[np.ndarray] = []
    values: list[torch.Tensor] = []

    def flush() -> None:
        if done:
            store.write_chunk(keys[np.concatenate(done)], torch.cat(values).view(-1, 2).cpu().numpy())
        done.clear()
        values.clear()

    engine.eval()
    per_pass = _PAIRS_PER_PASS * loader.ranks.world_size
    with torch.no_grad(), adapters_off(engine.module.model):
        for number, batch in enumerate(loader.in_order(ids, per_pass)):
            for row in batch.rows:
                logps = engine(RowTensors.from_row(row, device))
                if len(row.pairs):
                    done.append(number * per_pass + row.pairs)
                    values.append(logps)
            if (number + 1) % _PASSES_PER_CHUNK == 0:
                flush()
    flush()
    engine.train()
