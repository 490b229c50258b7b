"""The wheel, installed into a fresh virtual environment and used outside of the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from dsdpo.runtime.shipped import PACKED, shipped_files
from tests.helpers.ranks import ROOT
from tests.helpers.tiny import save_model, save_pairs, save_tokenizer, tiny_llama_config

pytestmark = pytest.mark.start


def call(*line: str | Path, cwd: Path, **variables: str) -> str:
    """What a command prints; it must end well. The repository is not on its path."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables}
    done = subprocess.run(
        [str(word) for word in line], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{line}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built by pip from a copy of the sources, so that nothing of an earlier build is in it."""
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"
    no_caches = shutil.ignore_patterns("__pycache__", ".*")
    for name in ("dsdpo", "configs", "data", "ds_configs", "launch", "slurm"):
        shutil.copytree(ROOT / name, source / name, ignore=no_caches)
    for name in ("constraints.txt", "LICENSE", "README.md", "MANIFEST.in", "pyproject.toml", "setup.py"):
        shutil.copy2(ROOT / name, source / name)
    build = ["wheel", ".", "--no-deps", "--no-build-isolation", "--wheel-dir", folder]
    call(sys.executable, "-m", "pip", *build, cwd=source)
    [path] = folder.glob("dsdpo-*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that has the wheel, and finds what dsdpo needs where this one does."""
    folder = tmp_path_factory.mktemp("fresh")
    call(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    [packages] = folder.glob("lib/python*/site-packages")
    # a folder that a .pth adds is not looked through for other .pth, so an editable install there is not found
    needed = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages / "needed.pth").write_text("".join(f"{path}\n" for path in needed))
    install = ["--python", folder / "bin/python", "install", "--no-deps", "--no-index", wheel]
    call(sys.executable, "-m", "pip", *install, cwd=folder)
    return folder / "bin" / "python"


def test_the_wheel_holds_the_package_and_the_files_beside_it(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "dsdpo").rglob("*.py")}
    files = {f"dsdpo/{PACKED}/{file.as_posix()}" for file in shipped_files(ROOT)}
    assert names == modules | files | {"dsdpo/py.typed"}
    assert {f"dsdpo/{PACKED}/{name}" for name in ("ds_configs/zero3.json", "slurm/train.sbatch")} <= names


def test_it_trains_outside_of_the_repository(python: Path, tmp_path: Path) -> None:
    """With the name of a DeepSpeed config; a launch script that `dsdpo files` has written finds that run."""
    dsdpo = python.with_name("dsdpo")
    where = "import dsdpo, dsdpo.runtime.shipped as s; print(dsdpo.__file__, s.root(), sep='\\n')"
    for path in call(python, "-c", where, cwd=tmp_path).splitlines():
        assert python.parents[1] in Path(path).parents
    save_model(tmp_path / "model", tiny_llama_config())
    save_tokenizer(tmp_path / "model")
    save_pairs(tmp_path / "pairs.jsonl", 16)
    settings = {"model_name_or_path": "model", "dataset": "pairs.jsonl", "dataset_dir": ".", "max_length": 64}
    settings |= {"train_batch_size": 8, "max_steps": 2, "output_dir": "out", "deepspeed": "zero3"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    output = call(dsdpo, "train", "run.yaml", "--deepspeed", "zero2", "--num_accelerators", "2", cwd=tmp_path)
    assert "ZeRO stage 2, 2 ranks" in output and (tmp_path / "out" / "COMPLETED").exists()
    assert yaml.safe_load((tmp_path / "out" / "run_config.yaml").read_text())["deepspeed"] == "zero2"

    written = call(dsdpo, "files", "--to", "files", cwd=tmp_path).splitlines()[:-1]
    assert written == [f"files/{file}" for file in shipped_files(ROOT)]
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    steps = (tmp_path / "out" / "metrics.jsonl").read_text()
    assert "finished: nothing to do" in call("files/launch/one_node.sh", "run.yaml", cwd=tmp_path, PATH=path)
    assert (tmp_path / "out" / "metrics.jsonl").read_text() == steps
