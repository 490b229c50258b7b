"""ModelScope's hub: the files of a model or data set, fetched into the cache of its own client.

The client is `modelscope_hub`, which `modelscope` itself is built on: it imports neither torch nor model code. Where
the hub gives no answer, or HF_HUB_OFFLINE forbids to ask, the cache counts.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from dsdpo.errors import ConfigError, DsdpoError, IOFailure, Problem, config_error
from dsdpo.runtime.files import file_digest

DEFAULT_REVISION = "master"
INSTALL = "run `pip install 'dsdpo[modelscope]'`"
_ID = re.compile(r"[\w.-]+/[\w.-]+")
EVERYTHING = ("*",)
SMALL = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py")  # a model without its weights
OTHER_WEIGHTS = (
    "original/*",
    "consolidated*",
    "onnx/*",
    "*.gguf",
    "*.onnx",
    "*.pth",
    "*.pt",
    "*.h5",
    "*.msgpack",
    "*.tflite",
    "*.ot",
)
# Stand in a folder until all of its files have been fetched, or all but the weights: nothing else tells later that
# some are missing, or are of an older commit than others.
_FETCHING, _FETCHING_SMALL = ".replacing", ".fetching"
_PARTIAL = (".incomplete", ".parallel_tmp", ".lock")
_TRY_AGAIN = (408, 425, 429)  # and 500 to 599
_TOKEN = "log in with `modelscope login` or set MODELSCOPE_API_TOKEN"


@dataclass(frozen=True)
class Repository:
    """A model or data set on ModelScope; no revision means its branch `master`."""

    name: str
    kind: Literal["model", "dataset"]
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.name} at {self.revision}" if self.revision else self.name


def is_installed() -> bool:
    """Whether the client is there."""
    return importlib.util.find_spec("modelscope_hub") is not None


def named_problem(name: str, option: str) -> Problem | None:
    """Why an id cannot be asked for at all."""
    if not _ID.fullmatch(name):
        return Problem("hub", option, f"{option}: {name} is no id of ModelScope; they are written org/name")
    if not is_installed():
        text = f"{option}: {name} is to come from ModelScope, whose client modelscope-hub is not installed; {INSTALL}"
        return Problem("modelscope-missing", option, text)
    return None


def cached(repository: Repository, holds: Callable[[Path], bool]) -> Path | None:
    """The folder of the client's cache that has what is needed of a repository, by `holds`. Nobody is asked."""
    folder = _folder(repository)
    return folder if folder is not None and holds(folder) and not is_changing(folder) else None


def fetched(
    repository: Repository,
    option: str,
    holds: Callable[[Path], bool],
    wanted: Sequence[str] = EVERYTHING,
    stamps: Path | None = None,
) -> Path:
    """The folder of the client's cache with the files that the hub has now, after fetching what differs.

    Args:
        option: that names it, for messages.
        holds: whether a folder of the cache has what is needed, where the hub gives no answer.
        wanted: patterns of paths; the others are not fetched.
        stamps: folder that remembers hashes of files, so that large ones are read once.

    Raises:
        ConfigError: there is no such repository or revision, it may not be read, or the cache mixes revisions.
        IOFailure: the hub gives no answer and the cache does not have it, or a file cannot be fetched or written.
    """
    if problem := named_problem(repository.name, option):
        raise ConfigError(problem)
    if is_offline():
        return _from_cache(repository, option, holds, None)
    try:
        api, listed = _listed(repository)
    except Exception as error:  # of the client, and of the HTTP library below it
        told = _told(repository, option, error)
        if isinstance(told, IOFailure):
            return _from_cache(repository, option, holds, told)
        raise told from error
    folder = _folder(repository) or _own_folder(repository)
    names = {file.path for file in listed}
    if left := [name for name in shown_files(folder) if name not in names]:
        text = f"{option}: {folder} holds {left[0]}, which {repository} does not have: another revision left it there"
        raise config_error("hub-cache", option, f"{text}. Delete that folder; it will be fetched again")
    try:
        _fetch(api, repository, folder, _selected(repository, listed, wanted), tuple(wanted), stamps)
    except Exception as error:
        raise _told(repository, option, error) from error
    if tuple(wanted) == EVERYTHING:
        (folder / _FETCHING).unlink(missing_ok=True)
    if tuple(wanted) in (EVERYTHING, SMALL):
        (folder / _FETCHING_SMALL).unlink(missing_ok=True)
    return folder


def is_changing(folder: Path) -> bool:
    """Whether a fetch into a folder of the cache was broken off, or files are of a newer commit than others."""
    return (folder / _FETCHING).exists() or (folder / _FETCHING_SMALL).exists()


def shown_files(folder: Path) -> list[str]:
    """The files in a folder of the cache; hidden ones, such as `.gitattributes`, and unfinished ones do not count."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(_PARTIAL))
    names = [path.relative_to(folder) for path in paths]
    return [name.as_posix() for name in names if not any(part.startswith(".") for part in name.parts)]


def is_offline() -> bool:
    """Whether hubs must not be asked, as huggingface_hub reads it."""
    said = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return said.upper() in ("1", "ON", "YES", "TRUE")


def _api(endpoint: str | None = None) -> Any:
    from modelscope_hub import HubApi, HubConfig

    logging.getLogger("modelscope_hub").setLevel(os.environ.get("MODELSCOPE_LOG_LEVEL", "ERROR").upper())
    return HubApi(config=HubConfig(endpoint=endpoint))


def _own_folder(repository: Repository) -> Path:
    """Where the client keeps a revision."""
    from modelscope_hub import HubConfig

    revision = repository.revision or DEFAULT_REVISION
    name = repository.name.replace("/", "--")
    return Path(HubConfig().cache_dir) / f"{repository.kind}s" / name / "snapshots" / revision


def _folder(repository: Repository) -> Path | None:
    """The folder of the client's cache with files of a repository, where there is one.

    Folders of clients before 1.38 do not tell their revision: they count for the default one alone.
    """
    if repository.revision is not None:
        folder = _own_folder(repository)
        return folder if folder.is_dir() and any(folder.iterdir()) else None
    from modelscope_hub.errors import CacheNotFound

    asked = {"revision": DEFAULT_REVISION, "local_files_only": True}
    try:
        return Path(_api().download_repo(repository.name, repository.kind, **asked))
    except CacheNotFound:
        return None


def _listed(repository: Repository) -> tuple[Any, list[Any]]:
    """The client for the site that has a repository, and the files there. Raises what the client raises."""
    api = _api(_api().resolve_endpoint_for_read(repository.name, repo_type=repository.kind))
    found = api.list_repo_files(repository.name, repository.kind, revision=repository.revision or DEFAULT_REVISION)
    return api, [file for file in found if not file.is_dir]


def _selected(repository: Repository, listed: list[Any], wanted: Sequence[str]) -> list[Any]:
    """The files to have: of a model, only what transformers loads."""
    unwanted: tuple[str, ...] = ()
    if repository.kind == "model":
        has_safetensors = any(file.path.endswith(".safetensors") and "/" not in file.path for file in listed)
        unwanted = (*OTHER_WEIGHTS, "*.bin") if has_safetensors else OTHER_WEIGHTS
    return [file for file in listed if _is_among(file.path, wanted) and not _is_among(file.path, unwanted)]


def _fetch(
    api: Any, repository: Repository, folder: Path, selected: list[Any], wanted: tuple[str, ...], stamps: Path | None
) -> None:
    """Raises what the client raises; the files that have come by then stay."""
    missing = [file for file in selected if not _is_same(folder / file.path, file, stamps)]
    if not missing:
        return
    if wanted == EVERYTHING or any((folder / file.path).exists() for file in missing):
        _mark(folder / _FETCHING)
    elif wanted == SMALL:
        _mark(folder / _FETCHING_SMALL)
    files = [{"Path": file.path, "Size": file.size, "Sha256": file.sha256} for file in missing]
    revision = repository.revision or DEFAULT_REVISION
    api.download_repo(repository.name, repository.kind, revision=revision, local_dir=folder, file_list=files)


def _mark(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def _is_among(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(path, pattern) for pattern in patterns)


def _is_same(path: Path, file: Any, stamps: Path | None) -> bool:
    """Whether a file of the cache is known to be the one that the hub lists; the hub may list no hash."""
    if not file.sha256 or not path.is_file() or path.stat().st_size != file.size:
        return False
    return file_digest(path.resolve(), stamps) == file.sha256


def _from_cache(repository: Repository, option: str, holds: Callable[[Path], bool], away: DsdpoError | None) -> Path:
    """What the cache has. Raises ConfigError where it lacks something, or `away`: why the hub gave nothing."""
    if (folder := cached(repository, holds)) is not None:
        return folder
    if away is not None:
        raise away
    flags = " --repo-type dataset" if repository.kind == "dataset" else ""
    flags += f" --revision {repository.revision}" if repository.revision else ""
    text = (
        f"{option}: {repository} is not complete in ModelScope's cache, and HF_HUB_OFFLINE is set; fetch it first "
        f"where there is a network (`modelscope download{flags} {repository.name}`), or unset it"
    )
    raise config_error("hub", option, text)


# --- errors ---


def _told(repository: Repository, option: str, error: Exception) -> DsdpoError:
    """What to tell of an error of the client."""
    from modelscope_hub.errors import FileDownloadError

    if isinstance(error, FileDownloadError) and error.failed_files:
        path, cause = next(iter(error.failed_files.items()))
        return IOFailure(f"{option}: {path} of {repository} could not be fetched from ModelScope: {_line(cause)}")
    status = getattr(error, "status_code", None)
    if status == 404:
        return config_error("hub", option, f"{option}: {_not_there(repository)}")
    if status in (401, 403):
        text = f"ModelScope answers {status} for {repository}: there is no such {_word(repository)}, or it is private"
        return config_error("hub", option, f"{option}: {text}; check the name, and {_TOKEN}")
    if status is not None and 400 <= status < 500 and status not in _TRY_AGAIN:
        text = f"{option}: ModelScope answers {status} for {repository}: {_line(error)}"
        return config_error("hub", option, f"{text}; check name and revision")
    return IOFailure(
        f"{option}: {repository} could not be fetched from ModelScope, tried several times: {_line(error)}. Try again "
        "later, or set HF_HUB_OFFLINE=1 where it is in the cache"
    )


def _not_there(repository: Repository) -> str:
    """Whether it is the name or the revision that the hub does not know."""
    revisions: list[str] = []
    if repository.revision is not None:
        with suppress(Exception):  # then the name is unknown, too
            found = _api().list_repo_revisions(repository.name, repository.kind)
            revisions = [str(one.get("Revision") or one.get("name")) for one in found]
    if revisions:
        names = f"{', '.join(revisions[:8])}{', ...' if len(revisions) > 8 else ''}"
        return f"{repository.name} has no revision {repository.revision} on ModelScope; it has {names}, and commits"
    text = f"there is no {_word(repository)} {repository} on ModelScope, and no folder of that name here"
    return f"{text}; check the spelling and the hub, or {_TOKEN} where it is private"


def _word(repository: Repository) -> str:
    return "data set" if repository.kind == "dataset" else "model"


def _line(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    return next((line.strip() for line in text.splitlines() if line.strip()), text)
