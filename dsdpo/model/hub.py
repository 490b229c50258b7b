"""The config.json of a hub id, fetched before anything is launched."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from dsdpo.errors import IOFailure, Problem

_TRY_AGAIN = (408, 425, 429)  # and 500 to 599
_TOKEN = "log in with `hf auth login` or set HF_TOKEN"
_COPY = "fetch it first where there is a network (`hf download {name}`), or name a local folder"


def fetch_config(name: str, option: str, files: Sequence[str] = ("config.json",)) -> tuple[Path | None, list[Problem]]:
    """The folder in the local cache that holds config.json of a hub id, or why there is none.

    huggingface_hub asks a server that is away for a moment again, up to five times and with growing pauses; where the
    cache has the file, it need not answer.

    Args:
        option: that names the id, for messages.
        files: of which one is enough.

    Raises:
        IOFailure: the hub gave no answer, or another than it should, each time.
    """
    import huggingface_hub  # noqa: F401 - what its import raises is no answer of the hub

    try:
        return Path(_download(name, files)).parent, []
    except Exception as error:
        if text := refusal(name, error):
            return None, [Problem("hub", option, f"{option}: {text}")]
        raise IOFailure(
            f"{option}: config.json of {name} could not be fetched, tried several times: {reason(error)}. Try again "
            "later, or set HF_HUB_OFFLINE=1 where the model is in the cache"
        ) from error


def _download(name: str, files: Sequence[str]) -> str:
    """The path of the first of some files that the hub id has. Raises what huggingface_hub raises."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    for file in files[:-1]:
        with suppress(EntryNotFoundError):
            return hf_hub_download(name, file)
    return hf_hub_download(name, files[-1])


def refusal(name: str, error: Exception) -> str:
    """What to do about an error that stays the same however often one asks; empty for one that may pass."""
    from huggingface_hub import errors

    causes = _causes(error)
    if any(isinstance(cause, errors.OfflineModeIsEnabled) for cause in causes):
        return f"{name} is not in the local cache, and HF_HUB_OFFLINE is set; {_COPY.format(name=name)}, or unset it"
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
