"""alpaca, sharegpt, ranked answers, text-to-SQL and OpenAI's format: a conversation beside its answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from dsdpo.data.dropped import Dropped
from dsdpo.data.example import Example, Message
from dsdpo.data.formats.columns import Columns
from dsdpo.data.formats.detect import TAGS
from dsdpo.data.formats.dialogues import REPEATED, pair_of_texts, preference, ranking, without_prompt
from dsdpo.data.formats.names import is_empty, not_used, part_of
from dsdpo.data.formats.trl import LOOSE_ROLES
from dsdpo.data.formats.written import is_messages, read_conversation, read_list, read_written
from dsdpo.data.messages import assistant, read_message, read_score, read_tools, reply, text_of, user

# (key of the role, key of the content, role in the data -> ours)
_Keys: TypeAlias = tuple[str, str, Mapping[str, str]]
Tools: TypeAlias = list[dict[str, Any]] | None
SQL_PROMPT = "Write one SQL query that answers the question.\n\nSchema:\n{context}\n\nQuestion: {question}"


def alpaca(row: Columns, tags: Mapping[str, str]) -> Example:
    """Instruction, optional input and history; `output: [better, worse]`, or chosen and rejected."""
    parts = [row.text("prompt"), row.optional_text("query")]
    question = "\n".join(part for part in parts if part)
    chosen, rejected = row.get("chosen"), row.get("rejected")
    prompt = [*history_of(row.get("history")), *user(question)]
    if is_empty(chosen) and is_empty(rejected):
        answers = read_list(row.get("response"), "output")
        scores = row.get("scores") if "scores" in row.columns else None
        if isinstance(answers, list) and (len(answers) > 2 or scores is not None):
            return _ranking(prompt, question, answers, scores)
        if isinstance(answers, list) and len(answers) == 2:
            chosen, rejected = answers
        elif chosen is None or rejected is None:
            raise Dropped("no_pair")
    return _pair(prompt, question, one_answer(chosen, "chosen"), one_answer(rejected, "rejected"))


def one_answer(value: Any, side: str, keys: _Keys | None = None) -> str | list[Message]:
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
    return reply(conversation(messages, keys), side)


def _pair(prompt: list[Message], question: str, chosen: str | list[Message], rejected: str | list[Message]) -> Example:
    """An example of two answers to a question, which ends the prompt."""
    if isinstance(chosen, str) and isinstance(rejected, str):
        return pair_of_texts(prompt, question, chosen, rejected)
    better, worse = (assistant(side) if isinstance(side, str) else side for side in (chosen, rejected))
    return preference(prompt, better, worse)


def ranked(row: Columns, tags: Mapping[str, str]) -> Example:
    """Several answers to a prompt, the best first, or with a score each; as text they stand as they are."""
    prompt = read_written(row.get("prompt"), "prompt")
    answers = read_list(row.get("completions"), "completions")
    if prompt is None:
        raise Dropped("column_missing", what="prompt")
    if not isinstance(answers, list):
        raise Dropped("no_answers", type(answers).__name__)
    if isinstance(prompt, str):
        is_text = all(isinstance(read_written(answer, "completions"), str) for answer in answers)
        return _ranking(prompt if is_text else user(prompt), prompt, answers, row.get("scores"))
    turns = conversation(prompt if isinstance(prompt, list) else [prompt])
    return _ranking(turns, (turns[-1]["content"] or "") if turns else "", answers, row.get("scores"))


def _ranking(prompt: str | list[Message], question: str, answers: Sequence[Any], scores: Any) -> Example:
    """An example of ranked answers to a question, which ends the prompt."""
    read = [one_answer(answer, "completions") for answer in answers]
    texts = [answer for answer in read if isinstance(answer, str)]
    rests = without_prompt(question, *texts) if len(texts) == len(read) else None
    known = _scores(scores, len(read))
    notes = (REPEATED,) if rests else ()
    if isinstance(prompt, str):
        if rests and any(rest[:1].isspace() for rest in rests):
            prompt = prompt.rstrip()  # the answers have the space that follows it
        return ranking(prompt, rests or texts, known, notes)
    turns = [assistant(answer) if isinstance(answer, str) else answer for answer in rests or read]
    return ranking(prompt, turns, known, notes)


def _scores(value: Any, n: int) -> list[float] | None:
    """A number for each of n answers; None where there are none."""
    if is_empty(value):
        return None
    given = read_list(value, "scores")
    numbers = [read_score(score, "scores") for score in given] if isinstance(given, list) else []
    found = [number for number in numbers if number is not None]
    if len(found) != n or len(numbers) != n:
        raise Dropped("bad_score", f"{len(found)} numbers for {n} answers")
    return found


def history_of(value: Any) -> list[Message]:
    """Earlier turns: a list of [question, answer], or of messages; also as JSON text."""
    if is_empty(value):
        return []
    history = read_list(value, "history")
    if not isinstance(history, list):
        raise Dropped("bad_history")
    if is_messages(history):
        return conversation(history)
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
    keys = keys_of(messages, tags)
    prompt = conversation(messages, keys)
    question = (prompt[-1]["content"] or "") if prompt else ""
    chosen, rejected = (one_answer(row.get(side), side, keys) for side in ("chosen", "rejected"))
    return _pair(prompt, question, chosen, rejected)


def conversation(messages: Sequence[Any], keys: _Keys | None = None) -> list[Message]:
    """The messages of a conversation. keys: as `keys_of` gives them; None: as its first message has them."""
    if messages and isinstance(messages[0], str):
        messages = [read_written(raw, "a message") for raw in messages]
    keys = keys or keys_of(messages, {})
    return [read_message(raw, *keys) for raw in messages]


def keys_of(messages: Sequence[Any], tags: Mapping[str, str]) -> _Keys:
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
    return preference(user(sql_prompt(row)), assistant(row.text("answer")), assistant(""))


def sql_prompt(row: Columns) -> str:
    """The question of a text-to-SQL record, with its schema."""
    question, context = row.text("question"), row.text("context")
    if not question.strip():
        raise Dropped("empty_prompt")
    return SQL_PROMPT.format(context=context, question=question)


def openai(row: Columns, tags: Mapping[str, str]) -> Example:
    """OpenAI's preference format: `input` with messages and tools, `preferred_output` and `non_preferred_output`."""
    given = read_list(row.get("prompt"), "input")
    if isinstance(given, str):
        given = user(given)
    elif given is None:
        raise Dropped("column_missing", what="input")
    tools: Tools = None
    notes: tuple[str, ...] = ()
    if isinstance(given, dict) and "messages" in given:
        others = [str(key) for key, value in given.items() if key not in ("messages", "tools") and not is_empty(value)]
        if words := [key for key in others if part_of(key) and not isinstance(given[key], (bool, int, float))]:
            raise Dropped("wrapper_with_keys", ", ".join(words), "input")
        tools, notes = read_tools(given.get("tools")), tuple(not_used(f"input.{key}") for key in others)
        given = read_conversation(given["messages"])
    if not isinstance(given, list):
        raise Dropped("no_messages", type(given).__name__)
    prompt = conversation(given)
    question = (prompt[-1]["content"] or "") if prompt else ""
    example = _pair(prompt, question, *(one_answer(row.get(side), side) for side in ("chosen", "rejected")))
    return replace(example, tools=tools, notes=example.notes + notes)
