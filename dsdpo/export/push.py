"""The exported weights of a run, sent to a repository of the Hugging Face hub."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from dsdpo.config.schema import RunConfig
from dsdpo.errors import IOFailure, Problem
from dsdpo.runtime.rundir import RunDir


def push(config: RunConfig) -> str:
    """Make the repository where there is none, and upload `final/`. The token is that of HF_TOKEN or `hf auth login`.

    Returns:
        The repository's id.

    Raises:
        IOFailure: the hub refused, or gives no answer; the weights stay where they are.
    """
    from huggingface_hub import HfApi

    folder = RunDir(Path(config.output_dir)).final
    name = config.hub_model_id or Path(config.output_dir).resolve().name
    try:
        api = HfApi()
        name = api.create_repo(name, private=config.hub_private_repo, exist_ok=True).repo_id
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Weights of dsdpo")
    except Exception as error:  # httpx's errors, the hub's own, and those of a broken connection
        again = shlex.join(["hf", "upload", name, str(folder)])
        raise IOFailure(
            f"the weights are in {folder}, but pushing them to {name} failed ({type(error).__name__}: {error}); "
            f"push them with `{again}`"
        ) from error
    return name


def problems(config: RunConfig) -> list[Problem]:
    """What would refuse the push at the end, as far as this machine tells."""
    if not config.push_to_hub:
        return []
    from huggingface_hub import get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    found = []
    try:
        validate_repo_id(config.hub_model_id or Path(config.output_dir).resolve().name)
    except HFValidationError as error:
        found.append(Problem("hub-id", "hub_model_id", f"{error}; set hub_model_id to a name such as org/my-model"))
    if get_token() is None:
        text = "push_to_hub is set, but there is no token; set HF_TOKEN or run `hf auth login`, or delete push_to_hub"
        found.append(Problem("hub-token", "push_to_hub", text))
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        text = "push_to_hub is set, but so is HF_HUB_OFFLINE; unset one of them"
        found.append(Problem("hub-offline", "push_to_hub", text))
    return found
