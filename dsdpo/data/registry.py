"""Which files or hub sets a run's dataset names stand for: dataset_info.json, in LLaMA-Factory's format.

Nothing is downloaded here and nothing heavy imported: `resolve` also serves the check before a run, and returns
what is wrong instead of raising.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from dsdpo.config.aliases import did_you_mean
from dsdpo.config.hubs import Hub, picked_hub
from dsdpo.config.losses import ANY_LOSS
from dsdpo.config.schema import RunConfig
from dsdpo.config.stages import STAGES, Records
from dsdpo.data.folders import (
    DEFAULT_SPLIT,
    FILE_KINDS,
    INFO_FILE,
    EntryProblem,
    check_file_split,
    data_files,
    is_saved_dict,
)
from dsdpo.data.formats.detect import READS, unread
from dsdpo.data.info_file import check_keys, read_info
from dsdpo.errors import Problem
from dsdpo.runtime.modelscope import INSTALL, is_installed

# with a revision and a subset
_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?(?::([\w.-]+))?")
_WITH_SPLIT = re.compile(r"(.+):(\w+(?:\.\w+)*(?:\[[\d:%-]*\])?)")  # with a part, as `datasets` takes it: train[:10%]
_HASH_BLOCK = 1 << 22


@dataclass(frozen=True)
class DatasetEntry:
    """One resolved data set: local files, or a set on a hub.

    Attributes:
        name: as the run config names it.
        root: dataset_dir; sources are told relative to it.
        files: local data files in reading order; empty for a hub set.
        hub_id: `org/name`, or None for files.
        modelscope: the hub is ModelScope instead of Hugging Face.
        revision: branch, tag or commit of a hub set; None: the hub's default.
        records: what the records are, as the stage takes them.
        formatting: a key of READS[records], or None to tell it from `columns` and the first rows.
        columns, tags: renamed columns and message keys, as in LLaMA-Factory.
        num_samples: read only the first so many rows.
        allow_empty_rejected: an empty rejected side is meant, and is trained as the end-of-turn token alone.
        ignore_columns: columns that count as absent; those of the run config are added.
    """

    name: str
    root: Path
    files: tuple[Path, ...] = ()
    hub_id: str | None = None
    modelscope: bool = False
    records: Records = "pairs"
    formatting: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    split: str = DEFAULT_SPLIT
    subset: str | None = None
    folder: str | None = None
    num_samples: int | None = None
    allow_empty_rejected: bool = False
    ignore_columns: tuple[str, ...] = ()
    revision: str | None = None

    def row_limit(self, max_samples: int | None) -> int | None:
        """Rows to read at most: num_samples and the run's max_samples, whichever is smaller. None: all."""
        limits = [limit for limit in (self.num_samples, max_samples) if limit is not None]
        return min(limits) if limits else None

    def label(self, path: Path) -> str:
        """A file's name in messages and in dropped_rows.jsonl: relative to dataset_dir."""
        return path.relative_to(self.root).as_posix()


def resolve(
    names: list[str], dataset_dir: str | Path, records: Records = "pairs", hub: Hub = "huggingface"
) -> tuple[list[DatasetEntry], list[Problem]]:
    """Look the names of `dataset` or `eval_dataset` up.

    Args:
        names: names from dataset_info.json, paths inside dataset_dir, or hub ids (`org/name`, with `@revision` and
            `:split` where wanted), tried in this order.
        dataset_dir: folder that holds dataset_info.json.
        records: what the stage takes.
        hub: that a plain id is asked of, and an entry that names its set on both hubs.

    Returns:
        The entries that are valid, in the order asked for, and what is wrong with the others.
    """
    root = Path(dataset_dir)
    if not root.is_dir():
        text = f"dataset_dir {root} is no folder; give the folder that holds {INFO_FILE} and the data files"
        return [], [Problem("dataset-dir", "dataset_dir", text)]
    info, problems = read_info(root / INFO_FILE)
    entries = []
    for position, name in enumerate(names):
        if name in names[:position]:
            problems.append(Problem("dataset", "dataset", f"{name} is named twice; name each set once"))
            continue
        try:
            entries.append(replace(_entry(name, info, root.resolve(), records, hub), records=records))
        except EntryProblem as problem:
            problems.append(Problem("dataset", "dataset", str(problem)))
    return entries, problems


def problems(config: RunConfig, faulty: frozenset[str]) -> list[Problem]:
    """What is wrong with the sets that a run names, each told once with the options that name it."""
    if "dataset_dir" in faulty:
        return []
    found: dict[Problem, list[str]] = {}
    for key in ("dataset", "eval_dataset"):
        names = getattr(config, key)
        if key not in faulty and names:
            entries, wrong = resolve(names, config.dataset_dir, STAGES[config.stage].records, picked_hub(config.hub))
            for problem in [*wrong, *_weight_problems(entries, config, faulty)]:
                found.setdefault(problem, []).append(key)
    return [replace(one, option=keys[0], text=f"{', '.join(keys)}: {one.text}") for one, keys in found.items()]


def hub_entries(config: RunConfig, faulty: frozenset[str]) -> list[DatasetEntry]:
    """The sets of a run that lie on a hub, of those that are valid."""
    names = [name for key in ("dataset", "eval_dataset") if key not in faulty for name in getattr(config, key)]
    if "dataset_dir" in faulty:
        return []
    entries, _ = resolve(
        list(dict.fromkeys(names)), config.dataset_dir, STAGES[config.stage].records, picked_hub(config.hub)
    )
    return [entry for entry in entries if entry.hub_id is not None]


def _weight_problems(entries: Sequence[DatasetEntry], config: RunConfig, faulty: frozenset[str]) -> Iterator[Problem]:
    """Losses across pairs have no loss of one pair that its weight could scale."""
    losses = [] if "loss_type" in faulty else [name for name in config.loss_type if ANY_LOSS[name].spans_batch]
    for entry in entries if losses else []:
        if "weight" in entry.columns:
            text = (
                f"{entry.name} has columns.weight, but loss_type {', '.join(losses)} compares pairs with each other, "
            )
            yield Problem("weight", "dataset", text + "so that no loss belongs to one; delete it or change loss_type")


def _entry(name: str, info: dict[str, Any], root: Path, records: Records, hub: Hub) -> DatasetEntry:
    if name in info:
        return _described(name, info[name], root, records, hub)
    if (found := _path(name, root)) is not None:
        return DatasetEntry(name, root, files=data_files(found, root, name))
    if with_split := _WITH_SPLIT.fullmatch(name):
        without, split = with_split.groups()
        if (found := _path(without, root)) is not None:
            check_file_split(found, split, name)
            return DatasetEntry(name, root, files=data_files(found, root, name, split), split=split)
        if entry := _of_hub(name, without, root, hub):
            return replace(entry, split=split)
    if entry := _of_hub(name, name, root, hub):
        folder, split = name.split("/", 1)
        if (parent := _path(folder, root)) is not None and is_saved_dict(parent):
            return DatasetEntry(name, root, files=data_files(parent, root, name, split), split=split)
        return entry
    if name.endswith(FILE_KINDS) or "/" in name:
        raise EntryProblem(f"{name}: there is no such file in {root}")
    known = ", ".join(sorted(info)[:8]) + (", ..." if len(info) > 8 else "")
    hint = did_you_mean(name, info) or (f"it describes {known}" if info else f"there is no entry in {root / INFO_FILE}")
    raise EntryProblem(f"{name} is not in {INFO_FILE}, no file in {root} and no hub id (org/name); {hint}")


def _of_hub(name: str, written: str, root: Path, hub: Hub) -> DatasetEntry | None:
    """The set that `org/name`, `org/name@revision` or either with `:subset` means, if it means one."""
    found = _HUB_ID.fullmatch(written)
    if found is None or found[1].endswith(FILE_KINDS):
        return None
    if hub == "modelscope":
        _check_client(name)
    hub_id, revision, subset = found.groups()
    return DatasetEntry(name, root, hub_id=hub_id, modelscope=hub == "modelscope", revision=revision, subset=subset)


def _check_client(where: str) -> None:
    if not is_installed():
        raise EntryProblem(f"{where}: ModelScope's client modelscope-hub is not installed; {INSTALL}")


def _path(name: str, root: Path) -> Path | None:
    """The file or folder that a name means, if it means one."""
    meant_as_path = name.endswith(FILE_KINDS) or name.startswith((".", "/"))
    for path in (root / name, Path(name)):
        # a folder of the same name elsewhere is a coincidence, not a data set
        if path.exists() and (meant_as_path or path.resolve().is_relative_to(root)):
            return path
    return None


def _described(name: str, described: Any, root: Path, records: Records, hub: Hub) -> DatasetEntry:
    """An entry of dataset_info.json, checked key by key."""
    where = f"{INFO_FILE}, {name}"
    if not isinstance(described, dict):
        raise EntryProblem(f"{where}: must be an object with file_name or hf_hub_url")
    check_keys(where, described)
    if described.get("ranking") is not None and described["ranking"] is not (records == "pairs"):
        holds = "preference pairs or rankings" if described["ranking"] else "no preference pairs"
        stages = " or ".join(name for name, spec in STAGES.items() if (spec.records == "pairs") is described["ranking"])
        raise EntryProblem(
            f"{where}: ranking is {str(described['ranking']).lower()}, so it holds {holds}: name another set, set "
            f"stage to {stages}, or correct the key"
        )
    formatting, reads = described.get("formatting"), READS[records]
    if formatting is not None and formatting not in reads:
        raise EntryProblem(f"{where}: formatting {formatting!r} is not one of {', '.join(reads)}")
    # LLaMA-Factory takes "" as unset
    columns = {key: value for key, value in (described.get("columns") or {}).items() if value != ""}
    if formatting is not None and (left := unread(formatting, columns, records)):
        raise EntryProblem(
            f"{where}: formatting {formatting} does not read columns.{', columns.'.join(left)}; "
            f"it reads {', '.join(reads[formatting])}: delete the others, or give the formatting that the rows have"
        )
    files, hub_id, modelscope = _source(where, described, root, hub)
    return DatasetEntry(
        name=name,
        root=root,
        files=files,
        hub_id=hub_id,
        modelscope=modelscope,
        formatting=formatting,
        columns=columns,
        tags=described.get("tags") or {},
        split=described.get("split") or DEFAULT_SPLIT,
        subset=described.get("subset"),
        folder=described.get("folder"),
        num_samples=described.get("num_samples"),
        allow_empty_rejected=bool(described.get("allow_empty_rejected")),
        ignore_columns=tuple(described.get("ignore_columns") or ()),
        revision=described.get("revision") or None,
    )


def _source(where: str, described: dict[str, Any], root: Path, hub: Hub) -> tuple[tuple[Path, ...], str | None, bool]:
    """(files, hub id, is it ModelScope): a hub wins over file_name, and the run's own over the other."""
    ids = [(key, described[key]) for key in ("hf_hub_url", "ms_hub_url") if described.get(key)]
    if ids:
        key, hub_id = ids[-1 if hub == "modelscope" else 0]
        if key == "ms_hub_url":
            _check_client(f"{where}, {key}")
        return (), hub_id, key == "ms_hub_url"
    if described.get("om_hub_url"):
        raise EntryProblem(
            f"{where}: om_hub_url names a set on openMind, which is not supported; give hf_hub_url or ms_hub_url "
            "beside it, or copy the files into dataset_dir and give file_name alone"
        )
    if not described.get("file_name"):
        raise EntryProblem(f"{where}: needs file_name, hf_hub_url or ms_hub_url")
    if described.get("revision"):
        raise EntryProblem(f"{where}: revision is of a set on a hub, not of file_name; delete it")
    path = root / described["file_name"]
    if not path.exists():
        raise EntryProblem(f"{where}: file_name {described['file_name']} does not exist in {root}")
    files = data_files(path, root, where, described.get("split"))
    if sha1 := described.get("file_sha1"):
        _check_sha1(where, path, sha1)
    return files, None, False


def _check_sha1(where: str, path: Path, expected: str) -> None:
    if path.is_dir():
        raise EntryProblem(f"{where}: file_sha1 is for one file, but file_name is the folder {path.name}; delete it")
    found = _sha1(path, path.stat().st_mtime_ns)
    if found != expected.lower():
        raise EntryProblem(
            f"{where}: {path.name} has sha1 {found}, file_sha1 says {expected}; "
            "fetch the file again, or correct file_sha1 if the change is meant"
        )


@cache
def _sha1(path: Path, changed: int) -> str:
    """Of a file that has changed last at a time: entries are looked up more than once."""
    digest = hashlib.sha1(usedforsecurity=False)
    with path.open("rb") as stream:
        while block := stream.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()
