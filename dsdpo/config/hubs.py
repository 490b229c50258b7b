"""Which hub an id is asked of, and at which revision.

`hub: auto` is decided where a hub is asked, by the variables that users of LLaMA-Factory and ms-swift set.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from dsdpo.errors import Problem
from dsdpo.runtime import modelscope
from dsdpo.runtime.rundir import RunDir
from dsdpo.runtime.weights import weight_files

Hub = Literal["huggingface", "modelscope"]
HUBS: dict[Hub, str] = {"huggingface": "Hugging Face", "modelscope": "ModelScope"}
_USE_MODELSCOPE, _USE_HF, _USE_OPENMIND = "USE_MODELSCOPE_HUB", "USE_HF", "USE_OPENMIND_HUB"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
_CONFIGS = ("config.json", "adapter_config.json")
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
_ON = ("1", "true", "yes", "on", "y", "t")


def picked_hub(hub: str, environment: Mapping[str, str] = os.environ) -> Hub:
    """`hub` of a run config, with `auto` decided."""
    if hub == "auto":
        return "modelscope" if _is_on(_USE_MODELSCOPE, environment) else "huggingface"
    return "modelscope" if hub == "modelscope" else "huggingface"


def why_picked(hub: str, environment: Mapping[str, str] = os.environ) -> str:
    """What has decided."""
    if hub != "auto":
        return f"hub: {hub}"
    named = [name for name in (_USE_MODELSCOPE, _USE_HF) if _is_on(name, environment)]
    return f"{named[0]}={environment[named[0]]}" if named else "hub: auto"


def environment_problems(hub: str, environment: Mapping[str, str] = os.environ) -> list[Problem]:
    """Why the environment does not tell which hub is meant; it is not asked where `hub` says it."""
    if hub != "auto":
        return []
    found = []
    if _is_on(_USE_MODELSCOPE, environment) and _is_on(_USE_HF, environment):
        text = f"{_USE_MODELSCOPE}={environment[_USE_MODELSCOPE]} and {_USE_HF}={environment[_USE_HF]} ask for two hubs"
        found.append(Problem("hub-environment", "hub", f"hub: {text}; unset one of them, or set hub in the run config"))
    if _is_on(_USE_OPENMIND, environment):
        text = f"{_USE_OPENMIND}={environment[_USE_OPENMIND]} asks for openMind, which is not supported"
        found.append(Problem("hub-environment", "hub", f"hub: {text}; unset it, or set hub: {' or '.join(HUBS)}"))
    return found


def _is_on(name: str, environment: Mapping[str, str]) -> bool:
    return environment.get(name, "").strip().lower() in _ON


@dataclass(frozen=True)
class ModelSource:
    """A model or adapter: a folder, or an id on a hub.

    Attributes:
        name: as it was typed.
        hub: that an id is asked of.
        revision: of an id; None: the hub's default.
    """

    name: str
    hub: Hub = "huggingface"
    revision: str | None = None

    @classmethod
    def named(cls, name: str, revision: str | None = None) -> ModelSource:
        """Without a run config that names a hub."""
        return cls(name, picked_hub("auto"), revision)

    @classmethod
    def of_adapter(cls, folder: Path, name: str, revision: str | None) -> ModelSource:
        """The base model of an adapter; the hub is that of the run that has written it, where that lies beside it."""
        return cls(name, hub_of(folder), revision)

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder here, which no hub is asked for."""
        return Path(self.name).is_dir()

    @property
    def repository(self) -> modelscope.Repository:
        """On ModelScope."""
        return modelscope.Repository(self.name, "model", self.revision)

    def place(self, option: str = "model_name_or_path", whole: bool = False) -> tuple[str, str | None]:
        """What `from_pretrained` takes, and `revision` beside: a folder stands for an id of ModelScope.

        Args:
            option: that names it, for messages.
            whole: with weights; else config and tokenizer are enough.

        Raises:
            ConfigError, IOFailure: ModelScope does not have it or gives no answer, and it is not in its cache.
        """
        if not self.is_folder and self.hub == "modelscope":
            return str(self.local(option, whole)), None
        return self.name, None if self.is_folder else self.revision

    def local(self, option: str, whole: bool, refresh: bool = False, stamps: Path | None = None) -> Path:
        """The folder that stands for an id of ModelScope; fetched if the cache lacks it, or asked of the hub again.

        Args:
            refresh: ask the hub, though the cache has it.
            stamps: as `modelscope.fetched` takes them.

        Raises:
            ConfigError, IOFailure: as `place`.
        """
        holds = _holds_model if whole else _holds_tokenizer
        if not refresh and modelscope.is_installed() and (folder := modelscope.cached(self.repository, holds)):
            return folder
        wanted = modelscope.EVERYTHING if whole else modelscope.SMALL
        return modelscope.fetched(self.repository, option, holds, wanted, stamps)


def same_model(one: str, other: str) -> bool:
    """Whether two names are one hub id, or paths of one folder."""
    return one == other or (Path(one).is_dir() and Path(one).resolve() == Path(other).resolve())


def hub_of(folder: Path) -> Hub:
    """The hub of the run that has written a folder of weights, where the run lies around it; else as `auto`."""
    for run_dir in map(RunDir, (folder.parent, folder)):
        try:
            recorded = yaml.safe_load(run_dir.run_config.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            continue
        if isinstance(recorded, dict):
            return picked_hub(str(recorded.get("hub", "huggingface")))
    return picked_hub("auto")


def _has(folder: Path, names: tuple[str, ...]) -> bool:
    return any((folder / name).is_file() for name in names)


def _holds_tokenizer(folder: Path) -> bool:
    return _has(folder, _CONFIGS) and _has(folder, _TOKENIZERS)


def _holds_model(folder: Path) -> bool:
    files, lacks = weight_files(folder)
    return _has(folder, _CONFIGS) and ((bool(files) and not lacks) or _has(folder, _ADAPTERS))
