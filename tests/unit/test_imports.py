"""The layers of the package, checked in the source: nothing imports upwards, and cheap modules stay cheap."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from dsdpo.config.schema import RunConfig
from dsdpo.data.prepare import prepare
from tests.helpers.tiny import save_model, save_pairs, save_tokenizer, tiny_llama_config

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "dsdpo"

# Bottom up. A module may import from its own folder and from those before it.
FOLDERS = [
    "errors",
    "compat",
    "trl_kernel",
    "runtime",
    "config",
    "data",
    "model",
    "plan",
    "objectives",
    "engine",
    "reference",
    "checkpoint",
    "export",
    "train",
    "tools",
    "launch",
    "api",
    "cli",
    "__main__",
]
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
    *(path for path in PACKAGE.glob("runtime/*.py") if path.stem != "collectives"),
    *PACKAGE.glob("launch/*.py"),
    PACKAGE / "data/registry.py",
]


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def folder_of(module: str) -> int:
    """Place of a dotted module name, such as `dsdpo.data.order`, in FOLDERS; -1 for the package itself, from which
    modules take the version."""
    parts = module.split(".")
    return FOLDERS.index(parts[1]) if len(parts) > 1 else -1


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
    own = folder_of(name_of(path)) if name_of(path) != "dsdpo" else len(FOLDERS)
    ours = [name for name in imported(ast.parse(path.read_text())) if name.split(".")[0] == "dsdpo"]
    assert not [name for name in ours if folder_of(name) > own]


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


def test_the_package_imports_nothing_until_it_is_asked() -> None:
    code = """
        import sys
        import dsdpo
        assert not {name for name in sys.modules if name.startswith("dsdpo.") or name in ("numpy", "pydantic", "yaml")}
        assert {"train", "prepare", "load_config", "TrainResult"} <= set(dir(dsdpo))
        assert callable(dsdpo.train) and dsdpo.load_config and dsdpo.TrainResult
        try:
            dsdpo.trian
        except AttributeError:
            pass
        else:
            raise SystemExit("it has every attribute")
        import dsdpo.train.trackers
        assert callable(dsdpo.train)
    """
    assert not loaded_after(code)


def loaded_after(code: str) -> set[str]:
    """Which of HEAVY, and pandas, a process has imported at its end."""
    program = f"{textwrap.dedent(code)}\nimport sys\nprint(*sys.modules)"
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return (HEAVY | {"pandas"}) & set(done.stdout.splitlines()[-1].split())


@pytest.fixture
def prepared_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The YAML of a run with prepared data, whose files are taken for old enough to be known by their dates."""
    monkeypatch.setattr("dsdpo.runtime.files._SETTLED_NS", 0)
    save_model(tmp_path / "model", tiny_llama_config())
    save_tokenizer(tmp_path / "model")
    save_pairs(tmp_path / "pairs.jsonl", 8)
    settings = {
        "model_name_or_path": str(tmp_path / "model"),
        "dataset": ["pairs.jsonl"],
        "dataset_dir": str(tmp_path),
        "output_dir": str(tmp_path / "out"),
        "max_length": 64,
    }
    prepare(RunConfig(**settings), "train")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "run.yaml"


def test_a_supervisor_with_prepared_data_loads_nothing_heavy(prepared_run: Path) -> None:
    """The real one, up to the moment at which it starts the launcher."""
    code = f"""
        import sys
        from dsdpo.cli import main

        class Launched(Exception):
            pass

        def stop_before_the_launcher(event, args):
            if event == "subprocess.Popen" and "deepspeed" in " ".join(args[1]):
                raise Launched

        sys.addaudithook(stop_before_the_launcher)
        try:
            main(["train", {str(prepared_run)!r}, "--num_accelerators", "2"])
        except Launched:
            pass
        else:
            raise SystemExit("no launcher was started")
    """
    assert loaded_after(code) == {"pyarrow"}


def test_reading_prepared_data_loads_pyarrow_alone(prepared_run: Path) -> None:
    """The loader reads in a thread, and threads import nothing."""
    code = f"""
        import numpy
        from dsdpo.config.load import load
        from dsdpo.data.prepare import open_prepared

        examples = open_prepared(load({str(prepared_run)!r}, []).config, "train")
        import sys
        before = set(sys.modules)
        ids = numpy.arange(len(examples))
        examples.lengths(ids), examples.digests(ids), examples.scores(ids), examples.weights(ids)
        examples.example(0), examples.where(0)
        assert set(sys.modules) == before, set(sys.modules) - before
    """
    assert loaded_after(code) == {"pyarrow"}


def test_the_kernel_is_loaded_without_its_package() -> None:
    code = """
        import torch
        from dsdpo.trl_kernel import chunked_logps

        hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
        chunked_logps(hidden, weight, None, torch.tensor([1, 2, 3]), 5, None, 1.0)[0].sum().backward()
    """
    assert not loaded_after(code) & {"trl", "datasets", "peft", "deepspeed"}


def test_only_env_reads_the_ranks_variables() -> None:
    variables = re.compile(r"[\"'](RANK|WORLD_SIZE|LOCAL_RANK|SLURM_\w+)[\"']")
    readers = [name_of(path) for path in modules() if variables.search(path.read_text())]
    assert readers == ["dsdpo.runtime.env"]


def test_only_the_engine_initializes_deepspeed() -> None:
    callers = [name_of(path) for path in modules() if re.search(r"deepspeed\.initialize\(", path.read_text())]
    assert callers == ["dsdpo.engine.engine"]


def test_the_training_loop_is_on_one_screen() -> None:
    lines = (PACKAGE / "train" / "loop.py").read_text().splitlines()
    rulers = [number for number, line in enumerate(lines) if re.fullmatch(r"\s*# -{20,}", line)]
    assert len(rulers) == 2, "the loop stands between two rulers"
    body = lines[rulers[0] + 1 : rulers[1]]
    assert re.match(r"\s+(for|while) ", body[0]), "the loop starts under the first ruler"
    assert len(body) <= 30
    loop = ast.parse(textwrap.dedent("\n".join(body)))
    assert not any(isinstance(node, ast.Subscript) for node in ast.walk(loop)), "it slices nothing"


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_modules_and_functions_stay_readable(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 320 or path == PACKAGE / "config" / "schema.py"
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    long = {f.name: n for f in functions if (n := (f.end_lineno or 0) - f.lineno + 1) > 60}
    assert not long


def test_few_modules_know_what_a_preference_is() -> None:
    """Formats, the objectives of preferences and their metrics, options, chat."""
    found = [name_of(path) for path in modules() if re.search("chosen|rejected", path.read_text())]
    knowing = {"dsdpo.data.formats" if name.startswith("dsdpo.data.formats.") else name for name in found}
    assert len(knowing) <= 18, knowing


def test_there_is_no_import_circle() -> None:
    """Also by imports inside functions: a module can be read after those that it imports.

    But for the package itself, which imports nothing until it is asked.
    """
    names = {name_of(path) for path in modules()} - {"dsdpo"}
    imports = {
        name_of(path): {n for n in imported(ast.parse(path.read_text())) if n in names and n != name_of(path)}
        for path in modules()
        if name_of(path) in names
    }
    while free := [name for name, needed in imports.items() if not needed]:
        for name in free:
            del imports[name]
        for needed in imports.values():
            needed.difference_update(free)
    assert not imports, f"a circle among {sorted(imports)}"
