"""What the files of a model tell before anything is launched: its folder or hub id, config.json, headers of weights.

Nothing heavy is imported: see `model/support.py` for what the models themselves must be.
"""

from __future__ import annotations

import re
from pathlib import Path

from dsdpo.config.hubs import ModelSource
from dsdpo.config.schema import RunConfig
from dsdpo.config.stages import STAGES
from dsdpo.errors import Problem
from dsdpo.model import adapter_files, support
from dsdpo.model.architecture import Architecture, module_prefix
from dsdpo.model.config_file import read_object, wrong_values
from dsdpo.model.hub import fetch_config
from dsdpo.model.other_folders import hub_id_in, what_it_is
from dsdpo.model.targets import modules_of, target_problems
from dsdpo.model.tensors import tensor_problems
from dsdpo.runtime import modelscope
from dsdpo.runtime.rundir import RunDir, run_of_merged
from dsdpo.runtime.weights import WEIGHTS, Shapes, damage, indexed, narrow, weight_files
from dsdpo.runtime.weights import shapes as shapes_of

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
_SMALL_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_MODEL = "model_name_or_path"


def problems(config: RunConfig, faulty: frozenset[str], reads_headers: bool = True) -> list[Problem]:
    """What is wrong with the model and the adapter of a run; a hub id is only looked at, not looked up.

    Args:
        faulty: options whose values cannot be used.
        reads_headers: False where another process has read config.json and the headers of the weights.
    """
    if (run_dir := not_merged(config)) is not None:
        return adapter_files.problems(str(run_dir.final))
    found = []
    if _MODEL not in faulty:
        found += folder_problems(config.model_name_or_path, _MODEL, reads_headers=reads_headers)
        if Path(config.model_name_or_path).is_dir():
            found += model_problems(Path(config.model_name_or_path), config, faulty) if reads_headers else []
            found += _revision_problems(config, faulty)
        elif not found and config.model_source.hub == "modelscope" and "hub" not in faulty:
            found += filter(None, [modelscope.named_problem(config.model_name_or_path, _MODEL)])
    if config.adapter_name_or_path and "adapter_name_or_path" not in faulty:
        found += adapter_files.problems(config.adapter_name_or_path)
    return found


def _revision_problems(config: RunConfig, faulty: frozenset[str]) -> list[Problem]:
    if config.model_revision is None or "model_revision" in faulty:
        return []
    text = (
        f"model_revision is {config.model_revision}, but model_name_or_path {config.model_name_or_path} is a folder, "
        "which has no revisions; delete it, or name the id of a hub"
    )
    return [Problem("model-revision", "model_revision", text)]


def not_merged(config: RunConfig) -> RunDir | None:
    """The run whose adapter is to be merged before this one begins; None where nothing is left to do."""
    model = config.model_name_or_path
    return run_of_merged(model) if config.create_new_adapter and not Path(model).is_dir() else None


def fetched_problems(config: RunConfig) -> list[Problem]:
    """The same for a hub id that has passed, from its config.json, which is fetched.

    Raises:
        IOFailure: the hub cannot be reached.
    """
    source = config.model_source
    if source.is_folder or not_merged(config) is not None:
        return []
    folder, found = fetch_config(source, _MODEL)
    if folder is None:
        return found
    # weights of an earlier commit beside it are replaced before they are loaded
    reads_weights = source.hub != "modelscope" or not modelscope.is_changing(folder)
    return model_problems(folder, config, frozenset(), reads_weights)


def fetched_weights(source: ModelSource, option: str) -> list[Problem]:
    """What is wrong with a hub id of trained weights, which may be an adapter. Raises IOFailure."""
    return [] if source.is_folder else fetch_config(source, option, ("config.json", "adapter_config.json"))[1]


def asks_hub(config: RunConfig) -> bool:
    """Whether the run's model is one of a hub."""
    return not config.model_source.is_folder and not _named(config.model_name_or_path) and not_merged(config) is None


def folder_problems(name: str, option: str, adapter_allowed: bool = False, reads_headers: bool = True) -> list[Problem]:
    """What is wrong with the name of a model folder or hub id, and with what lies in the folder."""
    found = _named(name) or [
        (code, f"{name} {lack}") for code, lack in _lacks(Path(name), adapter_allowed, reads_headers)
    ]
    return [Problem(code, option, f"{option}: {text}") for code, text in found]


def _named(name: str) -> list[tuple[str, str]]:
    folder = Path(name)
    if folder.is_dir():
        return []
    if folder.exists():
        return [("model-folder", f"{name} is a file; give the folder that holds config.json and the weights")]
    if name.startswith("~") and folder.expanduser().exists():
        return [("model-folder", f"write {folder.expanduser()} in full instead of {name}")]
    if hub_id := hub_id_in(name):
        return [("model-folder", f"{name} is an address; write the hub id {hub_id}")]
    if "://" in name:
        return [("model-folder", f"{name} is an address; download the model, and name its folder")]
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        return [("model-folder", f"there is no folder {name}")]
    if "/" in name and folder.parent.is_dir():
        return [
            (
                "model-folder",
                f"there is no {folder.name} in the folder {folder.parent}, which hides a hub id {name}",
            )
        ]
    if not _HUB_ID.fullmatch(name):
        return [("model-folder", f"{name} is neither a folder nor a hub id such as Qwen/Qwen2.5-0.5B-Instruct")]
    return []


def _lacks(folder: Path, adapter_allowed: bool, reads_headers: bool) -> list[tuple[str, str]]:
    if not folder.is_dir():
        return []
    files, faults = weight_files(folder)
    is_adapter = (folder / "adapter_config.json").exists()
    if is_adapter and files and not adapter_allowed:
        text = "holds an adapter beside a model, and transformers would put it onto the model"
        return [("model-is-adapter", f"{text}; move adapter_config.json and adapter_model.* to another folder")]
    if is_adapter and not files:
        if adapter_allowed:
            return []
        remedy = (
            "is a LoRA adapter; `dsdpo export --merge` makes a whole model of it, and so does create_new_adapter: true "
            "of a run's. To train it further, name its base model here and the adapter in adapter_name_or_path"
        )
        return [("model-is-adapter", remedy)]
    lacks = []
    if not files and not faults and (other := what_it_is(folder)):
        return [("model-folder", other)]
    if not (folder / "config.json").is_file():
        lacks.append(("model-folder", "has no config.json"))
    if not files and not faults:
        lacks.append(("model-folder", f"has no weights ({', '.join(WEIGHTS)})"))
    lacks += [("weights-missing", fault) for fault in faults]
    if reads_headers:
        lacks += [("weights-damaged", f"has a {file.name} that {fault}") for file in files if (fault := damage(file))]
    own = [folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    lacks += [("tokenizer-damaged", f"has a {file.name} that {fault}") for file in own if (fault := damage(file))]
    small = [folder / name for name in _SMALL_FILES if (folder / name).is_file()]
    lacks += [("tokenizer-damaged", f"has a {file.name} that {fault}") for file in small if (fault := _unread(file))]
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        lacks.append(("model-folder", f"has no tokenizer ({' or '.join(_TOKENIZER_FILES)})"))
    return lacks


def _unread(file: Path) -> str:
    """Why a small file beside the tokenizer cannot be read."""
    if file.suffix == ".json":
        return read_object(file)[1]
    try:
        file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        return f"cannot be read: {error}"
    return damage(file)


def model_problems(
    folder: Path, config: RunConfig, faulty: frozenset[str], reads_weights: bool = True
) -> list[Problem]:
    """Why the model in a folder cannot be trained as asked, from config.json and the headers of safetensors files.

    A folder of the hub's cache may lack the weights so far, or have others: then the ranks look for the modules of
    `lora_target`.
    """
    path = folder / "config.json"
    if not path.is_file():
        return []
    settings, fault = read_object(path)
    if fault:
        return [Problem("model-config", _MODEL, f"{_MODEL}: {path} {fault}")]
    if not isinstance(kind := settings.get("model_type"), str):
        text = f"{_MODEL}: {path} has no model_type; take a config.json of transformers"
        return [Problem("model-config", _MODEL, text)]
    wrong = wrong_values(settings) if kind in support.COMPARED else []
    settings |= dict.fromkeys(key for key, _ in wrong)
    architecture = Architecture.read(settings)
    longest = 0 if "max_length" in faulty else config.max_length
    backend = "auto" if "attn_implementation" in faulty else config.attn_implementation
    head = STAGES[config.stage].head
    found = [Problem("model-config", _MODEL, f"{_MODEL}: {path}: {text}; correct it") for _, text in wrong]
    found += support.problems(architecture, longest, config.disable_dropout, backend, head)
    if config.kernels == "liger" and kind in support.COMPARED - support.LIGER and "kernels" not in faulty:
        found.append(Problem("model-kernels", "kernels", support.unknown_to_liger(kind)))
    shapes = _shapes(folder) if reads_weights else {}
    if kind in support.COMPARED and not wrong and reads_weights:
        told = tensor_problems(settings, shapes, indexed(folder), narrow(weight_files(folder)[0]) if shapes else [])
        found += [Problem(code, _MODEL, f"{_MODEL}: {folder} {text}") for code, text in told]
    makes_adapter = config.finetuning_type == "lora" and not config.adapter_name_or_path
    if makes_adapter and "lora_target" not in faulty:
        found += target_problems(config.lora_target, *modules_of(shapes), module_prefix(kind))
    return found


def cuda_problems(config: RunConfig) -> list[Problem]:
    """What a model in a folder asks of the attention that `auto` means on a GPU; in fp16 that depends on the GPU."""
    path = Path(config.model_name_or_path) / "config.json"
    settings, fault = read_object(path) if path.is_file() else ({}, "missing")
    if fault or config.attn_implementation != "auto" or config.precision in ("fp32", "fp16"):
        return []
    return support.head_problems(Architecture.read(settings), "varlen")


def _shapes(folder: Path) -> Shapes:
    """Name and shape of each tensor; empty where the files cannot tell."""
    files, lacks = weight_files(folder)
    return {} if lacks or any(map(damage, files)) else shapes_of(files)
