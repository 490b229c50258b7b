"""CValues: a conversation whose last message carries both answers."""

from __future__ import annotations

from collections.abc import Mapping

from dsdpo.data.dropped import Dropped
from dsdpo.data.example import Example, Message
from dsdpo.data.formats.columns import Columns
from dsdpo.data.formats.dialogues import pair_of_texts, preference
from dsdpo.data.formats.trl import LOOSE_ROLES
from dsdpo.data.formats.written import read_conversation
from dsdpo.data.messages import read_message, read_score, user


def cvalues(row: Columns, tags: Mapping[str, str]) -> Example:
    """CValues: `messages` whose last one has chosen_value and rejected_value; or prompt, pos_resp and neg_resp.

    Earlier turns say the same on both sides: in `value`, or in an equal chosen_value and rejected_value. Other keys
    of the last message hold for both sides; of those with chosen_ or rejected_ in front, each side gets its own.
    """
    messages = read_conversation(row.get("messages"))
    if messages is None or messages == "":
        question = row.text("prompt")
        return pair_of_texts(user(question), question, row.text("chosen"), row.text("rejected"))
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise Dropped("no_messages", type(messages).__name__)
    earlier, last = messages[:-1], messages[-1]
    if _cvalues_role(last) != "assistant":
        raise Dropped("last_is_no_reply")
    for key in ("chosen_value", "rejected_value"):
        if last.get(key) is None:
            raise Dropped("last_lacks", what=key)
    better, worse = (_cvalues_message(_side_of(last, side)) for side in ("chosen", "rejected"))
    scores = (better.pop("score", None), worse.pop("score", None))
    return preference(
        [_cvalues_turn(turn) for turn in earlier],
        [better],
        [worse],
        scores=(read_score(scores[0], "chosen_score"), read_score(scores[1], "rejected_score")),
    )


def _cvalues_role(message: Message) -> str:
    said = str(message.get("role", message.get("from")))
    if said not in LOOSE_ROLES:
        raise Dropped("unknown_role", f"{said!r}; allowed: {', '.join(LOOSE_ROLES)}")
    return LOOSE_ROLES[said]


def _cvalues_message(message: Message) -> Message:
    role_key = "role" if message.get("role") is not None else "from"
    content_key = "value" if message.get("value") is not None else "content"
    return read_message(message, role_key, content_key, LOOSE_ROLES)


def _side_of(message: Message, side: str) -> Message:
    """A message of both sides as that of one: chosen_value becomes value, and so on; the other side's keys go."""
    own = {key: value for key, value in message.items() if not key.startswith(("chosen_", "rejected_"))}
    for key, value in message.items():
        if key.startswith(f"{side}_") and value is not None:
            bare = key.removeprefix(f"{side}_")
            if own.get(bare) not in (None, "", value):
                raise Dropped("message_says_two", f"{own[bare]!r} and {value!r}", bare)
            own[bare] = value
    return own


def _cvalues_turn(message: Message) -> Message:
    """An earlier turn, which must be the same on both sides but for its scores."""
    for key in message:
        other = key.replace("rejected_" if key.startswith("rejected_") else "chosen_", "", 1)
        if other not in (key, "score") and message.get(f"chosen_{other}") != message.get(f"rejected_{other}"):
            raise Dropped("earlier_turn_differs")
    return _cvalues_message(_side_of(message, "chosen"))
