"""One exception per exit code, as the table in the module says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from dsdpo import errors


def test_the_table_and_the_classes_agree() -> None:
    table = {int(code) for code in re.findall(r"^\| (\d+)", errors.__doc__ or "", re.MULTILINE)}
    codes = [error.exit_code for error in errors.DsdpoError.__subclasses__()]
    assert sorted(codes) == sorted(table - {0})
    assert len(set(codes)) == len(codes)


def test_a_config_error_numbers_its_problems() -> None:
    one, two = errors.Problem("a", "seed", "one"), errors.Problem("b", "beta", "two")
    assert str(errors.ConfigError(one)) == "1 problem in the run config:\n  1. one"
    assert str(errors.ConfigError([one, two])) == "2 problems in the run config:\n  1. one\n  2. two"
    assert errors.config_error("a", "seed", "one").problems == [one]


def test_every_config_error_has_codes() -> None:
    """Where one is raised with a text alone, no test could tell which mistake it is."""
    for path in sorted(Path(errors.__file__).parent.rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") in ("ConfigError", "CommandLineError"):
                assert not isinstance(call.args[0], (ast.Constant, ast.JoinedStr)), f"{path.name}:{call.lineno}"
