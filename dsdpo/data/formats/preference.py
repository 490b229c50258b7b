"""Records of the preference formats -> Example with a chosen and a rejected completion, or Dropped with a reason.

Pure functions, one per format. Each takes the record (through `Columns`) and the entry's `tags`. docs/formats.md shows
every format by example.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from dsdpo.data.dropped import Dropped
from dsdpo.data.example import Example, Message
from dsdpo.data.formats.columns import Columns
from dsdpo.data.formats.conversations import alpaca, openai, ranked, sharegpt, text_to_sql
from dsdpo.data.formats.cvalues import cvalues
from dsdpo.data.formats.names import leaves
from dsdpo.data.formats.trl import hh_rlhf, trl
from dsdpo.data.messages import (
    assistant,
    check_prompt,
    check_reply_keys,
    has_thoughts,
)

FORMATS: dict[str, Callable[[Columns, Mapping[str, str]], Example]] = {
    "alpaca": alpaca,
    "sharegpt": sharegpt,
    "trl": trl,
    "hh_rlhf": hh_rlhf,
    "cvalues": cvalues,
    "text_to_sql": text_to_sql,
    "openai": openai,
    "ranked": ranked,
}


def checked(example: Example, allow_empty_rejected: bool) -> Example:
    """The example, if it has a prompt that a reply may follow and replies that differ, the best one not empty."""
    if isinstance(example.prompt, str):
        if not example.prompt.strip():
            raise Dropped("empty_prompt")
    elif (checked := check_prompt(example.prompt)) != example.prompt:
        example = replace(example, prompt=checked)
    messages = [answer[0] for answer in example.completions if not isinstance(answer, str)]
    if any(len(message) > 2 for message in messages):
        notes = (*example.notes, *(note for message in messages for note in check_reply_keys(message)))
        example = replace(example, notes=tuple(dict.fromkeys(notes)))
    best, *others = example.completions
    if _is_empty(best):
        raise Dropped("empty_chosen")
    if any(map(_is_empty, others)):
        if not allow_empty_rejected:
            raise Dropped("empty_rejected")
        others = [_nothing(answer) if _is_empty(answer) else answer for answer in others]
        example = replace(example, completions=(best, *others))
    if any(answer in example.completions[:number] for number, answer in enumerate(example.completions)):
        raise Dropped("same")
    return example


def _nothing(answer: str | list[Message]) -> str | list[Message]:
    """An answer without words, without the spaces that it may have."""
    if isinstance(answer, str):
        return ""
    if leaves(answer, _NO_WORDS):
        raise Dropped("empty_with_keys", ", ".join(answer[0]))
    return assistant("")


_NO_WORDS = frozenset(["role", "content", "name"])


def _is_empty(completion: str | list[Message]) -> bool:
    if isinstance(completion, str):
        return not completion.strip()
    message = completion[0]
    if (message["content"] or "").strip():
        return False
    return len(message) == 2 or ("tool_calls" not in message and not has_thoughts(message))
