"""Records of the preference formats -> Example with a chosen and a rejected completion, or Dropped with a reason.

Pure functions, one per format. Each takes the record (through `Columns`) and the entry's `tags`. docs/formats.md shows
every format by example.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from dsdpo.data.dropped import Dropped
from dsdpo.data.example import Example, Message
from dsdpo.data.formats.detect import TAGS
from dsdpo.data.messages import (
    Columns,
    assistant,
    check_prompt,
    read_message,
    read_score,
    read_tools,
    reply,
    system_and,
    text_of,
)

SQL_PROMPT = "Write one SQL query that answers the question.\n\nSchema:\n{context}\n\nQuestion: {question}"

_ROLES = {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_LOOSE_ROLES = _ROLES | {"human": "user", "gpt": "assistant", "bot": "assistant"}
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_CVALUES_TEXT = ("value", "content")


def preference(
    prompt: str | list[Message],
    chosen: str | list[Message],
    rejected: str | list[Message],
    tools: list[dict[str, Any]] | None = None,
    scores: tuple[float | None, float | None] = (None, None),
) -> Example:
    """An example of two completions, the chosen one first."""
    return Example(prompt, (chosen, rejected), scores, tools=tools)


def trl(row: Columns, tags: Mapping[str, str]) -> Example:
    """TRL's preference format: `chosen`, `rejected` and usually `prompt`, all text or all lists of messages.

    Without `prompt`, it is the longest beginning that both sides share. A text prompt beside dialogues that begin
    with it as their user message (as in UltraFeedback) counts as shared, too.
    """
    prompt, chosen, rejected = row.get("prompt"), row.get("chosen"), row.get("rejected")
    tools = read_tools(row.get("tools"))
    for side, value in (("chosen", chosen), ("rejected", rejected)):
        if value is None:
            raise Dropped("column_missing", what=side)
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is None:
            return _implicit_text(text_of(chosen, "chosen"), text_of(rejected, "rejected"))
        return preference(text_of(prompt, "prompt"), text_of(chosen, "chosen"), text_of(rejected, "rejected"))
    better, worse = _openai_messages(chosen, "chosen"), _openai_messages(rejected, "rejected")
    if isinstance(prompt, str):
        if not better or better[0] != {"role": "user", "content": prompt}:
            raise Dropped("text_beside_messages")
        prompt = None
    if prompt is None:
        shared, better, worse = split_dialogues(better, worse)
    else:
        shared = _openai_messages(prompt, "prompt")
    return preference(shared, reply(better, "chosen"), reply(worse, "rejected"), tools=tools)


def _openai_messages(value: Any, side: str) -> list[Message]:
    if not isinstance(value, list):
        raise Dropped("not_text_or_messages", type(value).__name__, side)
    return [read_message(raw, "role", "content", _ROLES) for raw in value]


def _implicit_text(chosen: str, rejected: str) -> Example:
    """Split where the texts part; a space right before goes to the completions, as tokenizers want it."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared and chosen[shared - 1] == " ":
        shared -= 1
    return preference(chosen[:shared], chosen[shared:], rejected[shared:])


def split_dialogues(
    chosen: Sequence[Message], rejected: Sequence[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """Two whole dialogues -> (the turns that they share, rest of chosen, rest of rejected)."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == len(chosen) == len(rejected):
        raise Dropped("same")
    if shared == len(chosen) or shared == len(rejected):
        raise Dropped("one_begins_the_other")
    return list(chosen[:shared]), list(chosen[shared:]), list(rejected[shared:])


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


def alpaca(row: Columns, tags: Mapping[str, str]) -> Example:
    """Instruction, optional input, history, system and tools; `output: [better, worse]`, or chosen and rejected."""
    parts = [row.text("prompt", "instruction"), row.optional_text("query", "input")]
    question = "\n".join(part for part in parts if part)
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if chosen is None and rejected is None:
        answers = row.get("response", "output")
        if not isinstance(answers, list) or len(answers) != 2:
            raise Dropped("no_pair")
        chosen, rejected = answers
    history = row.get("history") or []
    if not isinstance(history, list):
        raise Dropped("bad_history")
    prompt: list[Message] = []
    for turn in history:
        if not isinstance(turn, list) or len(turn) != 2:
            raise Dropped("bad_history")
        prompt.append({"role": "user", "content": text_of(turn[0], "history")})
        prompt += assistant(text_of(turn[1], "history"))
    prompt.append({"role": "user", "content": question})
    prompt = system_and(row.optional_text("system"), prompt)
    better, worse = assistant(_answer(chosen, "chosen")), assistant(_answer(rejected, "rejected"))
    return preference(prompt, better, worse, tools=read_tools(row.get("tools")))


def _answer(value: Any, side: str) -> str:
    if value is None:
        raise Dropped("column_missing", what=side)
    return text_of(value, side)


def sharegpt(row: Columns, tags: Mapping[str, str]) -> Example:
    """LLaMA-Factory's sharegpt: the conversation so far, and `chosen` and `rejected` as one message each."""
    messages = row.get("messages", "conversations", "messages")
    if not isinstance(messages, list):
        raise Dropped("no_messages", type(messages).__name__)
    first = messages[0] if messages and isinstance(messages[0], dict) else {}
    openai = "role" in first and not tags
    role_key = tags.get("role_tag") or ("role" if openai else TAGS["role_tag"])
    content_key = tags.get("content_tag") or ("content" if openai else TAGS["content_tag"])
    named = {ours: tags.get(f"{ours}_tag", TAGS[f"{ours}_tag"]) for ours in ("system", "user", "assistant")}
    roles = {said: ours for ours, said in named.items()}
    roles[tags.get("observation_tag", TAGS["observation_tag"])] = "tool"
    roles[tags.get("function_tag", TAGS["function_tag"])] = "function_call"
    roles = _LOOSE_ROLES | roles if not tags else roles

    def answer(side: str) -> list[Message]:
        raw = row.get(side)
        if raw is None:
            raise Dropped("column_missing", what=side)
        if isinstance(raw, str):
            return assistant(text_of(raw, side))
        return reply([read_message(raw, role_key, content_key, roles)], side)

    prompt = [read_message(raw, role_key, content_key, roles) for raw in messages]
    prompt = system_and(row.optional_text("system"), prompt)
    return preference(prompt, answer("chosen"), answer("rejected"), tools=read_tools(row.get("tools")))


def cvalues(row: Columns, tags: Mapping[str, str]) -> Example:
    """CValues: `messages` whose last one has chosen_value and rejected_value; or prompt, pos_resp and neg_resp.

    Earlier turns say the same on both sides: in `value`, or in an equal chosen_value and rejected_value.
    """
    messages = row.get("messages", "messages", "conversations")
    if messages is None:
        prompt: list[Message] = [{"role": "user", "content": row.text("prompt")}]
        better, worse = row.text("chosen", "pos_resp"), row.text("rejected", "neg_resp")
        return preference(prompt, assistant(better), assistant(worse))
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise Dropped("no_messages", type(messages).__name__)
    earlier, last = messages[:-1], messages[-1]
    if _cvalues_role(last) != "assistant":
        raise Dropped("last_is_no_reply")
    for key in ("chosen_value", "rejected_value"):
        if last.get(key) is None:
            raise Dropped("last_lacks", what=key)
    return preference(
        system_and(row.optional_text("system"), [_cvalues_turn(turn) for turn in earlier]),
        assistant(text_of(last["chosen_value"], "chosen_value")),
        assistant(text_of(last["rejected_value"], "rejected_value")),
        scores=(
            read_score(last.get("chosen_score"), "chosen_score"),
            read_score(last.get("rejected_score"), "rejected_score"),
        ),
    )


def _cvalues_role(message: Message) -> str:
    said = str(message.get("role", message.get("from")))
    if said not in _LOOSE_ROLES:
        raise Dropped("unknown_role", f"{said!r}; allowed: {', '.join(_LOOSE_ROLES)}")
    return _LOOSE_ROLES[said]


def _cvalues_turn(message: Message) -> Message:
    text = next((message[key] for key in _CVALUES_TEXT if message.get(key) is not None), None)
    if text is None:
        text = message.get("chosen_value")
        if text != message.get("rejected_value"):
            raise Dropped("earlier_turn_differs")
    return {"role": _cvalues_role(message), "content": text_of(text, "message content")}


def text_to_sql(row: Columns, tags: Mapping[str, str]) -> Example:
    """Question, context (the CREATE TABLE statements) and answer; the rejected side is empty on purpose."""
    question, context = row.text("question"), row.text("context")
    if not question.strip():
        raise Dropped("empty_prompt")
    content = SQL_PROMPT.format(context=context, question=question)
    return preference([{"role": "user", "content": content}], assistant(row.text("answer")), assistant(""))


FORMATS: dict[str, Callable[[Columns, Mapping[str, str]], Example]] = {
    "alpaca": alpaca,
    "sharegpt": sharegpt,
    "trl": trl,
    "hh_rlhf": hh_rlhf,
    "cvalues": cvalues,
    "text_to_sql": text_to_sql,
}


def to_example(
    row: Any,
    formatting: str,
    columns: Mapping[str, str],
    tags: Mapping[str, str],
    allow_empty_rejected: bool,
) -> Example:
    """One record -> Example, with the checks that hold for every format.

    Args:
        row: the parsed record.
        formatting: a key of FORMATS.
        columns, tags, allow_empty_rejected: of the set's entry.

    Raises:
        Dropped: with the reason.
    """
    if not isinstance(row, dict):
        raise Dropped("not_object", type(row).__name__)
    seen = Columns(row, columns)
    example = FORMATS[formatting](seen, tags)
    if isinstance(example.prompt, str):
        if not example.prompt.strip():
            raise Dropped("empty_prompt")
    elif (checked := check_prompt(example.prompt)) != example.prompt:
        example = replace(example, prompt=checked)
    chosen, rejected = example.completions
    if _is_empty(chosen):
        raise Dropped("empty_chosen")
    if _is_empty(rejected):
        if not allow_empty_rejected:
            raise Dropped("empty_rejected")
        rejected = "" if isinstance(rejected, str) else assistant("")
        example = replace(example, completions=(chosen, rejected))
    if chosen == rejected:
        raise Dropped("same")
    return _with_scores(example, seen)


def _is_empty(completion: str | list[Message]) -> bool:
    if isinstance(completion, str):
        return not completion.strip()
    return not completion[0]["content"].strip() and "tool_calls" not in completion[0]


def _with_scores(example: Example, row: Columns) -> Example:
    """Add the record's own score columns where the format has not found scores."""
    chosen = read_score(row.get("chosen_score", "chosen_score", "score_chosen"), "chosen_score")
    rejected = read_score(row.get("rejected_score", "rejected_score", "score_rejected"), "rejected_score")
    if (chosen, rejected) != (None, None) and example.scores == (None, None):
        return replace(example, scores=(chosen, rejected))
    return example
