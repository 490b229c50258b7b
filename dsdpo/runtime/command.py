"""Commands as they can be pasted into a shell."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Sequence


def command_line(arguments: Sequence[str]) -> str:
    """`dsdpo` with these arguments; by its Python where there is no `dsdpo` on PATH."""
    program = ["dsdpo"] if shutil.which("dsdpo") else [sys.executable, "-m", "dsdpo"]
    return shlex.join([*program, *arguments])
