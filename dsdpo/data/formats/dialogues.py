"""What formats share: two whole dialogues with one beginning, and answers that repeat their prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dsdpo.data.dropped import Dropped
from dsdpo.data.example import MAX_COMPLETIONS, Example, Message
from dsdpo.data.formats.names import tells_about
from dsdpo.data.messages import assistant, system_and

REPEATED = "whose answers repeated the prompt (taken off)"


def preference(
    prompt: str | list[Message],
    chosen: str | list[Message],
    rejected: str | list[Message],
    tools: list[dict[str, Any]] | None = None,
    scores: tuple[float | None, float | None] = (None, None),
    notes: tuple[str, ...] = (),
) -> Example:
    """An example of two completions, the chosen one first."""
    return Example(prompt, (chosen, rejected), scores, tools=tools, notes=notes)


def ranking(
    prompt: str | list[Message],
    answers: Sequence[str | list[Message]],
    scores: Sequence[float] | None,
    notes: tuple[str, ...] = (),
) -> Example:
    """An example of several completions, the best first: as they stand, or by their scores.

    Raises:
        Dropped: too few or too many answers, or all have the same score.
    """
    if not 2 <= len(answers) <= MAX_COMPLETIONS:
        raise Dropped("number_of_answers", f"{len(answers)}; 2 to {MAX_COMPLETIONS} are ranked")
    if scores is None:
        return Example(prompt, tuple(answers), (None,) * len(answers), notes=notes)
    order = sorted(range(len(answers)), key=lambda i: -scores[i])
    if scores[order[0]] == scores[order[-1]]:
        raise Dropped("all_tied", str(scores[0]))
    return Example(prompt, tuple(answers[i] for i in order), tuple(scores[i] for i in order), notes=notes)


def split_dialogues(
    chosen: Sequence[Message], rejected: Sequence[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """Two whole dialogues -> (the turns that they share, rest of chosen, rest of rejected).

    Turns may differ in keys that tell about them (id, timestamp); those are left out.
    """
    shared, last = 0, min(len(chosen), len(rejected)) - 1
    while shared <= last and chosen[shared] == rejected[shared]:
        shared += 1
    turns = list(chosen[:shared])
    while shared < last and _is_same_turn(chosen[shared], rejected[shared]):
        turns.append(_common(chosen[shared], rejected[shared]))
        shared += 1
    if shared == len(chosen) == len(rejected):
        raise Dropped("same")
    if shared == len(chosen) or shared == len(rejected):
        raise Dropped("one_begins_the_other")
    if shared == 0 <= last and chosen[0]["role"] == rejected[0]["role"] == "system":
        raise Dropped("two_system_messages", _excerpts(chosen[0]["content"], rejected[0]["content"]))
    return turns, list(chosen[shared:]), list(rejected[shared:])


def _is_same_turn(a: Message, b: Message) -> bool:
    """Whether two messages say the same.

    Raises:
        Dropped: they differ in a key that a template may write.
    """
    if a == b:
        return True
    if (len(a) == 2 and len(b) == 2) or (a["role"], a["content"]) != (b["role"], b["content"]):
        return False
    differ = [key for key in {**a, **b} if a.get(key) != b.get(key)]
    if told := [key for key in differ if not _is_aside(key)]:
        raise Dropped("turns_differ", f"{', '.join(told)}, in a message of the role {a['role']}")
    return True


def _is_aside(key: str) -> bool:
    """Whether a key tells about a message and no template writes it."""
    return tells_about(key) and key not in ("name", "tool_call_id")


def _common(a: Message, b: Message) -> Message:
    return {key: value for key, value in a.items() if key in b and b[key] == value}


def _excerpts(one: str | None, other: str | None) -> str:
    return " and ".join(repr((text or "").strip()[:60]) for text in (one, other))


def split_after(
    prompt: list[Message], chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """Like split_dialogues, of a prompt beside answers that may be whole dialogues which begin with it.

    A system message that the prompt and the dialogues do not both have counts for all.
    """
    bare = _without_system(prompt)
    if not bare or not all(_begins(_without_system(side), bare) for side in (chosen, rejected)):
        return prompt, chosen, rejected
    for side in (chosen, rejected):
        if side[0]["role"] == "system":
            prompt = system_and(side[0]["content"] or "", prompt, "two_system_messages")
    n = len(bare)
    better, worse = _without_system(chosen)[n:], _without_system(rejected)[n:]
    shared, better, worse = split_dialogues(better, worse)
    return [*prompt, *shared], better, worse


def _without_system(messages: list[Message]) -> list[Message]:
    return messages[1:] if messages and messages[0]["role"] == "system" else messages


def _begins(dialogue: list[Message], prompt: list[Message]) -> bool:
    return len(dialogue) >= len(prompt) and all(_same(a, b) for a, b in zip(dialogue, prompt))


def _same(a: Message, b: Message) -> bool:
    """Whether two messages are the same but for spaces in their content, and keys that tell about them."""
    if a == b:
        return True
    return says(a, b["content"]) and all(
        a.get(key) == b.get(key) for key in {**a, **b} if key != "content" and not _is_aside(key)
    )


def says(message: Message, text: Any) -> bool:
    """Whether a message has this content, but for spaces."""
    return isinstance(text, str) and (message["content"] or "").split() == text.split()


def is_one_reply(messages: Sequence[Message]) -> bool:
    """Whether this is an assistant message alone."""
    return len(messages) == 1 and messages[0]["role"] == "assistant"


def without_prompt(prompt: str, *answers: str) -> tuple[str, ...] | None:
    """The answers without the prompt that all begin with; None if one of them does not.

    Spaces around the prompt may differ. An answer that goes on in the middle of a word does not repeat the prompt.
    """
    start = prompt.strip()
    bare = [answer.lstrip() for answer in answers]
    if not start or not all(answer.startswith(start) for answer in bare):
        return None
    rests = tuple(answer[len(start) :] for answer in bare)
    if _is_word(start[-1]) and any(_is_word(rest[:1]) for rest in rests):
        return None
    space = prompt[len(prompt.rstrip()) :]
    if space and all(rest.startswith(space) for rest in rests):
        return tuple(rest[len(space) :] for rest in rests)
    return rests


def _is_word(character: str) -> bool:
    return character.isascii() and character.isalnum()


def pair_of_texts(prompt: list[Message], question: str, chosen: str, rejected: str) -> Example:
    """A conversation with two answers in text, with the question taken off where both repeat it."""
    rests = without_prompt(question, chosen, rejected)
    better, worse = rests or (chosen, rejected)
    return preference(prompt, assistant(better), assistant(worse), notes=(REPEATED,) if rests else ())
