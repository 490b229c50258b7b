"""Every option is explained and is read by the code: an option that nobody reads would be a lie."""

from __future__ import annotations

import ast
import inspect
import textwrap
from pathlib import Path

import pytest

from dsdpo.config.options import options
from dsdpo.config.parser import option_help
from dsdpo.config.schema import RunConfig, options_with

PACKAGE = Path(__file__).parents[2] / "dsdpo"
# These compare options with each other or with the DeepSpeed JSON: that alone makes no option work.
CHECKERS = {"schema.py", "rules.py", "deepspeed_keys.py"}


def attributes(source: str) -> set[str]:
    return {node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}


def read_by_the_code() -> set[str]:
    """Attribute names read outside the checkers, and what the schema's own properties read for them."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        if path.name not in CHECKERS:
            found |= attributes(path.read_text())
    for name, value in vars(RunConfig).items():
        if isinstance(value, property) and name in found and value.fget is not None:
            found |= attributes(textwrap.dedent(inspect.getsource(value.fget)))
    return found


READ = read_by_the_code()


@pytest.mark.parametrize("name", list(RunConfig.model_fields))
def test_every_option_has_a_docstring(name: str) -> None:
    doc = options()[name].doc
    assert len(doc) > 15
    assert doc.endswith(".")


@pytest.mark.parametrize("name", list(RunConfig.model_fields))
def test_every_option_is_read(name: str) -> None:
    assert name in READ, f"no code reads the option {name}: use it or delete it from the schema"


@pytest.mark.parametrize("name", list(RunConfig.model_fields))
def test_every_option_is_in_the_help_with_group_type_and_default(name: str) -> None:
    option = options()[name]
    text = option_help()
    assert f"  {name} ({option.allowed}; " in text
    assert text.index(f"\n{option.group}:\n") < text.index(f"  {name} (")
    assert option.doc.split()[0] in text


def test_the_help_tells_what_a_resumed_run_may_change() -> None:
    text = option_help()
    assert "  save_steps (a whole number, at least 1, or empty; default 500; may change on resume)\n" in text
    assert "  learning_rate (a number, above 0; default 1e-05; with change_on_resume)\n" in text
    assert "  stage (one of pt, sft, dpo, kto, rm; default dpo)\n" in text
    assert text.count("; may change on resume)\n") == len(options_with("free"))
    assert text.count("; with change_on_resume)\n") == len(options_with("consent"))


def test_the_groups_are_the_rulers_of_the_schema() -> None:
    groups = list(dict.fromkeys(option.group for option in options().values()))
    assert groups == ["model", "data", "objective", "batches", "optimization", "running"]


def test_types_and_defaults_are_said_in_words() -> None:
    by_name = options()
    assert by_name["beta"].allowed == "a number, above 0"
    assert by_name["eval_steps"].allowed == "a whole number, at least 1, or empty"
    assert by_name["precision"].allowed == "one of auto, fp32, bf16, fp16"
    assert (
        by_name["report_to"].allowed
        == "a list out of tensorboard, wandb, trackio, mlflow, swanlab, comet_ml, clearml, all"
    )
    assert (by_name["dataset"].default, by_name["share_prefix"].default) == ("required", "true")
    assert (by_name["loss_type"].default, by_name["eval_steps"].default) == ("sigmoid", "empty")
