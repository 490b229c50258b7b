"""Shapes of models with round numbers."""

from __future__ import annotations

from dataclasses import replace

from dsdpo.plan.shape import ModelShape

SHAPE = ModelShape(
    layers=32,
    hidden=4096,
    vocab=32000,
    key_value=4096,
    intermediate=11008,
    linear=64 * 10**8,
    lora=0,
    total=7 * 10**9,
    trained=7 * 10**9,
    largest=2 * 10**8,
    largest_tensor=13 * 10**7,
)
LORA = replace(SHAPE, lora=2 * 10**7, trained=2 * 10**7)
