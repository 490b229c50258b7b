"""One exception per exit code. A message says what was found, what is allowed and what to change.

| code | meaning |
| ---- | ------- |
| 0    | done |
| 64   | config: the run config, the command line or the DeepSpeed JSON |
| 65   | data: no usable row, or more refused rows than `max_refused` |
| 66   | checkpoint: `output_dir` holds a run that cannot be continued |
| 70   | numeric: a loss or gradient norm that is not finite |
| 71   | hang: a rank died or stopped answering |
| 74   | I/O: disk full, unwritable folder |
| 75   | stopped on request, weights saved |
"""

from __future__ import annotations


class DsdpoError(Exception):
    """Base of the errors that end the program with a known exit code and no traceback."""

    exit_code = 1
    for_each_node = False  # whether each node says it, and not the main rank alone


class ConfigError(DsdpoError):
    """Every problem found in a run config, in one report.

    Args:
        problems: one line (or paragraph) each; shown as a numbered list.
    """

    exit_code = 64
    what = "problem{s} in the run config"

    def __init__(self, problems: list[str] | str) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        count = len(self.problems)
        lines = [f"{count} {self.what.format(s='s' if count != 1 else '')}:"]
        lines += [f"  {i}. {problem}" for i, problem in enumerate(self.problems, 1)]
        super().__init__("\n".join(lines))


class DataError(DsdpoError):
    """The data cannot be used as asked."""

    exit_code = 65


class CheckpointError(DsdpoError):
    """`output_dir` or a named checkpoint cannot be used."""

    exit_code = 66


class NumericError(DsdpoError):
    """A loss or gradient norm that is not finite."""

    exit_code = 70


class HangError(DsdpoError):
    """A rank died or stopped answering."""

    exit_code = 71


class IOFailure(DsdpoError):
    """The file system refused a write that the run needs."""

    exit_code = 74


class StopRequested(DsdpoError):
    """The run ended early because it was asked to; its weights are saved."""

    exit_code = 75
