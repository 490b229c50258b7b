"""LoRA as one operation: y = x W' + b + s (x A') B', and one backward pass for all layers that share their input.

PEFT's own forward starts a kernel for each of its products, for the scaling and for the sum, and autograd adds two
gradients of the input for each layer: six of full size for the queries, keys and values of one attention block. Here
the thin product is added onto the base layer's output where that lies, and layers that share their input add their
gradients in one buffer.

The parameters stay PEFT's own, and so do saving and loading: only `forward` of its layers is replaced.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from dsdpo.compat import quantization_state
from dsdpo.config.schema import RunConfig
from dsdpo.model.quantized import dequantized

# Layers of one block that get the same input, as the compared families name them. What they really get is looked at
# in each forward pass: a name that means something else here costs time, not correctness.
_SHARE_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_PEFT_LAYERS = ("Linear", "Linear4bit", "Linear8bitLt")


def uses_fused_lora(config: RunConfig) -> bool:
    """Whether the adapters of a run are computed as one operation, and not by PEFT's own forward."""
    return config.finetuning_type == "lora" and config.kernels != "none"


def fuse_lora(model: nn.Module) -> int:
    """Let the adapted linear layers of a PEFT model compute as this module says. Returns how many there are.

    Each forward pass of a layer looks whether that is possible, and is PEFT's own otherwise: without an adapter, with
    several, with dropout, a trained bias or a variant such as DoRA, under autocast, or where a module inside has hooks
    of its own (ZeRO-3 gathers weights by them where decoder layers are not gathered as a whole).
    """
    blocks = {layer: _Block([layer]) for layer in model.modules() if _is_linear(layer)}
    for module in model.modules():
        for names in _SHARE_INPUT:
            layers = [layer for name in names if (layer := getattr(module, name, None)) in blocks]
            blocks |= dict.fromkeys(layers, _Block(layers))
    for layer, block in blocks.items():
        layer.forward = MethodType(_forward, layer)
        layer.fused_block = block  # type: ignore[assignment]  # no module: the layer's state does not change
    return len(blocks)


def _is_linear(layer: nn.Module) -> bool:
    """Whether PEFT put this beside a linear layer, and nothing else has replaced its forward."""
    known = isinstance(layer, LoraLayer) and type(layer).__name__ in _PEFT_LAYERS
    return known and isinstance(layer.base_layer, nn.Linear) and "forward" not in vars(layer)


def _forward(layer: Any, inputs: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    part = None if args or kwargs else _part_of(layer, inputs)
    if part is None:
        own: torch.Tensor = type(layer).forward(layer, inputs, *args, **kwargs)
        return own
    if torch.compiler.is_compiling():  # a compiler sees all layers at once, and merges their gradients itself
        return _traced(layer.base_layer, inputs, part)
    found: torch.Tensor = layer.fused_block(layer, part, inputs)
    return found


class _Part(NamedTuple):
    """What a layer computes with: its base layer's weight, bias and `quantization_state`, A, B and s."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    state: Any
    a: torch.Tensor
    b: torch.Tensor
    scale: float


def _part_of(layer: Any, inputs: torch.Tensor) -> _Part | None:
    """What a layer computes with now. None: PEFT's own forward is to compute."""
    if layer.disable_adapters or layer.merged:
        return None
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1:
        return None
    name, base = active[0], layer.base_layer
    inner = base, layer.lora_A[name], layer.lora_B[name]
    plain = isinstance(layer.lora_dropout[name], nn.Identity) and not layer.use_dora.get(name)
    if not plain or name in getattr(layer, "lora_variant", ()) or any(map(_has_hooks, inner)):
        return None
    a, b = inner[1:]
    part = _Part(base.weight, base.bias, quantization_state(base.weight), a.weight, b.weight, layer.scaling[name])
    if a.bias is not None or b.bias is not None or torch.is_autocast_enabled(inputs.device.type):
        return None
    if any(p is not None and p.requires_grad for p in (part.weight, part.bias)):
        return None
    if part.state is None and (type(base) is not nn.Linear or part.weight.dtype != inputs.dtype):
        return None
    return part if part.a.dtype == part.b.dtype == inputs.dtype else None


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _traced(base: nn.Module, inputs: torch.Tensor, part: _Part) -> torch.Tensor:
    """The same of operations that torch.compile differentiates and merges."""
    output = base(inputs)
    thin = functional.linear(inputs, part.a).flatten(0, -2)
    return torch.addmm(output.flatten(0, -2), thin, part.b.T, alpha=part.scale).view_as(output)


class _Block:
    """Layers that get the same input one after another: the first of them to be called computes for all.

    The others find their output here, if they are called with that very tensor, unchanged, and would compute with the
    same parameters; otherwise they compute for themselves, and what nobody has taken gets no gradient.
    """

    def __init__(self, layers: list[nn.Module]) -> None:
        self._layers = layers
        self._forget()

    def _forget(self) -> None:
        self._inputs: torch.Tensor | None = None
        self._state: tuple[Any, ...] = ()
        self._waiting: dict[nn.Module, tuple[_Part, torch.Tensor]] = {}

    def __call__(self, layer: nn.Module, part: _Part, inputs: torch.Tensor) -> torch.Tensor:
        """The output of `layer`, which computes with `part`."""
        if len(self._layers) == 1 or inputs.is_inference():
            return _compute([part], inputs)[0]
        state = inputs._version, inputs.requires_grad, torch.is_grad_enabled()
        if inputs is self._inputs and state == self._state and layer in self._waiting:
            computed_with, output = self._waiting.pop(layer)
            if not self._waiting:
                self._forget()
            if all(ours is theirs for ours, theirs in zip(part, computed_with)):
                return output
        parts = {each: part if each is layer else _part_of(each, inputs) for each in self._layers}
        known = {each: found for each, found in parts.items() if found is not None}
        outputs = dict(zip(known, _compute(list(known.values()), inputs)))
        found = outputs.pop(layer)
        self._forget()
        if outputs:
            self._inputs, self._state = inputs, state
            self._waiting = {each: (known[each], output) for each, output in outputs.items()}
        return found


def _compute(parts: Sequence[_Part], inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Outputs of layers that share their input."""
    weights, biases, states, a, b, scales = zip(*parts)
    outputs: tuple[torch.Tensor, ...] = _LoraLinears.apply(inputs, scales, states, *weights, *biases, *a, *b)
    return outputs


class _LoraLinears(torch.autograd.Function):
    """x W' + b + s (x A') B' for n layers of one input, with frozen W and b.

    For the backward pass it keeps the input, the parameters themselves, which ZeRO-3 empties and fills again until
    then, and the thin products s x A', of which one is r / H of the input's size: to compute them again would read the
    whole input once more.
    """

    @staticmethod
    def forward(
        ctx: Any, inputs: torch.Tensor, scales: Sequence[float], states: Sequence[Any], *parameters: Any
    ) -> tuple[torch.Tensor, ...]:
        """
        Args:
            inputs: [..., H].
            scales, states: s and `quantization_state` of each layer.
            parameters: n weights [O, H], n biases [O] or None, n matrices A [r, H], n matrices B [O, r].

        Returns:
            n outputs [..., O].
        """
        n = len(scales)
        weights, biases, a, b = (parameters[i * n : (i + 1) * n] for i in range(4))
        x = inputs.reshape(-1, inputs.shape[-1])
        in_place = not torch._C._len_torch_dispatch_stack()  # selective checkpointing keeps what products give
        thin = _scaled(x @ _stacked(a).T, a, scales, in_place)
        outputs = []
        for weight, bias, state, own, matrix in zip(weights, biases, states, _split(thin, a), b):
            output = functional.linear(x, _value(weight, state, x.dtype), bias)
            output = output.addmm_(own, matrix.T) if in_place else torch.addmm(output, own, matrix.T)
            # a view that is none: the caller may change it in place
            outputs.append(torch.ops.aten._unsafe_view(output, [*inputs.shape[:-1], len(matrix)]))
        ctx.save_for_backward(inputs, thin, *weights, *a, *b)
        ctx.scales, ctx.states = scales, states
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[Any, ...]:
        """dx, dA and dB; an output without a gradient adds nothing."""
        n = len(gradients)
        inputs, thin, *parameters = ctx.saved_tensors
        weights, a, b = (parameters[i * n : (i + 1) * n] for i in range(3))
        thins = _split(thin, a)
        used = [i for i, gradient in enumerate(gradients) if gradient is not None]
        needs_a, needs_b = ctx.needs_input_grad[3 + 2 * n : 3 + 3 * n], ctx.needs_input_grad[3 + 3 * n :]
        da: list[torch.Tensor | None] = [None] * n
        db: list[torch.Tensor | None] = [None] * n
        if not used:
            return (None,) * (3 + 4 * n)
        x = inputs.reshape(-1, inputs.shape[-1])
        dy = {i: gradients[i].reshape(len(x), -1) for i in used}  # type: ignore[union-attr]
        for i in used:
            if needs_b[i]:
                db[i] = dy[i].T @ thins[i]
        used_a = [a[i] for i in used]
        d_thin = x.new_empty(len(x), sum(map(len, used_a)))
        for i, own in zip(used, _split(d_thin, used_a)):
            torch.mm(dy[i], b[i], out=own)
        d_thin = _scaled(d_thin, used_a, [ctx.scales[i] for i in used], in_place=True)
        if any(needs_a[i] for i in used):
            for i, gradient in zip(used, (d_thin.T @ x).split([len(matrix) for matrix in used_a])):
                da[i] = gradient if needs_a[i] else None
        dx = None
        if ctx.needs_input_grad[0]:
            dx = d_thin @ _stacked(used_a)
            for i in used:
                dx.addmm_(dy[i], _value(weights[i], ctx.states[i], x.dtype))
            dx = dx.view(inputs.shape)
        return (dx, None, None, *(None,) * (2 * n), *da, *db)


def _value(weight: torch.Tensor, state: Any, dtype: torch.dtype) -> torch.Tensor:
    return weight if state is None else dequantized(weight, state).to(dtype)


def _stacked(matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    return matrices[0] if len(matrices) == 1 else torch.cat(list(matrices))


def _split(thin: torch.Tensor, a: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The columns that belong to each matrix A, as views."""
    return thin.split([len(matrix) for matrix in a], dim=1)


def _scaled(thin: torch.Tensor, a: Sequence[torch.Tensor], scales: Sequence[float], in_place: bool) -> torch.Tensor:
    """The columns of each matrix A times its factor."""
    if not in_place:
        thin = thin.clone()
    if len(set(scales)) > 1:
        for part, scale in zip(_split(thin, a), scales):
            part.mul_(scale)
    elif scales[0] != 1:
        thin.mul_(scales[0])
    return thin
