"""Records of supervised training -> Example with the replies to train, or Dropped with a reason.

Pure functions, one per format, as in `preference`. A dialogue becomes a prompt, up to its first reply that is trained,
and one completion: the turns from there to the last such reply.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from dsdpo.data.dropped import Dropped
from dsdpo.data.example import MAX_COMPLETIONS, Example, Message
from dsdpo.data.formats.columns import Columns
from dsdpo.data.formats.conversations import conversation, history_of, keys_of, one_answer, sql_prompt
from dsdpo.data.formats.dialogues import REPEATED, without_prompt
from dsdpo.data.formats.written import read_conversation, read_list, read_written
from dsdpo.data.messages import assistant, check_prompt, check_reply_keys, in_order, says_nothing, user
from dsdpo.data.turns import is_trained

AFTER_LAST = "with turns after the last reply (left out)"
LAST_NOT_TRAINED = "whose last reply is not trained"


def alpaca(row: Columns, tags: Mapping[str, str]) -> Example:
    """Instruction, optional input and history, output. The replies of the history are trained, too."""
    parts = [row.text("prompt"), row.optional_text("query")]
    question = "\n".join(part for part in parts if part)
    return _dialogue([*history_of(row.get("history")), *user(question), *_reply(row.get("response"), "output")])


def sharegpt(row: Columns, tags: Mapping[str, str]) -> Example:
    """A conversation, with the roles and keys that the tags name, or the usual ones."""
    messages = read_conversation(row.get("messages"))
    if not isinstance(messages, list):
        raise Dropped("no_messages", type(messages).__name__)
    return _dialogue(conversation(messages, keys_of(messages, tags)))


def trl(row: Columns, tags: Mapping[str, str]) -> Example:
    """`prompt` and `completion`, both text or both messages; what the completion says is trained."""
    prompt, completion = (read_written(row.get(key), what) for key, what in _PROMPT_AND_COMPLETION)
    if prompt is None or completion is None:
        raise Dropped("column_missing", what="prompt" if prompt is None else "completion")
    return _answered(prompt, [completion])


_PROMPT_AND_COMPLETION = (("prompt", "prompt"), ("response", "completion"))


def several(row: Columns, tags: Mapping[str, str]) -> Example:
    """A prompt with several answers, all of which are trained."""
    prompt, completions = read_written(row.get("prompt"), "prompt"), read_list(row.get("completions"), "completions")
    if prompt is None:
        raise Dropped("column_missing", what="prompt")
    if not isinstance(completions, list):
        raise Dropped("no_answers", type(completions).__name__)
    if not 1 <= len(completions) <= MAX_COMPLETIONS:
        raise Dropped("number_of_answers", f"{len(completions)}; 1 to {MAX_COMPLETIONS} are read")
    return _answered(prompt, [read_written(some, "completions") for some in completions])


def text_to_sql(row: Columns, tags: Mapping[str, str]) -> Example:
    """Question, context (the CREATE TABLE statements) and answer."""
    return _dialogue([*user(sql_prompt(row)), *assistant(row.text("answer"))])


def text(row: Columns, tags: Mapping[str, str]) -> Example:
    """A text, all of which is trained."""
    return _example("", [row.text("prompt")], ())


FORMATS: dict[str, Callable[[Columns, Mapping[str, str]], Example]] = {
    "alpaca": alpaca,
    "sharegpt": sharegpt,
    "openai": sharegpt,
    "trl": trl,
    "several": several,
    "text_to_sql": text_to_sql,
    "text": text,
}
TEXT_FORMATS = {"text": text, "alpaca": text}


def _reply(value: Any, side: str) -> list[Message]:
    """The reply of a record: text, or one message."""
    if isinstance(value, list) and not all(isinstance(some, dict) for some in value):
        raise Dropped("pairs_not_replies", side)
    found = one_answer(value, side)
    return assistant(found) if isinstance(found, str) else found


def _answered(prompt: Any, completions: Sequence[Any]) -> Example:
    """A prompt with completions, each text or messages."""
    if isinstance(prompt, str) and not prompt.strip():
        raise Dropped("empty_prompt")
    if isinstance(prompt, str) and all(isinstance(some, str) for some in completions):
        rests = without_prompt(prompt, *completions)
        if rests and any(rest[:1].isspace() for rest in rests):
            prompt = prompt.rstrip()  # the answers have the space that follows it
        return _example(prompt, rests or completions, (REPEATED,) if rests else ())
    turns = user(prompt) if isinstance(prompt, str) else conversation(prompt if isinstance(prompt, list) else [prompt])
    answers = [assistant(some) if isinstance(some, str) else _turns_of(some) for some in completions]
    bare = [rest for some in answers if (rest := _after(some, turns)) is not None]
    whole = len(bare) == len(answers)
    return _example(turns, bare if whole else answers, (REPEATED,) if whole else ())


def _turns_of(value: Any) -> list[Message]:
    if not isinstance(value, (list, dict)):
        raise Dropped("not_text_or_messages", type(value).__name__, "completion")
    return conversation(value if isinstance(value, list) else [value])


def _after(turns: list[Message], prompt: list[Message]) -> list[Message] | None:
    """What follows the prompt in a completion that is a whole dialogue; None where it does not begin with it."""
    return turns[len(prompt) :] if len(turns) > len(prompt) and turns[: len(prompt)] == prompt else None


def _dialogue(turns: list[Message]) -> Example:
    """A whole conversation, all of whose replies are trained but those marked otherwise."""
    trained = [number for number, message in enumerate(turns) if is_trained(message)]
    if not any(message["role"] == "assistant" for message in turns):
        raise Dropped("no_reply_in_it", ", ".join(dict.fromkeys(message["role"] for message in turns)) or "no message")
    if not trained:
        raise Dropped("nothing_trained")
    first, last = trained[0], trained[-1]
    notes = () if turns[-1]["role"] == "assistant" else (AFTER_LAST,)
    if any(message["role"] == "assistant" for message in turns[last + 1 :]):
        notes = (*notes, LAST_NOT_TRAINED)
    return _example(turns[:first], [turns[first : last + 1]], notes)


def _example(prompt: Any, completions: Sequence[Any], notes: tuple[str, ...]) -> Example:
    return Example(prompt, tuple(completions), (None,) * len(completions), notes=notes, compares=False)


def checked(example: Example) -> Example:
    """The example, if its turns are in order and each of its replies says something."""
    if isinstance(example.prompt, str):
        if not all(str(some).strip() for some in example.completions):
            raise Dropped("empty_reply" if example.prompt else "empty_text")
        return example
    prompt = check_prompt(example.prompt)
    completions = []
    notes: dict[str, None] = dict.fromkeys(example.notes)
    for turns in example.completions:
        assert not isinstance(turns, str)
        trained = [message for message in turns if is_trained(message)]
        if not trained:
            raise Dropped("nothing_trained")
        if any(says_nothing(message) for message in trained):
            raise Dropped("empty_reply")
        if in_order([*prompt, *turns])[: len(prompt)] != prompt or turns[0]["role"] != "assistant":
            raise Dropped("roles_do_not_alternate", f"{turns[0]['role']} after {prompt[-1]['role']}")
        notes |= {note: None for message in trained if len(message) > 2 for note in check_reply_keys(message)}
        last = max(number for number, message in enumerate(turns) if is_trained(message))
        completions.append(turns[: last + 1])
    return replace(example, prompt=prompt, completions=tuple(completions), notes=tuple(notes))


def last_reply_alone(example: Example) -> Example:
    """The example with only the last reply of each dialogue trained: `mask_history`."""
    dialogues = [turns for turns in example.completions if not isinstance(turns, str)]
    if isinstance(example.prompt, str) or not any(len(turns) > 1 for turns in dialogues):
        return example
    if len(dialogues) == 1:
        *history, last = dialogues[0]
        return replace(example, prompt=[*example.prompt, *history], completions=([last],))
    marked = ([*({**message, "train": False} for message in turns[:-1]), turns[-1]] for turns in dialogues)
    return replace(example, completions=tuple(marked))
