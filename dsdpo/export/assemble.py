"""A checkpoint's weights as a Hugging Face folder or PEFT adapter, one tensor in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from dsdpo.checkpoint.commit import Checkpoint, read_run, verify
from dsdpo.checkpoint.fragments import Fragments, write_stream
from dsdpo.config.hubs import ModelSource, picked_hub
from dsdpo.config.schema import RunConfig
from dsdpo.data.exported import ExportedTemplate
from dsdpo.data.templates import load_tokenizer
from dsdpo.engine.zero_state import WEIGHTS
from dsdpo.errors import CheckpointError
from dsdpo.runtime.progress import Progress

SHARD_BYTES = 5 * 2**30


def assemble(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the weights of a checkpoint into an empty folder, in the precision that the model computes in.

    Needs one process and a few times the memory of its largest tensor. The tokenizer comes from the run's model,
    with the chat template and the end token that the run trained with.

    Raises:
        CheckpointError: the checkpoint is damaged, or the run's model with its tokenizer is not there any more.
        IOFailure: the file system refused.
    """
    problem = verify(checkpoint)
    if problem:
        raise CheckpointError(f"{checkpoint.path} cannot be used: {problem}; `dsdpo checkpoints` lists the others")
    run = read_run(checkpoint.path)
    config = run["config"]
    base = config["model_name_or_path"]
    source = ModelSource(base, picked_hub(config.get("hub", "huggingface")), config.get("model_revision"))
    try:
        tokenizer = load_tokenizer(*source.place())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the tokenizer of {base}, which the run trained, cannot be loaded: {error}") from error
    exported = _exported(run, tokenizer)
    exported.put_into(tokenizer)
    if run["generation_config"] is not None:
        own = run["generation_config"].get("eos_token_id", run["model_config"].get("eos_token_id"))
        run["generation_config"] |= {"eos_token_id": exported.end_ids(tokenizer, own), "_from_model_config": False}
    manifest = checkpoint.manifest
    with Fragments(checkpoint.path, manifest["parameters"], manifest["world_size"]) as fragments:
        if run["adapter_config"]:
            _write_adapter(fragments, run, base, folder)
        else:
            _write_model(fragments, run, folder)
    tokenizer.save_pretrained(folder)


def _exported(run: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> ExportedTemplate:
    """What the run trained with; a run of an earlier version did not write it down, its config names the template."""
    if "exported" in run:
        return ExportedTemplate(**run["exported"])
    settings = {key: run["config"][key] for key in ("template", "default_system") if run["config"].get(key) is not None}
    config = RunConfig(model_name_or_path="", dataset=[], output_dir="", **settings)
    return ExportedTemplate.of(tokenizer, config, None, run.get("template_date"))


def _write_adapter(fragments: Fragments, run: dict[str, Any], base: str, folder: Path) -> None:
    stored = {name.replace(".default.", "."): name for name in fragments.index}  # as PEFT names them on disk
    _write_weights(folder / "adapter_model.safetensors", fragments, stored, run["dtype"])
    base = str(Path(base).resolve()) if Path(base).is_dir() else base
    _write_generation_config(folder, run)
    _write_json(folder / "adapter_config.json", {**run["adapter_config"], "base_model_name_or_path": base})


def _write_model(fragments: Fragments, run: dict[str, Any], folder: Path) -> None:
    dtype = _dtype(run["dtype"])
    shards = list(_shards(fragments, dtype.itemsize))
    weight_map = {}
    for number, names in enumerate(shards, 1):
        suffix = "" if len(shards) == 1 else f"-{number:05d}-of-{len(shards):05d}"
        file = f"model{suffix}.safetensors"
        _write_weights(folder / file, fragments, {name: name for name in names}, run["dtype"])
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        total = sum(torch.Size(entry["shape"]).numel() for entry in fragments.index.values()) * dtype.itemsize
        _write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
    _write_json(folder / "config.json", {**run["model_config"], "dtype": run["dtype"]})
    _write_generation_config(folder, run)


def _write_generation_config(folder: Path, run: dict[str, Any]) -> None:
    """A reward model has none."""
    if run["generation_config"] is not None:
        _write_json(folder / "generation_config.json", run["generation_config"])


def _shards(fragments: Fragments, itemsize: int) -> Iterator[list[str]]:
    """Names of the parameters of each file, of at most SHARD_BYTES where a parameter is not larger itself."""
    names: list[str] = []
    size = 0
    for name, entry in fragments.index.items():
        more = torch.Size(entry["shape"]).numel() * itemsize
        if names and size + more > SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += more
    yield names


def _write_weights(path: Path, fragments: Fragments, stored: dict[str, str], dtype: str) -> None:
    """stored: name in the file -> name in the checkpoint."""
    shapes = {key: (_dtype(dtype), list(fragments.index[name]["shape"])) for key, name in stored.items()}
    with Progress(f"writing {path.name}", len(shapes), "tensors") as progress:

        def tensor_of(key: str) -> torch.Tensor:
            progress.advance()
            return fragments.read(stored[key], WEIGHTS).to(_dtype(dtype))

        write_stream(path, shapes, tensor_of)


def _dtype(name: str) -> torch.dtype:
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
