"""Answers of a model that says known words: each token has one successor, whatever stands before it."""

from __future__ import annotations

import io
import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dsdpo.data.formats.preference import SQL_PROMPT
from dsdpo.data.named_templates import NAMED
from dsdpo.errors import CheckpointError, ConfigError, DataError
from dsdpo.tools.chat import AnswerSettings, ChatModel, chat, load_both, read_prompts
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


def test_a_batch_of_unequal_prompts_gives_the_answers_of_each_alone(tmp_path: Path) -> None:
    """A model with random attention weights, so that padding that is seen would change its answer."""
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
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = ChatModel.load(str(tmp_path), AnswerSettings(max_new_tokens=5))
    prompts = ["a", "a longer prompt about the blue sea", *(f"number {i} " * i for i in range(1, 9))]
    assert model.answers(prompts) == [model.answer(prompt) for prompt in prompts]
    assert len(set(model.answers(prompts))) > 1


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


def test_what_is_no_model_is_told(tmp_path: Path, folders: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="no folder with a tokenizer here"):
        ChatModel.load(str(tmp_path / "missing"))
    with pytest.raises(CheckpointError, match="holds no weights"):
        ChatModel.load(str(tmp_path))
    with pytest.raises(ConfigError, match="template chatml needs the token"):
        ChatModel.load(folders["base"], AnswerSettings(template="chatml"))


def test_a_system_message_enters_the_prompt(folders: dict[str, str]) -> None:
    def tokens(system: str | None) -> int:
        with pytest.raises(DataError) as error:
            ChatModel.load(folders["base"], AnswerSettings(LONGEST, system=system)).answer("hi")
        return int(str(error.value).split()[3])

    assert tokens("Be brief.") > tokens(None) > 0


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
    with pytest.raises(ConfigError, match=r"neither \.txt"):
        read_prompts(tmp_path / "p.csv")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_prompts(tmp_path / "missing.txt")


# --- the command ---


def test_a_file_of_prompts_is_answered_side_by_side(
    folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    file = tmp_path / "p.txt"
    file.write_text("one\ntwo\n")
    chat(folders["run"], folders["base"], str(file), 12, "default", None)
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
    chat(folders["base"], None, None, 12, "default", None)
    assert capsys.readouterr().out.count("abc") == 2


def test_the_loop_keeps_the_conversation_until_reset(
    folders: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A history that no longer fits shows that it is kept, for each model."""
    typed(monkeypatch, "hello", "hello", "hello", "hello", "/reset", "hello", "/exit", "hello")
    chat(folders["run"], folders["base"], None, 12, "default", None)
    told = [line for line in capsys.readouterr().out.splitlines() if "abc" in line or "the model ends at" in line]
    kinds = ["answer" if "abc" in line else "too long" for line in told]
    kept = kinds.index("too long")
    assert 1 < kept < 4 and kinds == ["answer"] * kept + ["too long"] * (4 - kept) + ["answer"]


def test_an_answer_needs_a_token() -> None:
    with pytest.raises(ConfigError, match="--max_new_tokens is 0"):
        chat("model", None, None, 0, "default", None)
