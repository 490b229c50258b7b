"""The only place that starts a process group and calls deepspeed.initialize."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed import DeepSpeedEngine, comm
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import set_z3_leaf_modules
from transformers import PreTrainedModel

from dsdpo.compat import has_fp16, unlink_shared_buffers, without_gathering
from dsdpo.config.hubs import same_model
from dsdpo.config.kernels import LIGER_REMEDY, missing_liger
from dsdpo.config.precision import Precision, no_fp16, precision_of
from dsdpo.config.schema import RunConfig
from dsdpo.config.zero import ZeroConfig, engine_config, reference_engine_config
from dsdpo.engine.nvme import check_swap_room, prepare_swap
from dsdpo.engine.optimizer import build_optimizer, parameter_groups
from dsdpo.errors import ConfigError, config_error
from dsdpo.model.adapters import add_lora, continue_lora, is_adapter, load_lora, record_base_revision
from dsdpo.model.attention.register import Capability, choose
from dsdpo.model.hub import fetch_weights
from dsdpo.model.kernels import Kernels, apply_kernels, choose_kernels
from dsdpo.model.load import Head, load_model
from dsdpo.model.lora import fuse_lora, uses_fused_lora
from dsdpo.model.packed import PackedModel
from dsdpo.model.support import LIGER
from dsdpo.plan.shape import ModelShape
from dsdpo.runtime.builds import end_stale_builds, rebuild_broken_kernels
from dsdpo.runtime.collectives import all_gather_object, raise_on_any_rank
from dsdpo.runtime.env import Mesh

_THRESHOLD = "stage3_param_persistence_threshold"  # elements up to which a parameter stays whole
_DEEPSPEEDS_THRESHOLD = 100_000


@dataclass(frozen=True)
class Hardware:
    """Where this rank computes, and in what.

    Attributes:
        capability: compute capability of the weakest of the run's GPUs; None without CUDA.
        liger: whether every rank can import Liger's kernels; asked for on CUDA alone.
    """

    device: torch.device
    precision: Precision
    capability: Capability | None = None
    liger: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]

    def attention(self, attn_implementation: str) -> str:
        """The name of the backend for this run. Raises ConfigError, see `choose`."""
        return choose(attn_implementation, self.precision, self.capability)

    def kernels(self, config: RunConfig, model_type: Callable[[], str]) -> Kernels:
        """Of the decoder layers in this run; the model's type is asked for where it decides. Raises ConfigError, see
        `choose_kernels`."""
        cuda = self.capability is not None
        return choose_kernels(config.kernels, model_type() if cuda else "", cuda, self.liger)


def start_process_group(config: RunConfig, zero: ZeroConfig, mesh: Mesh) -> Hardware:
    """Join the other ranks (NCCL on CUDA, gloo on CPU) and pick this rank's device.

    Raises:
        ConfigError: the DeepSpeed JSON does not fit the number of ranks, a node cannot offload to NVMe, or a device
            has no fp16.
    """
    if problems := zero.rank_problems(mesh.world_size):
        raise ConfigError(problems)
    end_stale_builds()
    rebuild_broken_kernels()
    if config.deterministic:
        _make_deterministic()
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        accelerator.set_device(mesh.local_rank)
    deepspeed.init_distributed(verbose=False)
    if accelerator.device_name() == "cpu":
        comm.barrier()
        unlink_shared_buffers(mesh.rank)
    prepare_swap(zero, mesh)
    device = torch.device(accelerator.current_device_name())
    precision = precision_of(config.precision, device.type == "cuda")
    if precision == "fp16":
        raise_on_any_rank(_check_fp16)
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    # the weakest of all: each rank must choose the same attention and kernels
    liger = capability is not None and min(all_gather_object(not missing_liger()))
    return Hardware(device, precision, capability and min(all_gather_object(capability)), liger)


def _make_deterministic() -> None:
    """Let this process compute the same bits again; cuBLAS reads its variable when it is used first."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # a kernel that reads what nobody wrote is a bug with any filling
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _check_fp16() -> None:
    if not has_fp16():
        raise config_error("no-fp16", "precision", no_fp16(get_accelerator().device_name()))


def build_engine(
    config: RunConfig,
    zero: ZeroConfig,
    mesh: Mesh,
    hardware: Hardware,
    weights: str | None = None,
    head: Head = "logprob",
) -> DeepSpeedEngine:
    """The policy in a DeepSpeed engine: `engine(inputs)` gives what `PackedModel` does.

    Args:
        weights: a folder of trained weights, a whole model or an adapter of the run's model, in place of the
            untrained policy. Another whole model than the run's is not quantized.
        head: of `PackedModel`.

    Raises:
        ConfigError: the model cannot be trained this way.
        IOFailure: a node has no room on NVMe for the optimizer's state, or a hub gives no answer.
    """
    settings = engine_config(config, zero, mesh.dp_size, hardware.precision)
    attention = hardware.attention(config.attn_implementation)
    torch.manual_seed(config.seed)
    weights = weights and fetch_weights(config.source_of(weights), mesh)
    adapter = weights if weights is not None and is_adapter(weights) else None
    whole = config.model_name_or_path if weights is None or adapter else weights
    fetch_weights(config.source_of(whole), mesh)
    quantizes = same_model(whole, config.model_name_or_path)
    base = load_model(whole, config, settings, attention, hardware.dtype, head, quantizes)
    model: torch.nn.Module = base
    if adapter:
        model = load_lora(base, adapter)
    elif weights is None and config.adapter_name_or_path:
        keep_reference = config.reference_kind != "none"
        model = continue_lora(base, config.adapter_name_or_path, keep_reference, config.lora_dropout)
    elif weights is None and config.finetuning_type == "lora":
        model = add_lora(base, config)
    record_base_revision(model, config.model_revision)
    if uses_fused_lora(config):
        fuse_lora(model)
    apply_kernels(base, hardware.kernels(config, lambda: base.config.model_type))
    packed = PackedModel(model, head, config.use_weighting)
    all_whole = False
    if settings["zero_optimization"]["stage"] == 3:
        gather_by_layer(packed, base)
        all_whole = keep_whole(settings["zero_optimization"], packed, mesh.dp_size)
    check_swap_room(packed, zero, mesh)
    optimizer = build_optimizer(parameter_groups(packed, config.weight_decay), config, zero, hardware.device)
    engine, *_ = deepspeed.initialize(model=packed, optimizer=optimizer, config=settings)
    if all_whole:
        without_gathering(engine)
    if mesh.world_size == 1 and not engine.zero_optimization():
        engine.enable_backward_allreduce = False  # it copies all gradients into one buffer and back, here for nothing
    return engine


def build_reference_engine(config: RunConfig, zero: ZeroConfig, mesh: Mesh, hardware: Hardware) -> DeepSpeedEngine:
    """The untrained model, frozen and sharded with ZeRO-3 over the ranks, whatever the policy's stage."""
    settings = reference_engine_config(config, zero, mesh.dp_size, hardware.precision)
    attention = hardware.attention(config.attn_implementation)
    base = load_model(config.model_name_or_path, config, settings, attention, hardware.dtype)
    base.requires_grad_(False)
    apply_kernels(base, hardware.kernels(config, lambda: base.config.model_type))
    packed = PackedModel(base)
    all_whole = keep_whole(settings["zero_optimization"], packed, mesh.dp_size)
    engine, *_ = deepspeed.initialize(model=packed, config=settings)
    if all_whole:
        without_gathering(engine)
    engine.eval()
    return engine


def gather_by_layer(model: torch.nn.Module, base: PreTrainedModel) -> None:
    """Let ZeRO-3 gather and release a decoder layer at once instead of each linear layer and adapter matrix.

    ZeRO-3's bookkeeping in Python grows with the square of the modules that it hooks, of which LoRA makes 1500 in a
    30-layer model. Memory grows by the parameters of one layer.

    A layer is released when the gradient of its input is known, so the first layer's input must have one too, even
    where the embeddings are frozen.
    """
    base.enable_input_require_grads()
    classes = sorted(base._no_split_modules or [])
    set_z3_leaf_modules(model, classes, raise_if_not_found=False)


def keep_whole(block: dict[str, Any], model: torch.nn.Module, ranks: int) -> bool:
    """Let ZeRO-3 leave whole, between layers and micro-steps, what takes next to no memory so; changes its settings.

    On one rank that is everything: a parameter is then a view of its only shard, and to gather one would wait for the
    GPU to be done with all that is queued. On more ranks it is an adapter's matrices: 14 in a layer, each of which is
    gathered, released and counted by Python. A threshold in the user's JSON stays.

    Args:
        block: the `zero_optimization` settings, of stage 3.

    Returns:
        Whether every parameter stays whole.
    """
    if _THRESHOLD in block or block.get("offload_param", {}).get("device", "none") != "none":
        return False
    sizes = [(name, getattr(p, "ds_numel", p.numel())) for name, p in model.named_parameters()]
    if ranks == 1:
        block[_THRESHOLD] = sum(size for _, size in sizes)
        return "stage3_model_persistence_threshold" not in block
    adapter = [size for name, size in sizes if ".lora_" in name]
    block[_THRESHOLD] = max([_DEEPSPEEDS_THRESHOLD, *adapter])
    return False


def held_here(engine: DeepSpeedEngine) -> str:
    """How many of a model's parameters this rank holds: with ZeRO-3 a share. Four-bit ones are counted as packed."""
    parameters = list(engine.module.parameters())
    whole = sum(getattr(p, "ds_numel", p.numel()) for p in parameters)
    here = sum(p.ds_tensor.numel() if hasattr(p, "ds_tensor") else p.numel() for p in parameters)
    return f"{100 * here / whole:.0f} % of the parameters on a rank"


def describe(engine: DeepSpeedEngine, config: RunConfig, zero: ZeroConfig, mesh: Mesh, hardware: Hardware) -> str:
    """One line on what trains where."""
    shape = ModelShape.from_module(engine.module)
    stage, asked = engine.zero_optimization_stage(), zero.stage
    raised = f" (stage {asked} with {hardware.precision} runs as stage 1)" if stage != asked else ""
    quantized = f" over {config.quantization_bit}-bit weights" if config.quantization_bit else ""
    groups = f" with a second copy in groups of {zero.hpz_size} ranks" if zero.hpz_size > 1 else ""
    return (
        f"{config.stage} of {config.model_name_or_path}: {shape.total / 1e6:.1f}M parameters, "
        f"{shape.trained / 1e6:.1f}M trainable ({config.finetuning_type}{quantized}), "
        f"reference {config.reference_kind}; ZeRO stage {stage}{raised}{groups}, "
        f"{mesh.world_size} ranks on {hardware.device.type}, {hardware.precision}"
        f"{_kernels(engine, config, hardware)}, {held_here(engine)}"
    )


def _kernels(engine: DeepSpeedEngine, config: RunConfig, hardware: Hardware) -> str:
    """What to say of the kernels, where they are not transformers' own or better ones could be installed."""
    kind = engine.module.config.model_type
    kernels = hardware.kernels(config, lambda: kind)
    if kernels != "none":
        return f", kernels {kernels}"
    lacks = config.kernels == "auto" and hardware.capability is not None and kind in LIGER
    return f", without Liger's kernels ({LIGER_REMEDY})" if lacks else ""
