"""Each entry of the table of columns is needed: without it, a record that uses it is refused or becomes another."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dsdpo.data.dropped import Dropped
from dsdpo.data.formats import detect, names
from dsdpo.data.formats.columns import Columns, NotRead
from dsdpo.data.formats.detect import READS, Column
from dsdpo.data.formats.dialogues import preference
from dsdpo.data.formats.record import read_record

SIDES = {"chosen": "It is blue.", "rejected": "It is dry."}
BESIDE = {
    "system": "In rhyme.",
    "tools": [{"type": "function", "function": {"name": "tide"}}],
    "chat_template_kwargs": {"mood": "calm"},
}
SCORES = {"chosen_score": 2, "rejected_score": 1}
TRL_SCORES = {"score_chosen": 2, "score_rejected": 1}
HUMAN = [{"from": "human", "value": "Describe the sea."}]
USER = [{"role": "user", "content": "Describe the sea."}]
TWO_SIDED = {"role": "assistant", "chosen_value": "It is blue.", "rejected_value": "It is dry."}
SQL = {"question": "How many?", "context": "CREATE TABLE sea (depth INT)", "answer": "SELECT 1"}
PREFERRED = {"preferred_output": "chosen", "non_preferred_output": "rejected"}
HISTORY = {"history": [["Hi", "Hello"]]}

RECORDS = {
    "alpaca": [
        {"instruction": "Describe", "input": "the sea.", "output": ["Blue.", "Dry."], **HISTORY, **BESIDE, **SCORES},
        {"prompt": "Describe", "input": "the sea.", **SIDES, **HISTORY, **BESIDE, **TRL_SCORES},
    ],
    "sharegpt": [
        {"conversations": HUMAN, **SIDES, **BESIDE, **SCORES},
        {"messages": USER, **SIDES, **BESIDE, **TRL_SCORES},
    ],
    "trl": [
        {"prompt": USER, **SIDES, **BESIDE, **SCORES},
        {"prompt": "Describe the sea.", **SIDES, **TRL_SCORES},
        {
            f"{side}_messages": [
                {"role": role, "content": [{"type": "text", "value": text}]}
                for role, text in (("user", "Describe the sea."), ("assistant", said))
            ]
            for side, said in SIDES.items()
        },
    ],
    "ranked": [{"prompt": USER, "completions": ["Blue.", "Dry.", "Red."], "scores": [1, 3, 2], **BESIDE}],
    "hh_rlhf": [
        {side: f"\n\nHuman: Hi\n\nAssistant: {text}" for side, text in SIDES.items()} | BESIDE | scores
        for scores in (SCORES, TRL_SCORES)
    ],
    "cvalues": [
        {"messages": [*USER, TWO_SIDED], **BESIDE, **SCORES},
        {"conversations": [*HUMAN, TWO_SIDED], **BESIDE, **TRL_SCORES},
        {"prompt": "Describe the sea.", "pos_resp": "It is blue.", "neg_resp": "It is dry.", **BESIDE, **SCORES},
    ],
    "text_to_sql": [{**SQL, **BESIDE, **SCORES}, {**SQL, **TRL_SCORES}],
    "openai": [
        {
            "input": {"messages": USER},
            **{key: [{"role": "assistant", "content": SIDES[side]}] for key, side in PREFERRED.items()},
            **BESIDE,
            **scores,
        }
        for scores in (SCORES, TRL_SCORES)
    ],
}
DIALOGUE = [*USER, {"role": "assistant", "content": "It is blue."}]
TOLD = [*HUMAN, {"from": "gpt", "value": "It is blue."}]
REPLIES = {
    "alpaca": [
        {"instruction": "Describe", "input": "the sea.", "output": "Blue.", **HISTORY, **BESIDE},
        {"prompt": "Describe", "response": "Blue."},
    ],
    "sharegpt": [{"conversations": TOLD, **BESIDE}, {"messages": DIALOGUE, **BESIDE}],
    "openai": [{"messages": DIALOGUE, **BESIDE}, {"conversations": TOLD}],
    "trl": [{"prompt": USER, "completion": DIALOGUE[1:], **BESIDE}],
    "several": [{"prompt": USER, "completions": ["Blue.", "Dry.", "Red."], **BESIDE}],
    "text_to_sql": [{**SQL, **BESIDE}],
    "text": [{"text": "The sea is blue."}],
}
TEXTS = {name: [{"text": "The sea is blue."}] for name in ("text", "alpaca")}
LABELLED = {
    name: [{**record, label: value} for record in REPLIES[name] for label, value in (("label", True), ("kto_tag", 0))]
    for name in ("alpaca", "sharegpt", "openai", "trl")
}
ALL = {"pairs": RECORDS, "replies": REPLIES, "labelled": LABELLED, "texts": TEXTS}


def read(record, kind, formatting, columns=None):
    return read_record(record, formatting, columns or {}, {}, True, (), kind)


USES = [
    pytest.param(kind, formatting, record, name, key, id=f"{kind}-{formatting}-{number}-{name}")
    for kind, formats in ALL.items()
    for formatting, records in formats.items()
    for number, record in enumerate(records)
    for name, key in read(record, kind, formatting)[1].items()
]


@pytest.mark.parametrize(("kind", "formatting", "record", "name", "key"), USES)
def test_nothing_is_read_without_its_entry(monkeypatch, kind, formatting, record, name, key):
    whole = read(record, kind, formatting)[0]
    table = READS[kind][formatting]
    others = {ours: column for ours, column in table.items() if ours != key}
    usual = tuple(other for other in table[key].usual if other != name)
    renamed = table | {key: table[key]._replace(usual=usual)}
    for reads in (others, renamed):
        monkeypatch.setitem(READS[kind], formatting, reads)
        try:
            assert read(record, kind, formatting)[0] != whole
        except Dropped as dropped:
            if key in BESIDE or key in ("query", "history"):
                assert dropped.code == "column_not_read" and name in dropped.detail
    monkeypatch.undo()
    assert read(record, kind, formatting)[0] == whole


def test_the_records_use_every_name_of_the_table():
    used = {(*param.values[:2], param.values[4], param.values[3]) for param in USES}
    table = {
        (kind, formatting, key, name)
        for kind, formats in READS.items()
        for formatting, reads in formats.items()
        for key, column in reads.items()
        for name in column.usual
    }
    assert used == table


@pytest.mark.parametrize(("kind", "formatting"), [(kind, name) for kind, formats in READS.items() for name in formats])
def test_columns_rename_every_key(kind, formatting):
    for record in ALL[kind][formatting]:
        whole, used = read(record, kind, formatting)
        renamed = {f"x_{name}": record[name] for name in used}
        assert read(renamed, kind, formatting, {key: f"x_{name}" for name, key in used.items()})[0] == whole


def test_formats_of_replies_are_told_from_their_records():
    """sharegpt and openai have the same records."""
    for formatting, records in REPLIES.items():
        for record in records:
            assert detect.detect(record, {}, "replies") == ("sharegpt" if formatting == "openai" else formatting)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("question", "prompt"), ("Question", "prompt"), ("user_prompt", "prompt"), ("promptText", "prompt"),
        ("instructions", "prompt"), ("sys_prompt", "system"), ("systemMessage", "system"), ("context", "context"),
        ("chat_history", "history"), ("input_image", "media"), ("image_path", "media"), ("audios", "media"),
        ("available_tools", "tools"), ("functions", "tools"), ("chosen_response", "reply"), ("response_b", "reply"),
        ("conversation", "messages"), ("dialogue", "messages"), ("chat_template_kwargs", "chat_template_kwargs"),
        ("prompt_id", None), ("chosen_score", None), ("num_turns", None), ("question_type", None), ("id", None),
        ("chosen-model", None), ("promptId", None), ("source", None), ("margin", None), ("Bewertung", None),
    ],
)  # fmt: skip
def test_names_of_columns(name, part):
    assert names.part_of(name) == part


def test_a_column_counts_as_read_when_its_words_were():
    """In the prompt, for what can only be part of a prompt; spaces do not count."""
    reads = {"prompt": Column(("prompt",))}
    made = preference("Describe the  sea, please.", "It is blue.", "It is dry.")

    def missed(**columns) -> bool:
        seen = Columns({"prompt": "x", **columns}, reads, {})
        seen.get("prompt")
        try:
            seen.account(made)
        except NotRead as error:
            assert error.names == tuple(columns)
            return True
        return False

    assert not missed(question="the sea") and not missed(question=" the\nsea ") and not missed(answer="It is blue.")
    assert missed(question="It is blue.") and missed(question="The sea") and missed(question="lease")
    assert not missed(messages=[{"role": "user", "content": "the sea"}, {"role": "assistant", "content": "It is dry."}])
    assert missed(messages=[{"role": "user", "content": "the sea"}, {"role": "assistant", "content": "It is wet."}])
    assert missed(images=["the sea"]) and missed(tools="the sea") and not missed(question=5, images=0)


def test_the_records_of_the_docs_are_read():
    """Each record that docs/formats.md shows is of the format above it, and is read whole."""
    text = (Path(__file__).parents[3] / "docs/formats.md").read_text()
    for kind, title in (("pairs", "## The formats"), ("replies", "## Formats of supervised training")):
        section = text.split(title)[1].split("\n## ")[0]
        shown = [
            (formatting, json.loads(line))
            for formatting, lines in re.findall(r"\*\*(\w+)\*\*:.*?```json\n(.*?)```", section, re.DOTALL)
            for line in lines.splitlines()
        ]
        assert {formatting for formatting, _ in shown} == set(READS[kind])
        for formatting, record in shown:
            assert detect.detect(record, {}, kind) == (
                "sharegpt" if kind != "pairs" and formatting == "openai" else formatting
            )
            assert read(record, kind, formatting)[0].notes == ()
