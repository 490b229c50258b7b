"""A template that writes today's date writes one date for a run."""

from __future__ import annotations

import importlib.util
import json
from datetime import date
from pathlib import Path

import pytest

from dsdpo.config.schema import RunConfig
from dsdpo.data.named_templates import NAMED
from dsdpo.data.prepare import open_prepared, prepare
from dsdpo.errors import DataError
from tests.helpers.field import read

TRL = Path(next(iter(importlib.util.find_spec("trl").submodule_search_locations)), "chat_templates")
CHATML = NAMED["chatml"].jinja
TODAY = "<|im_start|>system\nToday: {{ strftime_now('%d %b %Y') }}<|im_end|>\n" + CHATML
HOUR = "{{ strftime_now('%Y-%m-%d %H:%M') }}\n" + CHATML
STRING = (
    "{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}{{ date_string }}\n" + CHATML
)
EITHER = (
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{{ date_string }}\n"
    + CHATML
)
PAIRS = [
    {
        "prompt": [{"role": "user", "content": f"Describe {what}."}],
        "chosen": [{"role": "assistant", "content": "Small."}],
        "rejected": [{"role": "assistant", "content": "No."}],
    }
    for what in ("boats", "shops")
]


def cached(folder: Path, day: str) -> None:
    """As if the first prepare in this cache had been on that day."""
    path = folder / ".dsdpo_cache" / "prepared" / "template_date"
    path.parent.mkdir(parents=True)
    path.write_text(day)


def saved(folder: Path, step: int, day: str | None) -> None:
    """As if the run had saved a checkpoint with that day."""
    path = folder / "out" / "checkpoints" / f"step-{step:08d}" / "run.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({} if day is None else {"template_date": day}))


@pytest.mark.parametrize(
    ("template", "written"),
    [
        (TODAY, "Today: 02 Jan 2020"),
        (HOUR, "2020-01-02 00:00"),
        (EITHER, "02 Jan 2020"),
        ((TRL / "llama3_2.jinja").read_text(), "Today Date: 02 Jan 2020"),
        ((TRL / "gptoss.jinja").read_text(), "Current date: 2020-01-02"),
        ((TRL / "muse_glimmer.jinja").read_text(), "Current date: 2020-01-02"),
    ],
)
def test_the_day_of_the_first_prepare_is_taken_again(template, written, tmp_path, model_of):
    cached(tmp_path / "run", "2020-01-02")
    found = read(tmp_path / "run", model_of(template, "llama"), PAIRS)
    assert found.exit_code == 0 and all(written in texts[0] for texts in found.texts), found
    assert "the template writes the date 2020-01-02" in found.said


def test_the_first_prepare_takes_today_and_writes_it_down(tmp_path, model_of):
    before = date.today()
    found = read(tmp_path / "run", model_of(TODAY), PAIRS)
    day = date.fromisoformat((tmp_path / "run/.dsdpo_cache/prepared/template_date").read_text())
    assert before <= day <= date.today()
    assert day.strftime("Today: %d %b %Y") in found.texts[0][0]


@pytest.mark.parametrize("template", [TODAY, STRING, EITHER])
def test_the_option_wins(template, tmp_path, model_of):
    cached(tmp_path / "run", "2020-01-02")
    saved(tmp_path / "run", 2, "2021-01-02")
    found = read(tmp_path / "run", model_of(template), PAIRS, template_date="2022-03-04")
    assert "04 Mar 2022" in found.texts[0][0] and "2022-03-04" in found.said


def test_a_checkpoint_comes_before_the_cache(tmp_path, model_of):
    """Also on a machine with an empty cache, which then stays without a day."""
    saved(tmp_path / "run", 2, "2021-01-02")
    saved(tmp_path / "run", 4, "2021-01-03")
    saved(tmp_path / "run", 6, None)
    found = read(tmp_path / "run", model_of(TODAY), PAIRS)
    assert "03 Jan 2021" in found.texts[0][0]
    assert not (tmp_path / "run/.dsdpo_cache/prepared/template_date").exists()
    saved(tmp_path / "other", 1, "2019-01-02")
    named = str(tmp_path / "other/out/checkpoints/step-00000001")
    found = read(tmp_path / "run2", tmp_path / "model", PAIRS, resume_from_checkpoint=named)
    assert "02 Jan 2019" in found.texts[0][0]


@pytest.mark.parametrize("template", [CHATML, STRING])
def test_a_template_without_today_takes_no_day(template, tmp_path, model_of):
    found = read(tmp_path / "run", model_of(template), PAIRS)
    assert found.exit_code == 0 and "the date" not in found.said, found
    assert not (tmp_path / "run/.dsdpo_cache/prepared/template_date").exists()
    assert template is CHATML or "26 Jul 2024" in found.texts[0][0]


def test_the_day_is_part_of_the_fingerprint_where_it_is_written(tmp_path, model_of):
    file = tmp_path / "dated.jinja"
    file.write_text(TODAY)
    model = model_of(CHATML)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))

    def fingerprint(template: str, day: str) -> str:
        config = RunConfig(
            model_name_or_path=str(model),
            dataset=["rows.jsonl"],
            dataset_dir=str(tmp_path / "data"),
            output_dir=str(tmp_path / "out"),
            template=template,
            template_date=day,
        )
        prepared = prepare(config, "train")
        opened = open_prepared(config, "train")
        assert prepared is not None and opened is not None and prepared.fingerprint == opened.fingerprint
        return prepared.fingerprint

    dated = [fingerprint(str(file), day) for day in ("2020-01-01", "2020-01-02", "2020-01-02")]
    assert dated[0] != dated[1] == dated[2]
    assert fingerprint("default", "2020-01-01") == fingerprint("default", "2020-01-02")
    file.write_text(TODAY.replace("Today", "Now"))
    assert fingerprint(str(file), "2020-01-02") not in dated


def test_a_day_that_is_none_is_an_error(tmp_path, model_of):
    cached(tmp_path / "run", "yesterday")
    assert read(tmp_path / "run", model_of(TODAY), PAIRS).exit_code == DataError.exit_code
