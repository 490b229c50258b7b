"""Whole config files in the shape of other trainers: what each becomes, or what is refused of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import trl
import yaml
from trl.scripts.utils import DatasetMixtureConfig

from dsdpo.config.load import load
from dsdpo.config.schema import RunConfig
from dsdpo.config.translation import llama_factory, trainer
from dsdpo.config.translation import trl as trl_names
from dsdpo.config.translation.translate import is_known
from dsdpo.errors import ConfigError
from dsdpo.tools.import_config import import_config
from tests.helpers.other_trainers import FILES, LLAMA_FACTORY, expected, is_there, loaded

TRL = (trl.DPOConfig, trl.SFTConfig, trl.RewardConfig, trl.KTOConfig, trl.ModelConfig, trl.ScriptArguments)
TRL_FIELDS = sorted({one.name for config in (*TRL, DatasetMixtureConfig) for one in dataclasses.fields(config)})


def needed(path: Path) -> None:
    """Skip a file whose options the schema does not have yet."""
    if missing := [need for need in expected(path).needs if not is_there(need)]:
        pytest.skip(f"the schema has no {', '.join(missing)}")


def named(paths: list[Path]) -> list[object]:
    return [pytest.param(path, id=path.stem) for path in paths]


VALID = [path for path in FILES if not expected(path).problems]


@pytest.mark.parametrize("path", named(FILES))
def test_a_file_gives_the_run_or_the_problems_that_its_header_names(path: Path) -> None:
    needed(path)
    want = expected(path)
    found, problems = loaded(path)
    assert sorted((problem.code, problem.option) for problem in problems) == sorted(want.problems), problems
    if want.problems:
        return
    assert want.want, "the header of a valid file names values"
    assert found.config is not None and found.translation is not None
    assert {name: getattr(found.config, name) for name in want.want} == want.want
    assert sorted(found.translation.differs) == sorted(want.differs)


@pytest.mark.parametrize("path", named([path for path in FILES if expected(path).needs]))
def test_an_option_that_the_schema_lacks_is_refused_and_not_unknown(path: Path) -> None:
    if all(map(is_there, expected(path).needs)):
        pytest.skip("the schema has it")
    _, problems = loaded(path)
    assert problems and {problem.code for problem in problems} <= {"not-supported", "value"}


def test_the_files_name_every_option_of_both_trainers() -> None:
    text = "\n".join(path.read_text() for path in FILES)
    words = {line.split(":")[0].strip().strip('"') for line in text.splitlines() if ":" in line}
    assert [name for name in (*TRL_FIELDS, *LLAMA_FACTORY) if name not in words] == []


def test_no_option_of_both_trainers_is_unknown() -> None:
    names = {*TRL_FIELDS, *LLAMA_FACTORY} - RunConfig.model_fields.keys()
    assert sorted(name for name in names if not is_known(name)) == []


def test_no_table_of_another_trainer_s_names_has_one_of_ours() -> None:
    """Its rule would never be asked: names of ours have theirs in SHARED and OWN."""
    names = {*llama_factory.LLAMA_FACTORY, *trl_names.TRL, *trainer.TRAINER}
    assert sorted(names & RunConfig.model_fields.keys()) == []


@pytest.mark.parametrize("with_ranks", [True, False], ids=["ranks", "no-ranks"])
@pytest.mark.parametrize("path", named(VALID))
def test_the_written_run_config_gives_the_same_run(path: Path, with_ranks: bool, tmp_path: Path) -> None:
    """Also on another number of ranks, where none was named."""
    needed(path)
    want, written = expected(path), tmp_path / "run.yaml"
    assert import_config(str(path), want.options, str(written), want.ranks if with_ranks else None) == 0
    ranks = want.ranks if with_ranks else 3
    again = load(written, ranks=ranks)
    assert again.problems == []
    assert again.config == loaded(path, ranks=ranks)[0].config


def test_nothing_is_written_where_something_is_refused(tmp_path: Path) -> None:
    path = next(path for path in FILES if path.stem == "lf_refused")
    with pytest.raises(ConfigError) as raised:
        import_config(str(path), [], str(tmp_path / "run.yaml"), None)
    assert ("not-supported", "use_dora") in [(problem.code, problem.option) for problem in raised.value.problems]
    assert not (tmp_path / "run.yaml").exists()


def test_a_run_config_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    written = tmp_path / "run.yaml"
    written.write_text("mine")
    with pytest.raises(ConfigError) as raised:
        import_config(str(VALID[0]), expected(VALID[0]).options, str(written), 1)
    assert [problem.code for problem in raised.value.problems] == ["exists"]
    assert written.read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"dataset_mixture": {"datasets": [{"id": "org/e", "data_files": "a.json"}]}}, "dataset_mixture"),
        ({"dataset_mixer": {"org/e": 1.0}, "dataset_splits": ["train", "dev"]}, "dataset_mixer"),
    ],
)
def test_a_part_of_a_mixture_that_cannot_be_read_is_refused(
    options: dict[str, Any], option: str, tmp_path: Path
) -> None:
    path = tmp_path / "other.yaml"
    path.write_text(yaml.safe_dump({"model_name_or_path": "m", "stage": "dpo", "output_dir": "out", **options}))
    problems = [(problem.code, problem.option) for problem in load(path, ranks=1).problems]
    assert problems == [("not-supported", option), ("missing-option", "dataset")]
