"""RunDir alone spells the names of files in output_dir, and the docs list them."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsdpo.runtime.rundir import RunDir

ROOT = Path(__file__).parents[3]
PACKAGE = ROOT / "dsdpo"
ARGUMENTS = {
    "rank": 0,
    "token": "TOKEN",
    "job": "JOB",
    "host": "NODE",
    "time": "TIME",
    "key": "KEY",
    "tracker": "TRACKER",
}
# The same word with another meaning, or a sentence for a reader.
OTHER_MEANING = {
    ("cli.py", "checkpoints"),  # the command
    ("cli.py", "metrics.jsonl"),  # in a help text
    ("config/trackers.py", "tensorboard"),  # a value of report_to
    ("train/trackers.py", "tensorboard"),  # the same
    ("config/deepspeed_keys.py", "tensorboard"),  # a key of a DeepSpeed JSON
    ("config/deepspeed_keys.py", "metrics.jsonl"),  # what to use in place of a key
}


def files() -> dict[str, str]:
    """Name of each file, such as `ranks/rank-00000.json` -> what its docstring says."""
    run_dir, found = RunDir(Path("output_dir")), {}
    for name, member in vars(RunDir).items():
        if name.startswith("_"):
            continue
        function = member.fget if isinstance(member, property) else member
        if inspect.signature(function).return_annotation != "Path":
            continue
        wanted = list(inspect.signature(function).parameters)[1:]
        path = function(run_dir, *(ARGUMENTS[parameter] for parameter in wanted))
        found[str(path.relative_to("output_dir"))] = inspect.getdoc(function) or ""
    return found


def strings(path: Path) -> Iterator[str]:
    """String constants of a module, without docstrings."""
    tree = ast.parse(path.read_text())
    docstrings = set()
    for node in ast.walk(tree):
        for child in getattr(node, "body", []) if isinstance(getattr(node, "body", None), list) else []:
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                docstrings.add(child.value)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings:
            yield node.value


def spelled(text: str) -> set[str]:
    """Names of files in output_dir that a string spells: as a whole, before a slash, or with a name's own look."""
    names = {part for file in files() for part in Path(file).parts}
    fixed = {re.split(r"TIME|TOKEN|JOB|TRACKER|00000", name)[0] for name in names} - {
        "",
        "rank-",
    }  # rank-: also in checkpoints
    own_look = [name for name in fixed if re.search(r"[^a-z]", name)]
    found = {name for name in fixed if text == name or re.search(rf"(?<![\w.-]){re.escape(name)}/", text)}
    return found | {name for name in own_look if re.search(rf"(?<![\w.-]){re.escape(name)}(?![\w])", text + " ")}


def test_no_other_module_spells_a_name() -> None:
    found = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        module = str(path.relative_to(PACKAGE))
        found |= {(module, name) for text in strings(path) for name in spelled(text) if module != "runtime/rundir.py"}
    assert found == OTHER_MEANING


@pytest.mark.parametrize("text", ["STOP", "see output_dir/EXIT", "final", "logs/x", ".environment-", "metrics.jsonl"])
def test_what_counts_as_spelled(text: str) -> None:
    assert spelled(text)


@pytest.mark.parametrize("text", ["the final step", "ranks differ", "STOPPED", "checkpoints of a run", "rank-00000"])
def test_what_does_not(text: str) -> None:
    assert not spelled(text)


def test_the_docs_list_every_file() -> None:
    rows = []
    for name, doc in files().items():
        writer, _, what = " ".join(doc.split()).removesuffix(".").partition(": ")
        rows.append(f"| `{name}` | {writer} | {what} |")
    text = (ROOT / "docs" / "checkpoints.md").read_text()
    table = text.partition("| file | written by | holds |\n| --- | --- | --- |\n")[2].partition("\n\n")[0]
    assert table.splitlines() == rows


def test_names_stand_in_the_folder(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    assert str(run_dir) == str(tmp_path)
    assert run_dir.heartbeat(12) == tmp_path / "ranks" / "rank-00012.json"
    assert run_dir.node_log("7", "n2") == tmp_path / "logs" / "7-n2.log"
    for name in ("t1", "t2"):
        run_dir.environment(name).touch()
    assert run_dir.environments() == [run_dir.environment("t1"), run_dir.environment("t2")]


def test_fresh_leaves_what_belongs_to_the_folder(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    stays = [run_dir.lock, run_dir.attempts, run_dir.started_over, run_dir.exit_reserve, run_dir.replaced("1")]
    moved = [run_dir.run_config, run_dir.metrics, run_dir.completed, run_dir.final_superseded]
    for path in stays + moved:
        path.touch()
    assert run_dir.left_by_run() == sorted(moved)
