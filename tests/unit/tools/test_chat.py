"""Answers of a model that says known words: each token has one successor, whatever stands before it."""

from __future__ import annotations

import io
import json
import shutil
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dsdpo import cli
from dsdpo.checkpoint.commit import MANIFEST
from dsdpo.config.schema import RunConfig
from dsdpo.data.formats.conversations import SQL_PROMPT
from dsdpo.data.named_templates import NAMED
from dsdpo.errors import CheckpointError, ConfigError, DataError
from dsdpo.runtime.rundir import RunDir
from dsdpo.tools.answers import AnswerSettings, sampling
from dsdpo.tools.chat import chat, read_prompts
from dsdpo.tools.chat_model import ChatModel, base_of, load_both
from dsdpo.tools.trained import TrainedRun
from tests.unit.data.conftest import make_tokenizer

LONGEST = 64
TURN_END = "<|eot_id|>"
FEW = AnswerSettings(max_new_tokens=12)


def ids_of(tokenizer: PreTrainedTokenizerFast, words: str) -> list[int]:
    return [int(tokenizer(word, add_special_tokens=False)["input_ids"][0]) for word in words]


def prompt_end(tokenizer: PreTrainedTokenizerFast) -> int:
    """The token after which the model begins its answer."""
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "?"}], add_generation_prompt=True)
    return int(prompt["input_ids"][-1])


def successors(tokenizer: PreTrainedTokenizerFast, words: str) -> dict[int, int]:
    """Token -> next token for an answer of one-letter words, its end of turn, and the same again."""
    end = int(tokenizer.convert_tokens_to_ids(TURN_END))
    chain = [prompt_end(tokenizer), *ids_of(tokenizer, words), end, *ids_of(tokenizer, words[0])]
    return dict(pairwise(chain))


def save_chain_model(folder: Path, tokenizer: PreTrainedTokenizerFast, words: str) -> None:
    size = len(tokenizer)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=size,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=LONGEST,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.lm_head.weight.zero_()
        for token, follower in successors(tokenizer, words).items():
            model.lm_head.weight[follower, token] = 1.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_adapter(folder: Path, base: Path, tokenizer: PreTrainedTokenizerFast, word: str) -> None:
    """LoRA on the output head with which the model says one word instead."""
    chain = list(successors(tokenizer, word).items())[:2]
    tuned = get_peft_model(
        LlamaForCausalLM.from_pretrained(base), LoraConfig(r=2, lora_alpha=2, target_modules=["lm_head"])
    )
    head = tuned.base_model.model.lm_head
    with torch.no_grad():
        down, up = head.lora_A["default"].weight.zero_(), head.lora_B["default"].weight.zero_()
        for row, (token, follower) in enumerate(chain):
            down[row, token] = up[follower, row] = 2.0
    tuned.save_pretrained(folder, save_embedding_layers=False)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """`base` says "abc", `other` says "xy", `run/final` is an adapter over `base` that says "d"."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = make_tokenizer("llama3", NAMED["llama3"].jinja)
    save_chain_model(root / "base", tokenizer, "abc")
    save_chain_model(root / "other", tokenizer, "xy")
    save_adapter(root / "run" / "final", root / "base", tokenizer, "d")
    return {name: str(root / name) for name in ("base", "other", "run")}


# --- answers ---


def test_an_answer_ends_at_the_templates_end_of_turn(folders: dict[str, str]) -> None:
    model = ChatModel.load(folders["base"], FEW)
    names = model.tokenizer.convert_ids_to_tokens(model.stop_ids)
    assert names == [TURN_END, model.tokenizer.eos_token], "the end of turn is another token than EOS here"
    assert model.answer("hello") == "abc"


def test_an_answer_ends_at_max_new_tokens(folders: dict[str, str]) -> None:
    assert ChatModel.load(folders["base"], AnswerSettings(max_new_tokens=2)).answer("hello") == "ab"


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """With random attention weights, so that padding that is seen would change its answer."""
    folder = tmp_path_factory.mktemp("random")
    torch.manual_seed(0)
    tokenizer = make_tokenizer("llama3", NAMED["llama3"].jinja)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # what its publisher recommends; an answer must depend on the options of the command alone
    (folder / "generation_config.json").write_text(
        '{"do_sample": true, "temperature": 0.6, "top_p": 0.5, "top_k": 2, "repetition_penalty": 3.0, "min_p": 0.2}'
    )
    return str(folder)


PROMPTS = ["a", "a longer prompt about the blue sea", *(f"number {i} " * i for i in range(1, 9))]


def test_a_batch_of_unequal_prompts_gives_the_answers_of_each_alone(random_model: str) -> None:
    model = ChatModel.load(random_model, AnswerSettings(max_new_tokens=5))
    assert model.answers(PROMPTS) == [model.answer(prompt) for prompt in PROMPTS]
    assert len(set(model.answers(PROMPTS))) > 1


def test_greedy_answers_take_the_likeliest_token(random_model: str) -> None:
    """Whatever the model's generation_config.json says."""
    model = ChatModel.load(random_model, AnswerSettings(max_new_tokens=4))
    ids = model._ids("a prompt")
    for _ in range(4):
        ids.append(int(model.model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert model.answer("a prompt") == model._text(ids[-4:])


def drawn(folder: str, seed: int | None, prompts: list[str] = PROMPTS, **settings: float) -> list[str]:
    return ChatModel.load(
        folder, AnswerSettings(max_new_tokens=5, seed=seed, **({"temperature": 1.0} | settings))
    ).answers(prompts)


def test_a_seed_gives_the_same_answers_however_the_prompts_are_split(random_model: str) -> None:
    answers = drawn(random_model, 7)
    assert drawn(random_model, 7) == answers
    assert [answer for prompt in PROMPTS for answer in drawn(random_model, 7, [prompt])] == answers
    assert drawn(random_model, 7, PROMPTS[::-1]) == answers[::-1]
    assert drawn(random_model, 8) != answers != drawn(random_model, None)
    assert drawn(random_model, None) != drawn(random_model, None)


def test_a_small_top_p_leaves_the_likeliest_token(random_model: str) -> None:
    greedy = ChatModel.load(random_model, AnswerSettings(max_new_tokens=5)).answers(PROMPTS)
    assert drawn(random_model, 7, top_p=1e-6) == drawn(random_model, 7, temperature=0.01) == greedy


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (2.0, 1.0), (1.0, 0.7)])
def test_tokens_are_drawn_as_often_as_they_are_likely(temperature: float, top_p: float) -> None:
    logits, draws = torch.tensor([2.0, 1.0, 0.0, -1.0, -30.0]), 4000
    settings = AnswerSettings(temperature=temperature, top_p=top_p, seed=0)
    process = sampling(settings, [[number] for number in range(draws)])
    found = process(torch.zeros(draws, 1, dtype=torch.long), logits.repeat(draws, 1)).argmax(dim=1)
    expected = torch.softmax(logits / temperature, dim=0)
    if top_p < 1:
        expected[2:] = 0
    share = torch.bincount(found, minlength=5) / draws
    assert torch.allclose(share, expected / expected.sum(), atol=0.03)


@pytest.mark.parametrize(
    ("flags", "option"),
    [
        ("--temperature -1", "--temperature"),
        ("--temperature 1e-9", "--temperature"),
        ("--temperature 1e9", "--temperature"),
        ("--temperature nan", "--temperature"),
        ("--temperature inf", "--temperature"),
        ("--temperature 1 --top_p 0", "--top_p"),
        ("--temperature 1 --top_p 1.5", "--top_p"),
        ("--temperature 1 --top_p nan", "--top_p"),
        ("--top_p 0.9", "--top_p"),
        ("--seed -1", "--seed"),
        ("--template chatmll", "--template"),
        ("--max_new_tokens 0", "--max_new_tokens"),
        ("--max_length 0", "--max_length"),
    ],
)
def test_impossible_values_are_told_before_anything_is_loaded(
    flags: str, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["chat", "no_such/model/anywhere", *flags.split()]) == 64
    assert f"1. {option} " in capsys.readouterr().err


@pytest.mark.parametrize("flags", ["--temperature hot", "--seed 1.5", "--max_new_tokens many", "--tempature 1"])
def test_what_is_no_number_is_told(flags: str) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["chat", "m", *flags.split()])
    assert caught.value.code == 64


def test_an_output_dir_stands_for_its_final_weights(folders: dict[str, str]) -> None:
    assert ChatModel.load(folders["run"], FEW).answer("hello") == "d"


def test_an_adapter_and_its_base_share_one_loaded_model(folders: dict[str, str]) -> None:
    base, tuned = load_both(folders["run"], folders["base"], FEW)
    assert base.model is tuned.model
    assert [base.answer("hello"), tuned.answer("hello"), base.answer("hello")] == ["abc", "d", "abc"]


def test_another_base_is_loaded_by_itself(folders: dict[str, str]) -> None:
    base, tuned = load_both(folders["run"], folders["other"], FEW)
    assert [base.answer("hello"), tuned.answer("hello")] == ["xy", "d"]


def test_a_conversation_too_long_for_the_model_is_refused(folders: dict[str, str]) -> None:
    with pytest.raises(DataError, match=rf"may have 12, but the model ends at {LONGEST}"):
        ChatModel.load(folders["base"], FEW).answer("a b c d e f g h i j k l m n o p q r s t u v w x y z")


def codes_of(name: Path | str, **settings: Any) -> list[str]:
    """The codes of why a model cannot be loaded."""
    with pytest.raises(ConfigError) as caught:
        ChatModel.load(str(name), AnswerSettings(**settings))
    return [problem.code for problem in caught.value.problems]


def test_what_is_no_model_is_told(tmp_path: Path, folders: dict[str, str]) -> None:
    with pytest.raises(CheckpointError, match="holds no weights"):
        ChatModel.load(str(tmp_path))
    (tmp_path / MANIFEST).write_text("{}")
    with pytest.raises(CheckpointError, match=f"dsdpo export {tmp_path} --to {tmp_path}-exported"):
        ChatModel.load(str(tmp_path))
    assert codes_of(tmp_path / "missing") == codes_of("some/where/else") == ["model-folder"]
    assert codes_of("nobody/nothing") == ["tokenizer-missing"]
    assert codes_of(folders["base"], template="chatml") == ["template-tokens"]
    shutil.copytree(folders["base"], tmp_path / "no_weights")
    (tmp_path / "no_weights/model.safetensors").unlink()
    assert codes_of(tmp_path / "no_weights") == ["model-load"]
    (tmp_path / "no_base").mkdir()
    shutil.copy(Path(folders["base"], "tokenizer.json"), tmp_path / "no_base")
    shutil.copy(Path(folders["base"], "tokenizer_config.json"), tmp_path / "no_base")
    (tmp_path / "no_base/adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert codes_of(tmp_path / "no_base") == ["adapter-base"]


def test_a_system_message_enters_the_prompt(folders: dict[str, str]) -> None:
    def tokens(system: str | None) -> int:
        with pytest.raises(DataError) as error:
            ChatModel.load(folders["base"], AnswerSettings(LONGEST, system=system)).answer("hi")
        return int(str(error.value).split()[3])

    assert tokens("Be brief.") > tokens(None) > 0


# --- a run's output_dir ---


@pytest.fixture
def run(tmp_path: Path, folders: dict[str, str]) -> Path:
    """A run that has ended: an adapter that says "d", trained with another template than the tokenizer's own."""
    path = tmp_path / "outputs" / "sft"
    shutil.copytree(Path(folders["run"]) / "final", path / "final")
    options = {"model_name_or_path": folders["base"], "dataset": ["d"], "output_dir": "outputs/sft"}
    options |= {"template": "none", "default_system": "Be brief.", "max_length": 40}
    record(path, options)
    return path


def record(output_dir: Path, options: dict[str, Any]) -> None:
    RunDir(output_dir).run_config.write_text(yaml.safe_dump(RunConfig(**options).model_dump()))


@pytest.mark.parametrize("of_run", [lambda run: run.path, lambda run: run.final])
def test_a_run_answers_with_the_options_that_it_trained_with(run: Path, of_run: Callable[[RunDir], Path]) -> None:
    model = ChatModel.load(str(of_run(RunDir(run))), AnswerSettings())
    prompt = model.tokenizer.decode(model._ids("hello"))
    assert prompt.endswith("Be brief.\nhello\n"), "template none"
    assert model.longest == 40


def test_options_of_the_command_come_first(run: Path) -> None:
    model = ChatModel.load(str(run), AnswerSettings(template="llama3", system="", max_length=50))
    prompt = model.tokenizer.decode(model._ids("hello"))
    assert TURN_END in prompt and "brief" not in prompt
    assert model.longest == 50
    assert model.answer("hello") == "d"


def test_an_answer_ends_with_the_run_s_max_length(run: Path) -> None:
    """Without --max_new_tokens it is as long as there is room; with it, it must fit."""
    model = ChatModel.load(str(run), AnswerSettings(system="", max_length=8))
    ids = model._ids("a b")
    assert len(ids) < 8 and model._room(ids) == 8 - len(ids)
    with pytest.raises(DataError, match="max_length is 8"):
        ChatModel.load(str(run), AnswerSettings(system="", max_length=8, max_new_tokens=8)).answer("a b")
    with pytest.raises(DataError, match="max_length is 8"):
        model.answer("a b c d e f g h")


def test_a_run_is_compared_with_its_base_and_its_template(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "p.txt").write_text("one\n")
    flags = ["--template", "llama3", "--system", "", "--max_new_tokens", "5", "--prompts", str(tmp_path / "p.txt")]
    assert cli.main(["chat", str(run), "--compare", *flags]) == 0
    cells = [[cell.strip() for cell in line.split("|")] for line in capsys.readouterr().out.splitlines() if "|" in line]
    assert cells == [["base", "sft"], ["abc", "d"]]
    assert base_of(str(run)) == base_of(str(run / "final")) == str(Path(base_of(str(run))).resolve())


def test_each_model_answers_with_the_options_of_its_own_run(run: Path, folders: dict[str, str]) -> None:
    other = run.parent / "other"
    shutil.copytree(run, other)
    record(other, {"model_name_or_path": folders["base"], "dataset": ["d"], "output_dir": str(other)})
    base, tuned = load_both(str(run), str(other))
    assert [base.settings.template, tuned.settings.template] == ["default", "none"]
    base, tuned = load_both(str(run), folders["base"])
    assert [base.settings.template, tuned.settings.template] == ["none", "none"]


def test_a_base_is_asked_for_where_nothing_tells_it(folders: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="name one: --compare BASE"):
        base_of(folders["base"])


def test_paths_of_a_run_are_found_from_another_folder(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "b").mkdir(parents=True)
    options = {"model_name_or_path": "models/b", "dataset": ["d"], "output_dir": "outputs/sft", "dataset_dir": "none"}
    record(run, options)

    def seen_from(folder: Path, name: str) -> TrainedRun:
        monkeypatch.chdir(folder)
        found = TrainedRun.find(name)
        assert found is not None
        return found

    assert seen_from(tmp_path, "outputs/sft").config["model_name_or_path"] == "models/b"
    for folder, name in ((tmp_path / "outputs", "sft"), (run, "."), (run, "final"), (Path("/"), str(run))):
        found = seen_from(folder, name)
        assert found.config["model_name_or_path"] == str(tmp_path / "models" / "b")
        assert found.config["dataset_dir"] == "none", "nothing is there"
    assert TrainedRun.find(str(tmp_path)) is None


def test_a_run_that_has_not_ended_says_what_to_do(run: Path) -> None:
    shutil.rmtree(run / "final")
    with pytest.raises(CheckpointError, match="has not ended, and there is no checkpoint"):
        ChatModel.load(str(run))


def test_nothing_but_answers_is_on_the_terminal(
    random_model: str, run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.txt").write_text("one\na longer one\n")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for flags in ([], ["--temperature", "1", "--top_p", "0.9", "--seed", "1"]):
            for model in (random_model, str(run)):
                arguments = [model, "--prompts", str(tmp_path / "p.txt"), "--max_new_tokens", "3", *flags]
                assert cli.main(["chat", *arguments]) == 0
    assert capfd.readouterr().err == ""
    assert not [str(warning.message) for warning in caught if not issubclass(warning.category, DeprecationWarning)]


def test_a_run_answers_with_the_day_of_its_template(run: Path) -> None:
    checkpoint = RunDir(run).checkpoints / "step-00000004"
    checkpoint.mkdir(parents=True)
    (checkpoint / "run.json").write_text('{"template_date": "2024-07-26"}')
    assert ChatModel.load(str(run)).settings.date == "2024-07-26"
    found = TrainedRun.find(str(run))
    assert found is not None and "--template_date=2024-07-26" in found.evaluation([])


def test_a_full_gpu_ends_with_a_sentence(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(ChatModel, "answer", full)
    typed(monkeypatch, "hello")
    assert cli.main(["chat", str(run)]) == 72
    assert "Traceback" not in capsys.readouterr().err


# --- prompts from a file ---


def test_prompts_of_a_text_file(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("first\n\n  second \n")
    assert read_prompts(file) == [[{"role": "user", "content": text}] for text in ("first", "second")]


def test_prompts_of_a_jsonl_file(tmp_path: Path) -> None:
    system, user = {"role": "system", "content": "s"}, {"role": "user", "content": "u"}
    rows = [
        {"prompt": "p", "chosen": "not read"},
        {"prompt": [user]},
        {"messages": [system, user]},
        {"question": "How many?", "context": "CREATE TABLE t (a INTEGER)", "answer": "not read"},
    ]
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    sql = SQL_PROMPT.format(question="How many?", context="CREATE TABLE t (a INTEGER)")
    assert read_prompts(file) == [
        [{"role": "user", "content": "p"}],
        [user],
        [system, user],
        [{"role": "user", "content": sql}],
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{", "not valid JSON"),
        ("3", "no JSON object"),
        ('{"text": "x"}', "no prompt, no messages, and no question with context: it has text"),
        ('{"prompt": " "}', "empty message"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "roles do not alternate"),
    ],
)
def test_a_line_without_a_prompt_is_named(tmp_path: Path, row: str, reason: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "good"}\n' + row)
    with pytest.raises(DataError, match=reason) as error:
        read_prompts(file)
    assert f"{file}:2: " in str(error.value)


def test_unusable_prompt_files_are_told(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(DataError, match="holds no prompt"):
        read_prompts(tmp_path / "empty.txt")
    for name in ("p.csv", "missing.txt"):
        with pytest.raises(ConfigError) as caught:
            read_prompts(tmp_path / name)
        assert [problem.code for problem in caught.value.problems] == ["prompts-file"]


# --- the command ---


def test_a_file_of_prompts_is_answered_side_by_side(
    folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    file = tmp_path / "p.txt"
    file.write_text("one\ntwo\n")
    chat(folders["run"], folders["base"], str(file), FEW)
    lines = capsys.readouterr().out.splitlines()
    first, second = lines.index("[1/2] one"), lines.index("[2/2] two")
    for start in (first, second):
        cells = [[cell.strip() for cell in lines[start + i].split("|")] for i in (2, 4)]
        assert cells == [["base", "run"], ["abc", "d"]]


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_the_loop_answers_until_the_end_of_input(
    folders: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    typed(monkeypatch, "hello", "", "again")
    chat(folders["base"], None, None, FEW)
    assert capsys.readouterr().out.count("abc") == 2


def test_the_loop_keeps_the_conversation_until_reset(
    folders: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A history that no longer fits shows that it is kept, for each model."""
    typed(monkeypatch, "hello", "hello", "hello", "hello", "/reset", "hello", "/exit", "hello")
    chat(folders["run"], folders["base"], None, FEW)
    told = [line for line in capsys.readouterr().out.splitlines() if "abc" in line or "the model ends at" in line]
    kinds = ["answer" if "abc" in line else "too long" for line in told]
    kept = kinds.index("too long")
    assert 1 < kept < 4 and kinds == ["answer"] * kept + ["too long"] * (4 - kept) + ["answer"]


def test_an_answer_needs_a_token() -> None:
    with pytest.raises(ConfigError, match="--max_new_tokens is 0"):
        chat("model", None, None, AnswerSettings(max_new_tokens=0))
