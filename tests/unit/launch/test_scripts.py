"""The SLURM scripts as bash reads them, and the Dockerfile; tests/cluster runs the scripts on a real SLURM."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
DOCKERFILE = ROOT / "launch" / "Dockerfile"
INSTRUCTIONS = {"ARG", "FROM", "RUN", "ENV", "COPY"}
# A `dsdpo` that tells how it was called, in place of the real one, which would start a run.
TELLS = """#!/usr/bin/env python3
import json, os, sys
print(json.dumps({"where": sys.argv[0], "argv": sys.argv[1:], "env": dict(os.environ)}))
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A submit folder, whose name has a space, beside a folder `bin` for PATH."""
    folder = tmp_path / "submit folder"
    for name in ("bin", "other/bin"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "dsdpo").write_text(TELLS)
        (tmp_path / name / "dsdpo").chmod(0o755)
    (tmp_path / "other/bin/activate").write_text(f'PATH="{tmp_path}/other/bin:$PATH"\n')
    folder.mkdir()
    return folder


def told(place: Path, script: str, **variables: str) -> dict[str, object]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("DSDPO_", "HF_"))}
    environment = {**clean, "PATH": f"{place.parent}/bin:{os.environ['PATH']}", "HOME": str(place.parent / "home")}
    line = ["bash", str(ROOT / "slurm" / script), "run.yaml", "--beta", "0.2"]
    done = subprocess.run(line, cwd=place, env={**environment, **variables}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return {**found, "where": str(Path(found["where"]).parent.relative_to(place.parent))}


@pytest.mark.parametrize("script", ["train.sbatch", "prepare.sbatch"])
def test_dsdpo_is_that_of_path_of_dot_venv_or_of_the_folder_that_is_named(place: Path, script: str) -> None:
    other = str(place.parent / "other")
    assert told(place, script)["where"] == "bin"
    assert told(place, script, DSDPO_ENV=other)["where"] == "other/bin"
    (place / ".venv").symlink_to(other)
    for variables in ({}, {"DSDPO_ENV": ""}, {"DSDPO_ENV": "container:/images/dsdpo.sqsh"}):
        assert told(place, script, **variables)["where"] == "other/bin"


def test_a_container_runs_the_ranks_in_the_same_folders(place: Path) -> None:
    image = {"DSDPO_ENV": "container:/images/dsdpo.sqsh", "DSDPO_SRUN_ARGS": "--container-mounts=/data"}
    found = told(place, "train.sbatch", **image)
    environment = found["env"]
    assert isinstance(environment, dict) and found["argv"] == ["train", "--requeue", "run.yaml", "--beta", "0.2"]
    cache = f"{place.parent}/home/.cache/huggingface"
    assert shlex.split(environment["DSDPO_SRUN_ARGS"]) == [
        "--container-image=/images/dsdpo.sqsh",
        f"--container-mounts={place},{cache}",
        f"--container-workdir={place}",
        "--container-mounts=/data",
    ]
    assert (environment["DSDPO_PYTHON"], environment["HF_HOME"]) == ("python3", cache)
    found = told(place, "train.sbatch", **image, HF_HOME=str(place.parent / "hub"), DSDPO_PYTHON="/opt/python")
    assert (
        isinstance(found["env"], dict)
        and f"{place},{place.parent}/hub" in shlex.split(found["env"]["DSDPO_SRUN_ARGS"])[1]
    )
    assert found["env"]["DSDPO_PYTHON"] == "/opt/python" and (place.parent / "hub").is_dir()


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    found = [line.strip().partition(" ") for line in text.splitlines() if line.strip()]
    return [(name, rest.strip()) for name, _, rest in found]


def test_the_dockerfile_installs_what_the_repository_pins() -> None:
    """Docker is not needed: its instructions, the files that they name, and its commands as a shell reads them."""
    found = instructions()
    assert {name for name, _ in found} <= INSTRUCTIONS and [name for name, _ in found][:2] == ["ARG", "FROM"]
    for name, rest in found:
        if name == "RUN":
            subprocess.run(["sh", "-n", "-c", rest], check=True)
    copied = [rest.split()[0] for name, rest in found if name == "COPY"]
    assert copied == ["constraints.txt", "dist/dsdpo-*.whl"] and (ROOT / copied[0]).is_file()
    project = (ROOT / "pyproject.toml").read_text()
    [extras] = [rest.removeprefix("EXTRAS=") for name, rest in found if rest.startswith("EXTRAS=")]
    assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras.split(","))
    assert (ROOT / "constraints.txt").read_text().count("\ntorch==") == 1
