"""A YAML file plus `--key value` becomes a RunConfig; everything wrong with it is collected, not raised.

`preflight` joins these problems with those of the data, the model and the cluster request and raises once.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_origin

from pydantic import ValidationError

from dsdpo.config.accelerate import launch_options, run_options
from dsdpo.config.aliases import suggest
from dsdpo.config.command_line import COMMAND_LINE, parse_overrides
from dsdpo.config.deepspeed_file import yaml_mapping
from dsdpo.config.earlier import earlier_values, recorded_batch, remark
from dsdpo.config.fields import Checked
from dsdpo.config.hubs import hub_of
from dsdpo.config.options import NUMERIC, base_kind, holds_numbers, is_switch, options, value_kinds
from dsdpo.config.run_file import IN_PLACE, is_text, read_yaml
from dsdpo.config.schema import RunConfig
from dsdpo.config.translation.others import other_trainer
from dsdpo.config.translation.translate import Translation, is_known, translate
from dsdpo.errors import Problem
from dsdpo.runtime.rundir import RunDir

_NOT_FINITE = ("inf", "infinity", "nan")  # pydantic takes these texts for numbers


@dataclass
class LoadResult:
    """What could be read of a run config.

    `config` holds every sound value; a key in `faulty` (wrong or missing) stands at its default or empty
    there, so a check looks at `faulty` first. `config` is None when the file itself cannot be read. `origins`
    tells where a given key was set: `run.yaml:3` or `command line`. `remark` says which defaults of an earlier version
    count on, `translation` what options of another trainer have become.
    """

    config: RunConfig | None
    problems: list[Problem]
    faulty: frozenset[str] = frozenset()
    origins: dict[str, str] = field(default_factory=dict)
    remark: str = ""
    translation: Translation | None = None

    def where(self, key: str) -> str:
        """Where `key` got its value, for a message."""
        return self.origins.get(key, "default")


def load(
    path: str | Path | None, overrides: Sequence[str] = (), fresh: bool = False, ranks: int | None = None
) -> LoadResult:
    """Read `path`, apply `--key value` overrides and validate key by key; a user's mistake raises nothing.

    Args:
        path: a YAML or JSON file, or its content as a JSON object; None where the command line says everything.
        fresh: whether what output_dir holds will be moved aside.
        ranks: how many there will be; None where that is not known.
    """
    values, lines, problems = read_yaml(path) if path else ({}, {}, [])
    path = IN_PLACE if path and is_text(path) else path
    changes, command_problems = parse_overrides(overrides)
    problems += command_problems
    if values is None:
        return LoadResult(None, problems)
    origins = {key: f"{path}:{lines[key]}" if key in lines else str(path) for key in values}
    origins |= dict.fromkeys(changes, COMMAND_LINE)
    values |= changes
    unknown = [name for name in values if name not in RunConfig.model_fields and not is_known(name)]
    if found := other_trainer(unknown, str(path or COMMAND_LINE)):
        return LoadResult(None, problems + found)
    given = dict(values)
    translation = translate(values, origins, ranks, lambda: recorded_batch(given, fresh))
    values, origins = translation.values, translation.origins
    problems += translation.problems + _take_unknown(values, origins)
    _take_unset(values, origins)
    _take_accelerate(values, origins)
    _take_run(values)
    kept = earlier_values(values, fresh)
    config, faulty, value_problems = _validate(values | kept, origins, str(path or COMMAND_LINE))
    if config is not None and path and _is_recorded(path):
        origins = {
            key: place for key, place in origins.items() if place == COMMAND_LINE or not _is_default(config, key)
        }
    said = remark(kept, config) if kept else ""
    return LoadResult(config, problems + value_problems, faulty, origins, said, translation)


def _is_recorded(path: str | Path) -> bool:
    """Whether a run has written this file: it names every option, also those that nobody has set."""
    return Path(path).name == RunDir(Path(path).parent).run_config.name


def _is_default(config: RunConfig, key: str) -> bool:
    return bool(getattr(config, key) == RunConfig.model_fields[key].get_default(call_default_factory=True))


def _take_accelerate(values: dict[str, Any], origins: dict[str, str]) -> None:
    """Put the DeepSpeed settings of accelerate in their place: of a config file of its own that `deepspeed` names, and
    of `accelerate launch`."""
    named = values.get("deepspeed")
    found = run_options(named if isinstance(named, dict) else yaml_mapping(named)) if named else {}
    if found:
        values["deepspeed"] = found["deepspeed"]
    for place, taken in ((str(named), found), ("accelerate launch", launch_options(os.environ))):
        for key, value in taken.items():
            if values.get(key) is None and value is not None:
                values[key], origins[key] = value, place


def _take_run(values: dict[str, Any]) -> None:
    """Put a run's weights in place of its output_dir, where that is named as the model or adapter to begin with.

    An adapter is trained further, on the model below it, or with create_new_adapter merged into it first.
    """
    adapter_run = _run_of(values.get("adapter_name_or_path"))
    if adapter_run is not None:
        values["adapter_name_or_path"] = str(adapter_run.final)
    run_dir = adapter_run or _run_of(values.get("model_name_or_path"))
    if run_dir is None:
        return
    adapter = run_dir.final / "adapter_config.json"
    if adapter.is_file() and values.get("create_new_adapter") is True:
        values |= {"model_name_or_path": str(run_dir.merged(_adapter_key(run_dir))), "adapter_name_or_path": None}
        return
    if adapter_run is not None:
        _take_hub(values, run_dir)
        return
    values["model_name_or_path"] = str(run_dir.final)
    if adapter.is_file() and values.get("adapter_name_or_path") is None and values.get("finetuning_type") != "full":
        with suppress(OSError, ValueError, KeyError, TypeError):  # the check of the model's files says what is wrong
            base = json.loads(adapter.read_bytes())["base_model_name_or_path"]
            values |= {"model_name_or_path": str(base), "adapter_name_or_path": str(run_dir.final)}
            _take_hub(values, run_dir)


def _take_hub(values: dict[str, Any], run_dir: RunDir) -> None:
    """Take the base model of a run's adapter from the hub and at the revision that the adapter was trained on."""
    with suppress(OSError, ValueError, AttributeError):  # the check of the adapter's files says what is wrong
        settings = json.loads((run_dir.final / "adapter_config.json").read_bytes())
        base = settings.get("base_model_name_or_path")
        if base != values.get("model_name_or_path") or Path(str(base)).is_dir():
            return
        if values.get("hub") in (None, "auto"):
            values["hub"] = hub_of(run_dir.final)
        if values.get("model_revision") is None and settings.get("revision"):
            values["model_revision"] = settings["revision"]


def _adapter_key(run_dir: RunDir) -> str:
    """Stands for the content of a run's adapter: once it is trained further, another model is merged."""
    digest = hashlib.sha256()
    for path in sorted(run_dir.final.glob("adapter_*")):
        with suppress(OSError), path.open("rb") as stream:  # the check of its files says what is wrong
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()[:12]


def _run_of(name: Any) -> RunDir | None:
    """The run whose output_dir an option names, if it has final weights."""
    run_dir = RunDir(Path(name)) if isinstance(name, str) else None
    if run_dir is None or (run_dir.path / "config.json").is_file():
        return None
    return run_dir if run_dir.run_config.is_file() and run_dir.final.is_dir() else None


# --- values ---


def _take_unknown(values: dict[str, Any], origins: dict[str, str]) -> list[Problem]:
    problems = []
    for key in [key for key in values if key not in RunConfig.model_fields]:
        del values[key]
        text = f"{origins[key]}: unknown option {key}; {suggest(key, RunConfig.model_fields)}"
        problems.append(Problem("unknown-option", key, text))
    return problems


def _take_unset(values: dict[str, Any], origins: dict[str, str]) -> None:
    """Drop what other trainers write for an option that is not set: null for a list, '' for a number that may be empty,
    `none` for report_to; of a list of names, items that name nothing."""
    for key, value in list(values.items()):
        kinds = value_kinds(RunConfig.model_fields[key])
        is_list = get_origin(kinds[0]) is list
        is_blank = value is None or (isinstance(value, str) and not value.strip(", " if is_list else None))
        if is_list and isinstance(value, list) and not holds_numbers(key) and value:
            values[key] = value = [item for item in value if item is not None and item != ""]
            is_blank = not value
        if key == "report_to" and _is_none(value):
            values[key] = []
        elif is_blank and options()[key].default == "required":
            values[key] = [] if is_list and value is not None else value
        elif is_blank and is_list:
            del values[key], origins[key]
        elif is_blank and kinds[0] is not str and type(None) in kinds:
            values[key] = None


def _is_none(value: Any) -> bool:
    """Whether a value of report_to is transformers' word for no reports."""
    return [str(item).lower() for item in (value if isinstance(value, list) else [value])] == ["none"]


def _validate(
    values: dict[str, Any], origins: dict[str, str], path: str
) -> tuple[RunConfig, frozenset[str], list[Problem]]:
    """The config of the sound values, the faulty keys, and a problem for each of these."""
    faulty: dict[str, Problem] = {}
    for key in RunConfig.model_fields:
        if problem := _look(key, values, origins, path):
            faulty[key] = problem
    sound = {key: value for key, value in values.items() if key not in faulty}
    while True:
        try:
            config = RunConfig.model_validate(_placeholders(faulty) | sound)
            return config, frozenset(faulty), list(faulty.values())
        except ValidationError as error:
            for key in dict.fromkeys(str(detail["loc"][0]) for detail in error.errors()):
                faulty[key] = _wrong(key, sound.pop(key), origins)


def _look(key: str, values: dict[str, Any], origins: dict[str, str], path: str) -> Problem | None:
    """What pydantic lets pass or says badly: a missing or empty required key, `true` for a number,
    infinity."""
    required = options()[key].default == "required"
    if key not in values:
        remedy = f"add --{key} ..." if path == COMMAND_LINE else f"add a line `{key}: ...`"
        text = f"{path}: {key} is missing; {remedy} ({options()[key].allowed})"
        return Problem("missing-option", key, text) if required else None
    value = values[key]
    items = value if isinstance(value, list) else [value]
    bad = (required and value in ("", [])) or any(_is_no_number(key, item) for item in items)
    return _wrong(key, value, origins) if bad else None


def _is_no_number(key: str, item: Any) -> bool:
    if isinstance(item, str) and (base_kind(key) in NUMERIC or holds_numbers(key)):
        return any(part.strip().lower().lstrip("+-") in _NOT_FINITE for part in item.split(","))
    return (isinstance(item, bool) and not is_switch(key)) or (isinstance(item, float) and not math.isfinite(item))


def _wrong(key: str, value: Any, origins: dict[str, str]) -> Problem:
    found = "empty" if value is None else json.dumps(value, default=str, ensure_ascii=False)
    marks = (mark for mark in options()[key].field.metadata if isinstance(mark, Checked) and isinstance(value, str))
    hint = "".join(mark.hint(value) for mark in marks)
    return Problem("value", key, f"{origins[key]}: {key} is {found}; {hint}allowed: {options()[key].allowed}")


def _placeholders(faulty: dict[str, Problem]) -> dict[str, Any]:
    required = [key for key in faulty if options()[key].default == "required"]
    return {key: "" if base_kind(key) is str else [] for key in required}
