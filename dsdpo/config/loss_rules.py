"""What must hold between the options of the losses. Each rule returns a message, or an empty string."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from typing import TypeAlias

from dsdpo.config.losses import ANY_LOSS, LOSSES, RANKINGS
from dsdpo.config.schema import RunConfig

Given: TypeAlias = Mapping[str, str]  # explicitly set key -> place
Rule: TypeAlias = tuple[str, tuple[str, ...], Callable[[RunConfig, Given], str]]  # code, options, what is wrong


def _losses(config: RunConfig, given: Given) -> str:
    if len(set(config.loss_type)) != len(config.loss_type):
        return f"loss_type names a loss twice: {', '.join(config.loss_type)}; name each once"
    ranking = [loss for loss in config.loss_type if loss in RANKINGS]
    if ranking and len(config.loss_type) > 1:
        return f"loss_type is {config.loss_type}; {ranking[0]} ranks several answers and stands alone"
    if not any(ANY_LOSS[loss].preference for loss in config.loss_type):
        return f"loss_type is {config.loss_type}; stage dpo needs a preference loss in it, such as [sigmoid, sft]"
    return ""


def _readers() -> dict[str, list[str]]:
    """Option that not all losses read -> the losses that do, by name."""
    readers: dict[str, list[str]] = {}
    for loss, spec in sorted(LOSSES.items()):
        for option in spec.options:
            readers.setdefault(option, []).append(loss)
    return readers


def _loss_options(config: RunConfig, given: Given) -> str:
    for option, losses in _readers().items():
        if option in given and getattr(config, option) and not set(losses).intersection(config.loss_type):
            return (
                f"{option} is set, but no loss of loss_type {config.loss_type} reads it (those that do: "
                f"{', '.join(losses)}); delete it or change loss_type"
            )
    for loss in config.loss_type:
        if ANY_LOSS[loss].needs_smoothing and config.label_smoothing == 0:
            return f"loss_type {loss} needs label_smoothing above 0, such as 1e-3"
    return ""


def _divergence(config: RunConfig, given: Given) -> str:
    if config.f_divergence_type == "reverse_kl":
        useless = "f_alpha_divergence_coef" in given
        return "f_alpha_divergence_coef is set, but f_divergence_type is reverse_kl; delete one" if useless else ""
    if "f_alpha_divergence_coef" in given and config.f_divergence_type != "alpha_divergence":
        return (
            f"f_alpha_divergence_coef is set, but f_divergence_type is {config.f_divergence_type}; delete it or set "
            "alpha_divergence"
        )
    others = [loss for loss in config.loss_type if not ANY_LOSS[loss].divergence]
    if others:
        return (
            f"f_divergence_type {config.f_divergence_type} is not defined for {', '.join(others)}; use it with "
            f"{', '.join(sorted(loss for loss, spec in LOSSES.items() if spec.divergence))}, or set reverse_kl"
        )
    return ""


def _ld_alpha(config: RunConfig, given: Given) -> str:
    if config.ld_alpha is None:
        return ""
    clash = sorted(loss for loss in config.loss_type if ANY_LOSS[loss].per_token)
    if clash:
        return f"ld_alpha weighs log-prob sums, but {', '.join(clash)} takes means per token; delete ld_alpha"
    if config.loss_type[0] in RANKINGS:
        return f"ld_alpha weighs the answers of a pair, but {config.loss_type[0]} ranks several; delete ld_alpha"
    return ""


def _reference(config: RunConfig, given: Given) -> str:
    needing = [loss for loss in config.loss_type if ANY_LOSS[loss].reference]
    if config.reference == "none" and needing:
        return f"reference is none, but {', '.join(needing)} needs one; set auto, cached or live"
    if config.reference in ("cached", "live") and not needing:
        return (
            f"reference is {config.reference}, but no loss of loss_type {config.loss_type} reads one; set auto or none"
        )
    return ""


def _spans_batch(config: RunConfig, given: Given) -> str:
    losses = [loss for loss in config.loss_type if ANY_LOSS[loss].spans_batch]
    if losses and (config.lora_dropout > 0 or not config.disable_dropout):
        return (
            f"loss_type {', '.join(losses)} computes each step's pairs twice, which dropout would make differ; set "
            "lora_dropout: 0 and disable_dropout: true"
        )
    return ""


def _weighting(config: RunConfig, given: Given) -> str:
    if not config.use_weighting:
        return ""
    if config.loss_type[0] in RANKINGS:
        return f"use_weighting weighs pairs, but {config.loss_type[0]} ranks several answers; delete use_weighting"
    losses = [loss for loss in config.loss_type if ANY_LOSS[loss].spans_batch]
    if losses:
        return (
            f"use_weighting weighs each pair's loss, but loss_type {', '.join(losses)} sorts what it compares over all "
            "pairs, so that no loss belongs to one pair; delete use_weighting or change loss_type"
        )
    if not _has_weighting_kernel():
        return "use_weighting needs trl 1.16 or newer, which needs Python 3.11; delete it or use a newer Python"
    return ""


def _has_weighting_kernel() -> bool:
    major, minor, *_ = importlib.metadata.version("trl").split(".")
    return (int(major), int(minor)) >= (1, 16)


def _loss_weights(config: RunConfig, given: Given) -> str:
    if config.loss_weights is None:
        return ""
    if len(config.loss_weights) != len(config.loss_type):
        return (
            f"loss_weights has {len(config.loss_weights)} number(s) for the {len(config.loss_type)} loss(es) "
            "of loss_type; give one each"
        )
    if min(config.loss_weights) < 0:
        return f"loss_weights is {config.loss_weights}; a weight is at least 0"
    return ""


LOSS_RULES: list[Rule] = [
    ("losses", ("loss_type",), _losses),
    ("loss-weights", ("loss_weights", "loss_type"), _loss_weights),
    ("loss-options", ("loss_type", *_readers()), _loss_options),
    ("divergence", ("f_divergence_type", "f_alpha_divergence_coef", "loss_type"), _divergence),
    ("ld-alpha", ("ld_alpha", "loss_type"), _ld_alpha),
    ("reference", ("reference", "loss_type"), _reference),
    ("dropout-with-batch-loss", ("loss_type", "lora_dropout", "disable_dropout"), _spans_batch),
    ("weighting", ("use_weighting", "loss_type"), _weighting),
]
