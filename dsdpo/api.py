"""What Python code may use: `dsdpo.train`, `dsdpo.prepare` and `dsdpo.load_config`.

They do what the commands of these names do, in the same way: `train` prepares the data in this process, starts the
`deepspeed` launcher as a child process, and waits. The ranks are processes of their own, so that this one keeps its
GPUs, threads and modules as they are. What ends a command with an exit code is raised here, as its class in
dsdpo/errors.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from dsdpo.config.load import load
from dsdpo.config.schema import RunConfig
from dsdpo.errors import config_error
from dsdpo.launch.preflight import ClusterRequest, preflight
from dsdpo.launch.supervisor import error_from, supervise
from dsdpo.launch.task import Task, prepare_data
from dsdpo.runtime.env import launched
from dsdpo.runtime.rundir import RunDir

Config: TypeAlias = "Mapping[str, Any] | RunConfig | str | os.PathLike[str]"


@dataclass(frozen=True)
class TrainResult:
    """A training that has reached its end.

    Attributes:
        output_dir: folder of the run; docs/checkpoints.md lists its files.
    """

    output_dir: Path

    @property
    def final(self) -> Path:
        """Folder with the weights: a Hugging Face model, or a PEFT adapter."""
        return RunDir(self.output_dir).final

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl: one for each step, and one for each evaluation, whose keys begin with eval_."""
        from dsdpo.tools.plots import read_metrics

        return read_metrics(RunDir(self.output_dir).metrics)


def train(
    config: Config, *, fresh: bool = False, num_accelerators: int | None = None, hostfile: str | None = None
) -> TrainResult:
    """Train, or go on with a run that was stopped, as `dsdpo train` does.

    Args:
        config: options by name, such as a dict or a RunConfig, or the path of a run config.
        fresh: begin again; what output_dir holds is moved aside without asking.
        num_accelerators: ranks on each node. None: all accelerators, or one CPU rank.
        hostfile: nodes, as `host slots=N` lines. None: this machine, or the nodes of the SLURM job.

    Raises:
        ConfigError: every mistake that can be found before the start; `problems` has a code for each.
        StopRequested: it was stopped, with Ctrl-C or the file STOP; its weights are saved, and the same call goes on.
        DsdpoError: the others of dsdpo/errors.py.
    """
    text = _text(config)
    if launched() is not None:
        told = "dsdpo.train starts ranks by itself, but this process is a rank of a launcher; start it with python"
        raise config_error("launched", "", told)
    task = Task("train", text, [], fresh=fresh, confirmed=True, typed=("train", text))
    with _environment_kept():
        code = supervise(task, ClusterRequest(num_accelerators=num_accelerators, hostfile=hostfile))
    loaded = load(text)
    assert loaded.config is not None, "the supervisor has read it"
    output_dir = Path(loaded.config.output_dir)
    if code:
        raise error_from("train", RunDir(output_dir), code)
    return TrainResult(output_dir)


def prepare(config: Config) -> None:
    """Read, check, template and tokenize the data, as `dsdpo prepare` does. Raises ConfigError, DataError, IOFailure.

    Args:
        config: as for `train`.
    """
    prepare_data(load_config(config), trains=False)


def load_config(config: Config) -> RunConfig:
    """The options of a run, with their defaults, after all checks that need neither the data nor a GPU.

    Args:
        config: as for `train`; options of LLaMA-Factory and TRL are translated.

    Raises:
        ConfigError: every mistake, in one report.
    """
    return preflight(_text(config), [], "prepare")[0]


def _text(config: Config) -> str:
    """A config in the place of a run config's path: that path, or the options as JSON."""
    if isinstance(config, (str, os.PathLike)):
        return os.fspath(config)
    values = config.model_dump(exclude_unset=True) if isinstance(config, RunConfig) else dict(config)
    try:
        return json.dumps(values, default=os.fspath, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        text = f"the config holds a value that no YAML has: {error}; give text, numbers, true, false, lists or mappings"
        raise config_error("value", "", text) from error


@contextmanager
def _environment_kept() -> Iterator[None]:
    """Around what a command sets for its own process, such as DS_ACCELERATOR."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)
