"""Records over max_length: cut and counted, or dropped with what would keep them, on the terminal too."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dsdpo import cli
from dsdpo.config.schema import RunConfig
from dsdpo.data.dropped import REASONS
from dsdpo.data.prepare import prepare, summary
from dsdpo.data.shards import MANIFEST
from tests.helpers.field import read
from tests.helpers.real import shared_file
from tests.helpers.tiny import save_model, tiny_llama_config
from tests.unit.data.conftest import model_folder  # noqa: F401

GOOD = {"prompt": "Name a river.", "chosen": "The Elbe.", "rejected": "No."}
LONG_PROMPT = {"prompt": "Once upon a time. " * 40, "chosen": "The end.", "rejected": "No."}
LONG_CHOSEN = {"prompt": "Tell a story.", "chosen": "and then " * 60, "rejected": "No."}
LONG_BOTH = {"prompt": "Once upon a time. " * 40, "chosen": "and then " * 60, "rejected": "but then " * 60}
SAME_START = {"prompt": "Tell a story.", "chosen": "and then " * 60 + "1", "rejected": "and then " * 60 + "2"}
TALK = {
    "prompt": [{"role": "user", "content": "Once upon a time. " * 40}],
    "chosen": [{"role": "assistant", "content": "The end."}],
    "rejected": [{"role": "assistant", "content": "No."}],
}

# records, options beside max_length 64, dropped codes, records that were cut, words that name a remedy
CASES: list[tuple[list[dict[str, Any]], dict[str, Any], dict[str, int], int, str]] = [
    ([GOOD, GOOD], {}, {}, 0, ""),
    ([GOOD, LONG_PROMPT], {}, {}, 1, "keep_end"),
    ([GOOD, LONG_CHOSEN], {}, {}, 1, "keep_end"),
    ([GOOD, LONG_BOTH], {}, {}, 1, "keep_end"),
    ([TALK, TALK], {}, {}, 2, "keep_end"),
    ([GOOD, SAME_START], {}, {"same_once_cut": 1}, 0, "raise max_length"),
    ([GOOD, LONG_PROMPT], {"truncation_mode": "keep_start"}, {"prompt_too_long": 1}, 0, "truncation_mode: keep_end"),
    ([GOOD, LONG_CHOSEN], {"truncation_mode": "keep_start"}, {}, 1, "keep_start"),
    ([GOOD, SAME_START], {"truncation_mode": "keep_start"}, {"same_once_cut": 1}, 0, "raise max_length"),
    ([TALK, GOOD], {"truncation_mode": "keep_start"}, {"prompt_too_long": 1}, 0, "truncation_mode: keep_end"),
    ([GOOD, LONG_PROMPT], {"truncation_mode": "refuse"}, {"too_long": 1}, 0, "truncation_mode: keep_end"),
    ([GOOD, LONG_CHOSEN], {"truncation_mode": "refuse"}, {"too_long": 1}, 0, "raise max_length"),
    ([GOOD, LONG_BOTH], {"max_tokens_per_row": 80}, {"too_long_for_row": 1}, 0, "raise max_tokens_per_row"),
]


@pytest.mark.parametrize(("records", "options", "dropped", "cut", "remedy"), CASES, ids=range(len(CASES)))
@pytest.mark.parametrize("allowed", [1.0, 0.0])
def test_what_becomes_of_a_long_record(tmp_path, model_folder, records, options, dropped, cut, remedy, allowed) -> None:  # noqa: F811
    found = read(tmp_path / "run", model_folder, records, max_length=64, max_refused=allowed, **options)
    assert found.dropped == dropped
    assert found.exit_code == (65 if dropped and not allowed else 0)
    assert remedy in found.said
    if found.exit_code == 0 and cut:
        assert f"{cut} cut to max_length 64" in found.said
        assert any("completion cut" in note for note in found.notes) == (
            records[1] in (LONG_CHOSEN, LONG_BOTH) and options == {}
        )
    for code in dropped:
        place = next(i for i, record in enumerate(records, 1) if record is not GOOD)
        assert f"rows.jsonl:{place}" in found.said and REASONS[code].remedy in found.said


def test_keep_end_keeps_the_end_of_the_question_and_the_whole_answer(tmp_path, model_folder) -> None:  # noqa: F811
    record = {"prompt": "Once upon a time. " * 40 + "How does it end?", "chosen": "Well.", "rejected": "Badly."}
    found = read(tmp_path / "run", model_folder, [record], max_length=64)
    [[prompt, chosen, rejected]] = found.texts
    assert prompt.endswith("How does it end?") and (chosen, rejected) == ("Well.<|im_end|>", "Badly.<|im_end|>")


def test_each_reason_has_its_count_first_place_and_remedy(tmp_path, model_folder) -> None:  # noqa: F811
    records = [GOOD, LONG_PROMPT, {"prompt": "x", "chosen": "y"}, LONG_PROMPT, {**GOOD, "rejected": ""}]
    for allowed in (0.0, 1.0):
        found = read(
            tmp_path / str(allowed),
            model_folder,
            records,
            max_length=64,
            truncation_mode="keep_start",
            max_refused=allowed,
        )
        said = next(line for line in found.said.splitlines() if "2 x" in line)
        assert "rows.jsonl:2" in said and "max_length is 64" in said and "keep_end" in said
        assert all(f"rows.jsonl:{line}" in found.said for line in (3, 5)) and "allow_empty_rejected" in found.said


def test_a_set_of_an_earlier_version_is_summed_up(tmp_path, model_folder) -> None:  # noqa: F811
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in [GOOD, {"prompt": "x"}]))
    config = RunConfig(
        model_name_or_path=str(model_folder),
        dataset=["rows.jsonl"],
        dataset_dir=str(tmp_path),
        output_dir=str(tmp_path / "runs/out"),
        max_refused=0.5,
    )
    found = prepare(config, "train")
    assert found is not None
    manifest = {**found.manifest}
    del manifest["dropped"]
    (found.path / MANIFEST).write_text(json.dumps(manifest))
    again = prepare(config, "train")
    assert again is not None and "1 x no chosen" in summary(again)


def test_dpo_en_demo_prepares_with_the_defaults(tmp_path, model_folder) -> None:  # noqa: F811
    """The tokenizer here is small, so that twice as many records are cut as with a real one."""
    source = shared_file("dpo_en_demo.json")
    config = RunConfig(
        model_name_or_path=str(model_folder),
        dataset=[source.name],
        dataset_dir=str(source.parent),
        output_dir=str(tmp_path / "out"),
    )
    found = prepare(config, "train")
    assert found is not None and len(found) >= 297 and found.manifest["truncated"] > 50


def test_the_command_line_tells_the_remedy(tmp_path, model_folder, capsys) -> None:  # noqa: F811
    save_model(model_folder, tiny_llama_config(vocab_size=512, max_position_embeddings=2048))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in [GOOD, LONG_PROMPT]))
    settings = {"model_name_or_path": model_folder, "dataset_dir": tmp_path, "output_dir": tmp_path / "runs/out"}
    run = tmp_path / "run.yaml"
    run.write_text("dataset: rows.jsonl\n" + "".join(f"{key}: {value}\n" for key, value in settings.items()))
    assert cli.main(["prepare", str(run), "--max_length", "64", "--truncation_mode", "keep_start"]) == 65
    said = capsys.readouterr().err
    assert "rows.jsonl:2" in said and "truncation_mode: keep_end" in said
    assert cli.main(["prepare", str(run), "--max_length", "64"]) == 0
    assert "1 cut to max_length 64" in capsys.readouterr().out
