"""The longest row that a run may still try, after it ran out of memory with longer ones: a file in output_dir."""

from __future__ import annotations

import json

from dsdpo.runtime.files import write_atomically
from dsdpo.runtime.rundir import RunDir


def read_row_limit(run_dir: RunDir) -> int | None:
    """Tokens of the longest row; None where no start has run out of memory."""
    try:
        return int(json.loads(run_dir.row_limit.read_text())["max_tokens_per_row"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_row_limit(run_dir: RunDir, tokens: int, before: int) -> None:
    """Say it for the next start. Several ranks may, and write the same.

    Args:
        before: tokens of the row that was too long.

    Raises:
        IOFailure: it cannot be written.
    """
    write_atomically(run_dir.row_limit, json.dumps({"max_tokens_per_row": tokens, "too_long": before}) + "\n")
