"""What `dsdpo` can be asked to do on ranks, and what a supervisor and a rank without one both do around it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from dsdpo.checkpoint import continuing
from dsdpo.config.run_file import is_text
from dsdpo.config.schema import RunConfig
from dsdpo.errors import CheckpointError, DsdpoError, HangError
from dsdpo.model.files import not_merged
from dsdpo.runtime.command import command_line
from dsdpo.runtime.env import launched
from dsdpo.runtime.rundir import RunDir


@dataclass(frozen=True)
class Task:
    """What to do (`train`, `reference` or `eval`), on which YAML (or its content as JSON; empty: the options say
    everything), with which options and `--model`.

    `fresh` trains from the beginning though output_dir holds a run, which `confirmed` says without asking. `typed` are
    the arguments of the command as a user has typed them.
    """

    name: str
    path: str
    overrides: list[str]
    model: str | None = None
    fresh: bool = False
    confirmed: bool = False
    typed: tuple[str, ...] = ()

    @property
    def file(self) -> str:
        """The YAML; empty where there is none."""
        return "" if is_text(self.path) else self.path

    def argv(self, token: str) -> list[str]:
        """The arguments that make a rank do this under a supervisor that holds the lock `token`."""
        model = ["--model", self.model] if self.model else []
        file = [self.path] if self.path else []
        return [self.name, *file, *model, "--supervised", token, *self.overrides]


def resume_command(task: Task) -> str:
    """What goes on with a training that was stopped: the same command, but for what would begin it again."""
    return command_line([argument for argument in task.typed if argument not in ("--fresh", "--yes")])


def evaluation(task: Task, usage_error: Callable[[str], object]) -> Task:
    """`dsdpo eval` with an output_dir in place of RUN.yaml, or as --model, in words of RUN.yaml and a model folder.

    Args:
        usage_error: ends the program where neither a run nor a model is named.

    Raises:
        CheckpointError: a folder is no run, or the run has no weights yet.
    """
    from dsdpo.tools.trained import TrainedRun

    weights = None if task.model is None else TrainedRun.find(task.model)
    if weights is not None:
        task = replace(task, model=str(weights.weights("eval")))
    if is_text(task.path) or not Path(task.path).is_dir():
        if task.model is None:
            usage_error("give --model DIR beside RUN.yaml, or a run's output_dir in place of RUN.yaml")
        return task
    run = TrainedRun.find(task.path)
    if run is None:
        raise CheckpointError(f"{task.path} is not the output_dir of a run; give one, or RUN.yaml with --model DIR")
    model = task.model or str(run.weights("eval"))
    return replace(task, path=str(run.run_dir.run_config), model=model, overrides=run.evaluation(task.overrides))


def merge_before(config: RunConfig) -> None:
    """Merge the adapter of the run before into its model, where create_new_adapter asks for that and it is not done.

    Raises:
        CheckpointError, IOFailure: it cannot be read, or written.
    """
    run_dir = not_merged(config)
    if run_dir is None:
        return
    from dsdpo.export.huggingface import export

    target = Path(config.model_name_or_path)
    print(f"merging the adapter of {run_dir} into {target}", flush=True)
    try:
        export(run_dir.path, target, merge=True)
    except DsdpoError:
        if not_merged(config) is not None:  # another process was faster
            raise


def wait_merged(config: RunConfig, timeout: float = 3600.0) -> None:
    """Wait for the process that does `merge_before`. Raises HangError where it is not done in time."""
    deadline = time.monotonic() + timeout
    while not_merged(config) is not None:
        if time.monotonic() >= deadline:
            raise HangError(
                f"waited {timeout:.0f} s for {config.model_name_or_path} to be written by rank 0; see its log"
            )
        time.sleep(1)


def prepare_data(config: RunConfig, trains: bool = True) -> None:
    """Prepare both splits where missing and print what they hold.

    Args:
        trains: ranks will load the model. One of ModelScope is fetched here, before they wait for each other.

    Raises:
        DsdpoError: as `prepare`, `merge_before` and `ModelSource.local`.
    """
    from dsdpo.data.prepare import prepare, summary

    merge_before(config)
    source = config.model_source
    if not source.is_folder and source.hub == "modelscope":
        source.local("model_name_or_path", whole=trains, refresh=True, stamps=config.weight_stamps)

    for prepared in (prepare(config, "train"), prepare(config, "eval")):
        if prepared is not None:
            print(summary(prepared), flush=True)
            remark = small_set_remark(len(prepared), config.train_batch_size) if prepared.split == "train" else ""
            if remark:
                print(remark, flush=True)


def small_set_remark(examples: int, train_batch_size: int) -> str:
    """What to say of a training set that does not fill a step; empty where it does."""
    if examples >= train_batch_size:
        return ""
    return (
        f"{examples} examples are fewer than train_batch_size ({train_batch_size}): each step is an epoch, and takes "
        "all of them"
    )


def clear_marks(task: Task, config: RunConfig) -> None:
    """Forget how an earlier attempt was stopped and ended; of training, also that it was finished, as it goes on.

    Raises:
        CheckpointError: another run has finished there.
    """
    run_dir = RunDir(Path(config.output_dir))
    if task.name == "train":
        continuing.reopen(config)
    for mark in (run_dir.stop, run_dir.exit, run_dir.peer_exit):
        mark.unlink(missing_ok=True)


def is_finished(task: Task, config: RunConfig) -> bool:
    """Whether this training has ended well before; said once."""
    if task.name != "train" or not continuing.is_finished(config):
        return False
    mesh = launched()
    if mesh is None or mesh.is_main:
        print(f"{config.output_dir} holds this run, finished: nothing to do. --fresh trains it again", flush=True)
    return True


def finish(task: Task, config: RunConfig) -> None:
    """What follows a training that reached its end: curves, also into the model card, and the push to the hub.

    Raises:
        IOFailure: it cannot be written, or pushed.
    """
    if task.name != "train":
        return
    run_dir = RunDir(Path(config.output_dir))
    if config.plot_loss:
        from dsdpo.export.card import add_pictures
        from dsdpo.tools.plots import plot

        add_pictures(run_dir.final, plot(run_dir))
    if config.push_to_hub:
        from dsdpo.export.push import push

        print(f"pushed to {push(config)}", flush=True)
