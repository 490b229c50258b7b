"""The prepared sets of a run: made when missing, opened memory-mapped, and summed up in a sentence."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from dsdpo.config.hubs import picked_hub
from dsdpo.config.losses import ANY_LOSS, RANKINGS
from dsdpo.config.schema import RunConfig
from dsdpo.config.stages import STAGES
from dsdpo.data.fingerprint import earlier_fingerprints, known_tokenizer, set_fingerprint, source_digest
from dsdpo.data.registry import DatasetEntry, resolve
from dsdpo.data.shards import DROPPED_ROWS, MANIFEST, SHARD_FORMAT, PreparedSet, SetIdentity
from dsdpo.data.split import is_split, split_folder, write_split
from dsdpo.data.tally import reason_texts
from dsdpo.data.template_date import date_for, date_uses
from dsdpo.data.template_files import find_template, template_place
from dsdpo.data.vocabulary import embedding_rows
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
        DataError: more than max_refused of the records are dropped, none is left, the model has no embedding for a
            token id, or the loss needs scores that are missing.
        IOFailure: the cache folder cannot be written.
    """
    names = _names(config, split)
    if names is None:
        return None
    entries = _resolved(names, config)
    tokenizer = _tokenizer(config)
    path, identity = _set_path(config, entries, tokenizer, refresh=True)
    if not (path / MANIFEST).exists():
        from dsdpo.data.make import make_set

        try:
            make_set(config, entries, tokenizer(), path, identity)
        except OSError as error:
            raise IOFailure(
                f"cannot write prepared data to {path.parent}: {error}; free space or set cache_dir"
            ) from error
    whole = PreparedSet(path)
    _check_tokens(config, whole, tokenizer)
    held_out = _held_out(config, whole)
    if held_out and config.val_split == "prompt" and not is_split(split_folder(path, held_out, config.seed)):
        try:
            write_split(split_folder(path, held_out, config.seed), whole.prompt_keys(), held_out, config.seed)
        except OSError as error:
            raise IOFailure(f"cannot write the index of val_size to {path}: {error}; set cache_dir") from error
    prepared = _opened(config, split, path)
    _check_numbers_of_answers(prepared, config)
    if config.margin_from_scores:
        _check_scores(prepared, "margin_from_scores", above=False)
    for loss in config.loss_type:
        if ANY_LOSS[loss].needs_scores:
            _check_scores(prepared, f"loss_type {loss}")
    return prepared


def _check_tokens(config: RunConfig, whole: PreparedSet, tokenizer: Callable[[], PreTrainedTokenizerBase]) -> None:
    """Raise DataError where an example holds a token id that the model has no embedding for."""
    largest = whole.manifest.get("largest_token", -1)  # sets of earlier versions do not say
    place, revision = config.model_source.place()
    known = embedding_rows(place, config.adapter_name_or_path, revision)
    if known is None or largest < known[0]:
        return
    size, said_by = known
    index, token_id = whole.first_token_from(size)
    raise DataError(
        f"{whole.where(index)} holds the token {tokenizer().convert_ids_to_tokens(token_id)!r} with the id {token_id}, "
        f"and the model has embeddings for ids below {size} ({said_by}): resize them and save the model "
        "(model.resize_token_embeddings(len(tokenizer))), take the tokenizer that the model came with, or take the "
        "token out of the data"
    )


def _check_numbers_of_answers(examples: PreparedSet, config: RunConfig) -> None:
    """Refuse rankings for losses of pairs, and such that are longer than a micro-batch.

    Raises:
        DataError: naming the first such example.
    """
    if STAGES[config.stage].records != "pairs" or "completion 3" not in examples.manifest["mean_tokens"]:
        return  # pairs alone, which a row holds: nothing is read of them
    ranks = config.stage == "dpo" and config.loss_type[0] in RANKINGS
    for start in range(0, len(examples), _AT_ONCE):
        ids = np.arange(start, min(start + _AT_ONCE, len(examples)))
        lengths = examples.lengths(ids)
        several = np.flatnonzero(lengths.counts != 2)
        if not len(several):
            continue
        where, count = examples.where(int(ids[several[0]])), lengths.counts[several[0]]
        if not ranks:
            reader = f"loss_type {', '.join(config.loss_type)}" if config.stage == "dpo" else f"stage {config.stage}"
            raise DataError(
                f"{where} has {count} answers, and {reader} compares two: set stage: dpo with loss_type "
                f"{', '.join(RANKINGS)}, or take such records out"
            )
        tokens = lengths.packed(config.share_prefix)
        if config.row_tokens is not None and tokens.max() > config.row_tokens:
            longest = int(tokens.argmax())
            raise DataError(
                f"{examples.where(int(ids[longest]))} takes {tokens[longest]} tokens with its "
                f"{lengths.counts[longest]} answers, max_tokens_per_row is {config.row_tokens}: raise it"
            )


def _check_scores(pairs: PreparedSet, reader: str, above: bool = True) -> None:
    """Refuse pairs without scores, or whose chosen side does not score higher, for an option that needs them.

    Args:
        reader: the option.
        above: whether the chosen side must score higher.

    Raises:
        DataError: naming the first such pair.
    """
    for start in range(0, len(pairs), _AT_ONCE):
        ids = np.arange(start, min(start + _AT_ONCE, len(pairs)))
        scores = pairs.scores(ids).reshape(-1, 2)
        bad = np.flatnonzero(~(scores[:, 0] > scores[:, 1]) if above else np.isnan(scores).any(axis=1))
        if len(bad):
            chosen, rejected = scores[bad[0]]
            raise DataError(
                f"{reader} needs a chosen_score {'above the' if above else 'and a'} rejected_score in every pair; "
                f"{pairs.where(int(ids[bad[0]]))} has {chosen} and {rejected} (nan: none): mend the data, or "
                f"{'choose another loss_type' if above else 'unset the option'}"
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

        return load_tokenizer(*config.model_source.place())

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
    entries, problems = resolve(names, config.dataset_dir, STAGES[config.stage].records, picked_hub(config.hub))
    if problems:
        raise ConfigError(problems)
    return [replace(entry, ignore_columns=(*entry.ignore_columns, *config.ignore_columns)) for entry in entries]


def _set_path(
    config: RunConfig, entries: list[DatasetEntry], tokenizer: Callable[[], PreTrainedTokenizerBase], refresh: bool
) -> tuple[Path, SetIdentity]:
    """Folder of the set, and what stands for its content."""
    folder = config.cache_path / "prepared"
    known = known_tokenizer(Path(config.model_source.place()[0]), tokenizer, folder / "sources")
    sources = [source_digest(entry, folder / "sources", refresh) for entry in entries]
    template = find_template(template_place(config.template, picked_hub(config.hub)))
    uses = date_uses(template.text) if template.text is not None else ([] if template.is_plain else known.date_uses)
    date = date_for(config, uses, refresh)
    inputs = (config, entries, known.digest, sources, template.text, date)
    identity = SetIdentity(set_fingerprint(*inputs), earlier_fingerprints(*inputs), date)
    return folder / f"{identity.fingerprint}-{SHARD_FORMAT}", identity


def _opened(config: RunConfig, split: Split, path: Path) -> PreparedSet:
    whole = PreparedSet(path, split)
    held_out = _held_out(config, whole)
    if held_out is None:
        return whole
    by_prompt = config.val_split == "prompt"
    if by_prompt and not is_split(split_folder(path, held_out, config.seed)):
        raise DataError(f"the split of {path} by val_size is not prepared; run `dsdpo prepare` first")
    return PreparedSet(path, split, held_out, config.seed, by_prompt)


def _held_out(config: RunConfig, whole: PreparedSet) -> int | None:
    """The examples that val_size asks for; None without it. Raises DataError."""
    if config.eval_dataset or config.val_size == 0:
        return None
    n = len(whole)
    held_out = round(config.val_size * n) if config.val_size < 1 else int(config.val_size)
    if not 0 < held_out < n:
        raise DataError(
            f"val_size {config.val_size} holds out {held_out} of {n} examples; each part needs one: change val_size"
        )
    return held_out


def summary(prepared: PreparedSet) -> str:
    """For the terminal: what was read, kept, cut and dropped, how long the examples are, and what keeps the dropped."""
    manifest = prepared.manifest
    n_refused = sum(manifest["refused"].values())
    text = f"{prepared.split} data: {', '.join(manifest['datasets'])}: "
    text += f"{manifest['rows']} records, {manifest['examples']} examples"
    if prepared.held_out is not None:
        text += f", {len(prepared)} of them in this split"
        if prepared.split == "eval" and len(prepared) != prepared.held_out:
            text += f" ({prepared.held_out} asked for; equal prompts stay together)"
    text += "; mean tokens " + ", ".join(f"{part} {value:.0f}" for part, value in manifest["mean_tokens"].items())
    text += "; longest " + ", ".join(f"{part} {value}" for part, value in manifest["longest"].items())
    if manifest["truncated"]:
        mode, max_length = manifest["settings"]["truncation_mode"], manifest["settings"]["max_length"]
        text += f"; {manifest['truncated']} cut to max_length {max_length} ({mode})"
    if manifest["diverged"]:
        text += f"; {manifest['diverged']} where prompt and completion share a token, which went to the completion"
    if day := manifest.get("template_date"):
        text += f"; the template writes the date {day}"
    for note, count in manifest.get("notes", {}).items():
        text += f"; {count} {note}"
    if n_refused:
        text += f"; {n_refused} dropped, listed in {prepared.path / DROPPED_ROWS}:"
        text += "".join(f"\n  {reason}" for reason in reason_texts(manifest))
    return text
