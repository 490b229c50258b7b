"""argparse as the commands use it: with the exit code of a config error, and a help that lists the options of a run."""

from __future__ import annotations

import argparse
import sys
import textwrap
from typing import Any, NoReturn

from dsdpo.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """argparse with the exit code of a config error; commands on a run config list all options in their
    help."""

    def __init__(self, takes_options: bool = False, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)
        self._takes_options = takes_options

    def arities(self) -> dict[str, int]:
        """Each option of the command, and how many values it takes."""
        return {name: int(action.nargs != 0) for name, action in self._option_string_actions.items()}

    def format_help(self) -> str:
        return super().format_help() + ("\n" + option_help() if self._takes_options else "")

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(ConfigError.exit_code, f"{self.prog}: {message}\n")


def option_help() -> str:
    """Every option of a run config by group, with type, default and meaning."""
    from dsdpo.config.options import options

    resume = {"fixed": "", "free": "; may change on resume", "consent": "; with change_on_resume"}
    lines = ["options of RUN.yaml, each also as --key value:"]
    group = ""
    for option in options().values():
        if option.group != group:
            group = option.group
            lines += ["", f"{group}:"]
        default = option.default if option.default == "required" else f"default {option.default}"
        lines.append(f"  {option.name} ({option.allowed}; {default}{resume[option.resume]})")
        lines += textwrap.wrap(option.doc, 104, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines) + "\n"
