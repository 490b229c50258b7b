"""One exception per exit code, as the table in the module says."""

from __future__ import annotations

import re

import pytest

from dsdpo import errors


def test_the_table_and_the_classes_agree() -> None:
    table = {int(code) for code in re.findall(r"^\| (\d+)", errors.__doc__ or "", re.MULTILINE)}
    codes = [error.exit_code for error in errors.DsdpoError.__subclasses__()]
    assert sorted(codes) == sorted(table - {0})
    assert len(set(codes)) == len(codes)


@pytest.mark.parametrize(
    ("problems", "said"),
    [
        ("one", "1 problem in the run config:\n  1. one"),
        (["one", "two"], "2 problems in the run config:\n  1. one\n  2. two"),
    ],
)
def test_a_config_error_numbers_its_problems(problems: str | list[str], said: str) -> None:
    assert str(errors.ConfigError(problems)) == said
