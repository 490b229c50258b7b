"""A run as other commands take it: its output_dir stands for its config and its weights."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsdpo.checkpoint.commit import checkpoints
from dsdpo.config.earlier import EARLIER_DEFAULTS
from dsdpo.config.hubs import ModelSource, picked_hub
from dsdpo.config.run_file import read_yaml
from dsdpo.data.template_date import date_of_run
from dsdpo.errors import CheckpointError
from dsdpo.runtime.command import command_line
from dsdpo.runtime.rundir import RunDir

# options of a run config that name files or folders, relative to where the run was started
_PATHS = ("model_name_or_path", "adapter_name_or_path", "dataset_dir", "cache_dir", "deepspeed", "template")


@dataclass(frozen=True)
class TrainedRun:
    """A run that has begun, ended or not.

    Attributes:
        run_dir: its files.
        config: the options that it trained with, paths as seen from the current folder.
        moved: those of them that name paths and are written otherwise in run_config.yaml.
    """

    run_dir: RunDir
    config: dict[str, Any]
    moved: dict[str, str]

    @classmethod
    def find(cls, name: str) -> TrainedRun | None:
        """The run whose output_dir, or `final` in it, `name` is; None for any other folder, or none.

        Raises:
            CheckpointError: its run_config.yaml cannot be read.
        """
        path = Path(name)
        if not path.is_dir():
            return None
        run_dir = RunDir(path)
        if not run_dir.run_config.is_file():
            run_dir = RunDir(path.absolute().parent if path.parent == path else path.parent)
            if not run_dir.run_config.is_file() or run_dir.final.resolve() != path.resolve():
                return None
        values, _, problems = read_yaml(run_dir.run_config)
        if values is None or problems:
            raise CheckpointError(
                f"the config of this run cannot be read: {'; '.join(problem.text for problem in problems)}"
            )
        moved = _paths_from_here(values, run_dir)
        return cls(run_dir, values | moved, moved)

    @property
    def base(self) -> str:
        """The model that the run began with, or the adapter over it that it trained further."""
        return str(self.config.get("adapter_name_or_path") or self.config.get("model_name_or_path") or "")

    @property
    def base_source(self) -> ModelSource:
        """Where `base` comes from."""
        revision = None if self.config.get("adapter_name_or_path") else self.config.get("model_revision")
        return ModelSource(self.base, picked_hub(self.config.get("hub") or "huggingface"), revision)

    @property
    def template_date(self) -> str | None:
        """The day that the run's chat template wrote as today's, by its config or its newest checkpoint."""
        return self.config.get("template_date") or date_of_run(self.run_dir.path)

    def weights(self, command: str) -> Path:
        """The folder of the trained weights.

        Args:
            command: `chat` or `eval`, which the error mentions.

        Raises:
            CheckpointError: the run has not written them; says how to get those of its newest checkpoint.
        """
        final = self.run_dir.final
        if any((final / name).is_file() for name in ("adapter_config.json", "config.json")):
            return final
        steps = [checkpoint.step for checkpoint in checkpoints(self.run_dir) if not checkpoint.problem]
        if not steps:
            every = self.config.get("save_steps")
            first = f"the first one comes after step {every}" if every else "save_steps is empty"
            raise CheckpointError(
                f"{self.run_dir} holds no weights yet: the run has not ended, and there is no checkpoint ({first})"
            )
        target = f"{self.run_dir}-step-{steps[0]}"
        export = command_line(["export", str(self.run_dir), "--step", str(steps[0]), "--to", target])
        then = ["eval", str(self.run_dir), "--model", target]
        if command == "chat":
            then = ["chat", target, *self._chat_flags()]
        raise CheckpointError(
            f"{self.run_dir} holds no weights yet: the run has not ended. For those of its newest checkpoint, run "
            f"`{export}` and then `{command_line(then)}`"
        )

    def _chat_flags(self) -> list[str]:
        flags = {"--template": self.config.get("template"), "--system": self.config.get("default_system")}
        flags["--max_length"] = self.config.get("max_length")
        return [part for flag, value in flags.items() if value and value != "default" for part in (flag, str(value))]

    def evaluation(self, overrides: Sequence[str]) -> list[str]:
        """Overrides of run_config.yaml with which it can be evaluated from here; those that are given come last.

        An evaluation has a folder of its own for lock and exit code, so that it may run beside the training.
        """
        given = {token[2:].partition("=")[0] for token in overrides if token.startswith("--")}
        cache = self.config.get("cache_dir") or str(self.run_dir.path.parent / ".dsdpo_cache")
        defaults = {**EARLIER_DEFAULTS, "hub": "huggingface"}
        earlier = {key: str(value) for key, value in defaults.items() if key not in self.config}
        date = {"template_date": self.template_date} if self.template_date else {}
        values = {**self.moved, **earlier, **date, "output_dir": str(self.run_dir.evaluation), "cache_dir": cache}
        return [*(f"--{key}={value}" for key, value in values.items() if key not in given), *overrides]


def _paths_from_here(values: dict[str, Any], run_dir: RunDir) -> dict[str, str]:
    """Relative paths of a recorded config, from the folder in which the run was started.

    That folder is what is left of output_dir's place without the recorded output_dir. Where it is not known, as after a
    move, paths stay as they are.
    """
    recorded, here = Path(str(values.get("output_dir") or "/")), Path(os.path.abspath(run_dir.path))
    tail = recorded.parts
    if recorded.is_absolute() or ".." in tail or not tail or here.parts[-len(tail) :] != tail:
        return {}
    started_in = Path(*here.parts[: -len(tail)])
    if started_in == Path.cwd():
        return {}
    moved = {}
    for key in _PATHS:
        value = values.get(key)
        if not isinstance(value, str) or not value:
            continue
        path = started_in / value  # a folder may be called zero3, too, which then is the name of a DeepSpeed JSON
        if key == "cache_dir" or (path.is_file() if key == "deepspeed" else path.exists()):
            moved[key] = str(path)
    return moved
