"""The one place for private or version-bound APIs of torch, deepspeed, transformers, peft and accelerate; trl_kernel.py
has trl's.

pyproject.toml holds these packages to the range that the tests ran with. Imports stand inside the functions: this
module is below everything and must cost nothing.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


@cache
def varlen_keywords(grouped_queries: bool) -> dict[str, bool]:
    """What torch's `varlen_attn` must be told about grouped queries. In torch 2.11 it takes them without a word."""
    from torch.nn.attention.varlen import varlen_attn

    known = signature(varlen_attn).parameters
    return {"enable_gqa": grouped_queries} if "enable_gqa" in known else {}


@contextmanager
def zero3_loading(engine_config: dict[str, Any]) -> Iterator[None]:
    """Load models under ZeRO-3: parameters are partitioned as they are created. Other stages: nothing happens.

    transformers keeps only a weak reference to the HfDeepSpeedConfig and reads it on every load. It is dropped at
    the end, or the next model would be partitioned as well, even one that trains with ZeRO-2.

    DeepSpeed makes the groups of hpZ while it loads, refuses to make them for a second model, and would share them
    with a model that wants none: those of the model before are forgotten here, by DeepSpeed, not by that model.
    """
    from deepspeed.utils import groups
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    if engine_config.get("zero_optimization", {}).get("stage", 0) != 3:
        yield
        return
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    alive = HfDeepSpeedConfig(engine_config)
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del alive


@contextmanager
def active_adapter(model: torch.nn.Module, name: str | None) -> Iterator[None]:
    """Inside, every tuned layer of a PEFT model computes with adapter `name`, or with none.

    PEFT's own set_adapter and disable_adapter change what requires gradients too, which DeepSpeed must not see.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    for layer in layers:
        layer._disable_adapters = name is None
        if name is not None:
            layer._active_adapter = [name]
    try:
        yield
    finally:
        for layer, (active, disabled) in zip(layers, before):
            layer._active_adapter, layer._disable_adapters = active, disabled


@contextmanager
def same_trainable(model: torch.nn.Module) -> Iterator[None]:
    """Inside, PEFT may add adapters: afterwards only those parameters require gradients that did before.

    peft 0.19 freezes the active adapter as well where it loads one that is not to be trained.
    """
    before = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    yield
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in before)


@contextmanager
def no_tensor_parallelism() -> Iterator[None]:
    """Inside, PEFT loads adapters as those of a model that is not tensor parallel; none is here.

    On ranks peft 0.19 imports a class for that before it looks, which transformers 5.17 does not have.
    """
    from peft.utils import save_and_load

    name = "_maybe_shard_state_dict_for_tp"
    own = getattr(save_and_load, name, None)
    if own is None:
        yield
        return
    setattr(save_and_load, name, lambda *_: None)
    try:
        yield
    finally:
        setattr(save_and_load, name, own)


def unlink_shared_buffers(rank: int) -> None:
    """Remove the name of the shared memory through which DeepSpeed's CPU ranks of one host reduce.

    DeepSpeed never does, so that every run leaves 66 MB a rank in /dev/shm until the next boot. All ranks of the host
    must have mapped it: the memory itself lives as long as one of them.
    """
    pattern = f"deepspeed_allreduce_buffer_{os.getuid()}_*_{os.environ.get('MASTER_PORT', '')}_{rank}"
    for path in Path("/dev/shm").glob(pattern):
        path.unlink(missing_ok=True)


def can_swap() -> bool:
    """Whether DeepSpeed can build its op for reading and writing NVMe here: libaio with its headers is there."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return bool(AsyncIOBuilder().is_compatible())


def cpu_adamw(groups: list[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
    """DeepSpeed's vectorized AdamW for a state in the CPU's memory, as a function of that state alone.

    Its C++ side multiplies the powers of the betas on from step to step, in fp32; a resumed run would get them from
    pow(), rounded otherwise. Asking it for step 0 of nothing first makes it take pow() in every step.
    """
    import torch
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    optimizer = DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
    nothing = torch.zeros(0)

    def forget_the_powers(*_: Any) -> None:
        beta1, beta2 = settings["betas"]
        parts = (nothing, nothing, nothing, nothing)
        optimizer.ds_opt_adam.adam_update(optimizer.opt_id, 0, 0.0, beta1, beta2, 1.0, 0.0, True, *parts)

    optimizer.register_step_pre_hook(forget_the_powers)
    return optimizer


def has_fp16() -> bool:
    """Whether DeepSpeed trains in fp16 on this process's device."""
    from deepspeed.accelerator import get_accelerator

    return bool(get_accelerator().is_fp16_supported())


def without_scale_warnings(engine: Any) -> None:
    """Keep an engine with a constant loss scale from saying, at each overflow, that the step is skipped."""
    engine.optimizer.loss_scaler.update_scale = lambda overflow: None


def drop_overflowed_gradients(engine: Any) -> None:
    """After a step that an overflow has stopped: let no gradient of it be added to those of the next one.

    DeepSpeed 0.19.8 keeps the buffers of an offloaded stage 1 or 2, in which an infinite sum stays infinite.
    """
    if engine.zero_optimization_stage() < 3:
        buffers = engine.optimizer.averaged_gradients
        buffers.update(dict.fromkeys(buffers))


def without_gathering(engine: Any) -> None:
    """Take ZeRO-3's hooks off the modules of an engine whose parameters all stay whole: they would find nothing to do.

    The optimizer's step still releases every parameter, and gathers it again. A parameter that it leaves released, as
    after an overflow in fp16, is gathered when the forward pass asks its module for it.
    """
    # without training the engine's optimizer is the offload itself
    offload = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
    offload._remove_module_hooks()
    whole = offload.persistent_parameters
    whole[0].all_gather(whole)


def is_partitioned(parameter: torch.nn.Parameter) -> bool:
    """Whether ZeRO-3 holds this parameter in pieces."""
    return hasattr(parameter, "ds_id")


def quantization_state(weight: torch.Tensor) -> Any:
    """What bitsandbytes keeps beside a quantized weight: its QuantState for 4 bits, a scale for each row for 8 bits.
    None for any other parameter."""
    return getattr(weight, "quant_state", getattr(weight, "SCB", None))


def unpacked_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """Shape of a parameter in its model: also where ZeRO-3 holds it in pieces, or its 4-bit values are packed."""
    state = getattr(parameter, "quant_state", None)
    return tuple(getattr(parameter, "ds_shape", parameter.shape) if state is None else state.shape)


def _alias_reasoning(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As newer versions of transformers do: a message's reasoning under each name that templates read."""
    found = []
    for message in messages:
        names = ("reasoning_content", "thinking", "reasoning")
        reasoning = next((message[name] for name in names if message.get(name) is not None), None)
        aliases = {} if reasoning is None else {"reasoning_content": reasoning}
        found.append({**({"thinking": reasoning} if aliases else {}), **message, **aliases})
    return found


def chat_renderer(tokenizer: PreTrainedTokenizerBase, chat_template: str | dict[str, str] | None) -> Callable[..., str]:
    """`tokenizer.apply_chat_template(…, tokenize=False)` for messages and tools of plain JSON values.

    Half of that method's time goes into copying each message value by value, to take rich objects out of a template's
    reach. A tokenizer with a method of its own keeps it.

    Args:
        chat_template: instead of the tokenizer's own; of several by name, that is taken which apply_chat_template would
            take: `tool_use` where there are tools, else `default`.

    Returns:
        (messages, tools or None, add_generation_prompt, **variables of the template) -> text. It raises what the
        template raises.
    """
    from transformers import PreTrainedTokenizerBase
    from transformers.utils import chat_template_utils

    def pick(tools: list[dict[str, Any]] | None) -> str | None:
        if not isinstance(chat_template, dict):
            return chat_template
        return chat_template["tool_use" if tools is not None and "tool_use" in chat_template else "default"]

    if type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
        return lambda messages, tools, for_reply, strftime_now=None, **more: str(
            tokenizer.apply_chat_template(
                messages, tools, chat_template=pick(tools), add_generation_prompt=for_reply, tokenize=False, **more
            )
        )
    special = {"documents": None, **tokenizer.special_tokens_map}
    compiled: dict[str, Any] = {}
    with_aliases = getattr(chat_template_utils, "_alias_reasoning_fields", _alias_reasoning)

    def render(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, for_reply: bool, **more: Any) -> str:
        """The text of a conversation; each template is compiled once."""
        text = tokenizer.get_chat_template(pick(tools), tools)
        template = compiled.get(text)
        if template is None:
            template = compiled[text] = chat_template_utils._compile_jinja_template(text)
            template.globals = dict(template.globals)  # it was a chain of two, which Jinja walks for each conversation
        if any(len(message) > 2 for message in messages):
            messages = with_aliases(messages)
        return template.render({**special, **more}, messages=messages, tools=tools, add_generation_prompt=for_reply)

    return render


def set_end_ids(model: Any, ids: int | list[int]) -> None:
    """Give a model's generation config its end tokens, also where transformers would make it anew of the config."""
    model.generation_config.eos_token_id = ids
    model.generation_config._from_model_config = False


def tracker_class(name: str) -> Callable[..., Any]:
    """A tracker of accelerate, without the PartialState of its logger, which would set the device and the threads."""
    from accelerate import tracking

    tracking.logger = logging.getLogger("accelerate.tracking")
    found = tracking.LOGGER_TYPE_TO_CLASS[name]
    return type(found.__name__, (found,), {"main_process_only": False})
