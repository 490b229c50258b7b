"""What a column of a record holds, as far as its name tells: a part of prompt or reply, or something beside it."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

# Words of column names, as data sets call their columns. The first part with one of a name's words counts.
_PART_WORDS = {
    "media": "image images img imgs picture pictures pic pics photo photos pixel pixels "
    "video videos audio audios speech sound",
    "chat_template_kwargs": "kwargs",
    "tools": "tool tools function functions api apis",
    "system": "system sys developer persona preamble 系统",
    "history": "history past previous 历史",
    "messages": "messages message conversation conversations dialogue dialogues dialog dialogs chat turns thread",
    "reply": "response responses output outputs answer answers completion completions generation generations reply "
    "replies assistant bot gpt chosen rejected preferred dispreferred solution solutions target targets reasoning "
    "thinking thought thoughts cot resp 回答 回复 输出",
    "context": "context contexts ctx document documents doc docs passage passages article background schema table "
    "tables premise hypothesis choices options evidence knowledge",
    "prompt": "prompt prompts instruction instructions question questions query queries input inputs user human "
    "problem problems text texts post content request task ask 问题 提示 指令 输入",
}
_PARTS = {word: (rank, part) for rank, (part, words) in enumerate(_PART_WORDS.items()) for word in words.split()}

# With one of these, a name tells about a part (prompt_id, chosen_score) and is none itself.
_BESIDE_WORDS = """
id ids idx index uid uuid guid key hash sha source sources src origin provenance type types kind category categories
topic topics domain subset split dataset language lang locale score scores rating ratings rank ranking reward rewards
margin weight weights length len lengths count counts num n nr number tokens token model models name names author url
urls link date time timestamp created updated version label labels tag tags flag flags is has was difficulty level
quality annotator annotators annotation annotations labelling labeling judge critique feedback metadata meta info
original raw status logps logprob logprobs embedding embeddings policy license file path filename size order group
groups
"""
_BESIDE = frozenset(_BESIDE_WORDS.split())
# With one word as their value, these name a person, a kind or the like: `task: math`, `user: ann`.
_LABEL_WORDS = "task user human bot gpt assistant target persona thread background post"
_MAY_LABEL = frozenset(_LABEL_WORDS.split())
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[^\W\d_]+")

# The keys of `columns` that may read a part.
KEYS_OF = {
    "media": (),
    "chat_template_kwargs": ("chat_template_kwargs",),
    "tools": ("tools",),
    "system": ("system",),
    "history": ("history", "messages"),
    "messages": ("messages", "history"),
    "reply": ("response",),
    "context": ("query", "context"),
    "prompt": ("prompt", "query"),
}


def _words(name: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(name)]


@lru_cache(4096)
def part_of(name: str) -> str | None:
    """The part of prompt or reply that a column of this name holds: a key of KEYS_OF, or None for other columns."""
    words = _words(name)
    found = [_PARTS[word] for word in words if word in _PARTS]
    if not found:
        return None
    # image_path and audio_file hold the picture itself
    if min(found)[1] != "media" and not _BESIDE.isdisjoint(words):
        return None
    return min(found)[1]


def is_label(name: str, value: Any) -> bool:
    """Whether a column holds a name or a kind, not a text for the model."""
    return name.lower() in _MAY_LABEL and isinstance(value, str) and value.isascii() and len(value.split()) == 1


def may_be_prompt(name: str, value: Any) -> bool:
    """Whether a column might be the prompt of a record in which no other is: anything but ids, sources and the like."""
    is_long = isinstance(value, str) and (len(value.split()) > 3 or not value.isascii())
    return is_long or _BESIDE.isdisjoint(_words(name))


@lru_cache(4096)
def not_used(name: str) -> str:
    """The note of a record with this column, which nothing reads."""
    return f"with the column {name} not used"


_BLANK = frozenset(["", "[]", "{}", "null", '""'])


def is_empty(value: Any) -> bool:
    """Whether a value holds nothing: null, blank text, JSON text of an empty list, or a list or object of such."""
    if value is None:
        return True
    if isinstance(value, str):
        return value.strip() in _BLANK
    if isinstance(value, dict):
        return all(is_empty(inner) for inner in value.values())
    return isinstance(value, (list, tuple)) and all(is_empty(inner) for inner in value)


def leaves(value: Any, skip: frozenset[str] = frozenset()) -> list[str]:
    """Every text in a value, in order.

    Args:
        value: text, or nested lists and objects.
        skip: keys whose values are left out.
    """
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for key, inner in value.items() if key not in skip for text in leaves(inner, skip)]
    if isinstance(value, (list, tuple)):
        return [text for inner in value for text in leaves(inner, skip)]
    return []
