"""The layers of the package, checked in the source: nothing imports upwards, and cheap modules stay cheap."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "dsdpo"

# Bottom up. A module may import from its own row and from those before it.
ROWS = ["base", "config", "data", "model", "objectives", "reference", "checkpoint", "train", "use", "cli"]
CLI = {"cli", "__main__"}
HEAVY = {
    "torch",
    "transformers",
    "datasets",
    "deepspeed",
    "peft",
    "trl",
    "accelerate",
    "pyarrow",
    "matplotlib",
}
CHEAP = [
    *PACKAGE.glob("*.py"),
    *PACKAGE.glob("config/*.py"),
    *(PACKAGE / name for name in ("data/registry.py", "train/stop.py")),
    *(path for path in PACKAGE.glob("use/*.py") if path.stem not in ("chat", "plots", "checkpoints", "screen")),
]


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def row_of(module: str) -> int:
    """Row of a dotted module name such as `dsdpo.data.order`."""
    parts = module.split(".")
    if len(parts) == 1 or (len(parts) == 2 and parts[1] not in {*ROWS, *CLI}):
        return 0
    return ROWS.index("cli" if parts[1] in CLI else parts[1])


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or ""


def is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imported_at_start(tree: ast.Module) -> Iterator[str]:
    """What runs when the module is imported: not inside functions, not for type checkers alone."""
    for node in tree.body:
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not is_type_checking(node):
            yield from imported(node)


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_nothing_imports_upwards(path: Path) -> None:
    row = row_of(name_of(path))
    ours = [name for name in imported(ast.parse(path.read_text())) if name.split(".")[0] == "dsdpo"]
    upwards = [name for name in ours if row_of(name) > row]
    assert not upwards, f"{name_of(path)} ({ROWS[row]}) imports {upwards}"


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_annotations_are_lazy(path: Path) -> None:
    text = path.read_text()
    is_empty = not ast.parse(text).body or path.name in ("__init__.py", "__main__.py")
    assert is_empty or "from __future__ import annotations" in text


@pytest.mark.parametrize("path", CHEAP, ids=name_of)
def test_cheap_modules_import_nothing_heavy(path: Path) -> None:
    names = {name.split(".")[0] for name in imported_at_start(ast.parse(path.read_text()))}
    assert not names & HEAVY


def test_the_command_line_loads_nothing_heavy() -> None:
    heavy = sorted(HEAVY | {"numpy", "pydantic", "yaml"})
    code = f"import sys, dsdpo.cli; loaded = set({heavy}) & set(sys.modules); assert not loaded, loaded"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_only_dist_reads_the_ranks_variables() -> None:
    variables = re.compile(r"[\"'](RANK|WORLD_SIZE|LOCAL_RANK|SLURM_\w+)[\"']")
    readers = [name_of(path) for path in modules() if variables.search(path.read_text())]
    assert readers == ["dsdpo.dist"]


def test_only_the_engine_initializes_deepspeed() -> None:
    callers = [name_of(path) for path in modules() if re.search(r"deepspeed\.initialize\(", path.read_text())]
    assert callers == ["dsdpo.train.engine"]


def test_the_training_loop_is_on_one_screen() -> None:
    lines = (PACKAGE / "train" / "loop.py").read_text().splitlines()
    rulers = [number for number, line in enumerate(lines) if re.fullmatch(r"\s*# -{20,}", line)]
    assert len(rulers) == 2, "the loop stands between two rulers"
    body = lines[rulers[0] + 1 : rulers[1]]
    assert re.match(r"\s+(for|while) ", body[0]), "the loop starts under the first ruler"
    assert len(body) <= 45
