"""Data sets on a hub: loaded, or what is wrong with their names, told apart from a hub that is away for a while."""

from __future__ import annotations

import hashlib
import re
import time
from pathlib import Path
from typing import Any

from dsdpo.data.registry import DatasetEntry
from dsdpo.errors import ConfigError, DataError, DsdpoError, IOFailure, Problem
from dsdpo.runtime import modelscope
from dsdpo.runtime.files import file_digest

_UNKNOWN_SPLIT = re.compile(r'Unknown split "(.*)"\. Should be one of \[(.*)\]')
_PAUSES_S = (1.0, 4.0, 15.0)  # between tries where the hub is away
_TRY_AGAIN = (408, 425, 429)  # and 500 to 599
_REFUSED = (401, 403, 404)
_COMMIT = re.compile(r"[0-9a-f]{40}")
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
        except DsdpoError:
            raise
        except Exception as error:
            told = _told(entry, error)
            if pause is None or not isinstance(told, IOFailure):
                raise told from error
        time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def _load(entry: DatasetEntry) -> Any:
    from datasets import load_dataset

    given = {"name": entry.subset, "data_dir": entry.folder, "split": entry.split}
    if entry.modelscope:
        return load_dataset(str(_modelscope_folder(entry)), **given)
    if entry.revision is None:
        return load_dataset(entry.hub_id, **given)
    commit = _commit(entry.hub_id, entry.revision)
    found = load_dataset(entry.hub_id, revision=commit, **given)
    _check_commit(entry, commit, found)
    return found


def _commit(name: str | None, revision: str) -> str:
    """The commit that a revision of a set is now. Raises what huggingface_hub raises."""
    from huggingface_hub import HfApi

    if _COMMIT.fullmatch(revision):
        return revision
    return str(HfApi().repo_info(str(name), repo_type="dataset", revision=revision).sha)


def _check_commit(entry: DatasetEntry, commit: str, found: Any) -> None:
    """Raise NotCached where `datasets` has given another commit: it does so with a warning where the hub is away.

    Its cache names the folder of a set by the commit.
    """
    given = {Path(file["filename"]).parent.name for file in found.cache_files}
    if given - {commit}:
        text = f"{entry.hub_id} at {entry.revision} is not in the local cache, which holds {', '.join(sorted(given))}, "
        raise NotCached([_problem(f"{text}and the hub gives no answer; {_load_once(entry)}, or name that commit")])


# --- ModelScope ---


def _repository(entry: DatasetEntry) -> modelscope.Repository:
    return modelscope.Repository(str(entry.hub_id), "dataset", entry.revision)


def _modelscope_folder(entry: DatasetEntry) -> Path:
    """Of the client's cache, as it was fetched last."""
    return modelscope.cached(_repository(entry), _holds_files) or modelscope.fetched(
        _repository(entry), "dataset", _holds_files
    )


def modelscope_digest(entry: DatasetEntry, stamps: Path) -> str:
    """Hash of the files of a set on ModelScope, as they are now. Its client's `MsDataset` asks for an older `datasets`.

    Args:
        stamps: folder that remembers hashes of files.

    Raises:
        ConfigError, IOFailure: as `modelscope.fetched`.
    """
    folder = modelscope.fetched(_repository(entry), "dataset", _holds_files, stamps=stamps)
    files = modelscope.shown_files(folder)
    digests = [f"{name} {file_digest((folder / name).resolve(), stamps)}" for name in files]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()[:32]


def _holds_files(folder: Path) -> bool:
    """A set that is being fetched is marked; beside that, any file counts."""
    return bool(modelscope.shown_files(folder))


# --- errors ---


def _told(entry: DatasetEntry, error: Exception) -> DsdpoError:
    """What to tell of an error of `datasets`."""
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub import constants
    from huggingface_hub.errors import RevisionNotFoundError

    name = entry.hub_id
    if found := _UNKNOWN_SPLIT.search(str(error)):
        splits = [split.strip("' \"") for split in found[2].split(",")]
        typed = (f"@{entry.revision}" if entry.revision else "") + (f":{entry.subset}" if entry.subset else "")
        return DataError(
            f"{name} has no split {found[1]}; it has {', '.join(splits)}: name one, as in {name}{typed}:{splits[0]}, "
            "or give split in the entry"
        )
    if entry.modelscope:
        return DataError(
            f"{name}, fetched from ModelScope, cannot be loaded: {error}; check its subset and split. Of older sets "
            "the repository holds no files of data: export the rows to a .jsonl file and give file_name"
        )
    if any(isinstance(cause, RevisionNotFoundError) for cause in _causes(error)):
        text = f"{name} has no revision {entry.revision} on the hub; name a branch, a tag or a whole commit"
        return ConfigError([_problem(text)])
    is_missing = isinstance(error, DatasetNotFoundError)
    is_away = any(map(_is_no_answer, _causes(error)))
    if constants.HF_HUB_OFFLINE and (is_away or is_missing):
        text = f"{name} is not in the local cache, and HF_HUB_OFFLINE is set; {_load_once(entry)}, or unset it"
        return NotCached([_problem(text)])
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


def _load_once(entry: DatasetEntry) -> str:
    given = ", ".join(repr(part) for part in (entry.hub_id, entry.subset) if part)
    given += f", revision={entry.revision!r}" if entry.revision else ""
    code = f"import datasets; datasets.load_dataset({given})"
    return f'load it once where there is a network (python -c "{code}")'


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
