"""One exception per exit code, as the table in the module says."""

from __future__ import annotations

import ast
import pickle
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


def test_an_error_goes_to_another_process_and_says_where_it_was_found() -> None:
    problems = [errors.Problem("a", "seed", "one"), errors.Problem("b", "beta", "two")]
    for error in (errors.ConfigError(problems), errors.CommandLineError(problems)):
        sent = pickle.loads(pickle.dumps(error))
        assert type(sent) is type(error) and sent.problems == problems and str(sent) == str(error)
        found = error.found_by("rank 1")
        assert type(found) is type(error) and [(p.code, p.option) for p in found.problems] == [
            ("a", "seed"),
            ("b", "beta"),
        ]
        assert str(found) == str(error).replace("one", "rank 1: one").replace("two", "rank 1: two")
    for kind in (errors.DataError, errors.CheckpointError, errors.IOFailure):
        sent = pickle.loads(pickle.dumps(kind("text"))).found_by("rank 1")
        assert type(sent) is kind and str(sent) == "rank 1: text"


def test_every_config_error_has_codes() -> None:
    """Where one is raised with a text alone, no test could tell which mistake it is."""
    for path in sorted(Path(errors.__file__).parent.rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") in ("ConfigError", "CommandLineError"):
                assert not isinstance(call.args[0], (ast.Constant, ast.JoinedStr)), f"{path.name}:{call.lineno}"
