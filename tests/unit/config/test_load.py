"""YAML and command line become a config; every mistake is told with its place and what is allowed."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsdpo.config.command_line import parse_overrides
from dsdpo.config.load import LoadResult, load
from dsdpo.config.schema import RunConfig

MINIMAL = "model_name_or_path: gpt2\ndataset: pairs\noutput_dir: out\n"


def read(tmp_path: Path, text: str, *overrides: str) -> LoadResult:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return load(path, overrides)


def sound(tmp_path: Path, text: str, *overrides: str) -> RunConfig:
    result = read(tmp_path, text, *overrides)
    assert result.problems == []
    assert result.config is not None
    return result.config


def only_problem(tmp_path: Path, text: str, *overrides: str) -> str:
    problems = read(tmp_path, text, *overrides).problems
    assert len(problems) == 1, problems
    return str(problems[0])


def test_minimal_file_takes_the_defaults(tmp_path: Path) -> None:
    config = sound(tmp_path, MINIMAL)
    assert (config.dataset, config.beta, config.loss_type) == (["pairs"], 0.1, ["sigmoid"])


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "0.0001", "+1e-04", "'1e-4'"])
def test_a_number_may_be_written_without_a_dot(tmp_path: Path, text: str) -> None:
    assert sound(tmp_path, MINIMAL + f"learning_rate: {text}\n").learning_rate == 1e-4


_TEXT = [
    "5e-6_beta0.1",
    "3e8f21b",
    "1e5",
    "42",
    "1_000",
    "0x1F",
    "010",
    "1:30",
    "on",
    "off",
    "yes",
    "no",
    "true",
    "1.5",
]
_TEXT += ["-3", ".5e3", "1e-4", "2024-01-01", "0b11", ".inf", "12e", "e5", "="]


@pytest.mark.parametrize("text", _TEXT)
@pytest.mark.parametrize("key", ["run_name", "dataset"])
def test_text_options_hold_what_was_typed(tmp_path: Path, key: str, text: str) -> None:
    """In the file and on the command line, alone and in a list."""
    wanted = text if key == "run_name" else [text]
    others = MINIMAL.replace(f"{key}: pairs\n", "")
    assert getattr(sound(tmp_path, others + f"{key}: {text}\n"), key) == wanted
    assert getattr(sound(tmp_path, MINIMAL, f"--{key}", text), key) == wanted
    if key == "dataset":
        assert sound(tmp_path, others + f"dataset: [a, {text}]\n").dataset == ["a", text]
        assert sound(tmp_path, MINIMAL, "--dataset", f"[a, {text}]").dataset == ["a", text]


@settings(max_examples=30)
@given(st.from_regex(r"[0-9a-fA-F][0-9a-fA-FxeE+_.-]{0,11}", fullmatch=True))
def test_what_looks_like_a_number_in_part_is_text(text: str) -> None:
    """Hashes, versions, names made of settings."""
    with tempfile.TemporaryDirectory() as folder:
        assert sound(Path(folder), MINIMAL + f"run_name: {text}\n").run_name == text
        assert sound(Path(folder), MINIMAL, "--run_name", text).run_name == text


@pytest.mark.parametrize(
    ("option", "text", "value"),
    [
        ("learning_rate", "1e-4", 1e-4),
        ("learning_rate", "5E-6", 5e-6),
        ("learning_rate", ".5e-3", 5e-4),
        ("learning_rate", "1", 1.0),
        ("learning_rate", "5e-6_beta0.1", None),
        ("learning_rate", "3e8f21b", None),
        ("learning_rate", ".inf", None),
        ("learning_rate", "inf", None),
        ("loss_weights", "1,nan", None),
        ("learning_rate", "1:30", None),
        ("seed", "1_000", 1000),
        ("seed", "0x1F", 31),
        ("seed", "010", 10),
        ("seed", "1e3", 1000),
        ("seed", "0o17", None),
        ("seed", "1:30", None),
        ("seed", "1,000", None),
        ("seed", "on", None),
        ("seed", "3e8f21b", None),
        ("max_tokens_per_row", "8_192", 8192),
        ("max_tokens_per_row", "auto", "auto"),
        ("max_steps", "~", None),
        ("plot_loss", "on", True),
        ("plot_loss", "No", False),
        ("plot_loss", "1e-4", None),
        ("loss_weights", "[1e-1]", [0.1]),
        ("loss_weights", "[0x1F]", [31.0]),
    ],
)
def test_numbers_are_read_as_users_mean_them(tmp_path: Path, option: str, text: str, value: object) -> None:
    """None: a problem that names the option, unless the text means null."""
    for loaded in (read(tmp_path, MINIMAL + f"{option}: {text}\n"), read(tmp_path, MINIMAL, f"--{option}={text}")):
        assert loaded.config is not None
        if value is None and text != "~":
            assert loaded.faulty == {option}
        else:
            assert not loaded.faulty and getattr(loaded.config, option) == value


def test_a_comment_sign_on_the_command_line_is_text(tmp_path: Path) -> None:
    assert sound(tmp_path, MINIMAL, "--default_system", "# Rules").default_system == "# Rules"
    assert sound(tmp_path, MINIMAL, "--default_system", "[be short]").default_system == "[be short]"
    assert sound(tmp_path, MINIMAL, "--default_system", "").default_system is None


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_another_encoding_is_told(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "run.yaml").write_bytes((MINIMAL + "run_name: ü\n").encode(encoding))
    (problem,) = load(tmp_path / "run.yaml").problems
    assert "save it as UTF-8" in problem.text


@pytest.mark.parametrize("text", ["&x", "!x", "*x"])
def test_marks_of_yaml_on_the_command_line_are_text(tmp_path: Path, text: str) -> None:
    assert sound(tmp_path, MINIMAL, "--run_name", text).run_name == text


def test_a_date_is_text(tmp_path: Path) -> None:
    assert sound(tmp_path, MINIMAL + "run_name: 2024-01-01\n").run_name == "2024-01-01"


@pytest.mark.parametrize("text", ["true", "False", "yes", "No", "on", "off", "y", "n", "T", "f", "1", "0"])
def test_a_switch_that_became_a_word_is_read_as_a_switch(tmp_path: Path, text: str) -> None:
    """In a file and on the command line; a switch that is one says what each of them means."""
    on = sound(tmp_path, f"{MINIMAL}disable_dropout: {text}\n").disable_dropout
    for asked in ((f"{MINIMAL}gradient_checkpointing: {text}\n",), (MINIMAL, "--gradient_checkpointing", text)):
        assert sound(tmp_path, *asked).gradient_checkpointing == ("full" if on else "none")


def test_lists_may_be_comma_separated(tmp_path: Path) -> None:
    config = sound(tmp_path, MINIMAL + "loss_type: sigmoid, sft\nloss_weights: [1, 0.5]\n")
    assert config.weighted_losses == {"sigmoid": 1.0, "sft": 0.5}


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("learning_rate", "5e-6", 5e-6),
        ("plot_loss", "true", True),
        ("eval_steps", "null", None),
        ("eval_steps", "", None),
        ("dataset", "a,b", ["a", "b"]),
        ("dataset", "[a, b]", ["a", "b"]),
        ("dataset", "2024", ["2024"]),
        ("run_name", "42", "42"),
        ("run_name", "a: b: c", "a: b: c"),
        ("template", "none", "none"),
        ("loss_weights", "1", [1.0]),
        ("max_length", "512", 512),
    ],
)
@pytest.mark.parametrize("form", ["--{key}={text}", "--{key} {text}"])
def test_the_command_line_wins_and_is_read_by_type(
    tmp_path: Path, key: str, text: str, value: object, form: str
) -> None:
    tokens = [f"--{key}={text}"] if "=" in form else [f"--{key}", text]
    assert getattr(sound(tmp_path, MINIMAL, *tokens), key) == value


def test_a_negative_value_is_a_value(tmp_path: Path) -> None:
    problem = only_problem(tmp_path, MINIMAL, "--val_size", "-1")
    assert problem == "command line: val_size is -1; allowed: a number, at least 0"


def test_a_duplicate_key_is_told_with_both_lines(tmp_path: Path) -> None:
    problem = only_problem(tmp_path, MINIMAL + "beta: 0.1\nseed: 1\nbeta: 0.2\n")
    assert "run.yaml:6: beta is already set on line 4" in problem


def test_duplicates_on_the_command_line(tmp_path: Path) -> None:
    assert only_problem(tmp_path, MINIMAL, "--seed", "1", "--seed=2").startswith("command line: --seed is given twice")


@pytest.mark.parametrize("tokens", [["--run_name"], ["--run_name", "--seed", "1"]])
def test_an_option_without_value_is_named(tmp_path: Path, tokens: list[str]) -> None:
    assert "--run_name has no value" in only_problem(tmp_path, MINIMAL, *tokens)


@pytest.mark.parametrize(
    ("tokens", "found"),
    [
        (["--plot_loss"], {"plot_loss": True}),
        (["--plot_loss", "--seed", "1"], {"plot_loss": True, "seed": 1}),
        (["--plot_loss", "false"], {"plot_loss": False}),
        (["--no_share_prefix"], {"share_prefix": False}),
        (["--plot-loss", "--run-name", "a"], {"plot_loss": True, "run_name": "a"}),
        (["--loss_type", "sigmoid", "sft", "--loss_weights", "1.0", "0.5"], {"loss_type": ["sigmoid", "sft"]}),
        (["--dataset", "a", "b,c"], {"dataset": ["a", "b,c"]}),
    ],
)
def test_switches_and_lists_on_the_command_line(tokens: list[str], found: dict[str, object]) -> None:
    values, problems = parse_overrides(tokens)
    assert problems == [] and {key: values[key] for key in found} == found


@pytest.mark.parametrize("token", ["gamma_of_mine=1", "-beta", "0.5"])
def test_a_stray_argument_is_named(tmp_path: Path, token: str) -> None:
    assert f"found '{token}'" in only_problem(tmp_path, MINIMAL, token)


@pytest.mark.parametrize(
    ("key", "advice"),
    [
        ("max_lenght", "did you mean max_length?"),
        ("Beta", "did you mean beta?"),
        ("micro_train_batch_size", "train_batch_size (examples per optimizer step"),
        ("sequence_len", "set max_length"),
        ("num_processes", "--num_accelerators"),
        ("zzzzz", "dsdpo train --help"),
    ],
)
def test_an_unknown_key_comes_with_advice(tmp_path: Path, key: str, advice: str) -> None:
    problem = only_problem(tmp_path, MINIMAL + f"{key}: 1\n")
    assert f"run.yaml:4: unknown option {key}" in problem
    assert advice in problem


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("beta: much", 'beta is "much"; allowed: a number, above 0'),
        ("beta: 0", "beta is 0; allowed: a number, above 0"),
        ("beta: yes", "beta is true; allowed: a number"),
        ("beta: .inf", "beta is Infinity; allowed: a number"),
        ("beta:", "beta is empty; allowed: a number"),
        ("max_length: 10.5", "max_length is 10.5; allowed: a whole number, at least 8"),
        ("plot_loss: maybe", 'plot_loss is "maybe"; allowed: true or false'),
        ("precision: fp8", 'precision is "fp8"; allowed: one of auto, fp32, bf16, fp16'),
        ("stage: ppo", 'stage is "ppo"; allowed: one of '),
        ("loss_type: sigmoid,dpo", "loss_type is"),
        ("loss_weights: [1, true]", "loss_weights is [1, true]; allowed: a list of numbers"),
        ("label_smoothing: 0.5", "allowed: a number, at least 0, below 0.5"),
        ("max_steps: 0", "allowed: a whole number, at least 1, or empty"),
    ],
)
def test_a_wrong_value_is_told_with_place_and_what_is_allowed(tmp_path: Path, line: str, said: str) -> None:
    problem = only_problem(tmp_path, MINIMAL + line + "\n")
    assert "run.yaml:4: " in problem
    assert said in problem


def test_all_problems_come_together_and_the_rest_is_kept(tmp_path: Path) -> None:
    result = read(tmp_path, "beta: no\nmax_length: 1\nsead: 2\nseed: 7\ndataset: []\n", "--oops")
    assert result.faulty == {"beta", "max_length", "dataset", "model_name_or_path", "output_dir"}
    assert len(result.problems) == 7
    assert result.config is not None
    assert result.config.seed == 7


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1\nb: 2\n", "run.yaml:2: not valid YAML"),
        ("\tbeta: 1\n", "run.yaml:1: not valid YAML"),
        ("- a\n- b\n", "a run config is lines of `key: value`"),
        ("[a, b]: 1\n", "not valid YAML"),
        ("a: \x07\n", "run.yaml:1: the character 0x7"),
        ("a: " + "[" * 3000, "nested too deeply"),
        ("lora_target: &a [*a]\n", "contain themselves"),
    ],
)
def test_a_broken_file_is_one_problem(tmp_path: Path, text: str, said: str) -> None:
    result = read(tmp_path, text)
    assert result.config is None
    assert len(result.problems) == 1
    assert said in str(result.problems[0])


# what stands in the file after the required options -> code, line, a word of the remedy
BROKEN = {
    "\tbeta: 0.1\n": ("yaml", 4, "spaces"),
    "beta:\t0.1\n": ("yaml", 4, "tab"),
    "loss_type:\n\t- sigmoid\n": ("yaml", 5, "tab"),
    "deepspeed:\n  a: 1\n  a: 2\n": ("duplicate-option", 6, "a is given twice"),
    "deepspeed: {a: {b: 1, b: 1}}\n": ("duplicate-option", 4, "b is given twice"),
    "run_name: !!python/name:os.system\n": ("yaml", 4, "tags"),
    "run_name: !ENV ${NAME}\n": ("yaml", 4, "tags"),
    "---\nbeta: 0.2\n": ("yaml", 4, "one run"),
    "beta: *strong\n": ("yaml", 4, "quotes"),
    "run_name: *best*\n": ("yaml", 4, "quotes"),
    "run_name: @me\n": ("yaml", 4, "quotes"),
    "run_name: {{ name }}\n": ("yaml", 4, "quotes"),
    "run_name: dpo: first\n": ("yaml", 4, "quotes"),
    "beta 0.1\n": ("yaml", 4, "a space after the colon"),
    "beta:0.1\nseed: 1\n": ("yaml", 4, "a space after the colon"),
    'run_name: "abc\n': ("yaml", 4, "not closed"),
    "loss_type: [sigmoid\n": ("yaml", 4, "not closed"),
    "<<: 3\n": ("yaml", 4, "block of options"),
}


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_line_is_named_with_its_remedy(tmp_path: Path, text: str) -> None:
    code, line, remedy = BROKEN[text]
    problems = read(tmp_path, MINIMAL + text).problems
    assert [problem.code for problem in problems] == [code]
    assert f"run.yaml:{line}:" in str(problems[0]) and remedy in str(problems[0])


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("report_to: none", []),
        ("report_to: [None]", []),
        ("report_to:", []),
        ("report_to: ''", []),
        ("eval_dataset: ''", []),
        ("eval_dataset:", []),
        ("eval_dataset: ['', null]", []),
        ("eval_dataset: [a, '']", ["a"]),
        ("ignore_columns: null", []),
        ("change_on_resume: ~", []),
        ("loss_type:", ["sigmoid"]),
        ("lora_target: null", ["all"]),
        ("lora_target: base_model.model.model.layers.0.self_attn.q_proj", ["model.layers.0.self_attn.q_proj"]),
        ("eval_steps: ''", None),
        ("save_steps: ' '", None),
        ("max_tokens_per_row: ''", None),
        ("lora_alpha: ''", None),
        ("loss_weights: ''", None),
        ("max_time: ''", None),
        (f"seed: {2**64 - 1}", 2**64 - 1),
    ],
)
@pytest.mark.parametrize("typed", [False, True])
def test_what_means_unset_is_unset(tmp_path: Path, line: str, value: object, typed: bool) -> None:
    """In the file, and on the command line over a value of the file."""
    key, _, text = line.partition(": ")
    result = (
        read(tmp_path, MINIMAL, f"--{key.rstrip(':')}", text.strip("'"))
        if typed
        else read(tmp_path, MINIMAL + line + "\n")
    )
    assert result.problems == [] and getattr(result.config, key.rstrip(":")) == value


def test_an_unset_list_was_set_nowhere(tmp_path: Path) -> None:
    """Or it would clash with options that exclude it."""
    assert read(tmp_path, MINIMAL + "finetuning_type: full\nlora_target:\n").where("lora_target") == "default"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("max_time: 90", "did you mean 90s or 90m?"),
        ("max_time: 1:30:00", "did you mean 1h30m?"),
        ("max_time: 1-12:00:00", "did you mean 1d12h?"),
        ("max_time: 2H 5m", "did you mean 2h5m?"),
        ("max_time: soon", "allowed: a time above 0 with its units, such as"),
        ("max_time: 0s", "allowed: a time"),
        (f"seed: {2**64}", "at most 18446744073709551615"),
        ("max_tokens_per_row: 8", "at least 16"),
        ("report_to: neptune", "tensorboard, wandb"),
        ("report_to: [wandb, none]", "tensorboard, wandb"),
        ("beta: ''", "a number, above 0"),
    ],
)
def test_a_wrong_value_tells_the_form_that_is_allowed(tmp_path: Path, line: str, said: str) -> None:
    result = read(tmp_path, MINIMAL + line + "\n")
    assert [(one.code, one.option) for one in result.problems] == [("value", line.partition(":")[0])]
    assert said in str(result.problems[0])


@pytest.mark.parametrize("value", ["", "','", "['']", "[null]"])
def test_a_required_list_that_names_nothing_is_missing(tmp_path: Path, value: str) -> None:
    text = MINIMAL.replace("dataset: pairs", f"dataset: {value}")
    assert [(one.code, one.option) for one in read(tmp_path, text).problems] == [("value", "dataset")]


def test_a_missing_file_and_a_bad_command_line_are_told_together(tmp_path: Path) -> None:
    result = load(tmp_path / "no.yaml", ["--beta"])
    assert result.config is None
    assert "there is no such file" in str(result.problems[0])
    assert len(result.problems) == 2


def test_python_objects_are_not_constructed(tmp_path: Path) -> None:
    result = read(tmp_path, MINIMAL + "run_name: !!python/object/apply:os.getcwd []\n")
    assert result.config is None
    assert "not valid YAML" in str(result.problems[0])


def test_anchors_and_merge_keys_work(tmp_path: Path) -> None:
    assert sound(tmp_path, MINIMAL + "seed: &s 3\nwarmup_steps: *s\n").warmup_steps == 3
    assert "unknown option shared" in only_problem(tmp_path, MINIMAL + "shared: &m {seed: 3}\n<<: *m\n")


def test_every_option_tells_where_it_was_set(tmp_path: Path) -> None:
    result = read(tmp_path, MINIMAL, "--beta", "0.2")
    assert result.where("dataset").endswith("run.yaml:2")
    assert result.where("beta") == "command line"
    assert result.where("seed") == "default"


@given(st.lists(st.text(max_size=12), max_size=6))
def test_no_command_line_breaks_the_reader(tokens: list[str]) -> None:
    values, problems = parse_overrides(tokens)
    assert len(values) + len(problems) <= len(tokens)
