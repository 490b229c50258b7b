"""One exception per exit code. A message says what was found, what is allowed and what to change.

| code | meaning |
| ---- | ------- |
| 0    | done |
| 64   | config: the run config, the command line or the DeepSpeed JSON |
| 65   | data: no usable row, or more refused rows than `max_refused` |
| 66   | checkpoint: `output_dir` holds a run that cannot be continued |
| 70   | numeric: a loss or gradient norm that is not finite |
| 71   | hang: a rank died or stopped answering |
| 72   | memory: a GPU has none left; the message says what to lower |
| 74   | I/O: disk full, unwritable folder, a hub that gives no answer |
| 75   | stopped on request, weights saved |
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with what a user gave.

    Attributes:
        code: what kind of mistake it is, such as `unknown-option`; tests compare it.
        option: the option or argument that it is about; empty where there is none.
        text: what was found, what is allowed and what to change.
    """

    code: str
    option: str
    text: str

    def __str__(self) -> str:
        return self.text


class DsdpoError(Exception):
    """Base of the errors that end the program with a known exit code and no traceback."""

    exit_code = 1
    for_each_node = False  # whether each node says it, and not the main rank alone

    def found_by(self, where: str) -> DsdpoError:
        """The same error with the place where it was found in front, such as a rank."""
        return type(self)(f"{where}: {self}")


class ConfigError(DsdpoError):
    """Every problem found in a run config, in one report.

    Args:
        problems: shown as a numbered list.
    """

    exit_code = 64
    what = "problem{s} in the run config"

    def __init__(self, problems: Iterable[Problem] | Problem) -> None:
        self.problems = [problems] if isinstance(problems, Problem) else list(problems)
        count = len(self.problems)
        lines = [f"{count} {self.what.format(s='s' if count != 1 else '')}:"]
        lines += [f"  {i}. {problem}" for i, problem in enumerate(self.problems, 1)]
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[Any, ...]:
        """As pickle takes it: the problems, and not their text."""
        return type(self), (self.problems,)

    def found_by(self, where: str) -> ConfigError:
        """See DsdpoError."""
        return type(self)(replace(problem, text=f"{where}: {problem.text}") for problem in self.problems)


class CommandLineError(ConfigError):
    """Options of a command that cannot be used."""

    what = "problem{s} in the command line"


def config_error(code: str, option: str, text: str) -> ConfigError:
    """The error of one problem."""
    return ConfigError(Problem(code, option, text))


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


class OutOfMemory(DsdpoError):
    """A GPU has no memory left for what the run asks of it. Another attempt as it was would meet the same."""

    exit_code = 72


class IOFailure(DsdpoError):
    """The file system refused a write that the run needs, or the hub gives no answer."""

    exit_code = 74


class StopRequested(DsdpoError):
    """The run ended early because it was asked to; its weights are saved."""

    exit_code = 75
