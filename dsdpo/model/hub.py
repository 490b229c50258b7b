"""What is fetched of a hub id: its config.json before anything is launched, and ModelScope's weights for the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from dsdpo.config.hubs import ModelSource
from dsdpo.errors import ConfigError, IOFailure, Problem
from dsdpo.runtime import modelscope
from dsdpo.runtime.env import Mesh

_TRY_AGAIN = (408, 425, 429)  # and 500 to 599
_TOKEN = "log in with `hf auth login` or set HF_TOKEN"
_COPY = "fetch it first where there is a network (`hf download {name}`), or name a local folder"


def fetch_config(
    source: ModelSource, option: str, files: Sequence[str] = ("config.json",)
) -> tuple[Path | None, list[Problem]]:
    """The folder in the local cache that holds config.json of a hub id, or why there is none.

    huggingface_hub asks a server that is away for a moment again, up to five times and with growing pauses; where the
    cache has the file, it need not answer.

    Args:
        option: that names the id, for messages.
        files: of which one is enough.

    Raises:
        IOFailure: the hub gave no answer, or another than it should, each time.
    """
    if source.hub == "modelscope":
        return _from_modelscope(source, option, files)
    import huggingface_hub  # noqa: F401 - what its import raises is no answer of the hub

    name = source.name
    try:
        return Path(_download(source, files)).parent, []
    except Exception as error:
        if text := refusal(name, error, source.revision):
            return None, [Problem("hub", option, f"{option}: {text}")]
        raise IOFailure(
            f"{option}: config.json of {name} could not be fetched, tried several times: {reason(error)}. Try again "
            "later, or set HF_HUB_OFFLINE=1 where the model is in the cache"
        ) from error


def _from_modelscope(source: ModelSource, option: str, files: Sequence[str]) -> tuple[Path | None, list[Problem]]:
    """Like fetch_config."""

    def holds(folder: Path) -> bool:
        return any((folder / file).is_file() for file in files)

    try:
        folder = modelscope.fetched(source.repository, option, holds, files)
    except ConfigError as error:
        return None, error.problems
    if not holds(folder):
        text = f"{option}: {source.repository} has no {files[0]} on ModelScope; name a model that transformers loads"
        return None, [Problem("hub", option, text)]
    return folder, []


def _download(source: ModelSource, files: Sequence[str]) -> str:
    """The path of the first of some files that the hub id has. Raises what huggingface_hub raises."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    for file in files[:-1]:
        with suppress(EntryNotFoundError):
            return hf_hub_download(source.name, file, revision=source.revision)
    return hf_hub_download(source.name, files[-1], revision=source.revision)


def refusal(name: str, error: Exception, revision: str | None = None) -> str:
    """What to do about an error that stays the same however often one asks; empty for one that may pass."""
    from huggingface_hub import errors

    causes = _causes(error)
    if any(isinstance(cause, errors.OfflineModeIsEnabled) for cause in causes):
        at, flag = (f" at {revision}", f" --revision {revision}") if revision else ("", "")
        copy = _COPY.format(name=f"{name}{flag}")
        return f"{name}{at} is not in the local cache, and HF_HUB_OFFLINE is set; {copy}, or unset it"
    if any(isinstance(cause, errors.RevisionNotFoundError) for cause in causes):
        return f"{name} has no revision {revision} on the hub; name a branch, a tag or a whole commit"
    if any(isinstance(cause, errors.HFValidationError) for cause in causes):
        return f"{name} is no hub id: {error}"
    status = _status(causes)
    if any(isinstance(cause, errors.GatedRepoError) for cause in causes):
        return f"access to {name} is gated; ask for it on the model's page, and {_TOKEN}"
    if any(isinstance(cause, errors.EntryNotFoundError) and _status([cause]) for cause in causes):
        return f"{name} has no config.json on the hub; name a model that transformers loads"
    if status == 401:
        return f"the hub answers 401 for {name}: there is no such model, or it is private; check the name, and {_TOKEN}"
    if status == 403:
        return f"the hub answers 403 for {name}: your token may not read it; ask for access, and {_TOKEN}"
    if status == 404:
        return f"there is no {name} on the hub, and no folder of that name here; check the spelling"
    if status is not None and 400 <= status < 500 and status not in _TRY_AGAIN:
        return f"the hub answers {status} for {name}: {_first_line(error)}"
    return ""


def reason(error: Exception) -> str:
    """Why the hub gave nothing this time."""
    causes = _causes(error)
    status = _status(causes)
    return f"the hub answers {status}" if status else _first_line(causes[-1]) or type(causes[-1]).__name__


def _causes(error: BaseException) -> list[BaseException]:
    """An error and what it was raised from, the first cause last."""
    found = [error]
    while found[-1].__cause__ is not None:
        found.append(found[-1].__cause__)
    return found


def _status(causes: list[BaseException]) -> int | None:
    """The HTTP status among causes."""
    for cause in causes:
        response = getattr(cause, "response", None)
        if response is not None:
            return int(response.status_code)
    return None


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")


def fetch_weights(source: ModelSource, mesh: Mesh) -> str:
    """Fetch a model of ModelScope where the cache of a node lacks it. A collective call then.

    The main rank goes first, then one of each other node: nodes may share the cache, or have their own. Ranks fetch a
    model of Hugging Face by themselves, as its client's locks allow.

    Returns:
        The folder that stands for it, or its name.

    Raises:
        ConfigError, IOFailure: as `ModelSource.place`, on all ranks.
    """
    if source.is_folder or source.hub != "modelscope":
        return source.name
    from dsdpo.runtime.collectives import raise_on_any_rank  # here, since it imports torch

    for goes in (mesh.is_main, mesh.local_rank == 0):
        raise_on_any_rank(partial(source.place, whole=True) if goes else lambda: None)
    return source.place(whole=True)[0]
