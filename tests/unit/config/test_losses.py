"""What the config says about losses follows from the table of losses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dsdpo.config.load import load
from dsdpo.config.losses import LOSSES, RANKINGS, LossSpec
from dsdpo.config.options import options
from dsdpo.config.rules import check_rules
from dsdpo.config.schema import RunConfig

MINIMAL = "model_name_or_path: gpt2\ndataset: pairs\noutput_dir: out\n"


def named_in(option: str) -> set[str]:
    return set(re.findall(r"`(\w+)`", options()[option].doc))


def test_the_options_of_a_loss_exist_and_name_it() -> None:
    for name, spec in LOSSES.items():
        for option in spec.options:
            assert option in RunConfig.model_fields and name in named_in(option)


def test_the_help_names_the_losses_without_a_reference_and_those_that_span_the_batch() -> None:
    free = {name for name, spec in LOSSES.items() if spec.preference and not spec.reference}
    assert free <= named_in("loss_type")
    assert {name for name, spec in LOSSES.items() if spec.spans_batch} == named_in("use_weighting")


def test_the_help_and_the_message_list_the_losses(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL + "loss_type: [sigmoid, dpo]\n")
    allowed = f"a list out of {', '.join([*LOSSES, *RANKINGS])}"
    assert options()["loss_type"].allowed == allowed
    [problem] = load(path).problems
    assert str(problem).endswith(f'loss_type is ["sigmoid", "dpo"]; allowed: {allowed}')


def test_a_row_added_to_the_table_is_a_loss_to_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = LossSpec("`-D`", reference=False, spans_batch=True, per_token=True, options=("simpo_gamma",))
    monkeypatch.setitem(LOSSES, "mine", row)
    assert ", mine, " in options()["loss_type"].allowed
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL + "loss_type: mine\nsimpo_gamma: 0.2\n")
    loaded = load(path)
    assert loaded.problems == check_rules(loaded) == []
    assert loaded.config is not None and loaded.config.reference_kind == "none"
    more = ["reference: cached", "ld_alpha: 0.5", "lora_dropout: 0.1", "use_weighting: true", "discopop_tau: 0.1"]
    path.write_text(path.read_text() + "\n".join([*more, "f_divergence_type: forward_kl\n"]))
    assert len(check_rules(load(path))) == len(more) + 1


@pytest.mark.parametrize("name", RANKINGS)
def test_a_loss_of_rankings_stands_alone(tmp_path: Path, name: str) -> None:
    path = tmp_path / "run.yaml"
    for more, codes in (
        ("", []),
        (f"loss_type: [{name}, sft]\n", ["losses"]),
        ("ld_alpha: 0.5\n", ["ld-alpha"]),
        ("use_weighting: true\n", ["weighting"]),
        ("f_divergence_type: forward_kl\n", ["divergence"]),
        ("label_smoothing: 0.1\n", ["loss-options"]),
        ("reference: none\n", ["reference"]),
        ("stage: rm\n", ["stage-options"]),
    ):
        path.write_text(MINIMAL + (more if "loss_type" in more else f"loss_type: {name}\n{more}"))
        assert [problem.code for problem in check_rules(load(path))] == codes, more
