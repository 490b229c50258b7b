"""What can be known to be wrong with a run before a process group, a download or a GPU is touched."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dsdpo.checkpoint.continuing import earlier_run_problem
from dsdpo.compat import has_fp16
from dsdpo.config.accelerate import launch_problems
from dsdpo.config.deepspeed import check_deepspeed
from dsdpo.config.hubs import HUBS, Hub, environment_problems, why_picked
from dsdpo.config.load import LoadResult, load
from dsdpo.config.precision import no_fp16
from dsdpo.config.rules import check_rules
from dsdpo.config.schema import RunConfig
from dsdpo.config.stages import STAGES
from dsdpo.config.zero import ZeroConfig
from dsdpo.data import registry, template_files
from dsdpo.errors import CheckpointError, ConfigError, IOFailure, Problem
from dsdpo.export import push
from dsdpo.model import files
from dsdpo.runtime.env import has_gpu_driver, launched

_MODEL = "model_name_or_path"
_HUB_OPTIONS = {"push_to_hub", "hub_model_id", "output_dir"}


@dataclass(frozen=True)
class ClusterRequest:
    """Where the ranks run, in the words of the `deepspeed` launcher.

    `num_accelerators` is per node and empty for all of them; with a hostfile, `include` and `exclude` choose
    among its hosts (`node-1:0,2@node-2`). `requeue` puts the SLURM job back into the queue where the run can go on.
    """

    num_accelerators: int | None = None
    hostfile: str | None = None
    include: str | None = None
    exclude: str | None = None
    master_addr: str | None = None
    master_port: int | None = None
    requeue: bool = False

    def problems(self) -> list[Problem]:
        """What cannot be launched."""
        found: list[tuple[str, str]] = []
        if self.num_accelerators is not None and self.num_accelerators < 1:
            found.append(("num_accelerators", f"--num_accelerators is {self.num_accelerators}; allowed: at least 1"))
        if self.hostfile and not Path(self.hostfile).is_file():
            found.append(("hostfile", f"--hostfile: there is no file {self.hostfile}"))
        if len([flag for flag in (self.num_accelerators, self.include, self.exclude) if flag is not None]) > 1:
            found.append(("include", "give only one of --num_accelerators, --include and --exclude"))
        if self.master_port is not None and not 1024 <= self.master_port <= 65535:
            found.append(("master_port", f"--master_port is {self.master_port}; allowed: 1024 to 65535"))
        return [Problem("cluster", option, f"command line: {text}") for option, text in found]


def preflight(
    path: str | Path,
    overrides: list[str],
    task: str = "train",
    cluster: ClusterRequest | None = None,
    model: str | None = None,
    fresh: bool = False,
    ranks: int | None = None,
) -> tuple[RunConfig, ZeroConfig]:
    """The checked config of a run, and its DeepSpeed JSON.

    Args:
        path: the YAML file; empty where the options say everything.
        overrides: `--key value` arguments.
        task: what the config is for. For `train`, output_dir may hold a run only if that can be continued.
        cluster: the launch that is asked for, when this process is to start it.
        model: `--model` of `dsdpo eval`.
        fresh: whether an earlier run in output_dir will be moved aside.
        ranks: how many will be started, where that is known already.

    Raises:
        ConfigError: every problem found, in one report.
        IOFailure: all is well as far as files tell, but the hub gives no answer.
        CheckpointError: all is well but for an earlier run in output_dir that this one cannot go on with.
    """
    loaded = load(path or None, overrides, fresh, ranks)
    config = loaded.config
    zero, problems = check_deepspeed(loaded)
    problems = loaded.problems + check_rules(loaded) + problems + _check_ranks(loaded, task, ranks)
    asked: list[str] = []
    problems += cluster.problems() if cluster else []
    problems += zero.rank_problems(ranks) if zero is not None and ranks else []
    if config is not None:
        problems += registry.problems(config, loaded.faulty) + files.problems(config, loaded.faulty)
        problems += template_files.problems(config, loaded.faulty)
        problems += push.problems(config) if task == "train" and not loaded.faulty & _HUB_OPTIONS else []
        problems += _check_folders(config, loaded.faulty) + _check_task(config, loaded.faulty, task)
        problems += files.folder_problems(model, "--model", adapter_allowed=True) if model else []
        asked = _asked(config, loaded.faulty, model)
        problems += environment_problems(config.hub) if asked else []
        if zero is not None and not loaded.faulty & {"precision", "max_grad_norm", "train_batch_size"}:
            problems += launch_problems(config, zero.raw, os.environ, has_gpu_driver())
    hub, failure = _check_hub(config, model, {*loaded.faulty, *(problem.option for problem in problems)})
    problems += hub
    earlier = _earlier_run(loaded) if task == "train" and not fresh else ""
    if problems or config is None or zero is None:
        raise ConfigError([*problems, Problem("earlier-run", "output_dir", earlier)] if earlier else problems)
    if earlier:
        raise CheckpointError(earlier)
    if failure is not None:
        raise failure
    mesh = launched()
    for remark in said(loaded, asked) if mesh is None or mesh.is_main else ():
        print(remark, flush=True)
    return config, zero


def said(loaded: LoadResult, asked: list[str]) -> Iterator[str]:
    """What to say before a run: how its options were read, and which hub is asked."""
    if loaded.translation is not None:
        yield from loaded.translation.lines()
    yield from filter(None, (loaded.remark, *asked))


def needs_ranks(path: str | Path, overrides: list[str]) -> bool:
    """Whether the size of a step is given for each rank."""
    translation = load(path or None, overrides).translation
    return translation is not None and translation.needs_ranks


def _check_ranks(loaded: LoadResult, task: str, ranks: int | None) -> list[Problem]:
    if task != "train" or ranks is not None or loaded.translation is None or not loaded.translation.needs_ranks:
        return []
    text = (
        "per_device_train_batch_size counts for each rank, and how many there will be is not known before they start; "
        "set train_batch_size, the examples of a step over all of them"
    )
    return [Problem("ranks-unknown", "train_batch_size", text)]


def _asked(config: RunConfig, faulty: frozenset[str], model: str | None) -> list[str]:
    """A line for each hub that a run asks, with what is asked of it and why."""
    names: dict[Hub, list[str]] = {}
    if _MODEL not in faulty and files.asks_hub(config):
        names.setdefault(config.model_source.hub, []).append(config.model_name_or_path)
    if model and not config.source_of(model).is_folder:
        names.setdefault(config.model_source.hub, []).append(model)
    if "template" not in faulty and template_files.is_hub_id(config.template):
        names.setdefault(config.model_source.hub, []).append(config.template)
    for entry in registry.hub_entries(config, faulty):
        names.setdefault("modelscope" if entry.modelscope else "huggingface", []).append(entry.name)
    why = {config.model_source.hub: why_picked(config.hub)}
    return [
        f"asking {HUBS[hub]} for {', '.join(dict.fromkeys(found))} ({why.get(hub, 'dataset_info.json')})"
        for hub, found in names.items()
    ]


def _check_hub(config: RunConfig | None, model: str | None, faulty: set[str]) -> tuple[list[Problem], IOFailure | None]:
    """What is wrong with the hub ids of a run, and why that cannot be told: the hub gives no answer."""
    if "hub" in faulty:
        return [], None
    try:
        found = files.fetched_problems(config) if config is not None and _MODEL not in faulty else []
        if config is not None and model and "--model" not in faulty:
            found += files.fetched_weights(config.source_of(model), "--model")
        return found, None
    except IOFailure as error:
        return [], error


def reload(path: str | Path, overrides: list[str], ranks: int) -> tuple[RunConfig, ZeroConfig]:
    """The same of a run that has passed `preflight` in its supervisor, maybe on another node. Raises ConfigError."""
    loaded = load(path or None, overrides, ranks=ranks)
    zero, problems = check_deepspeed(loaded)
    problems = loaded.problems + problems
    if loaded.config is not None:
        problems += files.problems(loaded.config, loaded.faulty, reads_headers=False)
    if loaded.config is None or zero is None or problems:
        raise ConfigError(problems)
    return loaded.config, zero


def check_device(config: RunConfig, cuda: bool, zero: ZeroConfig | None = None, ranks: int | None = None) -> None:
    """What only the machine that trains can tell. Raises ConfigError.

    Args:
        ranks: how many will be started; None where that is not known yet.
    """
    problems = zero.rank_problems(ranks) if zero is not None and ranks else []
    problems += files.cuda_problems(config) if cuda else []
    if config.precision == "fp16" and not cuda and not has_fp16():
        problems.append(Problem("no-fp16", "precision", no_fp16("cpu")))
    wanted = config.attn_implementation
    if wanted not in ("auto", "sdpa") and not cuda:
        text = f"attn_implementation is {wanted}, but no CUDA device is visible here; set sdpa or auto"
        problems.append(Problem("no-cuda", "attn_implementation", text))
    if config.kernels == "liger" and not cuda:
        text = "kernels is liger, but no CUDA device is visible here; set none or auto"
        problems.append(Problem("no-cuda", "kernels", text))
    if problems:
        raise ConfigError(problems)


def _check_task(config: RunConfig, faulty: frozenset[str], task: str) -> list[Problem]:
    """What `dsdpo eval` and `dsdpo reference` need."""
    if task == "eval" and not (faulty & {"eval_dataset", "val_size"} or config.eval_dataset or config.val_size):
        return [
            Problem("nothing-held-out", "eval_dataset", "there is nothing to evaluate on; set eval_dataset or val_size")
        ]
    if task == "reference" and not faulty & {"reference", "loss_type"} and config.reference_kind != "cached":
        text = f"`dsdpo reference` fills a store, but this run's reference is {config.reference_kind}; set cached"
        if "reference" not in STAGES[config.stage].options:
            text = f"`dsdpo reference` fills a store, but stage {config.stage} has no reference; leave the command away"
        return [Problem("no-store", "reference", text)]
    return []


def _check_folders(config: RunConfig, faulty: frozenset[str]) -> list[Problem]:
    if "output_dir" in faulty:
        return []
    output_dir = Path(config.output_dir)
    found = {"output_dir": _unwritable(output_dir, "output_dir")}
    if "cache_dir" not in faulty and (config.cache_dir or output_dir.exists()):
        found["cache_dir"] = _unwritable(config.cache_path, "cache_dir")
    return [Problem("unwritable", option, text) for option, text in found.items() if text]


def _unwritable(folder: Path, option: str) -> str:
    """Why `folder` cannot be written or made; tried with a nameless file, so that nothing is left behind."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        return f"{option}: {folder} cannot be a folder: {existing} is a file; choose another path"
    try:
        with tempfile.TemporaryFile(dir=existing):
            return ""
    except OSError as error:
        return f"{option}: cannot write to {existing} ({error.strerror}); choose another folder than {folder}"


def _earlier_run(loaded: LoadResult) -> str:
    config = loaded.config
    if config is None or loaded.faulty & {"output_dir", "resume_from_checkpoint", "change_on_resume"}:
        return ""
    return earlier_run_problem(config)
