"""Every format by example: what becomes an example, and every reason to refuse."""

from __future__ import annotations

import contextlib
import json
import random
import re
from pathlib import Path

import pytest

from dsdpo.data.dropped import Dropped
from dsdpo.data.example import Example
from dsdpo.data.formats.conversations import SQL_PROMPT
from dsdpo.data.formats.detect import detect
from dsdpo.data.formats.dialogues import preference
from dsdpo.data.formats.record import to_example
from dsdpo.data.readers import iter_rows, parse_row
from dsdpo.data.registry import resolve

DATA = Path(__file__).parents[3] / "data"


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def read(row, formatting, columns=None, tags=None, allow_empty_rejected=False) -> Example:
    return to_example(row, formatting, columns or {}, tags or {}, allow_empty_rejected)


def refusal(row, formatting, **kwargs) -> str:
    with pytest.raises(Dropped) as caught:
        read(row, formatting, **kwargs)
    return str(caught.value)


# --- TRL ---


def test_trl_text():
    pair = read({"prompt": "The sky is", "chosen": " blue", "rejected": " red"}, "trl")
    assert (pair.prompt, *pair.completions) == ("The sky is", " blue", " red")


def test_trl_implicit_text_is_split_as_trl_does():
    from trl.data_utils import extract_prompt

    rng = random.Random(0)
    rows = [{"chosen": "The sky is blue.", "rejected": "The sky is green."}]
    for _ in range(200):
        prompt, chosen, rejected = ("".join(rng.choices("ab ", k=rng.randint(1, 6))) for _ in range(3))
        rows.append({"chosen": "x" + prompt + "y" + chosen, "rejected": "x" + prompt + "z" + rejected})
    for row in rows:
        pair = read(row, "trl")
        assert dict(zip(("prompt", "chosen", "rejected"), (pair.prompt, *pair.completions))) == extract_prompt(row)
    assert read(rows[0], "trl").prompt == "The sky is"


def test_trl_conversations_with_and_without_prompt():
    prompt = [system("Be kind."), user("Hi"), bot("Hello"), user("Bye")]
    explicit = read({"prompt": prompt, "chosen": [bot("See you")], "rejected": [bot("Go")]}, "trl")
    implicit = read({"chosen": [*prompt, bot("See you")], "rejected": [*prompt, bot("Go")]}, "trl")
    assert explicit == implicit == preference(prompt, [bot("See you")], [bot("Go")])


def test_trl_text_prompt_beside_whole_dialogues():
    row = {"prompt": "Hi", "chosen": [user("Hi"), bot("Hello")], "rejected": [user("Hi"), bot("Go")]}
    assert read(row, "trl") == preference([user("Hi")], [bot("Hello")], [bot("Go")])
    assert "prompt is text" in refusal({**row, "prompt": "Ho"}, "trl")


def test_trl_tools_are_lists_or_json():
    tools = [{"type": "function", "function": {"name": "now"}}]
    row = {"prompt": [user("Time?")], "chosen": [bot("Noon")], "rejected": [bot("?")]}
    assert read({**row, "tools": tools}, "trl").tools == tools
    assert read({**row, "tools": json.dumps(tools)}, "trl").tools == tools
    assert read({**row, "tools": ""}, "trl").tools is None
    assert "tools is not JSON" in refusal({**row, "tools": "{"}, "trl")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "p", "chosen": "c"}, "no rejected"),
        ({"prompt": "p", "chosen": "c", "rejected": 3}, "rejected is neither text nor a list of messages"),
        ({"prompt": "", "chosen": "c", "rejected": "r"}, "empty prompt"),
        ({"prompt": "p", "chosen": " ", "rejected": "r"}, "empty chosen"),
        ({"prompt": "p", "chosen": "c", "rejected": ""}, "empty rejected"),
        ({"prompt": "p", "chosen": "c", "rejected": "c"}, "are the same"),
        ({"prompt": 5, "chosen": "c", "rejected": "r"}, "prompt is not text: int"),
        ({"chosen": "abc", "rejected": "xyz"}, "empty prompt"),
        ({"prompt": [user("p")], "chosen": [], "rejected": [bot("r")]}, "chosen is no assistant message"),
        ({"prompt": [user("p")], "chosen": [user("c")], "rejected": [bot("r")]}, "chosen is no assistant message"),
        ({"prompt": [user("p")], "chosen": ["c"], "rejected": [bot("r")]}, "a message is no object: str"),
        ({"prompt": [], "chosen": [bot("c")], "rejected": [bot("r")]}, "empty prompt"),
        ({"prompt": [user(" ")], "chosen": [bot("c")], "rejected": [bot("r")]}, "empty message in the prompt"),
        ({"prompt": [bot("p")], "chosen": [bot("c")], "rejected": [bot("r")]}, "assistant after nothing"),
        ({"prompt": [user("p"), bot("q")], "chosen": [bot("c")], "rejected": [bot("r")]}, "not end with a user"),
        ({"prompt": [user("p"), user("q")], "chosen": [bot("c")], "rejected": [bot("r")]}, "user after user"),
        (
            {"prompt": [user("p"), system("q"), user("s")], "chosen": [bot("c")], "rejected": [bot("r")]},
            "system after user",
        ),
        ({"prompt": [{"role": "me", "content": "p"}], "chosen": [bot("c")], "rejected": [bot("r")]}, "unknown role"),
        ({"prompt": [{"role": "user"}], "chosen": [bot("c")], "rejected": [bot("r")]}, "content is not text: NoneType"),
        ({"prompt": [user("p")], "chosen": [bot("c")], "rejected": [bot("r")], "chosen_score": "x"}, "no number"),
        ({"prompt": [user("p")], "chosen": [bot("c")], "rejected": [bot("r")], "score_chosen": True}, "no number"),
        ({"prompt": [user("p")], "chosen": [bot("c")], "rejected": [bot("r")], "chosen_score": 1e999}, "no number"),
        ({"chosen": [user("p"), bot("c")], "rejected": [user("p"), bot("c")]}, "are the same"),
        ({"chosen": [user("p"), bot("c")], "rejected": [user("p")]}, "the beginning of the other"),
        (
            {"chosen": [user("p"), bot("c"), user("q"), bot("s")], "rejected": [user("p"), bot("r")]},
            "more than one message after the prompt",
        ),
        ([1], "no JSON object: list"),
        (None, "no JSON object: NoneType"),
    ],
)
def test_trl_refusals(row, reason):
    assert re.search(reason, refusal(row, "trl"))


# --- hh-rlhf ---


def test_hh_turns_become_messages():
    shared = "\n\nHuman: Hi there\n\nAssistant: Hello.\n\nHuman: A\n\nquestion?\n\nAssistant:"
    pair = read({"chosen": shared + " Yes. ", "rejected": shared + " No."}, "hh_rlhf")
    assert pair == preference([user("Hi there"), bot("Hello."), user("A\n\nquestion?")], [bot("Yes.")], [bot("No.")])


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: x\n\nAssistant: c", "more than one message after the prompt"),
        (
            "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
            "\n\nHuman: a\n\nAssistant: B\n\nHuman: C\n\nAssistant: D",
            "more than one message after the prompt",
        ),
        (
            "\n\nHuman: a\n\nAssistant: b\n\nAssistant: c",
            "\n\nHuman: a\n\nAssistant: d",
            "more than one message after the prompt",
        ),
        ("\n\nHuman: a\n\nAssistant:", "\n\nHuman: a\n\nAssistant: d", "empty chosen"),
        ("\n\nHuman:\n\nAssistant: b", "\n\nHuman:\n\nAssistant: d", "empty message in the prompt"),
        ("\n\nAssistant: b", "\n\nAssistant: d", "empty prompt"),
        ("a reply", "another", 'does not begin with "Human:"'),
        ("text\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant: d", 'does not begin with "Human:"'),
        (["a"], "b", "chosen is not text"),
    ],
)
def test_hh_refusals(chosen, rejected, reason):
    assert reason in refusal({"chosen": chosen, "rejected": rejected}, "hh_rlhf")


# --- alpaca, sharegpt ---


def test_alpaca_answers_as_list_or_columns():
    row = {"instruction": "Do", "input": "this", "history": [["q", "a"]], "system": "Be brief."}
    expected = preference([system("Be brief."), user("q"), bot("a"), user("Do\nthis")], [bot("good")], [bot("bad")])
    assert read({**row, "output": ["good", "bad"]}, "alpaca") == expected
    assert read({**row, "chosen": "good", "rejected": "bad"}, "alpaca") == expected
    renamed = {"q": "Do", "i": "this", "h": [["q", "a"]], "s": "Be brief.", "good": "good", "bad": "bad"}
    names = {"prompt": "q", "query": "i", "history": "h", "system": "s", "chosen": "good", "rejected": "bad"}
    assert read(renamed, "alpaca", columns=names) == expected


def test_alpaca_tools():
    tools = [{"type": "function", "function": {"name": "now"}}]
    row = {"instruction": "Time?", "output": ["Noon", "?"], "functions": json.dumps(tools)}
    assert read(row, "alpaca", columns={"tools": "functions"}).tools == tools
    with pytest.raises(Dropped) as caught:
        read(row, "alpaca")
    assert caught.value.code == "column_not_read"


def test_alpaca_refusals():
    row = {"instruction": "Do"}
    assert "no prompt" in refusal({"output": ["a", "b"]}, "alpaca")
    assert "no pair of answers" in refusal({**row, "output": "one answer"}, "alpaca")
    assert "chosen is not text" in refusal({**row, "output": [1, "b"]}, "alpaca")
    assert "no rejected" in refusal({**row, "chosen": "a"}, "alpaca")
    assert "history is no list" in refusal({**row, "history": ["q"], "output": ["a", "b"]}, "alpaca")
    assert "history is no list" in refusal({**row, "history": "q", "output": ["a", "b"]}, "alpaca")
    assert "good (columns.chosen)" in refusal({**row, "output": ["a", "b"]}, "alpaca", columns={"chosen": "good"})


def test_sharegpt_by_defaults_tags_and_openai_keys():
    expected = preference([system("s"), user("p"), bot("q"), user("r")], [bot("good")], [bot("bad")])
    plain = [("system", "s"), ("human", "p"), ("gpt", "q"), ("human", "r")]
    row = {
        "conversations": [{"from": who, "value": text} for who, text in plain],
        "chosen": {"from": "gpt", "value": "good"},
        "rejected": {"from": "gpt", "value": "bad"},
    }
    assert read(row, "sharegpt") == expected
    assert read({**row, "chosen": "good", "rejected": "bad"}, "sharegpt") == expected
    openai = {"messages": expected.prompt, "chosen": bot("good"), "rejected": bot("bad")}
    assert read(openai, "sharegpt") == expected
    tags = {"role_tag": "who", "content_tag": "says", "user_tag": "U", "assistant_tag": "A", "system_tag": "S"}
    names = {"system": "S", "human": "U", "gpt": "A"}
    tagged = {
        "talk": [{"who": names[who], "says": text} for who, text in plain],
        "better": {"who": "A", "says": "good"},
        "worse": {"who": "A", "says": "bad"},
    }
    columns = {"messages": "talk", "chosen": "better", "rejected": "worse"}
    assert read(tagged, "sharegpt", columns=columns, tags=tags) == expected
    with_column = {**row, "conversations": row["conversations"][1:], "system": "s"}
    assert read(with_column, "sharegpt") == expected


def test_sharegpt_tool_turns():
    call = {"name": "weather", "arguments": {"city": "Rome"}}
    row = {
        "conversations": [
            {"from": "human", "value": "Weather in Rome?"},
            {"from": "function_call", "value": json.dumps(call)},
            {"from": "observation", "value": "sunny"},
        ],
        "chosen": {"from": "gpt", "value": "Sunny."},
        "rejected": {"from": "gpt", "value": "Rain."},
    }
    prompt = read(row, "sharegpt").prompt
    assert prompt[1] == {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
    assert prompt[2] == {"role": "tool", "content": "sunny"}
    row["conversations"][1]["value"] = "weather()"
    assert "a function call is not JSON" in refusal(row, "sharegpt")


def test_sharegpt_refusals():
    row = {
        "conversations": [{"from": "human", "value": "p"}],
        "chosen": {"from": "gpt", "value": "c"},
        "rejected": {"from": "gpt", "value": "r"},
    }
    assert "no list of messages" in refusal({**row, "conversations": "text"}, "sharegpt")
    assert "no list of messages" in refusal({k: v for k, v in row.items() if k != "conversations"}, "sharegpt")
    assert "chosen is no assistant message" in refusal({**row, "chosen": {"from": "human", "value": "c"}}, "sharegpt")
    assert "unknown role" in refusal({**row, "chosen": {"role": "gpt", "value": "c"}}, "sharegpt")
    assert "no rejected" in refusal({**row, "rejected": None}, "sharegpt")


# --- CValues, text-to-SQL ---


def test_cvalues_with_scores_and_several_turns():
    last = {"role": "assistant", "chosen_value": "c", "rejected_value": "r", "chosen_score": 8.5, "rejected_score": -2}
    expected = preference([user("p"), bot("q"), user("s")], [bot("c")], [bot("r")], scores=(8.5, -2.0))
    for earlier in ({"value": "q"}, {"chosen_value": "q", "rejected_value": "q"}, {"content": "q"}):
        turns = [{"role": "user", "value": "p"}, {"role": "assistant", **earlier}, {"role": "user", "value": "s"}, last]
        assert read({"messages": turns}, "cvalues") == expected
    turns = [{"from": "human", "value": "p"}, {"from": "gpt", "chosen_value": "c", "rejected_value": "r"}]
    assert read({"messages": turns, "chosen_score": 1, "rejected_score": 0}, "cvalues") == preference(
        [user("p")], [bot("c")], [bot("r")], scores=(1.0, 0.0)
    )
    flat = {"prompt": "p", "pos_resp": "c", "neg_resp": "r"}
    assert read(flat, "cvalues") == preference([user("p")], [bot("c")], [bot("r")])


def test_cvalues_refusals():
    ask = {"role": "user", "value": "p"}
    last = {"role": "assistant", "chosen_value": "c", "rejected_value": "r"}
    differs = {"role": "assistant", "chosen_value": "x", "rejected_value": "y"}
    assert "an earlier turn differs" in refusal({"messages": [ask, differs, ask, last]}, "cvalues")
    assert "the last message is no assistant" in refusal({"messages": [ask, last, ask]}, "cvalues")
    assert "no rejected_value" in refusal({"messages": [ask, {"role": "assistant", "chosen_value": "c"}]}, "cvalues")
    assert "unknown role" in refusal({"messages": [{"role": "me", "value": "p"}, last]}, "cvalues")
    assert "no list of messages" in refusal({"messages": []}, "cvalues")
    assert "a score is no number" in refusal({"messages": [ask, {**last, "chosen_score": "high"}]}, "cvalues")


def test_text_to_sql_prompt_is_exact():
    row = {"question": "How many?", "context": "CREATE TABLE cat (name VARCHAR)", "answer": "SELECT COUNT(*) FROM cat"}
    pair = read(row, "text_to_sql", allow_empty_rejected=True)
    assert pair.prompt == [
        user(
            "Write one SQL query that answers the question.\n\nSchema:\nCREATE TABLE cat (name VARCHAR)"
            "\n\nQuestion: How many?"
        )
    ]
    assert pair.completions == ([bot("SELECT COUNT(*) FROM cat")], [bot("")])
    assert "empty rejected" in refusal(row, "text_to_sql")
    assert "empty chosen" in refusal({**row, "answer": " "}, "text_to_sql", allow_empty_rejected=True)
    assert "empty prompt" in refusal({**row, "question": ""}, "text_to_sql", allow_empty_rejected=True)
    assert "no context" in refusal({**row, "context": None}, "text_to_sql", allow_empty_rejected=True)
    braces = read({**row, "context": "{question}"}, "text_to_sql", allow_empty_rejected=True)
    assert "Schema:\n{question}\n" in braces.prompt[0]["content"]
    assert SQL_PROMPT.count("{") == 2


# --- every format ---


def test_scores_are_kept():
    row = {"prompt": "p", "chosen": "c", "rejected": "r"}
    assert read({**row, "score_chosen": 3, "score_rejected": "1.5"}, "trl").scores == (3.0, 1.5)
    assert read({**row, "good": 4}, "trl", columns={"chosen_score": "good"}).scores == (4.0, None)
    assert read(row, "trl").scores == (None, None)


def test_empty_rejected_is_normalised():
    row = {"prompt": "p", "chosen": "c", "rejected": "  \n"}
    assert read(row, "trl", allow_empty_rejected=True).completions == ("c", "")


SAMPLES = json.loads((DATA / "dataset_info.json").read_text())
KINDS = {
    name: {"kto_labelled": "labelled", "sql_notes": "texts"}.get(name, "pairs" if entry.get("ranking") else "replies")
    for name, entry in SAMPLES.items()
}


def sample_entry(name):
    return resolve([name], DATA, KINDS[name])[0][0]


def sample_rows(name, limit=None):
    return [parse_row(row) for _, row in iter_rows(sample_entry(name), limit)]


@pytest.mark.parametrize("name", SAMPLES)
def test_our_samples_are_read_and_show_their_format(name):
    entry = sample_entry(name)
    rows = sample_rows(name)
    assert len(rows) >= 3
    for row in rows:
        made = to_example(
            row, entry.formatting, entry.columns, entry.tags, entry.allow_empty_rejected, (), entry.records
        )
        chosen, *others = made.completions
        assert chosen not in others and made.weight == 1
    assert detect(rows[0], {}, entry.records) == entry.formatting


def test_detection_knows_its_limits():
    assert detect({"text": "a line"}, {}) is None
    assert detect({"instruction": "Do", "output": "one answer"}, {}) == "alpaca"
    assert detect({"prompt": "p", "pos_resp": "a", "neg_resp": "b"}, {}) == "cvalues"


ORCA = {  # Intel/orca_dpo_pairs
    "system": "You are an AI assistant. You will be given a task.",
    "question": "Generate an approximately fifteen-word sentence: Midsummer House eatType restaurant",
    "chosen": "Midsummer House is a moderately priced restaurant near All Bar One.",
    "rejected": " Sure! Here's a sentence that describes all the data you provided.",
}
ORCA_COLUMNS = {"prompt": "question", "chosen": "chosen", "rejected": "rejected", "system": "system"}
_ASKED = "how can i develop a habit of drawing daily"
_GOOD = [user(_ASKED), bot("Start small, and draw at the same time every day.")]
ULTRAFEEDBACK = {  # HuggingFaceH4/ultrafeedback_binarized
    "prompt": _ASKED,
    "prompt_id": "086b3e24f29b8956a01059f79c56db35d118a06fb6b844b095737d042795cd43",
    "chosen": _GOOD,
    "rejected": [user(_ASKED), bot("As an AI language model, I cannot personally develop habits.")],
    "messages": _GOOD,
    "score_chosen": 8.5,
    "score_rejected": 6.0,
}
PLAIN = {"prompt": "The sky is", "chosen": " blue", "rejected": " red"}
SIDES = {"chosen": "chosen", "rejected": "rejected"}
SHAREGPT = {
    "conversations": [{"from": "human", "value": "Hi"}],
    "chosen": {"from": "gpt", "value": "Hello!"},
    "rejected": {"from": "gpt", "value": "No."},
}


@pytest.mark.parametrize(
    ("row", "columns", "formatting"),
    [
        pytest.param(ORCA, ORCA_COLUMNS, "alpaca", id="orca"),
        pytest.param(ORCA, {**SIDES, "prompt": "question"}, "alpaca", id="prompt-named"),
        pytest.param({**PLAIN, "sys": "Be brief."}, {**SIDES, "system": "sys"}, "alpaca", id="system-named"),
        pytest.param({**PLAIN, "input": "at noon"}, {**SIDES, "query": "input"}, "alpaca", id="query-named"),
        pytest.param({**PLAIN, "past": []}, {**SIDES, "history": "past"}, "alpaca", id="history-named"),
        pytest.param({**ORCA, "messages": SHAREGPT["conversations"]}, ORCA_COLUMNS, "alpaca", id="beside-messages"),
        pytest.param({**ORCA, "context": "", "answer": ""}, ORCA_COLUMNS, "alpaca", id="beside-sql-names"),
        pytest.param({"instruction": "Do", "output": ["a", "b"]}, {"response": "output"}, "alpaca", id="response"),
        pytest.param(PLAIN, {}, "trl", id="plain-text"),
        pytest.param({**PLAIN, "system": "Be brief."}, {}, "trl", id="plain-text-beside-system"),
        pytest.param(
            {"prompt": "p", "good": "a", "bad": "b"}, {"chosen": "good", "rejected": "bad"}, "trl", id="sides"
        ),
        pytest.param(ULTRAFEEDBACK, {}, "trl", id="ultrafeedback"),
        pytest.param(ULTRAFEEDBACK, {**SIDES, "prompt": "prompt"}, "trl", id="ultrafeedback-named"),
        pytest.param({**ULTRAFEEDBACK, "instruction": _ASKED}, {}, "trl", id="lists-beside-instruction"),
        pytest.param(SHAREGPT, {}, "sharegpt", id="sharegpt"),
        pytest.param(SHAREGPT, {**SIDES, "messages": "conversations"}, "sharegpt", id="sharegpt-named"),
        pytest.param({**SHAREGPT, "sys": "Be brief."}, {"system": "sys"}, "sharegpt", id="sharegpt-system"),
    ],
)
def test_format_is_told_from_columns_and_row(row, columns, formatting):
    assert detect(row, columns) == formatting


def test_orca_pairs_keep_their_system_message():
    pair = read(ORCA, "alpaca", columns=ORCA_COLUMNS)
    assert pair.prompt == [system(ORCA["system"]), user(ORCA["question"])]
    assert pair.completions == ([bot(ORCA["chosen"])], [bot(ORCA["rejected"])])


def test_ultrafeedback_is_a_pair_of_replies():
    pair = read(ULTRAFEEDBACK, detect(ULTRAFEEDBACK, {}))
    chosen, rejected = (ULTRAFEEDBACK[side][1:] for side in ("chosen", "rejected"))
    notes = ("with the column prompt_id not used", "with the column messages not used")
    assert pair == preference([user(_ASKED)], chosen, rejected, scores=(8.5, 6.0), notes=notes)


def test_any_json_value_is_a_pair_or_refused():
    """Wrong types anywhere in a good row never escape as another exception."""
    rng = random.Random(1)
    junk = [None, 3, 1.5, True, "", "text", [], {}, [None], [[]], [{}], {"role": 1}, [{"role": []}], ["a", "b"]]
    good = [(row, name) for name in SAMPLES for row in sample_rows(name, 3)]

    def spoil(value):
        if rng.random() < 0.2:
            return rng.choice(junk)
        if isinstance(value, dict):
            return {key: spoil(inner) for key, inner in value.items()}
        return [spoil(inner) for inner in value] if isinstance(value, list) else value

    for _ in range(150):
        for row, name in good:
            with contextlib.suppress(Dropped):
                to_example(spoil(row), SAMPLES[name]["formatting"], {}, {}, rng.random() < 0.5, (), KINDS[name])
