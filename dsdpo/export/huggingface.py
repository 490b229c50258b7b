"""Weights in the form that transformers, PEFT, TRL and vLLM load."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import GENERATION_CONFIG_NAME

from dsdpo.checkpoint.commit import MANIFEST, RUN_FILE, Checkpoint, checkpoints, read, read_run, verify
from dsdpo.compat import is_partitioned
from dsdpo.config.hubs import Hub, ModelSource, hub_of, picked_hub
from dsdpo.data.templates import load_tokenizer
from dsdpo.errors import CheckpointError, IOFailure
from dsdpo.export.assemble import assemble
from dsdpo.export.card import run_facts, write_card
from dsdpo.model.adapters import SCORE_WEIGHT
from dsdpo.runtime.files import follow_umask, fsync_path, fsync_tree
from dsdpo.runtime.progress import track
from dsdpo.runtime.rundir import RunDir

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def export_engine(engine: DeepSpeedEngine, tokenizer: PreTrainedTokenizerBase, folder: Path, is_main: bool) -> None:
    """Write the policy as a Hugging Face folder, or a PEFT adapter when it has one. A collective call.

    Under ZeRO-3 parameters are gathered one at a time and kept in the main rank's host memory. The folder appears
    by rename, complete or not at all, and survives a power cut once this returns.

    Raises:
        IOFailure: the file system refused.
    """
    model = engine.module.model
    adapter_only = isinstance(model, peft.PeftModel)
    state = _whole_state(model, trainable_only=adapter_only, keep=is_main)
    if not is_main:
        return
    if adapter_only:
        resolve_base(model.peft_config["default"])
    _write_folder(folder, model, tokenizer, state)


def _whole_state(model: nn.Module, trainable_only: bool, keep: bool) -> dict[str, torch.Tensor]:
    """Parameters by name, whole and on the host; a tied parameter stands under its first name only."""
    from deepspeed.runtime.zero import GatheredParameters  # here, since exporting a folder needs no deepspeed

    state: dict[str, torch.Tensor] = {}
    parameters = list(model.named_parameters())
    for name, parameter in track(parameters, "gathering weights", len(parameters), "tensors"):
        if trainable_only and not parameter.requires_grad:
            continue
        with GatheredParameters([parameter], enabled=is_partitioned(parameter)):
            if keep:
                state[name] = parameter.detach().to("cpu", copy=True)
    return state


def resolve_base(adapter_config: peft.PeftConfig) -> None:
    """Name a local base model by its absolute path: an adapter moves, and is loaded from other folders."""
    base = adapter_config.base_model_name_or_path
    if base and Path(base).is_dir():
        adapter_config.base_model_name_or_path = str(Path(base).resolve())


def _write_folder(
    folder: Path, model: Any, tokenizer: PreTrainedTokenizerBase, state: dict[str, torch.Tensor] | None
) -> None:
    """save_pretrained into a new folder in place of `folder`."""
    with new_folder(folder) as temporary:
        # without the second one, PEFT asks Hugging Face how many embeddings the base has
        of_adapter = {"selected_adapters": ["default"], "save_embedding_layers": False}
        which = of_adapter if isinstance(model, peft.PeftModel) else {}
        model.save_pretrained(temporary, **which, **({} if state is None else {"state_dict": state}))
        if isinstance(model, peft.PeftModel) and state is not None and SCORE_WEIGHT in state:
            file = temporary / "adapter_model.safetensors"  # PEFT writes its own copies of such layers alone
            save_file({**load_file(file), SCORE_WEIGHT: state[SCORE_WEIGHT].contiguous()}, file, {"format": "pt"})
        if isinstance(model, peft.PeftModel) and getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(temporary)  # an adapter's own would be its base's
        tokenizer.save_pretrained(temporary)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary neighbour to write into, fsynced and renamed over `folder` at the end.

    Raises:
        IOFailure: the file system refused.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        follow_umask(temporary)
        fsync_tree(temporary)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
        fsync_path(folder.parent)
    except (OSError, SafetensorError) as error:  # safetensors has an exception of its own for a full disk
        raise IOFailure(f"cannot write {folder}: {error}; free space or choose another folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def set_aside(run_dir: RunDir) -> None:
    """Rename exported weights that are not those of the run any more; an earlier folder of that name goes."""
    if run_dir.final.exists():
        shutil.rmtree(run_dir.final_superseded, ignore_errors=True)
        run_dir.final.rename(run_dir.final_superseded)


def finished_weights(output_dir: Path) -> Path | None:
    """The weights of a run that has ended, or the folder itself where it holds weights; None where there are none."""
    for folder in (RunDir(output_dir).final, output_dir):
        if (folder / "adapter_config.json").exists() or (folder / "config.json").exists():
            return folder
    return None


def adapter_remark(folder: Path) -> str:
    """Where an adapter's base stops generating elsewhere: what to do about it. Empty for anything else.

    transformers and PEFT take the generation config of the base, whatever stands beside the adapter.
    """
    if not (folder / "adapter_config.json").is_file() or not (folder / GENERATION_CONFIG_NAME).is_file():
        return ""
    try:
        settings = peft.PeftConfig.from_pretrained(str(folder))
        base = settings.base_model_name_or_path
        of_base = _end_ids(_generation_config(*ModelSource(base, hub_of(folder), settings.revision).place()))
        missing = [end for end in _end_ids(GenerationConfig.from_pretrained(str(folder))) if end not in of_base]
        names = ", ".join(map(str, load_tokenizer(str(folder)).convert_ids_to_tokens(missing)))
    except Exception:  # a base that is not there any more must not end the run that wrote the adapter
        return ""
    if not missing:
        return ""
    return (
        f"of an adapter, generation takes the end tokens of its base model, and {base} does not stop at {names}: pass "
        f"generation_config=GenerationConfig.from_pretrained({str(folder)!r}) to generate, or merge the adapter "
        "(`dsdpo export --merge`)"
    )


def _generation_config(model: str, revision: str | None) -> GenerationConfig:
    """What `generate` takes for a model: generation_config.json, or what config.json says."""
    try:
        return GenerationConfig.from_pretrained(model, revision=revision or "main")
    except OSError:
        return GenerationConfig.from_model_config(AutoConfig.from_pretrained(model, revision=revision or "main"))


def _end_ids(config: GenerationConfig) -> list[int]:
    ids = config.eos_token_id
    return ids if isinstance(ids, list) else [ids] if isinstance(ids, int) else []


def export(output_dir: Path, to: Path, merge: bool, step: int | None = None) -> Path:
    """Write a run's weights to `to`, merged into the base model when asked.

    Args:
        output_dir: of a run, or a folder of weights, or a checkpoint.
        to: must not exist, or be empty.
        merge: fold a LoRA adapter into its base and write a whole model.
        step: of the checkpoint. None: the weights at the end, or of the newest checkpoint before it.

    Returns:
        The folder that was exported.

    Raises:
        CheckpointError: no weights, a target that is not empty, or `merge` without an adapter.
        IOFailure: the file system refused.
    """
    check_target(to)
    run_dir = RunDir(output_dir)
    source = finished_weights(output_dir) if step is None else None
    if source is None:
        checkpoint = _pick(output_dir, step)
        if merge and not verify(checkpoint, [RUN_FILE]) and not read_run(checkpoint.path)["adapter_config"]:
            raise CheckpointError(f"{checkpoint.path} is of a whole model, without an adapter: leave --merge away")
        with new_folder(to) as folder:
            assemble(checkpoint, folder)
        if merge:
            hub = picked_hub(read_run(checkpoint.path)["config"].get("hub", "huggingface"))
            _write_folder(to, merged(to, hub), load_tokenizer(str(to)), None)
        write_card(to, read_run(checkpoint.path), run_dir, checkpoint.step)
        return checkpoint.path
    if merge and not (source / "adapter_config.json").exists():
        raise CheckpointError(f"{source} is a whole model, there is no adapter to merge: leave --merge away")
    if merge:
        _write_folder(to, merged(source), load_tokenizer(str(source)), None)
        facts = run_facts(output_dir)
        if facts is not None:
            write_card(to, facts, run_dir)
    else:
        shutil.copytree(source, to, dirs_exist_ok=True)
    return source


def _pick(output_dir: Path, step: int | None) -> Checkpoint:
    """The checkpoint of a step, or the newest that is whole by size. Raises CheckpointError."""
    if (output_dir / MANIFEST).exists():
        return read(output_dir)
    found = checkpoints(RunDir(output_dir))
    for checkpoint in found:
        if checkpoint.step == step or (step is None and not checkpoint.problem):
            return checkpoint
    steps = ", ".join(str(checkpoint.step) for checkpoint in found) or "none"
    what = "no weights" if step is None else f"no checkpoint of step {step}"
    raise CheckpointError(
        f"{output_dir} holds {what}: expected {RunDir(output_dir).final.name}/, a model's own files or checkpoints "
        f"(there are {steps}); is this the output_dir of a run?"
    )


def check_target(to: Path) -> None:
    """Raise CheckpointError unless `to` does not exist, or is an empty folder."""
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise CheckpointError(f"{to} is not empty: choose another folder for --to")


def merged(adapter: Path, hub: Hub | None = None) -> PreTrainedModel:
    """An adapter's base model with the adapter folded in, on the CPU, in the precision that the base is stored in.

    Args:
        hub: of the base model. None: that of the run whose weights they are.
    """
    settings = peft.PeftConfig.from_pretrained(str(adapter))
    base_name = settings.base_model_name_or_path
    name, revision = ModelSource(base_name, hub or hub_of(adapter), settings.revision).place(whole=True)
    pinned = {"revision": revision or "main", "dtype": "auto"}
    if settings.task_type == peft.TaskType.SEQ_CLS:
        base = AutoModelForSequenceClassification.from_pretrained(name, num_labels=1, **pinned)
        base.config.pad_token_id = load_tokenizer(str(adapter)).pad_token_id
    else:
        base = AutoModelForCausalLM.from_pretrained(name, **pinned)
    whole = peft.PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    if (adapter / GENERATION_CONFIG_NAME).is_file():
        whole.generation_config = GenerationConfig.from_pretrained(str(adapter))
    return whole
