"""Checkpoints that other trainers write with DeepSpeed's own save_checkpoint, as ordinary weights.

TRL, LLaMA-Factory and the Hugging Face Trainer leave `checkpoint-500/` with `latest`, `global_step500/…_states.pt`, and
a config and a tokenizer, or an adapter_config.json, beside them. DeepSpeed's zero_to_fp32 puts the fp32 master weights
together; here they are held against the model that the config describes, tensor by tensor, before anything is written.
"""

from __future__ import annotations

import io
import re
import shutil
import sys
import zipfile
from collections.abc import Iterable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import peft
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dsdpo.config.hubs import ModelSource
from dsdpo.errors import CheckpointError, DsdpoError, IOFailure
from dsdpo.export.huggingface import check_target, new_folder, resolve_base
from dsdpo.export.match import fit, some

PICKLE_WARNING = "these are pickle files, and reading one can run code: import only what you trust"

_STATES = "*_states.pt"
_STATES_NAME = re.compile(r"(?:bf16_|fp16_)?(?:zero_pp_rank_(\d+)_)?mp_rank_00_(model|optim)_states\.pt")
_CONFIG = "config.json"
_ADAPTER_CONFIG = "adapter_config.json"
_GENERATION_CONFIG = "generation_config.json"
_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
)


def import_checkpoint(source: Path, to: Path, tag: str | None = None, base: str | None = None) -> Path:
    """Write a DeepSpeed checkpoint as a Hugging Face folder, or a PEFT adapter where it has an adapter_config.json.

    A model is stored in bf16 where its config says so, else in fp32; an adapter in fp32.

    Args:
        source: the folder that holds `latest`, or the step's folder in it.
        to: must not exist, or be empty.
        tag: name of the step's folder, in place of what `latest` says.
        base: folder or hub id with the model's config, or the adapter's base model. By default the config in `source`
            or its parent, or what the adapter names as its base.

    Returns:
        The step's folder.

    Raises:
        CheckpointError: a file is missing or broken, the tensors are not the model's, or `to` is not empty.
        IOFailure: the file system refused.
    """
    to = to.absolute()
    check_target(to)
    states = find_states(source.resolve(), tag)
    is_sharded = _check_files(states)
    near = [states.parent, states.parent.parent]
    adapter = states.parent if (states.parent / _ADAPTER_CONFIG).is_file() else None
    config = _config_folder(near, adapter, base)
    model: Any = _empty_model(config)
    if adapter is not None:
        model = _empty_adapter(model, adapter, base)
    weights = fit(_read(states, is_sharded, adapter is not None), model, states, config)
    with new_folder(to) as temporary:
        options = {} if adapter is None else {"save_embedding_layers": False}  # else PEFT asks the hub about the base
        model.save_pretrained(temporary, state_dict=weights, **options)
        for file in _companions([*near, config], adapter is None):
            shutil.copyfile(file, temporary / file.name)
    return states


# --- files ---


def find_states(source: Path, tag: str | None) -> Path:
    """The folder with the …_states.pt files: `source`, or the one in it that `tag` or else the file `latest` names.

    Raises:
        CheckpointError: there is none; with the tags there are.
    """
    if any(source.glob(_STATES)):
        if tag in (None, source.name):
            return source
        raise CheckpointError(f"{source} is the folder of one step; leave --tag {tag} away, or give the folder above")
    tags = _names(source.glob(f"*/{_STATES}"))
    tag = tag or _latest(source)
    if tag in tags:
        return source / str(tag)
    inner = _names(source.glob("*/latest"))
    if not tags:
        others = (
            f"; give one of the checkpoints in it: {', '.join(inner)}" if inner else ": is it a DeepSpeed checkpoint?"
        )
        raise CheckpointError(f"{source} holds no folder with {_STATES} files{others}")
    found = "no file latest" if tag is None else f"no folder {tag} with {_STATES} files"
    raise CheckpointError(f"{source} holds {found}; choose with --tag: {', '.join(tags)}")


def _names(files: Iterable[Path]) -> list[str]:
    """The folders that files lie in, step9 before step10."""
    return sorted({file.parent.name for file in files}, key=lambda name: (len(name), name))


def _latest(source: Path) -> str | None:
    """The tag that the file `latest` names; None without such a file."""
    try:
        return (source / "latest").read_text(errors="replace").strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise IOFailure(f"cannot read {source / 'latest'}: {error}; name the folder with --tag") from error


def _check_files(states: Path) -> bool:
    """Whether ZeRO's shards are there; otherwise the weights are whole, in the model states.

    Raises:
        CheckpointError: a rank's file is missing, one is broken, or the model was split in other ways than ZeRO's.
    """
    files = sorted(states.glob(_STATES))
    matches = [_STATES_NAME.fullmatch(file.name) for file in files]
    other = [file.name for file, match in zip(files, matches) if match is None]
    if other:
        raise CheckpointError(
            f"{states} holds {some(other)}, of a model split by tensors, layers or experts; only data-parallel "
            "checkpoints (mp_rank_00) can be imported: let the trainer that wrote it save the model"
        )
    broken = [file.name for file in files if not zipfile.is_zipfile(file)]
    if broken:
        raise CheckpointError(f"{states}: cut short, or not written by torch.save: {some(broken)}; copy them again")
    ranks: dict[str, set[int]] = {"model": set(), "optim": set()}
    for match in matches:
        if match and match[1]:
            ranks[match[2]].add(int(match[1]))
    whole = (states / "mp_rank_00_model_states.pt").is_file()
    kinds = ["optim"] if whole else ["model", "optim"]
    count = max([*ranks["model"], *ranks["optim"]], default=-1) + 1
    if whole and count == 0:
        return False
    missing = [
        f"rank {rank}'s {kind} states" for kind in kinds for rank in range(max(count, 1)) if rank not in ranks[kind]
    ]
    if missing:
        raise CheckpointError(f"{states} lacks {some(missing)}; copy the files of all ranks and nodes into it")
    return True


def _read(states: Path, is_sharded: bool, trainable_only: bool) -> dict[str, Any]:
    """Tensors by name, or what becomes one by `.contiguous()`; says on stderr what reading a pickle means."""
    print(f"warning: {states}: {PICKLE_WARNING}", file=sys.stderr, flush=True)
    try:
        return _zero_state(states, trainable_only) if is_sharded else _module_state(states)
    except (DsdpoError, MemoryError):
        raise
    except OSError as error:
        raise IOFailure(f"cannot read {states}: {error}") from error
    except Exception as error:  # unpickling a damaged or foreign file can raise anything
        raise CheckpointError(
            f"{states} cannot be read: {type(error).__name__}: {error}; are the files of all ranks there and whole?"
        ) from error


def _zero_state(states: Path, trainable_only: bool) -> dict[str, Any]:
    """fp32 master weights of ZeRO's trainable parameters, frozen ones as they are, and buffers."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with redirect_stdout(io.StringIO()):
        return get_fp32_state_dict_from_zero_checkpoint(
            str(states.parent), states.name, exclude_frozen_parameters=trainable_only, lazy_mode=True
        )


def _module_state(states: Path) -> dict[str, Any]:
    """The weights that the module had, whole: what a run without ZeRO saves."""
    file = states / "mp_rank_00_model_states.pt"
    saved = torch.load(file, map_location="cpu", mmap=True, weights_only=False)
    if saved.get("param_shapes") is not None:
        raise CheckpointError(
            f"{states} lacks the ZeRO shards (zero_pp_rank_…_optim_states.pt), which hold the fp32 weights; copy the "
            "files of all ranks and nodes into it"
        )
    if not saved.get("module"):
        raise CheckpointError(f"{file} holds no module state: is it a model's DeepSpeed checkpoint?")
    return dict(saved["module"])


# --- the model ---


def _config_folder(near: list[Path], adapter: Path | None, base: str | None) -> Path:
    """Where the model's config.json lies: `base`, or near the checkpoint, or the base model of its adapter."""
    if base is not None:
        return _model_folder(base, "--model")
    for folder in near:
        if (folder / _CONFIG).is_file():
            return folder
    if adapter is not None:
        settings = _adapter_config(adapter)
        if named := settings.base_model_name_or_path:
            where = f"{adapter / _ADAPTER_CONFIG}: base_model_name_or_path"
            return _model_folder(named, where, settings.revision)
    raise CheckpointError(
        f"no {_CONFIG} in {near[0]} or {near[1]}; name the model that was trained, as a folder or hub id, with --model"
    )


def _model_folder(name: str, said_by: str, revision: str | None = None) -> Path:
    """The folder, or the local copy of a hub id's config and tokenizer."""
    source = ModelSource.named(name, revision)
    folder = Path(name)
    if not source.is_folder and source.hub == "modelscope":
        folder = source.local(said_by, whole=False, refresh=True)
    elif not source.is_folder:
        wanted = [_CONFIG, _GENERATION_CONFIG, *_TOKENIZER]
        try:
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{said_by}: {name} is no folder here, and no model of the hub within reach: {error}; name the model "
                "that was trained with --model"
            ) from error
    if not (folder / _CONFIG).is_file():
        raise CheckpointError(f"{said_by}: {folder} holds no {_CONFIG}; name the model that was trained with --model")
    return folder


def _empty_model(folder: Path) -> PreTrainedModel:
    """The causal language model of a config, without memory, in bf16 where the config says so and else in fp32."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        dtype = torch.bfloat16 if str(config.dtype).endswith("bfloat16") else torch.float32
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise CheckpointError(f"{folder / _CONFIG} describes no causal language model: {error}") from error


def _empty_adapter(model: PreTrainedModel, folder: Path, base: str | None) -> peft.PeftModel:
    """`model` with the adapter of `folder` beside it, trainable, without memory and in fp32."""
    config = _adapter_config(folder)
    initialization = getattr(config, "init_lora_weights", None)
    named = base or config.base_model_name_or_path
    config.inference_mode, config.base_model_name_or_path = False, None
    if isinstance(initialization, str):  # these decompose the base's weights, and there are none
        config.init_lora_weights = True
    try:
        tuned = peft.get_peft_model(model.float(), config)
    except ValueError as error:
        raise CheckpointError(
            f"{folder / _ADAPTER_CONFIG} does not fit its base model: {error}; name the right one with --model"
        ) from error
    if isinstance(initialization, str):
        config.init_lora_weights = initialization
    config.base_model_name_or_path = named
    resolve_base(config)
    return tuned


def _adapter_config(folder: Path) -> Any:
    try:
        return peft.PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{folder / _ADAPTER_CONFIG} cannot be read: {error}") from error


def _companions(folders: list[Path], is_model: bool) -> list[Path]:
    """Files to stand beside the weights: the first tokenizer in `folders`, and a model's first generation config."""
    files = []
    for folder in folders:
        if (folder / "tokenizer.json").is_file() or (folder / "tokenizer_config.json").is_file():
            files += sorted({file for pattern in _TOKENIZER for file in folder.glob(pattern) if file.is_file()})
            break
    generation = [folder / _GENERATION_CONFIG for folder in folders]
    return files + [file for file in generation if is_model and file.is_file()][:1]
