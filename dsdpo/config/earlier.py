"""Defaults that have changed: a run begun by an earlier version goes on with those of its time."""

from __future__ import annotations

# option -> its default before
EARLIER_DEFAULTS: dict[str, object] = {
    "truncation_mode": "keep_start",
    "val_split": "example",
}
