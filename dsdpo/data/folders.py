"""Which data files a path stands for: a file, a folder of files, a folder of splits, or one that `datasets` saved.

Only names and small JSON files are read here: the check before a run comes this way, too.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

INFO_FILE = "dataset_info.json"
FILE_KINDS = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet", ".csv", ".arrow", ".txt", ".txt.gz")
DEFAULT_SPLIT = "train"

_SAVED = "state.json"  # of a Dataset that save_to_disk wrote
_SAVED_DICT = "dataset_dict.json"  # of a DatasetDict
_TEXT_KINDS = (".txt", ".txt.gz")
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}(?:-[0-9a-f]+)?\.\w+(?:\.gz)?")  # how the hub and `datasets` name splits
_OF_SHARDS = re.compile(r"data-\d{5}-of-(\d{5})\.arrow")  # how save_to_disk names a Dataset's files
_SPLIT_FILE = re.compile(r"((train|test|validation|valid|val|dev|eval)(?:_[A-Za-z]+)?)\.\w+(?:\.gz)?")


class EntryProblem(Exception):
    """What is wrong with one entry."""


def data_files(path: Path, root: Path, where: str, split: str | None = None) -> tuple[Path, ...]:
    """The data files of a path, in reading order; all must lie inside dataset_dir, links followed.

    Args:
        path: a file or folder.
        root: dataset_dir.
        where: what to call the entry in a problem.
        split: that the entry or the name asks for.

    Raises:
        EntryProblem: there are none, or they are several splits and none is asked for.
    """
    if not path.resolve().is_relative_to(root):
        raise EntryProblem(f"{where}: {path} lies outside dataset_dir {root}; move it inside or change dataset_dir")
    path = path.resolve()
    if split is not None and "[" in split:
        raise EntryProblem(_part(where, split))
    if not path.is_dir():
        if not path.name.endswith(FILE_KINDS):
            raise EntryProblem(f"{where}: {path.name} is none of the kinds {', '.join(FILE_KINDS)}")
        _check_split(path.parent, split, where)
        if split not in (None, DEFAULT_SPLIT):
            raise EntryProblem(f"{where}: {path.name} is one file and has no split {split}; take the split out")
        return (path,)
    if is_saved_dict(path):
        splits = [str(name) for name in _read(path / _SAVED_DICT, where).get("splits") or []]
        found = _saved(path / _chosen(path, splits, split, where), split, where)
    else:
        found = _saved(path, split, where) if (path / _SAVED).is_file() else _of_folder(path, split, where)
    for file in found:
        if not file.resolve().is_relative_to(root):
            raise EntryProblem(f"{where}: {file} points outside dataset_dir {root}; move the data inside")
    return tuple(file.resolve() for file in found)


def _part(where: str, split: str) -> str:
    """What to say of a part of a split, such as `train[:100]`."""
    first = re.fullmatch(r"(\w*)\[:(\d+)\]", split)
    name = split.partition("[")[0]
    instead = (
        f"num_samples: {first[2]} in the entry, or max_samples: {first[2]} for all sets"
        if first
        else ("num_samples in the entry reads the first so many records; write any other part to a file of its own")
    )
    return f"{where}: a part of a split ({split}) is read of hub sets alone; name {name or DEFAULT_SPLIT}: {instead}"


def is_saved_dict(folder: Path) -> bool:
    """Whether `datasets` saved a DatasetDict there."""
    return (folder / _SAVED_DICT).is_file()


def _of_folder(path: Path, split: str | None, where: str) -> tuple[Path, ...]:
    """A folder's data files by name; those of one split where their names say splits."""
    found = sorted(file for file in path.iterdir() if file.name.endswith(FILE_KINDS) and file.name != INFO_FILE)
    found = [file for file in found if not file.name.endswith(_TEXT_KINDS)] or found  # a README beside the data
    if not found:
        folders = [file.name for file in sorted(path.iterdir()) if file.is_dir() and not file.name.startswith(".")]
        hint = f"; it holds the folders {', '.join(folders)}: name one of them" if folders else ""
        raise EntryProblem(f"{where}: the folder {path} holds no {', '.join(FILE_KINDS)} file{hint}")
    named = {file: match[1] for file in found if (match := _SHARD.fullmatch(file.name))}
    if len(named) < len(found):
        matches = {file: match for file in found if (match := _SPLIT_FILE.fullmatch(file.name))}
        named = {file: match[1] for file, match in matches.items()}
        if len(named) < len(found) or len({match[2] for match in matches.values()}) < 2:
            if split not in (None, DEFAULT_SPLIT):
                raise EntryProblem(
                    f"{where}: the files of {path.name} are not named like splits, so it has no split {split}; name a "
                    "file, or take the split out"
                )
            return tuple(found)
    chosen = _chosen(path, list(dict.fromkeys(named.values())), split, where, inside=False)
    return tuple(file for file in found if named[file] == chosen)


def _chosen(path: Path, splits: list[str], split: str | None, where: str, inside: bool = True) -> str:
    """The split that is asked for; or `train`, where there is no other."""
    if split in splits:
        return str(split)
    if split is None and splits == [DEFAULT_SPLIT]:
        return DEFAULT_SPLIT
    first = splits[0] if splits else "NAME"
    plural, wrong = "s" if len(splits) != 1 else "", f", not {split}" if split is not None else ""
    raise EntryProblem(
        f"{where}: {path.name} holds the split{plural} {', '.join(splits) or 'of no name'}{wrong}; name one, as in "
        f"{path.name}{'/' if inside else ':'}{first}, or give split in the entry"
    )


def _saved(folder: Path, split: str | None, where: str) -> tuple[Path, ...]:
    """The files of a Dataset that save_to_disk wrote, in the order of its state.json."""
    state = _read(folder / _SAVED, where)
    try:
        names = [str(file["filename"]) for file in state["_data_files"]]
    except (KeyError, TypeError) as error:
        raise EntryProblem(f"{where}: {folder / _SAVED} names no data files; save the data set again") from error
    if state.get("_indices_data_files"):
        raise EntryProblem(
            f"{where}: {folder} was saved with a selection of its rows; save it again with flatten_indices"
        )
    _check_split(folder, split, where)
    files = tuple(folder / name for name in names)
    _check_shards(folder, names, where)
    for file in files:
        if not file.is_file():
            raise EntryProblem(
                f"{where}: {folder / _SAVED} names {file.name}, which is not there; copy the whole folder"
            )
    return files


def _check_split(folder: Path, split: str | None, where: str) -> None:
    """Raise EntryProblem where a saved Dataset is another split than the one that is asked for."""
    if split is None or not (folder / _SAVED).is_file():
        return
    own = _read(folder / _SAVED, where).get("_split")
    if is_saved_dict(folder.parent):
        splits = _read(folder.parent / _SAVED_DICT, where).get("splits") or []
        own = folder.name if folder.name in splits else own  # its Dataset may come from a set where it had another name
    if own is not None and re.fullmatch(r"\w+", str(own)) and own != split:
        raise EntryProblem(f"{where}: {folder.name} holds the split {own}, not {split}; correct split")


def check_file_split(path: Path, split: str, where: str) -> None:
    """Raise EntryProblem where a name asks a file for another split than the one that the file is named after.

    An entry's `split: train` says nothing of a file: `datasets` calls every file so.
    """
    match = _SHARD.fullmatch(path.name) or _SPLIT_FILE.fullmatch(path.name)
    if path.is_file() and match and match[1] != split and not (path.parent / _SAVED).is_file():
        raise EntryProblem(f"{where}: {path.name} is named after the split {match[1]}, not {split}; take the split out")


def _check_shards(folder: Path, names: list[str], where: str) -> None:
    """Raise EntryProblem where state.json names some shards of a saved Dataset and not the others, or one twice."""
    counts = {int(match[1]) for name in names if (match := _OF_SHARDS.fullmatch(name))}
    if len(set(names)) < len(names) or (counts and counts != {len(names)}):
        raise EntryProblem(
            f"{where}: {folder / _SAVED} names {len(names)} files ({names[0]}, ...), and by their names there are "
            f"{' or '.join(map(str, sorted(counts)))}; copy the whole folder again, or save the data set again"
        )


def check_saved_columns(file: Path, names: list[str]) -> None:
    """Raise EntryProblem where a file has other columns than dataset_info.json says of the Dataset saved there."""
    if not (file.parent / _SAVED).is_file() or not (file.parent / INFO_FILE).is_file():
        return
    features = _read(file.parent / INFO_FILE, file.parent.name).get("features")
    if isinstance(features, dict) and set(features) != set(names):
        raise EntryProblem(
            f"{file} has the columns {', '.join(names)}, and {INFO_FILE} beside it says {', '.join(features)}: the "
            "files are of different data sets; copy the whole folder again"
        )


def _read(path: Path, where: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise EntryProblem(f"{where}: {path} cannot be read: {error}; copy the whole folder again") from error
    if not isinstance(found, dict):
        raise EntryProblem(f"{where}: {path} holds no JSON object; copy the whole folder again")
    return found
