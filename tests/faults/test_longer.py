"""A finished run that is given more steps ends as one that had them from the start, whatever kills it on the way."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsdpo.runtime.rundir import RunDir
from tests.faults.place import Place, losses, same_weights

CONSTANT = ["--lr_scheduler_type", "constant", "--lora_dropout", "0.1"]  # no step depends on how many there are
LONGER = ["--max_steps", "8", "--change_on_resume", "max_steps"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("longer"))


@pytest.fixture(scope="module")
def whole(place: Place) -> Path:
    code, output = place.run_ranks("whole", *CONSTANT, "--max_steps", "8", ranks=2)
    assert code == 0, output
    return place.folder / "whole"


def test_what_the_message_advises_goes_on(place: Place, whole: Path) -> None:
    """Finished, refused without consent, killed at the first save after it, and then to the end."""
    run_dir = RunDir(place.folder / "longer")
    code, output = place.run_ranks("longer", *CONSTANT, "--max_steps", "4", ranks=2)
    assert code == 0 and run_dir.completed.exists(), output
    code, output = place.run_supervisor("longer", *CONSTANT, "--max_steps", "8")
    assert code == 66 and "name it in change_on_resume to go on with 8" in output
    code, output = place.run("longer", *CONSTANT, *LONGER, DSDPO_FAULT="save:renamed@1#0")
    assert code == 71 and "resumed after step 4" in output, output
    assert not run_dir.completed.exists()
    code, output = place.run_ranks("longer", *CONSTANT, *LONGER, ranks=2)
    assert code == 0 and "resumed after step 6" in output, output
    assert losses(run_dir.path) == losses(whole) and same_weights(run_dir.path, whole)
    assert run_dir.completed.exists() and run_dir.final_superseded.exists()
    code, output = place.run_supervisor("longer", *CONSTANT, *LONGER)
    assert code == 0 and "nothing to do" in output


@pytest.mark.slow
def test_a_kill_before_the_first_new_step_leaves_the_finished_run(place: Place, whole: Path) -> None:
    """COMPLETED is gone, all else is there: the command that had finished completes it again."""
    run_dir = RunDir(place.folder / "back")
    first = [*CONSTANT, "--max_steps", "4"]
    assert place.run_ranks("back", *first, ranks=2)[0] == 0
    code, output = place.run("back", *CONSTANT, *LONGER, DSDPO_FAULT="forward@1#0")
    assert code == 71 and not run_dir.completed.exists(), output
    assert place.run_ranks("back", *first, ranks=2)[0] == 0
    assert run_dir.completed.exists() and run_dir.final.exists() and losses(run_dir.path) == losses(whole)[:4]
