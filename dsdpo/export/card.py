"""The model card of exported weights: README.md with what they were trained from, on what and how, for a reader and for
the hub's search."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from dsdpo.checkpoint.commit import checkpoints, read_run
from dsdpo.config.schema import RunConfig
from dsdpo.errors import IOFailure
from dsdpo.runtime.files import write_atomically
from dsdpo.runtime.rundir import RunDir

CARD = "README.md"
_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+?)([:@].*)?")
_DATA_FILES = (".json", ".jsonl", ".csv", ".parquet", ".arrow", ".txt", ".zip")
# Where the run stood and how fast it was: nothing that a reader of the weights could use.
_PLACES = (
    *("model_name_or_path", "dataset", "output_dir", "cache_dir", "dataset_dir", "resume_from_checkpoint"),
    *("adapter_name_or_path", "push_to_hub", "hub_model_id", "hub_private_repo", "report_to", "change_on_resume"),
    *("deepspeed", "template_date"),
)


def write_card(folder: Path, run: Mapping[str, Any], run_dir: RunDir, step: int | None = None) -> None:
    """Write the card of the weights in `folder`, in place of what PEFT may have written.

    Args:
        run: what a checkpoint says of its run: config, fingerprints, examples, versions.
        run_dir: whose metrics are shown.
        step: of the weights. None: the last one.

    Raises:
        IOFailure: the file system refused.
    """
    from huggingface_hub import ModelCard

    config = run["config"]
    content = f"---\n{_metadata(folder, config)}\n---\n\n{_text(folder, run, _records(run_dir, step))}"
    write_atomically(folder / CARD, str(ModelCard(content, ignore_metadata_errors=True)))


def add_pictures(folder: Path, pictures: Iterable[Path]) -> None:
    """Put a run's curves beside its weights, and into their card. Raises IOFailure."""
    card = folder / CARD
    if not card.is_file():
        return
    lines = []
    for picture in pictures:
        try:
            shutil.copyfile(picture, folder / picture.name)
        except OSError as error:
            raise IOFailure(f"cannot copy {picture} into {folder}: {error}; free space") from error
        lines.append(f"![{picture.stem}]({picture.name})\n")
    text = card.read_text(encoding="utf-8")
    new = "\n".join(line for line in lines if line.strip() not in text)
    write_atomically(card, f"{text.rstrip()}\n\n## Curves\n\n{new}" if new else text)


def run_facts(output_dir: Path) -> dict[str, Any] | None:
    """What is known of the run in a folder: its newest checkpoint's record, or its run config alone; None: no run."""
    run_dir = RunDir(output_dir)
    for checkpoint in checkpoints(run_dir):
        if not checkpoint.problem:
            return dict(read_run(checkpoint.path))
    try:
        config = yaml.safe_load(run_dir.run_config.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    return {"config": config} if isinstance(config, dict) else None


def _metadata(folder: Path, config: Mapping[str, Any]) -> str:
    """The front matter. A base model or data set in a folder has no id that the hub would know."""
    from huggingface_hub import ModelCardData

    base, is_adapter = str(config["model_name_or_path"]), (folder / "adapter_config.json").exists()
    of_hub = config.get("hub", "huggingface") in ("auto", "huggingface")
    ids = [found[1] for name in config["dataset"] if (found := _HUB_ID.fullmatch(name)) and _is_id(name)]
    losses = config.get("loss_type", []) if config.get("stage", "dpo") == "dpo" else []
    data = ModelCardData(
        base_model=base if of_hub and _is_id(base) else None,
        datasets=ids if of_hub and ids else None,
        library_name="peft" if is_adapter else "transformers",
        license=_license(base, config.get("model_revision")),
        tags=["dsdpo", str(config.get("stage", "dpo")), *(["lora"] if is_adapter else []), *losses],
    )
    return str(data.to_yaml()).strip()


def _is_id(name: str) -> bool:
    return bool(_HUB_ID.fullmatch(name)) and not Path(name).exists() and not name.endswith(_DATA_FILES)


def _license(base: str, revision: str | None) -> str | None:
    """The license in the base model's card, where that card is on this machine."""
    from huggingface_hub import ModelCard, try_to_load_from_cache

    card: Any = Path(base) / CARD
    if not card.is_file():
        card = try_to_load_from_cache(base, CARD, revision=revision or "main") if _is_id(base) else None
    if not isinstance(card, (str, Path)):
        return None
    try:
        data = ModelCard(Path(card).read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, yaml.YAMLError):
        return None
    found = data.get("license")
    return found if isinstance(found, str) else None


def _records(run_dir: RunDir, step: int | None) -> list[dict[str, Any]]:
    try:
        lines = run_dir.metrics.read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
    except (OSError, ValueError):
        return []
    return [record for record in records if step is None or record["step"] <= step]


def _text(folder: Path, run: Mapping[str, Any], records: list[dict[str, Any]]) -> str:
    config, base = run["config"], str(run["config"]["model_name_or_path"])
    is_adapter = (folder / "adapter_config.json").exists()
    revision = config.get("model_revision")
    where = base if _is_id(base) else Path(base).name
    of_base = f"`{where}`" + (f" at revision `{revision}`" if revision else "")
    parts = [
        f"# {config.get('run_name') or Path(config['output_dir']).name}",
        f"{'A LoRA adapter of' if is_adapter else 'A model trained from'} {of_base}, by stage "
        f"`{config.get('stage', 'dpo')}` of dsdpo.",
        f"License: {_license(base, revision) or 'not known here; fill it in, by that of the base model'}.",
        f"## Data\n\n{_data(run)}",
        f"## Settings\n\nWhat differs from the defaults:\n\n```yaml\n{_settings(config)}```",
    ]
    if records:
        parts.append(f"## Figures\n\n{_figures(records)}")
    if versions := run.get("versions"):
        parts.append("## Versions\n\n" + ", ".join(f"{name} {version}" for name, version in versions.items()))
    return "\n\n".join(parts) + "\n"


def _data(run: Mapping[str, Any]) -> str:
    config = run["config"]
    lines = ["- " + ", ".join(f"`{name}`" for name in config["dataset"])]
    if "examples" in run:
        lines.append(f"- {run['examples']} examples")
    if found := run.get("fingerprints", {}).get("data"):
        lines.append(f"- fingerprint of the prepared examples: `{found}`")
    return "\n".join(lines)


def _settings(config: Mapping[str, Any]) -> str:
    fields = RunConfig.model_fields
    told = {
        name: value
        for name, value in config.items()
        if name in fields and name not in _PLACES and value != fields[name].get_default()
    }
    return yaml.safe_dump(told, sort_keys=False, allow_unicode=True) if told else "{}\n"


def _figures(records: list[dict[str, Any]]) -> str:
    """The last step's training loss, and the last figures of the held-out examples."""
    shown = [("train loss", record["loss"], record["step"]) for record in records if "loss" in record][-1:]
    evaluated = [record for record in records if "eval_loss" in record][-1:]
    for record in evaluated:
        shown += [
            (f"held-out {name.removeprefix('eval_')}", value, record["step"])
            for name, value in record.items()
            if name.startswith("eval_")
        ]
    rows = [f"| {name} | {value:.4g} | {step:.0f} |" for name, value, step in shown]
    return "\n".join(["| figure | value | after step |", "| --- | --- | --- |", *rows])
