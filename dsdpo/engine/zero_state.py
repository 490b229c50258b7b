"""Where a DeepSpeed engine keeps the state that training changes: the one reader of ZeRO's internals.

Each rank holds flat pieces of some trainable parameters' fp32 weights and Adam moments. Stage 0: all of all. Stages 1
and 2: pieces at arbitrary offsets of one flat vector per parameter group. Stage 3: an equal share of each parameter,
the last one padded. Offloading to the CPU changes the device, not the layout; offloading to NVMe keeps the vectors of
sub-groups of parameters in files, from which they are read one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

WEIGHTS = "fp32"
MOMENTS = ("exp_avg", "exp_avg_sq")
STATES = (WEIGHTS, *MOMENTS)


@dataclass(frozen=True)
class Piece:
    """A run of consecutive elements of one parameter that this rank holds.

    Attributes:
        name: of the parameter in the Hugging Face or PEFT model.
        shape: of the whole parameter.
        start: of the piece in the flattened parameter.
        states: STATES -> fp32 [n], views into what the optimizer works on; writing to them changes it. Without content,
            on the device `meta`, while they are on NVMe.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    states: dict[str, torch.Tensor]

    def __len__(self) -> int:
        return self.states[WEIGHTS].numel()

    def narrow(self, start: int, length: int) -> Piece:
        """`length` elements of it, from its element `start` on."""
        states = {state: tensor.narrow(0, start, length) for state, tensor in self.states.items()}
        return Piece(self.name, self.shape, self.start + start, states)


def local_shards(engine: DeepSpeedEngine) -> list[Piece]:
    """Every piece that this rank works on, in the order of `iter_state_shards`. The Adam moments must exist."""
    stage = engine.zero_optimization_stage() if engine.zero_optimization() else 0
    layout = {0: _whole, 1: _flat_piece, 2: _flat_piece, 3: _share}[stage]
    named = [(name, p) for name, p in engine.module.model.named_parameters() if p.requires_grad]
    if _is_swapped(engine):
        named.sort(key=lambda item: _sub_group(engine.optimizer, item[1]))
    pieces = [layout(engine.optimizer, name, parameter) for name, parameter in named]
    return [piece for piece in pieces if piece is not None]


def iter_state_shards(engine: DeepSpeedEngine, changes: bool = False) -> Generator[list[Piece], None, None]:
    """The pieces in portions whose states are in memory together: all at once, or one sub-group after another on NVMe.

    Each portion is to be used before the next is asked for.

    Args:
        changes: whether the caller writes into the states.
    """
    if not _is_swapped(engine):
        yield local_shards(engine)
        return
    optimizer = engine.optimizer
    names = {id(parameter): name for name, parameter in engine.module.model.named_parameters()}
    for number, group in enumerate(optimizer.fp16_groups):
        with _swapped_in(optimizer, number, changes):
            pieces = [_share(optimizer, names[id(parameter)], parameter) for parameter in group]
            yield [piece for piece in pieces if piece is not None]


def _is_swapped(engine: DeepSpeedEngine) -> bool:
    return bool(getattr(engine.optimizer, "swap_optimizer", False))


@contextmanager
def _swapped_in(optimizer: Any, sub_group: int, changes: bool) -> Iterator[None]:
    """Inside, the state of a ZeRO-3 sub-group is in memory; small ones always are. DeepSpeed's step does the same."""
    if not optimizer._swappable_optimizer_subgroup(sub_group):
        yield
        return
    optimizer._optimizer_states_and_gradient_swap_in(sub_group)
    try:
        yield
    finally:
        if changes:
            optimizer._optimizer_states_and_gradient_swap_out(sub_group)
        else:
            optimizer._release_swap_buffers(sub_group)


def shards_to_save(engine: DeepSpeedEngine, rank: int, world_size: int) -> list[Piece]:
    """The pieces that this rank saves: over all ranks, each element of each trainable parameter once."""
    held = local_shards(engine)
    if engine.zero_optimization():
        return held
    shares = []
    for piece in held:
        size = math.ceil(len(piece) / world_size)
        start = min(rank * size, len(piece))
        if start < len(piece):
            shares.append(piece.narrow(start, min(size, len(piece) - start)))
    return shares


def _whole(optimizer: Any, name: str, parameter: torch.nn.Parameter) -> Piece:
    return _piece(name, parameter.shape, 0, parameter.data.view(-1), optimizer.state[parameter])


def _flat_piece(optimizer: Any, name: str, parameter: Any) -> Piece | None:
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    flat = _flat_groups(optimizer)[mapping.param_group_index]
    address = mapping.hp_fragment_address
    start = mapping.lp_fragment_address.start
    return _piece(name, parameter.shape, start, flat, optimizer.optimizer.state[flat], address.start, address.numel)


def _sub_group(optimizer: Any, parameter: Any) -> int:
    return int(optimizer.grad_position[optimizer.get_param_id(parameter)][0])


def _share(optimizer: Any, name: str, parameter: Any) -> Piece | None:
    group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = size * optimizer._get_param_partition_rank(parameter)
    length = min(size, parameter.ds_numel - start)
    if length <= 0:
        return None
    flat = optimizer.fp32_partitioned_groups_flat[group]
    moments = optimizer.optimizer.state[flat]
    if flat.numel() == 0:  # swapped out
        flat = torch.empty(optimizer.fp16_partitioned_groups_flat_numel[group], device="meta")
        moments = dict.fromkeys(MOMENTS, flat)
    return _piece(name, parameter.ds_shape, start, flat, moments, offset, length)


def _piece(
    name: str,
    shape: torch.Size,
    start: int,
    weights: torch.Tensor,
    moments: dict[str, Any],
    offset: int = 0,
    length: int | None = None,
) -> Piece:
    flat = {WEIGHTS: weights.detach(), **{key: moments[key] for key in MOMENTS}}
    length = weights.numel() if length is None else length
    return Piece(name, tuple(shape), start, {key: x.view(-1).narrow(0, offset, length) for key, x in flat.items()})


def _flat_groups(optimizer: Any) -> list[torch.Tensor]:
    """This rank's flat fp32 weights of each parameter group under ZeRO 1 and 2; stage 1 in bf16 has its own class."""
    groups = getattr(optimizer, "single_partition_of_fp32_groups", None)
    return optimizer.fp32_groups_flat_partition if groups is None else groups


def adam_step(engine: DeepSpeedEngine) -> int:
    """How many steps Adam has counted, for its bias correction; 0 before the first."""
    states = _inner(engine).state.values()
    return max((int(state["step"]) for state in states if "step" in state), default=0)


def _inner(engine: DeepSpeedEngine) -> torch.optim.Optimizer:
    return engine.optimizer.optimizer if engine.zero_optimization() else engine.optimizer


def set_adam_step(engine: DeepSpeedEngine, step: int) -> None:
    """Make the Adam moments where an engine has not stepped yet, and let all of Adam count `step` steps."""
    optimizer = _inner(engine)
    for weights in _optimized(engine):
        state = optimizer.state[weights]
        for key in MOMENTS:
            if key not in state:
                state[key] = torch.zeros_like(weights.detach(), memory_format=torch.preserve_format)
        if not isinstance(optimizer, torch.optim.AdamW):  # DeepSpeed's Adam for offloaded state counts in int
            state["step"] = step
        else:
            device = weights.device if optimizer.defaults["fused"] else "cpu"
            state["step"] = torch.tensor(float(step), device=device)
    if engine.zero_optimization() and engine.zero_optimization_stage() < 3:
        engine.optimizer._lazy_init_hp_params_optimizer_state()  # DeepSpeed's own readers of the moments look there


def _optimized(engine: DeepSpeedEngine) -> Iterator[torch.Tensor]:
    """The tensors that the inner optimizer has a state for, in memory and to be changed until the next is asked for."""
    if not engine.zero_optimization():
        yield from (p for group in engine.optimizer.param_groups for p in group["params"])
    elif engine.zero_optimization_stage() == 3:
        for group, flat in enumerate(engine.optimizer.fp32_partitioned_groups_flat):
            with _swapped_in(engine.optimizer, group, changes=True):
                yield flat
    else:
        yield from _flat_groups(engine.optimizer)


def sync_model_weights(engine: DeepSpeedEngine) -> None:
    """Make the weights that the model computes with from the fp32 ones. A collective call."""
    if not engine.zero_optimization():
        return
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() < 3:
        optimizer.update_lp_params()
        return
    optimizer.checkpoint_event_prologue()
    for group in range(len(optimizer.fp32_partitioned_groups_flat)):
        with _swapped_in(optimizer, group, changes=False):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
    optimizer.checkpoint_event_epilogue()  # under hpZ it drops the second copy, made of the weights before


def trainable_shapes(engine: DeepSpeedEngine) -> dict[str, list[int]]:
    """Name -> shape of every parameter that is trained, on every rank all of them."""
    return {
        name: list(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in engine.module.model.named_parameters()
        if parameter.requires_grad
    }


def trained_weights(engine: DeepSpeedEngine) -> int:
    """How many numbers are trained."""
    return sum(math.prod(shape) for shape in trainable_shapes(engine).values())
