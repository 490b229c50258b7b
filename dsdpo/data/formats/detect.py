"""Which columns each format reads, and which format a data set has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from dsdpo.config.stages import Records
from dsdpo.data.dropped import Dropped
from dsdpo.data.formats.written import read_conversation, read_written

TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}


class Column(NamedTuple):
    """Where a format finds one of our columns.

    Attributes:
        usual: names that are looked for where `columns` gives none, in this order.
        optional: a record may lack it though `columns` names it.
    """

    usual: tuple[str, ...]
    optional: bool = False


_NUMBERS = {
    "chosen_score": Column(("chosen_score", "score_chosen"), optional=True),
    "rejected_score": Column(("rejected_score", "score_rejected"), optional=True),
    "weight": Column((), optional=True),  # a column of this name may hold anything
}
# What a conversation may have beside its messages; text has no place for it.
BESIDE = {key: Column((key,), optional=True) for key in ("system", "tools", "chat_template_kwargs")}
_SIDES = {"chosen": Column(("chosen",)), "rejected": Column(("rejected",))}

MESSAGES = ("conversations", "messages")

# What is read of pairs and rankings: a column that is not in it is reported as not used, or refused.
PAIRS: dict[str, dict[str, Column]] = {
    "alpaca": {
        "prompt": Column(("instruction", "prompt")),
        "query": Column(("input",), optional=True),
        "response": Column(("output",)),
        "history": Column(("history",), optional=True),
        "scores": Column((), optional=True),
        **_SIDES,
        **BESIDE,
        **_NUMBERS,
    },
    "sharegpt": {"messages": Column(MESSAGES), **_SIDES, **BESIDE, **_NUMBERS},
    "trl": {
        "prompt": Column(("prompt",)),
        **{side: Column((side, f"{side}_messages")) for side in _SIDES},  # the second are LLaMA-Factory's
        **BESIDE,
        **_NUMBERS,
    },
    "ranked": {
        "prompt": Column(("prompt",)),
        "completions": Column(("completions",)),
        "scores": Column(("scores",), optional=True),
        **BESIDE,
        "weight": _NUMBERS["weight"],
    },
    "hh_rlhf": {**_SIDES, **BESIDE, **_NUMBERS},
    "cvalues": {
        "messages": Column(("messages", "conversations")),
        "prompt": Column(("prompt",)),
        "chosen": Column(("pos_resp",)),
        "rejected": Column(("neg_resp",)),
        **BESIDE,
        **_NUMBERS,
    },
    "text_to_sql": {
        "question": Column(("question",)),
        "context": Column(("context",)),
        "answer": Column(("answer",)),
        **BESIDE,
        **_NUMBERS,
    },
    "openai": {
        "prompt": Column(("input",)),
        "chosen": Column(("preferred_output",)),
        "rejected": Column(("non_preferred_output",)),
        **BESIDE,
        **_NUMBERS,
    },
}
_WEIGHT = {"weight": _NUMBERS["weight"]}
_TEXT = {"prompt": Column(("text",)), **_WEIGHT}
# The same of replies.
REPLIES: dict[str, dict[str, Column]] = {
    "alpaca": {
        "prompt": Column(("instruction", "prompt")),
        "query": Column(("input",), optional=True),
        "response": Column(("output", "response")),
        "history": Column(("history",), optional=True),
        **BESIDE,
        **_WEIGHT,
    },
    "sharegpt": {"messages": Column(MESSAGES), **BESIDE, **_WEIGHT},
    "openai": {"messages": Column(("messages", "conversations")), **BESIDE, **_WEIGHT},
    "trl": {"prompt": Column(("prompt",)), "response": Column(("completion",)), **BESIDE, **_WEIGHT},
    "several": {"prompt": Column(("prompt",)), "completions": Column(("completions",)), **BESIDE, **_WEIGHT},
    "text_to_sql": {
        "question": Column(("question",)),
        "context": Column(("context",)),
        "answer": Column(("answer",)),
        **BESIDE,
        **_WEIGHT,
    },
    "text": _TEXT,
}
LABELS = ("label", "kto_tag")
_LABEL = {"kto_tag": Column(LABELS)}
LABELLED = {name: {**REPLIES[name], **_LABEL} for name in ("alpaca", "sharegpt", "openai", "trl")}
TEXTS = {"text": _TEXT, "alpaca": _TEXT}  # LLaMA-Factory has no name for it but the default's
READS: dict[Records, dict[str, dict[str, Column]]] = {
    "pairs": PAIRS,
    "replies": REPLIES,
    "labelled": LABELLED,
    "texts": TEXTS,
}
COLUMNS = tuple(dict.fromkeys(key for formats in READS.values() for keys in formats.values() for key in keys))


def unread(formatting: str, columns: Mapping[str, str], records: Records) -> list[str]:
    """The keys of `columns` that a format does not read."""
    return [key for key in columns if key not in READS[records][formatting]]


def detect(row: Mapping[str, Any], columns: Mapping[str, str], records: Records = "pairs") -> str | None:
    """Tell the format of a set from one of its records: a key of READS[records], or None.

    A format that reads every column named in `columns` goes before one that would leave some out.
    """

    def leaves_out(formatting: str) -> bool:
        is_text = formatting == "trl" and not any(is_structured(row, columns, key) for key in ("chosen", "prompt"))
        return bool(unread(formatting, columns, records)) or (is_text and any(key in columns for key in BESIDE))

    if records == "pairs":
        likely = _likely(row, columns)
    else:
        likely = [
            name for name, needed in _NEEDED[records].items() if _has_all(row, columns, READS[records][name], needed)
        ]
    return min(likely, key=leaves_out, default=None)


def is_record(row: Mapping[str, Any], columns: Mapping[str, str]) -> bool:
    """Whether an object looks like a record of any format."""
    return any(detect(row, columns, records) for records in READS)


def is_structured(row: Mapping[str, Any], columns: Mapping[str, str], key: str) -> bool:
    """Whether a column holds messages, as they are or written as text."""
    try:
        return isinstance(read_written(row.get(columns.get(key, key)), key), (list, dict))
    except Dropped:
        return True  # written by Python: the reader refuses it


def _has(row: Mapping[str, Any], columns: Mapping[str, str], key: str, *usual: str) -> bool:
    return columns.get(key) in row if key in columns else any(name in row for name in usual or (key,))


def _has_all(
    row: Mapping[str, Any], columns: Mapping[str, str], reads: Mapping[str, Column], needed: Sequence[str]
) -> bool:
    return all(_has(row, columns, key, *reads[key].usual) for key in needed)


# format -> the columns by which it is known, in the order in which they are looked for
_NEEDED: dict[Records, dict[str, tuple[str, ...]]] = {
    "replies": {
        "sharegpt": ("messages",),
        "several": ("prompt", "completions"),
        "trl": ("prompt", "response"),
        "text_to_sql": ("question", "context", "answer"),
        "alpaca": ("prompt", "response"),
        "text": ("prompt",),
    },
    "labelled": {
        "sharegpt": ("messages", "kto_tag"),
        "trl": ("prompt", "response", "kto_tag"),
        "alpaca": ("prompt", "response", "kto_tag"),
    },
    "texts": {"text": ("prompt",)},
}


def _likely(row: Mapping[str, Any], columns: Mapping[str, str]) -> list[str]:
    """The formats that a record of pairs may have, likeliest first."""
    has = partial(_has, row, columns)
    found = []
    if _has_two_sided_turn(row.get(columns.get("messages", "messages"))) or "pos_resp" in row:
        found.append("cvalues")
    if "chosen_messages" in row and "rejected_messages" in row:
        found.append("trl")
    if "preferred_output" in row and "non_preferred_output" in row:
        found.append("openai")
    if has("chosen") and has("rejected"):
        chosen = row[columns.get("chosen", "chosen")]
        has_messages = has("messages", *MESSAGES)
        if has_messages and has("prompt", "instruction", "prompt"):  # beside a prompt, messages may be a whole dialogue
            has_messages = not any(_ends_with_reply(row.get(columns.get("messages", n))) for n in MESSAGES)
        if is_structured(row, columns, "chosen") and not (isinstance(chosen, (dict, str)) and has_messages):
            if "instruction" in row and "prompt" not in row and "prompt" not in columns and _is_one(chosen):
                found.append("alpaca")
            return [*found, "trl"]
        if has_messages:
            found.append("sharegpt")
        has_turns = is_structured(row, columns, "prompt")
        # LLaMA-Factory takes an entry without formatting as alpaca
        if "instruction" in row or ("prompt" in columns and not has_turns):
            found.append("alpaca")
        is_hh = _is_hh(chosen) and not has_turns and not _is_hh(row.get(columns.get("prompt", "prompt")))
        return [*found, "hh_rlhf"] if is_hh else [*found, "trl", "alpaca"]
    if has("prompt") and has("completions"):
        found.append("ranked")
    if has("question") and has("context") and has("answer"):
        found.append("text_to_sql")
    return [*found, "alpaca"] if has("prompt", "instruction") and has("response", "output") else found


def _is_one(value: Any) -> bool:
    """Whether an answer that is structured is one message."""
    try:
        answer = read_written(value, "chosen")
    except Dropped:
        return False
    return not isinstance(answer, list) or len(answer) == 1


def _is_hh(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip().startswith("Human:")


def _turns(messages: Any) -> list[Any]:
    try:
        turns = read_conversation(messages)
    except Dropped:
        return []
    return turns if isinstance(turns, list) else []


def _has_two_sided_turn(messages: Any) -> bool:
    return any(isinstance(turn, dict) and "chosen_value" in turn for turn in _turns(messages))


def detect_in_any_case(row: Mapping[str, Any], records: Records) -> tuple[str, dict[str, str]] | None:
    """Like detect, of names in other cases (Prompt, CHOSEN): the format, and the `columns` which name them."""
    lower = {name.lower(): name for name in row if isinstance(name, str)}
    if len(lower) < len(row):
        return None
    if (formatting := detect({name: row[own] for name, own in lower.items()}, {}, records)) is None:
        return None
    columns = {}
    for key, column in READS[records][formatting].items():
        usual = next((name for name in column.usual if name in lower), None)
        if usual is not None and lower[usual] != usual:
            columns[key] = lower[usual]
    return formatting, columns


def _ends_with_reply(messages: Any) -> bool:
    last = (_turns(messages) or [None])[-1]
    return (
        isinstance(last, dict)
        and ({"assistant", "gpt", "model", "bot"} & {str(last.get("role")), str(last.get("from"))}) != set()
    )
