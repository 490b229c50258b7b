"""A GPU that is full: once more with a shorter row before the first checkpoint, exit code 72 after it."""

from __future__ import annotations

import json

import pytest

from tests.faults.place import Place, losses, records, same_weights

ROWS = ["--train_batch_size", "16", "--max_steps", "4", "--save_steps", "2", "--max_tokens_per_row", "256"]
FULL = "forward@1#1=oom:130"  # rank 1 has memory for rows of 130 tokens


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("full"))


def test_before_the_first_checkpoint_a_run_begins_again_with_a_shorter_row(place: Place) -> None:
    """It ends as one that began with it. A later start takes it, too."""
    zero3 = ["--deepspeed", place.zero(3)]
    code, output = place.run_ranks("short", *zero3, *ROWS[:-1], "128")
    assert code == 0, output
    code, output = place.run("full", *zero3, *ROWS, DSDPO_FAULT=FULL)
    out, short = place.folder / "full", place.folder / "short"
    assert code == 0 and "once more from the beginning, with rows of at most 128 tokens" in output, output
    assert json.loads((out / "row_limit.json").read_text()) == {"max_tokens_per_row": 128, "too_long": 256}
    assert losses(out) == losses(short) and same_weights(out, short)
    assert len(records(out)) == 4
    longer = ["6" if word == "4" else word for word in ROWS]
    code, output = place.run_ranks("full", *zero3, *longer, "--change_on_resume", "max_steps")
    assert code == 0 and "rows of at most 128 tokens instead of 256" in output, output


def test_ranks_alone_record_the_shorter_row_for_the_next_start(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSDPO_FAULT", FULL.replace("#1", "#0"))
    code, output = place.run_ranks("alone", *ROWS)
    assert code == 72 and "The next start takes rows of at most 128 tokens" in output, output
    code, output = place.run_ranks("alone", *ROWS)
    assert code == 0 and "rows of at most 128 tokens instead of 256" in output, output


def test_after_a_checkpoint_it_is_72(place: Place) -> None:
    code, output = place.run("late", *ROWS, DSDPO_FAULT="forward@3#1=oom")
    assert code == 72 and "once more" not in output, output
    assert not (place.folder / "late" / "row_limit.json").exists()
