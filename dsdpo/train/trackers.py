"""The metrics in TensorBoard, wandb and others, through accelerate's trackers, on the main rank alone.

A tracker that fails ends no run: metrics.jsonl has every step. A run that is resumed goes on in the tracker's same run,
by the id that a file of output_dir keeps.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dsdpo.compat import tracker_class
from dsdpo.config.schema import RunConfig
from dsdpo.runtime.files import write_atomically
from dsdpo.runtime.rundir import RunDir

PROJECT = "dsdpo"
MOST_FAILURES = 3  # in a row, after which a tracker is left out
# As in transformers. accelerate reads mlflow's itself.
_PROJECT_VARIABLES = {
    "wandb": "WANDB_PROJECT",
    "trackio": "TRACKIO_PROJECT",
    "swanlab": "SWANLAB_PROJECT",
    "comet_ml": "COMET_PROJECT_NAME",
    "clearml": "CLEARML_PROJECT",
}


class Trackers:
    """All trackers of a run.

    Args:
        names: of `config.trackers.TRACKERS`.
        first_step: steps that earlier processes took; 0 begins a new run in each tracker.
        say: prints a line.
    """

    def __init__(self, config: RunConfig, names: Sequence[str], first_step: int, say: Callable[[str], None]) -> None:
        # A server that is gone costs seconds, not the quarter of an hour in which the watchdog would end the run.
        for key, value in (("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1"), ("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")):
            os.environ.setdefault(key, value)
        self._say = say
        self._failures = dict.fromkeys(names, 0)
        self._warned: set[str] = set()
        self._running: dict[str, Any] = {}
        for name in names:
            self._try(name, lambda name=name: self._start(name, config, first_step))  # type: ignore[misc]
            if name not in self._running:
                self._say(f"{name} did not start; the run goes on without it")

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Report the metrics of a step."""
        for name, tracker in list(self._running.items()):
            self._try(name, lambda tracker=tracker: tracker.log(dict(values), step=step))  # type: ignore[misc]
            if self._failures[name] >= MOST_FAILURES:
                del self._running[name]
                self._say(f"{name} failed {MOST_FAILURES} times in a row; the run goes on without it")

    def close(self) -> None:
        """End the tracker's runs."""
        for name, tracker in self._running.items():
            self._try(name, tracker.finish)
        self._running = {}

    def _start(self, name: str, config: RunConfig, first_step: int) -> None:
        place = RunDir(Path(config.output_dir)).tracker_id(name)
        known = place.read_text().strip() if first_step and place.exists() else None
        tracker = tracker_class(name)(*_arguments(name, config), **_options(name, config, first_step, known))
        tracker.start()
        tracker_id = known or _new_id(name, tracker)
        if tracker_id is not None and known is None:
            write_atomically(place, tracker_id)
        if name == "comet_ml":
            tracker.tracker.set_name(_run_name(config))
        if name in ("mlflow", "comet_ml", "clearml") and known is None:
            tracker.store_init_configuration(_flat(config))
        self._running[name] = tracker

    def _try(self, name: str, call: Callable[[], Any]) -> None:
        """Call, and warn of the first failure."""
        try:
            call()
        except Exception as error:  # whatever a tracker raises: it is not the training
            self._failures[name] += 1
            if name not in self._warned:
                self._warned.add(name)
                self._say(f"WARNING: {name} failed ({type(error).__name__}: {error}); output_dir has every step")
        else:
            self._failures[name] = 0


def _run_name(config: RunConfig) -> str:
    return config.run_name or Path(config.output_dir).resolve().name


def _arguments(name: str, config: RunConfig) -> tuple[str, ...]:
    """Project, or for TensorBoard the folder of the run and the one that it stands in."""
    if name == "tensorboard":
        folder = RunDir(Path(config.output_dir)).tensorboard
        return folder.name, str(folder.parent)
    return (os.environ.get(_PROJECT_VARIABLES.get(name, ""), PROJECT),)


def _options(name: str, config: RunConfig, first_step: int, known: str | None) -> dict[str, Any]:
    """What a tracker's own `init` takes: the run's name, and which run is continued."""
    title, settings = _run_name(config), config.model_dump(mode="json")
    if name == "tensorboard":
        return {"purge_step": first_step + 1} if first_step else {}
    if name == "wandb":
        own = known or uuid.uuid4().hex[:12]
        return {"id": own, "resume": "allow", "name": title, "dir": config.output_dir, "config": settings}
    if name == "trackio":  # goes on in the newest run of a name
        return {"name": known or title, "resume": "allow" if known else "never", "config": settings, "embed": False}
    if name == "mlflow":
        return {"run_id": known, "run_name": title}
    if name == "swanlab":
        own = known or uuid.uuid4().hex[:21]
        return {"id": own, "resume": "allow", "experiment_name": title, "config": settings}
    if name == "comet_ml":
        return {"experiment_key": known or uuid.uuid4().hex, "mode": "get_or_create"}
    assert name == "clearml"
    begin: dict[str, Any] = {"reuse_last_task_id": known or False}
    if known:
        begin["continue_last_task"] = 0  # the steps that are logged are counted from the run's beginning
    return {"task_name": title, "auto_connect_frameworks": {"tensorboard": False, "pytorch": False}, **begin}


def _new_id(name: str, tracker: Any) -> str | None:
    """What a later process needs to go on in the run that a tracker has begun; None where the folder is enough."""
    if name == "tensorboard":
        return None
    if name in ("wandb", "swanlab"):
        return str(tracker.init_kwargs["id"])
    if name == "comet_ml":
        return str(tracker.init_kwargs["experiment_key"])
    if name == "trackio":
        return str(tracker.init_kwargs["name"])
    return str(tracker.tracker.info.run_id if name == "mlflow" else tracker.tracker.id)


def _flat(config: RunConfig) -> dict[str, Any]:
    """The options as numbers and texts, which is all that some trackers take."""
    plain = (bool, int, float, str)
    return {key: value if isinstance(value, plain) else str(value) for key, value in config.model_dump().items()}
