"""pyproject.toml names every package that the code imports."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "yaml": "pyyaml",
    "flash_attn": "flash-attn",
    "pydantic_core": "pydantic",
    "modelscope_hub": "modelscope-hub",
}
BUILT_BY_HAND = {"flash_attn_interface"}  # flash-attn-3, which no index has


def imported() -> set[str]:
    found: set[str] = set()
    for path in (ROOT / "dsdpo").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found |= {name.split(".")[0] for name in names}
    return found - sys.stdlib_module_names - BUILT_BY_HAND - {"dsdpo"}


def test_every_imported_package_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    declared = {re.split(r"[<>=;\[ ]", line)[0].lower().replace("_", "-") for line in lines}
    names = {PACKAGES.get(name, name).lower().replace("_", "-") for name in imported()}
    assert sorted(names - declared) == []
