"""The files of a run's output_dir: the one place that spells their names.

Each docstring says who writes the file, a colon, and what it holds; docs/checkpoints.md has the same as a table. What
stands inside a checkpoint is the business of `checkpoint/commit.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_REPLACED, _ENVIRONMENT = "replaced-", ".environment-"


@dataclass(frozen=True)
class RunDir:
    """The folder that `output_dir` names. Nothing is read or made here.

    Attributes:
        path: of the folder.
    """

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    # --- what a run leaves ---

    @property
    def run_config(self) -> Path:
        """main rank, before the first step: every option of the run, as YAML."""
        return self.path / "run_config.yaml"

    @property
    def metrics(self) -> Path:
        """main rank: a JSON object in each line, one for each step and each evaluation."""
        return self.path / "metrics.jsonl"

    def merged(self, key: str) -> Path:
        """a later run with create_new_adapter: folder with the model that the adapter in `final` is merged into."""
        return self.path / f"merged-{key}"

    @property
    def eval_examples(self) -> Path:
        """main rank, after `dsdpo eval`: a JSON object in each line, one for each held-out example, with its
        metrics."""
        return self.path / "eval_examples.jsonl"

    @property
    def tensorboard(self) -> Path:
        """main rank: folder of TensorBoard's event files."""
        return self.path / "tensorboard"

    def tracker_id(self, tracker: str) -> Path:
        """main rank: text; the id of the run in a tracker of `report_to`, such as wandb."""
        return self.path / f"{tracker}_id"

    @property
    def checkpoints(self) -> Path:
        """all ranks: folder with one folder for each checkpoint."""
        return self.path / "checkpoints"

    @property
    def final(self) -> Path:
        """main rank, at the end: folder with the weights, for transformers or PEFT."""
        return self.path / "final"

    @property
    def final_superseded(self) -> Path:
        """main rank: the earlier `final`, of a run that was given more steps."""
        return self.path / "final.superseded"

    @property
    def completed(self) -> Path:
        """main rank, last of all: empty; the run has ended well."""
        return self.path / "COMPLETED"

    @property
    def loss_plot(self) -> Path:
        """`dsdpo plot`, or `plot_loss`: picture of the loss, as PNG."""
        return self.path / "loss.png"

    @property
    def rewards_plot(self) -> Path:
        """`dsdpo plot`, or `plot_loss`: picture of the rewards, as PNG."""
        return self.path / "rewards.png"

    @property
    def accuracy_plot(self) -> Path:
        """`dsdpo plot`, or `plot_loss`: picture of the reward accuracy, as PNG."""
        return self.path / "accuracy.png"

    @property
    def evaluation(self) -> Path:
        """`dsdpo eval OUTPUT_DIR`: folder with the lock, exit record and heartbeats of an evaluation."""
        return self.path / "evaluation"

    # --- while it runs ---

    @property
    def lock(self) -> Path:
        """supervisor, or main rank without one: JSON; the process that uses the folder."""
        return self.path / "LOCK"

    @property
    def stop(self) -> Path:
        """supervisor, or you: text of any kind; asks the run to stop. The supervisor writes the name of a signal."""
        return self.path / "STOP"

    @property
    def exit(self) -> Path:
        """main rank, or the rank that noticed a hang: JSON; exit code, message, and the rank that wrote it."""
        return self.path / "EXIT"

    @property
    def exit_reserve(self) -> Path:
        """main rank: 4096 spaces; room for EXIT when the disk is full."""
        return self.path / ".EXIT.reserve"

    @property
    def peer_exit(self) -> Path:
        """the first other rank that failed: JSON, as EXIT."""
        return self.path / "EXIT_PEER"

    @property
    def ranks(self) -> Path:
        """all ranks: folder of the next two."""
        return self.path / "ranks"

    def heartbeat(self, rank: int) -> Path:
        """each rank, every few seconds: JSON; its process and how far it has come."""
        return self.ranks / f"rank-{rank:05d}.json"

    def stacks(self, rank: int) -> Path:
        """each rank that waited in a hang: the Python stacks of its threads, as text."""
        return self.ranks / f"stacks-{rank:05d}.txt"

    def environment(self, token: str) -> Path:
        """supervisor with a hostfile, while it runs: JSON; environment variables, for its owner's eyes only."""
        return self.path / f"{_ENVIRONMENT}{token}"

    def environments(self) -> list[Path]:
        """Those that are there, also of runs that were killed."""
        return sorted(self.path.glob(f"{_ENVIRONMENT}*"))

    # --- across starts ---

    @property
    def row_limit(self) -> Path:
        """the rank that ran out of memory before the first checkpoint: JSON; tokens of the longest row that later
        starts take."""
        return self.path / "row_limit.json"

    @property
    def logs(self) -> Path:
        """nodes of a SLURM job but the first: folder of the next one."""
        return self.path / "logs"

    def node_log(self, job: str, host: str) -> Path:
        """a node of a SLURM job: what its ranks print, as text."""
        return self.logs / f"{job}-{host}.log"

    @property
    def attempts(self) -> Path:
        """supervisor in a SLURM job with `--requeue`: a JSON object in each line, one for each start of the job."""
        return self.path / "attempts.jsonl"

    @property
    def started_over(self) -> Path:
        """supervisor in a SLURM job with `--fresh`: text; id of the job that has moved the earlier run."""
        return self.path / ".started-over"

    def replaced(self, time: str) -> Path:
        """supervisor with `--fresh`: folder with all that the earlier run had left."""
        return self.path / f"{_REPLACED}{time}"

    def left_by_run(self) -> list[Path]:
        """What `--fresh` moves: all but hidden files, the lock, the job's attempts and what was moved before."""
        stays = (".", self.lock.name, self.attempts.name, _REPLACED)
        return [path for path in sorted(self.path.iterdir()) if not path.name.startswith(stays)]


def run_of_merged(model: str) -> RunDir | None:
    """The run in whose folder a model is, or will be, that its adapter is merged into; None for any other model."""
    run_dir = RunDir(Path(model).parent)
    is_named = Path(model).name.startswith(run_dir.merged("").name)
    return run_dir if is_named and run_dir.run_config.is_file() else None
