"""Files that come with dsdpo beside its code: DeepSpeed configs, launch and SLURM scripts, examples.

In a checkout they stand in its top folder. A wheel has copies of them in `dsdpo/_files`, which setup.py puts there.
"""

from __future__ import annotations

from pathlib import Path

# files and folders of the top folder, as setup.py packs them
SHIPPED = ("configs", "constraints.txt", "data", "ds_configs", "launch", "slurm")
_PACKAGE = Path(__file__).parents[1]
PACKED = "_files"  # folder of the package; only in a wheel


def root() -> Path:
    """The folder that holds all of SHIPPED."""
    packed = _PACKAGE / PACKED
    return packed if packed.is_dir() else _PACKAGE.parent


def shipped_files(top: Path) -> list[Path]:
    """Paths of the shipped files below the folder `top`, relative to it."""
    found = [top / name for name in SHIPPED if (top / name).is_file()]
    found += [path for name in SHIPPED for path in (top / name).rglob("*") if path.is_file()]
    files = sorted(path.relative_to(top) for path in found)
    return [file for file in files if not any(part.startswith(".") for part in file.parts)]


def ds_configs() -> dict[str, Path]:
    """The DeepSpeed JSON files by the names that the option `deepspeed` takes, such as `zero3`."""
    return {path.stem: path for path in sorted((root() / "ds_configs").glob("*.json"))}
