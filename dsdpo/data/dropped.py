"""Why a record is dropped: each reason with its code, its words, and what would keep the record."""

from __future__ import annotations

from typing import NamedTuple


class Reason(NamedTuple):
    """Words for a reason.

    Attributes:
        text: `{what}` in it stands for a column, a side or the like.
        remedy: what would keep such records: an option, an entry, a repair.
        fatal: one such record ends the preparation (65), whatever max_refused allows.
    """

    text: str
    remedy: str = ""
    fatal: bool = False


class Dropped(Exception):
    """A record that cannot be used.

    Attributes:
        code: a key of REASONS. Tests and other programs compare it.
        reason: its words; dropped records are counted by them.
        detail: what is special about this record, or an empty string.
        remedy: what would keep the record, or an empty string.
    """

    def __init__(self, code: str, detail: str = "", what: str = "") -> None:
        text, self.remedy, _ = REASONS[code]
        self.code, self.reason, self.detail = code, text.format(what=what), detail
        super().__init__(f"{self.reason}: {detail}" if detail else self.reason)


# key of the object that stands for a value which no format can take for text
NOT_TEXT = "no text"


def kind_of(value: object) -> str:
    """What a value is that is not text, in words."""
    if isinstance(value, dict) and set(value) == {NOT_TEXT}:
        return str(value[NOT_TEXT])
    return type(value).__name__


_SIDES = "both sides must continue the same turns with one assistant message each"
REASONS = {
    # the record and its columns
    "not_json": Reason("not valid JSON"),
    "key_twice": Reason("a key stands twice in one object, with two values", "take one of them out"),
    "not_object": Reason("the record is no JSON object"),
    "named_column_missing": Reason("a column named in columns is missing", "correct columns in the entry"),
    "column_missing": Reason("no {what}"),
    "number_of_answers": Reason("a ranking with a number of answers that is not read"),
    "all_tied": Reason("all answers of a ranking have the same score"),
    "no_answers": Reason("no list of answers"),
    "not_text": Reason("{what} is not text"),
    "not_text_or_messages": Reason("{what} is neither text nor a list of messages"),
    "no_messages": Reason("no list of messages"),
    "no_pair": Reason("no pair of answers", "output must be [better, worse], or give chosen and rejected"),
    "bad_history": Reason("history is no list of [question, answer]", "name another column, or ignore_columns: [NAME]"),
    "bad_score": Reason("a score is no number"),
    "bad_weight": Reason("the weight is no number above 0", "take records out that are not to count"),
    # messages
    "message_not_object": Reason("a message is no object"),
    "unknown_role": Reason("unknown role"),
    "call_not_json": Reason("a function call is not JSON"),
    "call_without_name": Reason("a function call has no name"),
    "tools_not_json": Reason("tools is not JSON"),
    "tool_without_name": Reason("a tool has no name", "give each tool a name, or function: {name, ...}"),
    "tools_not_list": Reason("tools is no list of objects"),
    "roles_do_not_alternate": Reason("roles do not alternate"),
    "empty_message": Reason("empty message in the prompt"),
    "empty_prompt": Reason("empty prompt"),
    "prompt_ends_with_reply": Reason("the prompt does not end with a user message"),
    "several_replies": Reason("a side has more than one message after the prompt", _SIDES),
    "turns_differ": Reason(
        "a turn that chosen and rejected share has a key that differs", "make it equal, or take the key out"
    ),
    "reply_not_trained": Reason(
        "a reply is marked as not to be trained", "take such records out, or the key if the reply is to be trained"
    ),
    "no_reply": Reason("{what} is no assistant message"),
    "text_beside_messages": Reason(
        "prompt is text but chosen and rejected are messages, and none of their user messages says it",
        "ignore_columns: [prompt] takes the prompt from the messages",
    ),
    "same": Reason("chosen and rejected are the same"),
    "one_begins_the_other": Reason("one dialogue is the beginning of the other"),
    "not_hh": Reason('{what} does not begin with "Human:"'),
    "last_is_no_reply": Reason("the last message is no assistant message"),
    "last_lacks": Reason("the last message has no {what}"),
    "earlier_turn_differs": Reason("an earlier turn differs between chosen and rejected"),
    "empty_chosen": Reason("empty chosen"),
    "empty_rejected": Reason("empty rejected", "set allow_empty_rejected: true in the entry if it is meant"),
    "no_prompt": Reason("no prompt, no messages, and no question with context"),
    # what would be lost
    "column_not_read": Reason(
        "a column holds a part of the prompt or the reply, and the format does not read it",
        "give an entry that reads it, or name it in ignore_columns",
        fatal=True,
    ),
    "two_systems": Reason(
        "two system texts that differ, in a column and in a message",
        "name the column in ignore_columns, or take the message out",
        fatal=True,
    ),
    "two_system_messages": Reason("two system messages that differ, in prompt, chosen or rejected", _SIDES),
    "wrapper_with_keys": Reason(
        "{what} is an object around messages with other keys, which would be lost",
        "give them columns of their own beside the messages, or take them out",
    ),
    "tools_in_message": Reason("a message holds tools", "put them into the column tools, or into the first message"),
    "two_tools": Reason("two lists of tools that differ, in a column and with the messages", "take one of them out"),
    "message_says_two": Reason("a message has two keys for its {what}, which differ", "take one of them out"),
    "message_with_media": Reason(
        "a message holds more than text ({what})", "only text is trained on; take such records out", fatal=True
    ),
    "part_not_read": Reason(
        "the content of a message has a part that is not read ({what})",
        "give calls as tool_calls, results as tool messages, thoughts as reasoning_content before the text",
    ),
    "part_with_key": Reason("a text part of a message has a key that would be lost", "take the key out"),
    "empty_with_keys": Reason("the rejected message has no text but other keys", "give it a text, or take them out"),
    "python_repr": Reason(
        "{what} is a list or object as Python prints it (str(), pandas' to_csv), not JSON",
        "write the column with json.dumps, or the set as Parquet or JSON lines",
    ),
    "messages_not_json": Reason(
        "{what} begins like JSON of messages and is not valid JSON",
        "write the column with json.dumps, or the set as Parquet or JSON lines",
    ),
    "bad_template_kwargs": Reason("chat_template_kwargs is no object of template variables"),
    "calls_not_list": Reason("tool_calls is no list of objects"),
    # template and tokens
    "template_error": Reason("the chat template refuses the conversation"),
    "no_template": Reason("a conversation, but the tokenizer has no chat template", "set template"),
    "no_tools_in_template": Reason("tools need a chat template that knows them"),
    "template_leaves_out": Reason(
        "the chat template leaves out {what}",
        "set template to one that writes it (docs/formats.md), or take it out of the records",
    ),
    "prompt_differs": Reason(
        "the chat template writes the prompt in another way once the reply follows",
        "use a template for training, such as those in TRL's chat_templates, as a .jinja file",
    ),
    "already_rendered": Reason(
        "a text holds markers that open a turn: it was rendered before", "set template: none for rendered texts"
    ),
    "own_end": Reason(
        "the chat template ends this reply with another token than others of its kind",
        "set template to a .jinja file that ends each reply, and each reply with calls, with one token",
    ),
    "no_shared_token": Reason("prompt and completion share no token"),
    "end_inside": Reason("the end-of-turn token stands inside a completion"),
    "broken_unicode": Reason("broken Unicode"),
    "same_tokens": Reason("two completions are the same"),
    "content_not_found": Reason(
        "train_detail counts characters of a content that the chat template does not write as it is, once",
        "set template to one that writes it, or take train_detail out",
    ),
    "bad_train_detail": Reason(
        "train_detail is no list of objects with begin_offset and end_offset within the content, and train"
    ),
    "nothing_trained": Reason("no reply is to be trained", "take such records out"),
    "labelled_answer": Reason(
        "a label says whether the answer is good or bad, and the stage trains on every answer", fatal=True
    ),
    "bad_label": Reason("the label is neither true nor false", "write true for a good answer, false for a bad one"),
    "empty_text": Reason("an empty text"),
    "empty_reply": Reason("an empty reply", "take it out, or mark it with train: false"),
    "no_reply_in_it": Reason("no message of the assistant", "name the tags of the roles, or take such records out"),
    "pairs_not_replies": Reason(
        "the answer is a list of answers, which are ranked",
        "stage dpo and rm train on rankings; for supervised training of all, give prompt and completions",
    ),
    # lengths
    "no_loss": Reason("no token is left that the loss sees", "raise max_length, or mask less"),
    "too_long": Reason("longer than max_length", "raise max_length, or set truncation_mode: keep_end or keep_start"),
    "prompt_too_long": Reason(
        "the prompt alone reaches max_length", "raise max_length, or set truncation_mode: keep_end"
    ),
    "same_once_cut": Reason("two completions are the same once cut to max_length", "raise max_length"),
    "too_long_for_row": Reason("longer than max_tokens_per_row", "raise max_tokens_per_row"),
}
