"""What a column of a record holds, as far as its name tells: a part of prompt or reply, or something beside it."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

# Words of column names, as data sets call their columns. The first part with one of a name's words counts.
_PART_WORDS = {
    "media": "image images img imgs picture pictures pic pics photo photos pixel pixels "
    "video videos audio audios speech sound",
    "chat_template_kwargs": "",  # see part_of
    "tools": "tool tools function functions api apis",
    "system": "system sys developer persona preamble sistema système systeme системный 系统 システム 시스템",
    "history": "history past previous verlauf historial historique histórico история 历史 歷史 履歴",
    "messages": "messages message conversation conversations dialogue dialogues dialog dialogs chat turns thread "
    "сообщения диалог 对话 對話 会話 대화",
    "reply": "response responses output outputs answer answers completion completions generation generations reply "
    "replies assistant bot gpt chosen rejected preferred dispreferred solution solutions target targets reasoning "
    "thinking thought thoughts cot resp step steps prefix prefill continuation suffix "
    "antwort antworten ausgabe respuesta salida réponse reponse sortie resposta risposta ответ "
    "回答 回复 输出 出力 답변",
    "context": "context contexts ctx document documents doc docs passage passages article background schema table "
    "tables premise hypothesis choices options evidence knowledge "
    "kontext contexto contexte contesto контекст 上下文 背景 文脈 맥락",
    "prompt": "prompt prompts instruction instructions question questions query queries input inputs user human "
    "problem problems text texts post content request task ask "
    "frage fragen anweisung eingabe pregunta instrucción instruccion entrada consigne entrée entree pergunta instrução "
    "instrucao domanda istruzione вопрос инструкция 问题 問題 提示 指令 输入 輸入 質問 指示 入力 질문 지시 입력",
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
groups fingerprint format choice lang langs style styles class classes intent intents sentiment train training
trainable loss mask masked
类型 編號 编号 来源 來源 评分 分数 得分 质量 语言 语种 标签 长度 数量
"""
_BESIDE = frozenset(_BESIDE_WORDS.split())
# Objects in columns of such names are looked into: extra_info, metadata.
_CONTAINERS = frozenset(["meta", "metadata", "info"])
# With one word as their value, these name a person, a kind or the like: `task: math`, `user: ann`.
_LABEL_WORDS = "task user human bot gpt assistant target persona thread background post"
_MAY_LABEL = frozenset(_LABEL_WORDS.split())
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[^\W\d_]+")
_WORD_BEYOND_ASCII = re.compile(r"[^\W\d_]+")

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
    """The words of a name, also of names without a border between them (systemprompt) and of Chinese."""
    found = (_WORD if name.isascii() else _WORD_BEYOND_ASCII).findall(name)
    return [part for word in found for part in _known_parts(word.lower())]


def _known_parts(word: str) -> list[str]:
    if word in _PARTS or word in _BESIDE:
        return [word]
    if not word.isascii():
        return [known for known in (*_PARTS, *_BESIDE) if not known.isascii() and known in word] or [word]
    for end in range(3, len(word) - 1):
        if all(half in _PARTS or half in _BESIDE for half in (word[:end], word[end:])):
            return [word[:end], word[end:]]
    return [word]


@lru_cache(4096)
def part_of(name: str) -> str | None:
    """The part of prompt or reply that a column of this name holds: a key of KEYS_OF, or None for other columns."""
    words = _words(name)
    if "kwargs" in words:  # those of sampling and of environments are no part
        return "chat_template_kwargs" if "template" in words else None
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


def part_within(name: str, value: Any) -> str | None:
    """Like part_of, of a key of an object in a column; facts about the record have such keys, too."""
    part = None if is_label(name, value) else part_of(name)
    return None if part == "context" and isinstance(value, str) and len(value.split()) == 1 else part


@lru_cache(4096)
def holds_others(name: str) -> bool:
    """Whether an object in a column of this name may hold anything, unlike scores, annotations and the like."""
    return _BESIDE.intersection(_words(name)) <= _CONTAINERS


@lru_cache(4096)
def tells_about(name: str) -> bool:
    """Whether a key of this name tells about a message: id, created_at, tokenCount."""
    return not _BESIDE.isdisjoint(_words(name))


_TRAINED = frozenset(["train", "trained", "training", "trainable", "learn", "loss", "weight"])
_MASKED = frozenset(["mask", "masked", "ignore", "ignored", "skip"])
_AROUND_MARKS = "is do to on in for this turn message reply use should be"


@lru_cache(4096)
def training_mark(name: str) -> str | None:
    """Whether a key of a message says if it is to be trained: "trained" or "masked", or None."""
    words = frozenset(_words(name))
    if not words <= _TRAINED | _MASKED | set(_AROUND_MARKS.split()):
        return None
    return "trained" if words & _TRAINED else "masked" if words & _MASKED else None


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
