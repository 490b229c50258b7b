"""The prepared sets of a run: made when missing, opened memory-mapped, and summed up in a sentence."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from dsdpo.config.losses import LOSSES
from dsdpo.config.schema import RunConfig
from dsdpo.data.fingerprint import known_tokenizer_digest, set_fingerprint, source_digest
from dsdpo.data.registry import DatasetEntry, resolve
from dsdpo.data.shards import DROPPED_ROWS, MANIFEST, SHARD_FORMAT, PreparedSet
from dsdpo.errors import ConfigError, DataError, HangError, IOFailure

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Split = Literal["train", "eval"]

_POLL_S = 1.0
_AT_ONCE = 1_000_000


def prepare(config: RunConfig, split: Split) -> PreparedSet | None:
    """The prepared set of a split, made when it is missing. None for `eval` when nothing is held out.

    Raises:
        ConfigError: a name of `dataset` or `eval_dataset` cannot be resolved, or the template does not fit.
        DataError: more than max_refused of the rows are refused, none is left, or the loss needs scores that it lacks.
        IOFailure: the cache folder cannot be written.
    """
    names = _names(config, split)
    if names is None:
        return None
    entries = _resolved(names, config)
    tokenizer = _tokenizer(config)
    path, fingerprint = _set_path(config, entries, tokenizer, refresh=True)
    if not (path / MANIFEST).exists():
        from dsdpo.data.make import make_set

        try:
            make_set(config, entries, tokenizer(), path, fingerprint)
        except OSError as error:
            raise IOFailure(
                f"cannot write prepared data to {path.parent}: {error}; free space or set cache_dir"
            ) from error
    prepared = _opened(config, split, path)
    for loss in config.loss_type:
        if LOSSES[loss].needs_scores:
            _check_scores(prepared, loss)
    return prepared


def _check_scores(pairs: PreparedSet, loss: str) -> None:
    """Refuse pairs without scores, or whose chosen side does not score higher, for a loss that needs them.

    Raises:
        DataError: naming the first such pair.
    """
    for start in range(0, len(pairs), _AT_ONCE):
        ids = np.arange(start, min(start + _AT_ONCE, len(pairs)))
        scores = pairs.scores(ids).reshape(-1, 2)
        bad = np.flatnonzero(~(scores[:, 0] > scores[:, 1]))
        if len(bad):
            chosen, rejected = scores[bad[0]]
            raise DataError(
                f"loss_type {loss} needs a chosen_score above the rejected_score in every pair; "
                f"{pairs.where(int(ids[bad[0]]))} has {chosen} and {rejected} (nan: none): mend the data, or choose "
                "another loss_type"
            )


def open_prepared(config: RunConfig, split: Split) -> PreparedSet | None:
    """The prepared set of a split, opened only. None for `eval` when nothing is held out.

    Raises:
        DataError: it has not been prepared, or the data changed since.
    """
    return _open_or_none(config, split, _tokenizer(config))


def wait_prepared(config: RunConfig, split: Split, timeout: float = 3600.0) -> PreparedSet | None:
    """Like open_prepared, for a set that another process is making: looks again until `timeout` seconds are over.

    Raises:
        HangError: it did not appear in time.
    """
    tokenizer = _tokenizer(config)
    deadline = time.monotonic() + timeout
    while True:
        try:
            return _open_or_none(config, split, tokenizer)
        except DataError as error:
            if time.monotonic() >= deadline:
                raise HangError(
                    f"waited {timeout:.0f} s for the {split} data to be prepared by rank 0; see its log: {error}"
                ) from error
        time.sleep(_POLL_S)


def _tokenizer(config: RunConfig) -> Callable[[], PreTrainedTokenizerBase]:
    """The run's tokenizer, loaded when first asked for: a set is mostly found without it, and its imports cost most."""

    def load() -> PreTrainedTokenizerBase:
        from dsdpo.data.templates import load_tokenizer

        return load_tokenizer(config.model_name_or_path)

    return cache(load)


def _open_or_none(
    config: RunConfig, split: Split, tokenizer: Callable[[], PreTrainedTokenizerBase]
) -> PreparedSet | None:
    names = _names(config, split)
    if names is None:
        return None
    path, _ = _set_path(config, _resolved(names, config), tokenizer, refresh=False)
    if not (path / MANIFEST).exists():
        raise DataError(f"the {split} data ({', '.join(names)}) are not prepared as {path}; run `dsdpo prepare` first")
    return _opened(config, split, path)


def _names(config: RunConfig, split: Split) -> list[str] | None:
    """The sets of a split; held-out pairs come from `dataset` when there is no eval_dataset."""
    if split == "train":
        return config.dataset
    return config.eval_dataset or (config.dataset if config.val_size > 0 else None)


def _resolved(names: list[str], config: RunConfig) -> list[DatasetEntry]:
    entries, problems = resolve(names, config.dataset_dir)
    if problems:
        raise ConfigError(problems)
    return [replace(entry, ignore_columns=(*entry.ignore_columns, *config.ignore_columns)) for entry in entries]


def _set_path(
    config: RunConfig, entries: list[DatasetEntry], tokenizer: Callable[[], PreTrainedTokenizerBase], refresh: bool
) -> tuple[Path, str]:
    """Folder and fingerprint of the set."""
    folder = config.cache_path / "prepared"
    digest = known_tokenizer_digest(Path(config.model_name_or_path), tokenizer, folder / "sources")
    sources = [source_digest(entry, folder / "sources", refresh) for entry in entries]
    fingerprint = set_fingerprint(config, entries, digest, sources)
    return folder / f"{fingerprint}-{SHARD_FORMAT}", fingerprint


def _opened(config: RunConfig, split: Split, path: Path) -> PreparedSet:
    whole = PreparedSet(path)
    if config.eval_dataset or config.val_size == 0:
        return whole
    n = len(whole)
    held_out = round(config.val_size * n) if config.val_size < 1 else int(config.val_size)
    if not 0 < held_out < n:
        raise DataError(
            f"val_size {config.val_size} holds out {held_out} of {n} examples; each part needs one: change val_size"
        )
    return PreparedSet(path, split, held_out, config.seed)


def summary(prepared: PreparedSet) -> str:
    """One paragraph for the terminal: what was read, kept, refused, cut, and how long the examples are."""
    manifest = prepared.manifest
    n_refused = manifest["rows"] - manifest["examples"]
    text = f"{prepared.split} data: {', '.join(manifest['datasets'])}: "
    text += f"{manifest['rows']} rows, {manifest['examples']} examples"
    if prepared.held_out is not None:
        text += f", {len(prepared)} of them in this split"
    text += "; mean tokens " + ", ".join(f"{part} {value:.0f}" for part, value in manifest["mean_tokens"].items())
    text += "; longest " + ", ".join(f"{part} {value}" for part, value in manifest["longest"].items())
    if manifest["truncated"]:
        mode, max_length = manifest["settings"]["truncation_mode"], manifest["settings"]["max_length"]
        text += f"; {manifest['truncated']} cut to max_length {max_length} ({mode})"
    if manifest["diverged"]:
        text += f"; {manifest['diverged']} where prompt and completion share a token, which went to the completion"
    for note, count in manifest.get("notes", {}).items():
        text += f"; {count} {note}"
    if n_refused:
        reasons = ", ".join(f"{count} {reason}" for reason, count in manifest["refused"].items())
        text += f"; {n_refused} refused ({reasons}), listed in {prepared.path / DROPPED_ROWS}"
    return text
