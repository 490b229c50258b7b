"""TRL's preference format, and the dialogues of hh-rlhf."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dsdpo.data.dropped import Dropped, kind_of
from dsdpo.data.example import Example, Message
from dsdpo.data.formats.columns import Columns
from dsdpo.data.formats.dialogues import (
    REPEATED,
    is_one_reply,
    pair_of_texts,
    preference,
    says,
    split_after,
    split_dialogues,
    without_prompt,
)
from dsdpo.data.formats.names import is_empty
from dsdpo.data.formats.written import read_written
from dsdpo.data.messages import assistant, read_message, reply, text_of, user

ROLES = {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool", "function": "tool"}
ROLES |= {"developer": "system", "model": "assistant", "ipython": "tool"}  # OpenAI's, Gemma's, Llama's
LOOSE_ROLES = ROLES | {"human": "user", "prompter": "user", "gpt": "assistant", "bot": "assistant"}
LOOSE_ROLES |= {"ai": "assistant", "chatbot": "assistant"}
_SHAREGPT_ROLES = LOOSE_ROLES | {"observation": "tool", "function_call": "function_call"}
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")


def trl(row: Columns, tags: Mapping[str, str]) -> Example:
    """`chosen`, `rejected` and usually `prompt`: all text, or messages where at least one of them is a list.

    Without `prompt`, it is the longest beginning that both sides share. Beside messages, a text prompt is the user
    message, and text answers are assistant messages; dialogues that begin with the prompt have it taken off.
    """
    prompt, chosen, rejected = (read_written(row.get(key), key) for key in ("prompt", "chosen", "rejected"))
    for side, value in (("chosen", chosen), ("rejected", rejected)):
        if value is None:
            raise Dropped("column_missing", what=side)
    if isinstance(chosen, str) and isinstance(rejected, str) and not isinstance(prompt, (list, dict)):
        if prompt is None:
            row.prompt_is_guessed = True
            return _implicit_text(chosen, rejected)
        return _pair_of_texts(text_of(prompt, "prompt"), chosen, rejected)
    if isinstance(chosen, str) and isinstance(rejected, str) and prompt:
        turns = _messages(prompt, "prompt")
        return pair_of_texts(turns, turns[-1]["content"] or "", chosen, rejected)
    better, worse = _messages(chosen, "chosen"), _messages(rejected, "rejected")
    if is_empty(prompt) and not (is_one_reply(better) and is_one_reply(worse)):
        shared, better, worse = split_dialogues(better, worse)
    elif isinstance(prompt, str):
        shared, better, worse = _beside_text(prompt, better, worse)
    else:
        shared, better, worse = split_after(_messages(prompt or [], "prompt"), better, worse)
    return preference(shared, reply(better, "chosen"), reply(worse, "rejected"))


def _pair_of_texts(prompt: str, chosen: str, rejected: str) -> Example:
    """An example of bare texts; the prompt is taken off where both answers repeat it."""
    rests = without_prompt(prompt, chosen, rejected)
    if rests is None:
        return preference(prompt, chosen, rejected)
    if any(rest[:1].isspace() for rest in rests):
        prompt = prompt.rstrip()  # the answers have the space that follows it
    chosen, rejected = rests
    return preference(prompt, chosen, rejected, notes=(REPEATED,))


def _messages(value: Any, side: str) -> list[Message]:
    if isinstance(value, str):
        return assistant(value)
    if isinstance(value, dict):
        if value.get("role") is None and value.get("from") is None:
            raise Dropped("not_text_or_messages", f"an object with {', '.join(map(str, value))}", side)
        value = [value]
    if not isinstance(value, list):
        raise Dropped("not_text_or_messages", kind_of(value), side)
    if value and isinstance(value[0], str):
        value = [read_written(raw, side) for raw in value]
    if value and isinstance(value[0], dict) and value[0].get("role") is None and value[0].get("from") is not None:
        return [read_message(raw, "from", "value", _SHAREGPT_ROLES) for raw in value]
    return [read_message(raw, "role", "content", _SHAREGPT_ROLES) for raw in value]


def _beside_text(
    prompt: str, chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """(prompt, chosen, rejected) of a text prompt beside messages: it is their user message, or stands in them."""
    if is_one_reply(chosen) and is_one_reply(rejected):
        return user(prompt), chosen, rejected
    shared, better, worse = split_dialogues(chosen, rejected)
    if not any(says(message, prompt) for message in shared if message["role"] == "user"):
        if any(says(message, prompt) for message in (*better, *worse) if message["role"] == "user"):
            return shared, better, worse  # the dialogues part too early, which is told there
        raise Dropped("text_beside_messages", repr(prompt[:60]))
    return shared, better, worse


def _implicit_text(chosen: str, rejected: str) -> Example:
    """Split where the texts part; a space right before goes to the completions, as tokenizers want it."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared and chosen[shared - 1] == " ":
        shared -= 1
    return preference(chosen[:shared], chosen[shared:], rejected[shared:])


def hh_rlhf(row: Columns, tags: Mapping[str, str]) -> Example:
    """Two whole dialogues as text, turns marked by a blank line and "Human:" or "Assistant:"."""
    chosen = _hh_messages(row.text("chosen"), "chosen")
    rejected = _hh_messages(row.text("rejected"), "rejected")
    shared, better, worse = split_dialogues(chosen, rejected)
    return preference(shared, reply(better, "chosen"), reply(worse, "rejected"))


def _hh_messages(text: str, side: str) -> list[Message]:
    before, *turns = _HH_TURN.split("\n\n" + text.lstrip())  # the first turn may lack the blank line
    if before.strip() or not turns:
        raise Dropped("not_hh", what=side)
    roles = ["user" if speaker == "Human" else "assistant" for speaker in turns[::2]]
    return [{"role": role, "content": said.strip()} for role, said in zip(roles, turns[1::2])]
