"""Another trainer's config as a run config of ours, with a list of what became of each option."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml

from dsdpo.config.load import load
from dsdpo.config.options import options
from dsdpo.config.rules import check_rules
from dsdpo.config.schema import RunConfig
from dsdpo.config.translation.translate import Translation
from dsdpo.errors import ConfigError, IOFailure, config_error
from dsdpo.runtime.files import write_atomically


def import_config(path: str, overrides: list[str], to: str | None, ranks: int | None) -> int:
    """Write the run config, to a file or the terminal, and the list to stderr. Returns the exit code.

    Args:
        path: the other trainer's file; empty where the options say everything.
        overrides: options on the command line, ours or theirs.
        to: a new file; None: the terminal.
        ranks: how many there will be; None: the size of a step stays one for each rank.

    Raises:
        ConfigError: something is refused or wrong; nothing is written then.
        IOFailure: the file cannot be written.
    """
    if to is not None and Path(to).exists():
        raise config_error("exists", "--to", f"--to: {to} is there already; give a new file")
    loaded = load(path or None, overrides, fresh=True, ranks=ranks)
    translation = loaded.translation
    for line in [] if translation is None else report(translation):
        print(line, file=sys.stderr)
    if problems := [*loaded.problems, *check_rules(loaded, here=False)]:
        raise ConfigError(problems)
    assert translation is not None and loaded.config is not None, "without problems there are both"
    text = run_config(translation, loaded.config)
    if to is None:
        print(text, end="")
        return 0
    try:
        write_atomically(Path(to), text)
    except OSError as error:
        raise IOFailure(f"--to: cannot write {to}: {error.strerror}") from error
    print(f"wrote {to}", file=sys.stderr)
    return 0


def report(translation: Translation) -> list[str]:
    """What became of each option of another trainer."""
    lines = [f"read as options of {translation.source}" if translation.source else "every option is one of dsdpo's own"]
    lines += [f"  translated   {name}: {text}" for name, text in translation.renamed.items()]
    lines += [f"  default      {name}: {value}" for name, value in translation.defaults.items()]
    lines += [f"  no effect    {name}: {why}" for name, why in translation.no_effect.items()]
    lines += [f"  differs      {name}: {text}" for name, text in translation.differs.items()]
    lines += [f"  refused      {problem.option}: {problem}" for problem in translation.problems]
    return lines


def run_config(translation: Translation, config: RunConfig) -> str:
    """The options that were set as YAML, by group."""
    values = {name: getattr(config, name) for name in translation.values}
    if translation.needs_ranks:
        del values["train_batch_size"]
    lines, group = [f"# from a config of {translation.source}" if translation.source else "# a run config"], ""
    for name, option in options().items():
        if name not in values or (name == "max_refused" and translation.needs_ranks):
            continue
        if option.group != group:
            group = option.group
            lines += ["", f"# {group}"]
        origin = translation.origins.get(name, "")
        note = f"   # {origin}" if origin.startswith("default of") else ""
        lines.append(_line(name, values[name]) + note)
    if translation.needs_ranks:
        lines += ["", "# an option of dsdpo alone, so that no defaults of another trainer count"]
        lines.append(_line("max_refused", values.get("max_refused", RunConfig.model_fields["max_refused"].default)))
        lines += ["", "# examples of a step, for each rank"]
        lines += [_line(name, count) for name, count in translation.batch.items()]
    return "\n".join(lines) + "\n"


def _line(name: str, value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True).strip()
    return f"{name}: {text.removesuffix('...').strip()}"
