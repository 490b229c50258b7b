"""Which columns each format reads, and which format a data set has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
SCORES = ("chosen_score", "rejected_score")
READS = {
    "alpaca": ("prompt", "query", "response", "history", "system", "tools", "chosen", "rejected", *SCORES),
    "sharegpt": ("messages", "system", "tools", "chosen", "rejected", *SCORES),
    "trl": ("prompt", "tools", "chosen", "rejected", *SCORES),
    "hh_rlhf": ("chosen", "rejected", *SCORES),
    "cvalues": ("messages", "system", "prompt", "chosen", "rejected", *SCORES),
    "text_to_sql": ("question", "context", "answer", *SCORES),
}
COLUMNS = tuple(dict.fromkeys(key for keys in READS.values() for key in keys))


def unread(formatting: str, columns: Mapping[str, str]) -> list[str]:
    """The keys of `columns` that a format does not read."""
    return [key for key in columns if key not in READS[formatting]]


def detect(row: Mapping[str, Any], columns: Mapping[str, str]) -> str | None:
    """Tell the format of a set from one of its rows: a key of READS, or None.

    A format that reads every column named in `columns` goes before one that would leave some out.
    """
    likely = _likely(row, columns)
    return min(likely, key=lambda formatting: bool(unread(formatting, columns)), default=None)


def _likely(row: Mapping[str, Any], columns: Mapping[str, str]) -> list[str]:
    """The formats that a row may have, likeliest first."""

    def has(key: str, *usual: str) -> bool:
        return columns.get(key) in row if key in columns else any(name in row for name in usual or (key,))

    found = []
    messages = row.get(columns.get("messages", "messages"))
    turns = messages if isinstance(messages, list) else []
    if has("question") and has("context") and has("answer"):
        found.append("text_to_sql")
    if any(isinstance(turn, dict) and "chosen_value" in turn for turn in turns) or "pos_resp" in row:
        found.append("cvalues")
    if has("chosen") and has("rejected"):
        chosen = row[columns.get("chosen", "chosen")]
        if isinstance(chosen, list):
            return [*found, "trl"]
        if has("messages", "conversations", "messages"):
            found.append("sharegpt")
        if "instruction" in row or "prompt" in columns:  # LLaMA-Factory takes an entry without formatting as alpaca
            found.append("alpaca")
        is_hh = not has("prompt") and isinstance(chosen, str) and chosen.lstrip().startswith("Human:")
        return [*found, "hh_rlhf"] if is_hh else [*found, "trl", "alpaca"]
    return [*found, "alpaca"] if has("prompt", "instruction") and has("response", "output") else found
