"""Whether a checkpoint may be continued by a run config: which settings must be the same, and which need not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dsdpo.config.earlier import EARLIER_DEFAULTS
from dsdpo.config.schema import RunConfig, options_with


def config_diff(saved: dict[str, Any], now: dict[str, Any], consented: Sequence[str]) -> list[str]:
    """Settings of a saved run that another run config changes and may not, a line each.

    An option that is newer than the saved run had its earlier default's meaning then, or its default's.

    Args:
        saved, now: option -> value.
        consented: names of `change_on_resume`.
    """
    lines = []
    saved = {**_defaults(), **EARLIER_DEFAULTS, **saved}
    may_change, with_consent = {*options_with("free"), *consented}, options_with("consent")
    for option in sorted(saved.keys() | now.keys()):
        if option in may_change or saved.get(option) == now.get(option):
            continue
        if option not in RunConfig.model_fields:
            lines.append(f"{option} was {saved[option]}, this version has no such option (the one that saved it has)")
            continue
        hint = f" (name it in change_on_resume to go on with {now.get(option)})" if option in with_consent else ""
        lines.append(f"{option} was {saved.get(option)}, now it is {now.get(option)}{hint}")
    return lines


def _defaults() -> dict[str, Any]:
    options = RunConfig.model_fields.items()
    return {option: field.get_default() for option, field in options if not field.is_required()}


def refusal(folder: str, lines: list[str]) -> str:
    """What to say of differences."""
    return (
        f"{folder} was saved by a run that differs in {len(lines)} point{'s' if len(lines) > 1 else ''}: "
        f"{'; '.join(lines)}. Put the old value{'s' if len(lines) > 1 else ''} back, or choose another output_dir"
    )
