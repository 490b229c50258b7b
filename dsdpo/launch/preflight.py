"""What can be known to be wrong with a run before a process group, a download or a GPU is touched."""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import yaml

from dsdpo.checkpoint.commit import RUN_FILE, none_usable, read_run, resume_candidates, verify
from dsdpo.checkpoint.identity import config_diff, refusal
from dsdpo.config.deepspeed import check_deepspeed
from dsdpo.config.load import LoadResult, load
from dsdpo.config.rules import adapter_problems, check_rules
from dsdpo.config.schema import RunConfig
from dsdpo.config.zero import ZeroConfig
from dsdpo.errors import CheckpointError, ConfigError
from dsdpo.runtime.rundir import RunDir

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
_WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


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

    def problems(self) -> list[str]:
        """What cannot be launched."""
        found = []
        if self.num_accelerators is not None and self.num_accelerators < 1:
            found.append(f"command line: --num_accelerators is {self.num_accelerators}; allowed: at least 1")
        if self.hostfile and not Path(self.hostfile).is_file():
            found.append(f"command line: --hostfile: there is no file {self.hostfile}")
        if len([flag for flag in (self.num_accelerators, self.include, self.exclude) if flag is not None]) > 1:
            found.append("command line: give only one of --num_accelerators, --include and --exclude")
        if self.master_port is not None and not 1024 <= self.master_port <= 65535:
            found.append(f"command line: --master_port is {self.master_port}; allowed: 1024 to 65535")
        return found


def preflight(
    path: str | Path,
    overrides: list[str],
    task: str = "train",
    cluster: ClusterRequest | None = None,
    model: str | None = None,
    fresh: bool = False,
) -> tuple[RunConfig, ZeroConfig]:
    """The checked config of a run, and its DeepSpeed JSON.

    Args:
        path: the YAML file.
        overrides: `--key value` arguments.
        task: what the config is for. For `train`, output_dir may hold a run only if that can be continued.
        cluster: the launch that is asked for, when this process is to start it.
        model: `--model` of `dsdpo eval`.
        fresh: whether an earlier run in output_dir will be moved aside.

    Raises:
        ConfigError: every problem found, in one report.
        CheckpointError: all is well but for an earlier run in output_dir that this one cannot go on with.
    """
    loaded = load(path, overrides)
    zero, zero_problems = check_deepspeed(loaded)
    problems = loaded.problems + check_rules(loaded) + zero_problems
    problems += _check_data(loaded) + _check_model(loaded) + _check_folders(loaded)
    problems += cluster.problems() if cluster else []
    problems += check_weights(model, "--model", adapter_allowed=True) if model else []
    problems += _check_held_out(loaded) if task == "eval" else []
    problems += _check_stored(loaded) if task == "reference" else []
    earlier = _earlier_run(loaded) if task == "train" and not fresh else ""
    if problems or loaded.config is None or zero is None:
        raise ConfigError(problems + [earlier] if earlier else problems)
    if earlier:
        raise CheckpointError(earlier)
    return loaded.config, zero


def reload(path: str | Path, overrides: list[str]) -> tuple[RunConfig, ZeroConfig]:
    """The same of a run that has passed `preflight` in its supervisor, maybe on another node. Raises ConfigError."""
    loaded = load(path, overrides)
    zero, zero_problems = check_deepspeed(loaded)
    problems = loaded.problems + zero_problems + _check_model(loaded)
    if loaded.config is None or zero is None or problems:
        raise ConfigError(problems)
    return loaded.config, zero


def check_device(config: RunConfig, cuda: bool) -> None:
    """What only the machine that trains can tell. Raises ConfigError."""
    wanted = config.attn_implementation
    if wanted not in ("auto", "sdpa") and not cuda:
        raise ConfigError(f"attn_implementation is {wanted}, but no CUDA device is visible here; set sdpa or auto")


def _check_data(loaded: LoadResult) -> list[str]:
    from dsdpo.data.registry import resolve

    config = loaded.config
    if config is None or "dataset_dir" in loaded.faulty:
        return []
    found: dict[str, list[str]] = {}
    for key in ("dataset", "eval_dataset"):
        names = getattr(config, key)
        if key not in loaded.faulty and names:
            for problem in resolve(names, config.dataset_dir)[1]:
                found.setdefault(problem, []).append(key)
    return [f"{', '.join(keys)}: {problem}" for problem, keys in found.items()]


def _check_model(loaded: LoadResult) -> list[str]:
    config = loaded.config
    problems = []
    if config is not None and "model_name_or_path" not in loaded.faulty:
        problems += check_weights(config.model_name_or_path, "model_name_or_path")
    if config is not None and config.adapter_name_or_path and "adapter_name_or_path" not in loaded.faulty:
        problems += _check_adapter(config.adapter_name_or_path)
    return problems


def _check_adapter(name: str) -> list[str]:
    path = Path(name) / "adapter_config.json"
    if not path.is_file() or not any(Path(name).glob("adapter_model.*")):
        return [f"adapter_name_or_path: {name} is no folder with adapter_config.json and adapter_model.safetensors"]
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return [f"adapter_name_or_path: {path} cannot be read: {error}; take an undamaged copy"]
    if not isinstance(settings, dict):
        return [f"adapter_name_or_path: {path} holds no JSON object; take an undamaged copy"]
    return [
        f"adapter_name_or_path: {path}: {problem}. Name another adapter, or let `dsdpo export {name} --to DIR --merge` "
        "fold this one into its base and name DIR in model_name_or_path"
        for problem in adapter_problems(settings)
    ]


def check_weights(name: str, option: str, adapter_allowed: bool = False) -> list[str]:
    """What is wrong with a model folder or hub id; a hub id is only looked at, not looked up."""
    folder = Path(name)
    if folder.is_dir():
        return [f"{option}: {name} {lack}" for lack in _lacks(folder, adapter_allowed)]
    if folder.exists():
        return [f"{option}: {name} is a file; give the folder that holds config.json and the weights"]
    if name.startswith("~") and folder.expanduser().exists():
        return [f"{option}: write {folder.expanduser()} in full instead of {name}"]
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        return [f"{option}: there is no folder {name}"]
    if "/" in name and folder.parent.is_dir():
        return [f"{option}: there is no {folder.name} in the folder {folder.parent}, which hides a hub id {name}"]
    if not _HUB_ID.fullmatch(name):
        return [f"{option}: {name} is neither a folder nor a hub id such as Qwen/Qwen2.5-0.5B-Instruct"]
    return []


def _lacks(folder: Path, adapter_allowed: bool) -> list[str]:
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        if adapter_allowed:
            return []
        return [
            "is a LoRA adapter; `dsdpo export --merge` makes a whole model of it. To train it further, name its base "
            "model here and the adapter in adapter_name_or_path"
        ]
    lacks = []
    if not (folder / "config.json").is_file():
        lacks.append("has no config.json")
    if not any(any(folder.glob(pattern)) for pattern in _WEIGHT_PATTERNS):
        lacks.append(f"has no weights ({' or '.join(_WEIGHT_PATTERNS)})")
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        lacks.append(f"has no tokenizer ({' or '.join(_TOKENIZER_FILES)})")
    return lacks


def _check_held_out(loaded: LoadResult) -> list[str]:
    config = loaded.config
    if config is None or loaded.faulty & {"eval_dataset", "val_size"} or config.eval_dataset or config.val_size:
        return []
    return ["there is nothing to evaluate on; set eval_dataset or val_size"]


def _check_stored(loaded: LoadResult) -> list[str]:
    config = loaded.config
    if config is None or loaded.faulty & {"reference", "loss_type"} or config.reference_kind == "cached":
        return []
    return [f"`dsdpo reference` fills a store, but this run's reference is {config.reference_kind}; set cached"]


def _check_folders(loaded: LoadResult) -> list[str]:
    config = loaded.config
    if config is None or "output_dir" in loaded.faulty:
        return []
    output_dir = Path(config.output_dir)
    problems = [_unwritable(output_dir, "output_dir")]
    if "cache_dir" not in loaded.faulty and (config.cache_dir or output_dir.exists()):
        problems.append(_unwritable(config.cache_path, "cache_dir"))
    return [problem for problem in problems if problem]


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
    """Why the run in output_dir, or the checkpoint that is named, cannot be continued; no weights are read."""
    config = loaded.config
    if config is None or loaded.faulty & {"output_dir", "resume_from_checkpoint", "change_on_resume"}:
        return ""
    if RunDir(Path(config.output_dir)).completed.exists():
        return _finished_run(config)
    faults = []
    for checkpoint in resume_candidates(config):
        if checkpoint.uncertain:  # the ranks look again, and tell
            return ""
        problem = verify(checkpoint, [RUN_FILE])
        if not problem:
            saved = read_run(checkpoint.path)["config"]
            lines = config_diff(saved, config.model_dump(mode="json"), config.change_on_resume)
            return refusal(str(checkpoint.path), lines) if lines else ""
        faults.append(f"{checkpoint.path.name}: {problem}")
    return str(none_usable(config, faults)) if faults else ""


def _finished_run(config: RunConfig) -> str:
    """Whether the finished run in output_dir is another one; where it is this one, there is nothing to do."""
    try:
        saved = yaml.safe_load(RunDir(Path(config.output_dir)).run_config.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return ""
    if not isinstance(saved, dict):
        return ""
    lines = config_diff(saved, config.model_dump(mode="json"), [])
    if not lines and not config.resume_from_checkpoint:
        return ""
    named = "resume_from_checkpoint is set" if config.resume_from_checkpoint else ""
    return (
        f"output_dir: {config.output_dir} holds a finished run, and this is another one: "
        f"{'; '.join(filter(None, [*lines, named]))}. Choose another output_dir, or begin again with --fresh"
    )
