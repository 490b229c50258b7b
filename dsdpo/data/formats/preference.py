"""Records of the preference formats -> Example with a chosen and a rejected completion, or Dropped with a reason.

Pure functions, one per format. Each takes the record (through `Columns`) and the entry's `tags`. docs/formats.md shows
every format by example.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from dsdpo.data.dropped import Dropped
from dsdpo.data.example import Example, Message
from dsdpo.data.formats.columns import Columns
from dsdpo.data.formats.cvalues import cvalues
from dsdpo.data.formats.detect import READS, TAGS
from dsdpo.data.formats.dialogues import pair_of_texts, preference
from dsdpo.data.formats.names import is_empty, leaves, not_used, part_of
from dsdpo.data.formats.trl import LOOSE_ROLES, hh_rlhf, trl
from dsdpo.data.formats.written import is_messages, read_conversation, read_list, read_written
from dsdpo.data.messages import (
    TOOL_KEYS,
    assistant,
    check_prompt,
    check_reply_keys,
    has_thoughts,
    read_message,
    read_score,
    read_template_kwargs,
    read_tools,
    read_weight,
    reply,
    system_and,
    text_of,
    user,
)

# (key of the role, key of the content, role in the data -> ours)
_Keys: TypeAlias = tuple[str, str, Mapping[str, str]]
_Tools: TypeAlias = list[dict[str, Any]] | None
SQL_PROMPT = "Write one SQL query that answers the question.\n\nSchema:\n{context}\n\nQuestion: {question}"


def alpaca(row: Columns, tags: Mapping[str, str]) -> Example:
    """Instruction, optional input and history; `output: [better, worse]`, or chosen and rejected."""
    parts = [row.text("prompt"), row.optional_text("query")]
    question = "\n".join(part for part in parts if part)
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if is_empty(chosen) and is_empty(rejected):
        answers = read_list(row.get("response"), "output")
        if isinstance(answers, list) and len(answers) == 2:
            chosen, rejected = answers
        elif chosen is None or rejected is None:
            raise Dropped("no_pair")
    prompt = [*_history(row.get("history")), *user(question)]
    return _pair(prompt, question, _answer(chosen, "chosen"), _answer(rejected, "rejected"))


def _answer(value: Any, side: str, keys: _Keys | None = None) -> str | list[Message]:
    """An answer: text, or one assistant message."""
    if value is None:
        raise Dropped("column_missing", what=side)
    value = read_written(value, side)
    if not isinstance(value, (list, dict)):
        return text_of(value, side)
    messages = value if isinstance(value, list) else [value]
    if (
        keys
        and messages
        and isinstance(messages[0], dict)
        and keys[0] not in messages[0]
        and keys[1] not in messages[0]
    ):
        keys = None  # answers may be written in another way than the conversation
    return reply(_conversation(messages, keys), side)


def _pair(prompt: list[Message], question: str, chosen: str | list[Message], rejected: str | list[Message]) -> Example:
    """An example of two answers to a question, which ends the prompt."""
    if isinstance(chosen, str) and isinstance(rejected, str):
        return pair_of_texts(prompt, question, chosen, rejected)
    better, worse = (assistant(side) if isinstance(side, str) else side for side in (chosen, rejected))
    return preference(prompt, better, worse)


def _history(value: Any) -> list[Message]:
    """Earlier turns: a list of [question, answer], or of messages; also as JSON text."""
    if is_empty(value):
        return []
    history = read_list(value, "history")
    if not isinstance(history, list):
        raise Dropped("bad_history")
    if is_messages(history):
        return _conversation(history)
    turns: list[Message] = []
    for turn in history:
        if not isinstance(turn, (list, tuple)) or len(turn) != 2:
            raise Dropped("bad_history")
        turns += [*user(text_of(turn[0], "history")), *assistant(text_of(turn[1], "history"))]
    return turns


def sharegpt(row: Columns, tags: Mapping[str, str]) -> Example:
    """LLaMA-Factory's sharegpt: the conversation so far, and `chosen` and `rejected` as one message each."""
    messages = read_conversation(row.get("messages"))
    if not isinstance(messages, list):
        raise Dropped("no_messages", type(messages).__name__)
    keys = _keys(messages, tags)
    prompt = _conversation(messages, keys)
    question = (prompt[-1]["content"] or "") if prompt else ""
    chosen, rejected = (_answer(row.get(side), side, keys) for side in ("chosen", "rejected"))
    return _pair(prompt, question, chosen, rejected)


def _conversation(messages: Sequence[Any], keys: _Keys | None = None) -> list[Message]:
    if messages and isinstance(messages[0], str):
        messages = [read_written(raw, "a message") for raw in messages]
    keys = keys or _keys(messages, {})
    return [read_message(raw, *keys) for raw in messages]


def _keys(messages: Sequence[Any], tags: Mapping[str, str]) -> _Keys:
    """The keys of a conversation: those of the tags, else as its first message has them."""
    first = messages[0] if messages and isinstance(messages[0], dict) else {}
    openai = first.get("role") is not None and first.get(TAGS["role_tag"]) is None and not tags
    role_key = tags.get("role_tag") or ("role" if openai else TAGS["role_tag"])
    content_key = tags.get("content_tag") or ("content" if openai else TAGS["content_tag"])
    named = {ours: tags.get(f"{ours}_tag", TAGS[f"{ours}_tag"]) for ours in ("system", "user", "assistant")}
    roles = {said: ours for ours, said in named.items()}
    roles[tags.get("observation_tag", TAGS["observation_tag"])] = "tool"
    roles[tags.get("function_tag", TAGS["function_tag"])] = "function_call"
    return role_key, content_key, (_MORE_ROLES if tags else LOOSE_ROLES) | roles


_MORE_ROLES = {"developer": "system", "ipython": "tool"}  # which no tag names


def text_to_sql(row: Columns, tags: Mapping[str, str]) -> Example:
    """Question, context (the CREATE TABLE statements) and answer; the rejected side is empty on purpose."""
    question, context = row.text("question"), row.text("context")
    if not question.strip():
        raise Dropped("empty_prompt")
    content = SQL_PROMPT.format(context=context, question=question)
    return preference(user(content), assistant(row.text("answer")), assistant(""))


def openai(row: Columns, tags: Mapping[str, str]) -> Example:
    """OpenAI's preference format: `input` with messages and tools, `preferred_output` and `non_preferred_output`."""
    given = read_list(row.get("prompt"), "input")
    if isinstance(given, str):
        given = user(given)
    elif given is None:
        raise Dropped("column_missing", what="input")
    tools: _Tools = None
    notes: tuple[str, ...] = ()
    if isinstance(given, dict) and "messages" in given:
        others = [str(key) for key, value in given.items() if key not in ("messages", "tools") and not is_empty(value)]
        if words := [key for key in others if part_of(key) and not isinstance(given[key], (bool, int, float))]:
            raise Dropped("wrapper_with_keys", ", ".join(words), "input")
        tools, notes = read_tools(given.get("tools")), tuple(not_used(f"input.{key}") for key in others)
        given = read_conversation(given["messages"])
    if not isinstance(given, list):
        raise Dropped("no_messages", type(given).__name__)
    prompt = _conversation(given)
    question = (prompt[-1]["content"] or "") if prompt else ""
    example = _pair(prompt, question, *(_answer(row.get(side), side) for side in ("chosen", "rejected")))
    return replace(example, tools=tools, notes=example.notes + notes)


FORMATS: dict[str, Callable[[Columns, Mapping[str, str]], Example]] = {
    "alpaca": alpaca,
    "sharegpt": sharegpt,
    "trl": trl,
    "hh_rlhf": hh_rlhf,
    "cvalues": cvalues,
    "text_to_sql": text_to_sql,
    "openai": openai,
}


def to_example(
    row: Any,
    formatting: str,
    columns: Mapping[str, str],
    tags: Mapping[str, str],
    allow_empty_rejected: bool,
    ignore_columns: Sequence[str] = (),
) -> Example:
    """One record -> Example, with the checks that hold for every format.

    Args:
        row: the parsed record.
        formatting: a key of FORMATS.
        columns, tags, allow_empty_rejected, ignore_columns: of the set's entry.

    Raises:
        Dropped: with the reason; columns.NotRead where a column would be lost.
    """
    return read_record(row, formatting, columns, tags, allow_empty_rejected, ignore_columns)[0]


def read_record(
    row: Any,
    formatting: str,
    columns: Mapping[str, str],
    tags: Mapping[str, str],
    allow_empty_rejected: bool,
    ignore_columns: Sequence[str] = (),
) -> tuple[Example, Mapping[str, str]]:
    """Like to_example, and which columns were read: name in the record -> our name."""
    if not isinstance(row, dict):
        raise Dropped("not_object", type(row).__name__)
    seen = Columns(row, READS[formatting], columns, ignore_columns)
    try:
        example = _with_columns_beside(FORMATS[formatting](seen, tags), seen)
    except Dropped as dropped:
        if dropped.code == "column_missing":
            seen.account(None)
        raise
    if notes := seen.account(example):
        example = replace(example, notes=example.notes + notes)
    return _checked(example, allow_empty_rejected), seen.used


def _with_columns_beside(example: Example, row: Columns) -> Example:
    """Add what a record may have beside prompt and answers; text has no place for a system message or tools."""
    is_bare = isinstance(example.prompt, str) or not example.prompt or len(example.prompt[0]) == 2
    if is_bare and row.all_read:
        return example
    if not isinstance(example.prompt, str):
        prompt, own = example.prompt, example.tools
        if not is_bare:
            prompt, own = _with_tools_of_first(prompt, own)
        system = row.optional_text("system")
        if system and is_empty(system):  # CSV files have "[]" and "null"
            system = ""
        tools = read_tools(row.get("tools"))
        kwargs = read_template_kwargs(row.get("chat_template_kwargs"))
        if system or tools or kwargs or prompt is not example.prompt:
            prompt, tools = system_and(system, prompt), _one_of(tools, own)
            example = replace(example, prompt=prompt, tools=tools, template_kwargs=kwargs)
    if "weight" in row.columns:
        example = replace(example, weight=read_weight(row.get("weight")))
    if example.scores != (None, None):
        return example
    scores = tuple(read_score(row.get(key), key) for key in ("chosen_score", "rejected_score"))
    return example if scores == (None, None) else replace(example, scores=scores)


def _with_tools_of_first(prompt: list[Message], tools: _Tools) -> tuple[list[Message], _Tools]:
    """Tools that stand in the conversation's first message, as some data sets have them, become those of the record."""
    first = prompt[0]
    if all(is_empty(first.get(key)) for key in TOOL_KEYS):
        return prompt, tools
    for key in TOOL_KEYS:
        tools = _one_of(read_tools(first.get(key)), tools)
    return [{key: value for key, value in first.items() if key not in TOOL_KEYS}, *prompt[1:]], tools


def _one_of(tools: _Tools, other: _Tools) -> _Tools:
    if tools and other and tools != other:
        raise Dropped("two_tools", ", ".join(str(tool.get("function", tool))[:40] for tool in (tools[0], other[0])))
    return tools or other


def _checked(example: Example, allow_empty_rejected: bool) -> Example:
    """The example, if it has a prompt that a reply may follow and two different replies."""
    if isinstance(example.prompt, str):
        if not example.prompt.strip():
            raise Dropped("empty_prompt")
    elif (checked := check_prompt(example.prompt)) != example.prompt:
        example = replace(example, prompt=checked)
    chosen, rejected = example.completions
    if not isinstance(chosen, str) and not isinstance(rejected, str) and (len(chosen[0]) > 2 or len(rejected[0]) > 2):
        notes = (*example.notes, *check_reply_keys(chosen[0]), *check_reply_keys(rejected[0]))
        example = replace(example, notes=tuple(dict.fromkeys(notes)))
    if _is_empty(chosen):
        raise Dropped("empty_chosen")
    if _is_empty(rejected):
        if not allow_empty_rejected:
            raise Dropped("empty_rejected")
        if not isinstance(rejected, str) and leaves(rejected, _NO_WORDS):
            raise Dropped("empty_with_keys", ", ".join(rejected[0]))
        if rejected not in ("", _NOTHING):
            rejected = "" if isinstance(rejected, str) else assistant("")
            example = replace(example, completions=(chosen, rejected))
    if chosen == rejected:
        raise Dropped("same")
    return example


_NOTHING = assistant("")
_NO_WORDS = frozenset(["role", "content", "name"])


def _is_empty(completion: str | list[Message]) -> bool:
    if isinstance(completion, str):
        return not completion.strip()
    message = completion[0]
    if (message["content"] or "").strip():
        return False
    return len(message) == 2 or ("tool_calls" not in message and not has_thoughts(message))
