"""Data sets on a hub: loaded, or what is wrong with their names, told apart from a hub that is away for a while."""

from __future__ import annotations

import re
import time
from typing import Any

from dsdpo.data.registry import DatasetEntry
from dsdpo.errors import ConfigError, DataError, DsdpoError, IOFailure, Problem

_UNKNOWN_SPLIT = re.compile(r'Unknown split "(.*)"\. Should be one of \[(.*)\]')
_PAUSES_S = (1.0, 4.0, 15.0)  # between tries where the hub is away
_TRY_AGAIN = (408, 425, 429)  # and 500 to 599
_REFUSED = (401, 403, 404)
_CLIENTS = ("httpx", "httpcore", "requests", "urllib3")  # which HTTP client it is differs by version


class NotCached(ConfigError):
    """A set that is not in the local cache of `datasets`, while HF_HUB_OFFLINE forbids to ask the hub."""


def load_hub(entry: DatasetEntry) -> Any:
    """The hub set as a `datasets.Dataset`.

    Raises:
        NotCached: the hub must not be asked, and the set is not in the cache.
        ConfigError: the hub has no such set, or refuses it.
        DataError: it has no such split or subset, or cannot be read.
        IOFailure: the hub gave no answer, several times.
    """
    for pause in (*_PAUSES_S, None):
        try:
            return _load(entry)
        except Exception as error:
            told = _told(entry, error)
            if pause is None or not isinstance(told, IOFailure):
                raise told from error
        time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def _load(entry: DatasetEntry) -> Any:
    if entry.modelscope:
        from modelscope.msdatasets import MsDataset

        return MsDataset.load(entry.hub_id, subset_name=entry.subset, split=entry.split).to_hf_dataset()
    from datasets import load_dataset

    return load_dataset(entry.hub_id, name=entry.subset, data_dir=entry.folder, split=entry.split)


def _told(entry: DatasetEntry, error: Exception) -> DsdpoError:
    """What to tell of an error of `datasets`."""
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub import constants

    name = entry.hub_id
    if found := _UNKNOWN_SPLIT.search(str(error)):
        splits = [split.strip("' \"") for split in found[2].split(",")]
        return DataError(
            f"{name} has no split {found[1]}; it has {', '.join(splits)}: name one, as in {name}:{splits[0]}, or give "
            "split in the entry"
        )
    is_missing = isinstance(error, DatasetNotFoundError)
    is_away = any(map(_is_no_answer, _causes(error)))
    if constants.HF_HUB_OFFLINE and (is_away or is_missing):
        return NotCached([_problem(f"{name} is not in the local cache, and HF_HUB_OFFLINE is set; {_fetch(entry)}")])
    status = _status(error)
    if is_missing or status in _REFUSED:
        text = f"{name} cannot be loaded from the hub: {error}; check its name, or log in with `hf auth login`"
        return ConfigError([_problem(text)])
    if is_away or status in _TRY_AGAIN or (status or 0) >= 500:
        return IOFailure(
            f"{name} could not be loaded from the hub, tried several times: {error}. Try again later, or set "
            "HF_HUB_OFFLINE=1 where the set is in the cache"
        )
    return DataError(
        f"{name} cannot be loaded from the hub: {error}; check its name, subset and split, and what its files hold"
    )


def _problem(text: str) -> Problem:
    return Problem("hub", "dataset", f"dataset, eval_dataset: {text}")


def _fetch(entry: DatasetEntry) -> str:
    given = ", ".join(repr(part) for part in (entry.hub_id, entry.subset) if part)
    code = f"import datasets; datasets.load_dataset({given})"
    return f'load it once where there is a network (python -c "{code}"), or unset it'


def _is_no_answer(error: BaseException) -> bool:
    """Whether it is about the connection."""
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    return type(error).__module__.startswith(_CLIENTS) and not hasattr(error, "response")


def _causes(error: BaseException) -> list[BaseException]:
    """An error and what it was raised from or after."""
    found = [error]
    while (cause := found[-1].__cause__ or found[-1].__context__) is not None and cause not in found:
        found.append(cause)
    return found


def _status(error: BaseException) -> int | None:
    """The HTTP status among the causes of an error."""
    responses = (getattr(cause, "response", None) for cause in _causes(error))
    return next((int(response.status_code) for response in responses if response is not None), None)
