"""The day that a chat template writes as today's: one for a run, whatever day and machine it goes on on."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterable
from datetime import date
from pathlib import Path

from dsdpo.config.schema import RunConfig
from dsdpo.errors import DataError, IOFailure
from dsdpo.runtime.rundir import RunDir

STRFTIME_NOW, DATE_STRING = "strftime_now", "date_string"
_FILE = "template_date"
_RUN_FILE = "run.json"  # of a checkpoint: checkpoint/commit.py writes it
_KEY = "template_date"


def date_uses(template: object) -> list[str]:
    """Which of the two ways to a date a template's text names."""
    return [name for name in (STRFTIME_NOW, DATE_STRING) if name in str(template)]


def date_for(config: RunConfig, uses: Iterable[str], refresh: bool) -> str | None:
    """The day for the run's template as YYYY-MM-DD; None where the template writes none.

    It is template_date's, else that of the checkpoints in output_dir, else that of the first prepare in the cache. A
    template that only knows date_string has a day of its own, so template_date alone changes that.

    Args:
        uses: of the template, as `date_uses` gives them.
        refresh: take today where nothing is known, and write it into the cache.

    Raises:
        DataError: nothing is known, when `refresh` is False.
        IOFailure: the cache cannot be written.
    """
    uses = list(uses)
    if not uses or (STRFTIME_NOW not in uses and not config.template_date):
        return None
    saved = config.template_date or date_of_run(Path(config.output_dir), config.resume_from_checkpoint)
    return saved or _date_of_cache(config.cache_path / "prepared" / _FILE, refresh)


def date_of_run(output_dir: Path, named: str | None = None) -> str | None:
    """The day that the newest checkpoint of a run was trained with; None where there is none.

    Args:
        named: a checkpoint that comes first, as resume_from_checkpoint gives it.
    """
    own = sorted(RunDir(output_dir).checkpoints.glob("step-*"), reverse=True)
    for folder in ([Path(named)] if named else []) + own:
        try:
            found = json.loads((folder / _RUN_FILE).read_bytes()).get(_KEY)
        except (OSError, ValueError):
            continue  # whether a checkpoint can be used is found out when it is resumed
        if found:
            return str(found)
    return None


def _date_of_cache(path: Path, refresh: bool) -> str:
    """The day in the cache, or today, which then stands there: the first of several processes decides."""
    try:
        if not path.exists():
            if not refresh:
                raise DataError(f"{path} is missing; run `dsdpo prepare` first")
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
            temporary.write_text(date.today().isoformat())
            try:
                os.link(temporary, path)
            except FileExistsError:
                pass
            finally:
                temporary.unlink()
        return date.fromisoformat(path.read_text().strip()).isoformat()
    except ValueError:
        raise DataError(f"{path} holds no day such as 2026-11-26; remove it, or set template_date") from None
    except OSError as error:
        raise IOFailure(f"cannot write {path}: {error}; free space or set cache_dir") from error
