"""Loading a model for training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from dsdpo.compat import is_partitioned, zero3_loading
from dsdpo.config.quantization import Quantization
from dsdpo.config.schema import RunConfig
from dsdpo.errors import IOFailure, config_error
from dsdpo.model.quantized import bitsandbytes_config, dequantize_in_forward, quantization_identity
from dsdpo.model.recompute import recompute_layers
from dsdpo.model.support import check_supported
from dsdpo.runtime.allocator import freed_at_once
from dsdpo.runtime.collectives import run_on_main
from dsdpo.runtime.env import Mesh
from dsdpo.runtime.files import file_digest

_MODEL = "model_name_or_path"

# keys of a config that change no log-prob; the precision in memory is the run's own
_NO_EFFECT = (
    "_name_or_path",
    "architectures",
    "base_model_name_or_path",
    "dtype",
    "inference_mode",
    "revision",
    "torch_dtype",
    "transformers_version",
    "peft_version",
    "use_cache",
)


Head: TypeAlias = Literal["logprob", "value"]
_CLASSES = {"logprob": AutoModelForCausalLM, "value": AutoModelForSequenceClassification}


def load_model(
    model_name_or_path: str,
    config: RunConfig,
    engine_config: dict[str, Any],
    attn_implementation: str,
    dtype: torch.dtype,
    head: Head = "logprob",
    quantizes: bool = False,
) -> PreTrainedModel:
    """Load a whole model; with a stage 3 engine config, partitioned as it is loaded.

    A model that is quantized is loaded tensor by tensor, each quantized before the next is read, and partitioned when
    its engine is made.

    Args:
        model_name_or_path: folder or hub id.
        config: the run.
        engine_config: the DeepSpeed config that the engine will be made with.
        attn_implementation: a registered packed backend.
        dtype: of the weights in memory.
        head: `logprob`: a causal language model. `value`: a model for sequence classification with one label; where
            the weights have no `score` layer, it is drawn as transformers draws it, from the run's seed.
        quantizes: whether linear layers are quantized as the run says.

    Raises:
        ConfigError: the model's attention cannot run on packed rows, or its files are not those of one model.
        IOFailure: the hub gives no answer or has no weights, or the disk of its cache is full.
    """
    place, revision = config.source_of(model_name_or_path).place(whole=True)
    model_config = _config_of(model_name_or_path, place, revision)
    check_supported(model_config, config.max_length, config.disable_dropout, attn_implementation, head)
    if config.disable_dropout:
        _zero_dropout(model_config)
    if head == "value":
        model_config.num_labels = 1
    quantization = Quantization.of(config) if quantizes else None
    partitioned = zero3_loading({} if quantization else engine_config)
    with partitioned, freed_at_once() if quantization else nullcontext(), _told(model_name_or_path, place):
        loaded: Any = _CLASSES[head].from_pretrained(
            place,
            revision=revision or "main",
            config=model_config,
            dtype=dtype,
            attn_implementation=attn_implementation,
            quantization_config=quantization and bitsandbytes_config(quantization, dtype),
            output_loading_info=True,
        )
    model: PreTrainedModel = loaded[0]
    model.name_or_path = model.config.name_or_path = model_name_or_path  # as PEFT writes the base of an adapter
    model.config.architectures = [type(model).__name__]
    missing = set(loaded[1]["missing_keys"])
    if head == "value" and "score.weight" in missing:
        missing.remove("score.weight")
        set_score(model, draw_score(model, config.seed))
    _check_complete(model_name_or_path, sorted(missing))
    dequantize_in_forward(model)
    if config.gradient_checkpointing != "auto":  # which is decided when the memory that is left is known
        recompute_layers(model, config.gradient_checkpointing)
    return model


def model_type(config: RunConfig) -> str:
    """Of the run's model."""
    place, revision = config.model_source.place()
    return str(_config_of(config.model_name_or_path, place, revision).model_type)


def _config_of(name: str, place: str, revision: str | None) -> PretrainedConfig:
    """The model's config. Raises ConfigError where transformers refuses what config.json says."""
    try:
        return AutoConfig.from_pretrained(place, revision=revision or "main")
    except (StrictDataclassError, TypeError, ValueError, AttributeError, KeyError) as error:
        said = " ".join(str(error).split())
        raise config_error("model-config", _MODEL, f"{_MODEL}: config.json of {name} cannot be used: {said}") from error


@contextmanager
def _told(name: str, place: str) -> Iterator[None]:
    """Turn what transformers and its hub say of weights that do not come, or do not fit config.json, into our errors.

    Of tensors that do not fit, transformers prints a table.
    """
    try:
        yield
    except OSError as error:
        if Path(place).is_dir():
            raise
        said = " ".join(str(error).split())
        raise IOFailure(
            f"{_MODEL}: weights of {name} could not be fetched from the hub: {said}. See that the hub answers and has "
            "them, and that the disk of its cache has room; then try again"
        ) from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        text = f"{_MODEL}: weights of {name} have other shapes than its config.json says, see the table above"
        raise config_error("weights-mismatch", _MODEL, f"{text}; take the config.json that they came with") from error


def _check_complete(name: str, missing: list[str]) -> None:
    """Raises ConfigError where tensors are missing: transformers draws them at random."""
    if missing:
        text = (
            f"{_MODEL}: {name} lacks {len(missing)} tensors of its model, such as {', '.join(missing[:3])}; they would "
            "be drawn at random. Take a complete copy, with the config.json that belongs to it"
        )
        raise config_error("weights-incomplete", _MODEL, text)


def draw_score(model: Any, seed: int) -> torch.Tensor:
    """Weights of a `score` layer, fp32 [1, hidden size]: the same for any number of ranks and ZeRO stage."""
    weight = model.score.weight
    drawn = torch.empty(getattr(weight, "ds_shape", weight.shape))
    std = getattr(model.config, "initializer_range", 0.02)
    return drawn.normal_(std=std, generator=torch.Generator().manual_seed(seed))


def set_score(model: Any, weight: torch.Tensor) -> None:
    """Put weights into the `score` layer of a model, which may be partitioned. A collective call then."""
    from deepspeed.runtime.zero import GatheredParameters

    score = model.score.weight
    with GatheredParameters([score], modifier_rank=0, enabled=is_partitioned(score)):
        score.data.copy_(weight)


def _zero_dropout(model_config: PretrainedConfig) -> None:
    """Set every dropout probability of a model config to 0: `attention_dropout`, `resid_pdrop` and the like."""
    for key, value in model_config.to_dict().items():
        if key.endswith(("dropout", "pdrop", "dropout_rate")) and isinstance(value, float):
            setattr(model_config, key, 0.0)


def weights_digest(model_name_or_path: str, stamps: Path, revision: str | None = None) -> str:
    """Hash of what a model computes with: the content of its weight files, and its config.

    Args:
        model_name_or_path: a folder of a model or of an adapter, or a hub id. A hub id is looked up in the local cache,
            where loading has put it before. Paths and file names do not count, nor does what the config says of
            versions and names.
        stamps: folder that remembers hashes of files, so that large weights are read once.
        revision: of a hub id.
    """
    folder = Path(model_name_or_path)
    if not folder.is_dir():
        folder = Path(snapshot_download(model_name_or_path, revision=revision, local_files_only=True))
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not files:
        text = f"{folder} holds no *.safetensors or *.bin weights: check model_name_or_path"
        raise config_error("model-folder", "model_name_or_path", text)
    settings = {}
    for name in ("config.json", "adapter_config.json"):
        if (folder / name).exists():
            found = json.loads((folder / name).read_text())
            settings[name] = {key: value for key, value in found.items() if key not in _NO_EFFECT}
    weights = [file_digest(file.resolve(), stamps) for file in files]
    return hashlib.sha256(json.dumps([weights, settings], sort_keys=True).encode()).hexdigest()


def weights_digests(config: RunConfig, mesh: Mesh, device: torch.device) -> dict[str, str]:
    """What tells the weights that a run starts from: the hash of `model`, and of `adapter` where there is one; and for
    a base that is quantized on `device`, in words, how. A collective call."""
    stamps = config.weight_stamps

    def digests() -> dict[str, str]:
        place, revision = config.model_source.place(whole=True)
        found = {"model": weights_digest(place, stamps, revision)}
        if config.adapter_name_or_path:
            found["adapter"] = weights_digest(config.adapter_name_or_path, stamps)
        return found

    found = run_on_main(mesh.is_main, digests)
    quantization = Quantization.of(config)
    return found if quantization is None else {**found, "quantization": quantization_identity(quantization, device)}
