"""The content of a message that is a list of parts, as OpenAI and Anthropic write it: its text and its thoughts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from dsdpo.data.dropped import Dropped, kind_of
from dsdpo.data.formats.names import is_empty, part_of

MEDIA = frozenset(["image", "images", "video", "videos", "audio", "audios"])
# type of a part -> keys of its text; the second and third are those of OpenAI's responses, `value` is LLaMA-Factory's
_TEXT = {"text": ("text", "value"), "input_text": ("text",), "output_text": ("text",), "refusal": ("refusal",)}
_THOUGHTS = {kind: (kind, "text", "value") for kind in ("thinking", "reasoning", "think", "thought")}
_CALL = "tool_call"  # LLaMA-Factory's: its value is JSON with name and arguments
_KINDS = _TEXT | _THOUGHTS | {_CALL: ("value",)}
_NO_WORDS = ("type", "signature")  # the second is Anthropic's proof that it wrote the thoughts


def are_parts(value: Any) -> bool:
    """Whether a value is a list of typed parts, of which at least one is text or thoughts and none is a message."""
    if not isinstance(value, list) or not all(isinstance(part, dict) and "role" not in part for part in value):
        return False
    known = [str(part.get("type")) in _KINDS and _said(part) is not None for part in value]
    return any(known) and all(known[i] or part_of(str(part.get("type"))) == "media" for i, part in enumerate(value))


class Parts(NamedTuple):
    """What a list of parts says."""

    text: str
    thoughts: str
    calls: tuple[str, ...]


def read_parts(parts: Sequence[Any]) -> Parts:
    """What a list of parts says, such as [{"type": "text", "text": "Hi"}].

    Raises:
        Dropped: a part is something else, or has a key that would be lost, or thoughts follow text.
    """
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[str] = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, dict):
            raise Dropped("not_text", f"a list of {kind_of(part)}", "message content")
        kind = str(part.get("type") or "text")
        said = _said(part)
        held = [k for k, value in part.items() if k not in (*_NO_WORDS, *_KINDS.get(kind, ())) and not is_empty(value)]
        if any(key in MEDIA for key in held) or part_of(kind) == "media" or kind in ("file", "document"):
            raise Dropped("message_with_media", ", ".join(held), kind if kind not in _TEXT else "part without text")
        if kind not in _KINDS or said is None:
            raise Dropped("part_not_read", ", ".join(held), kind if kind not in _KINDS else f"{kind} without text")
        if held:
            raise Dropped("part_with_key", ", ".join(held))
        if kind == _CALL:
            calls.append(said)
        elif kind in _TEXT and not calls:
            texts.append(said)
        elif calls or "".join(texts).strip():
            raise Dropped("part_not_read", f"it follows {'a call' if calls else 'text'}", kind)
        else:
            thoughts.append(said)
    return Parts("".join(texts), "\n\n".join(thoughts), tuple(calls))


def _said(part: dict[str, Any]) -> str | None:
    """What a part of text or thoughts says."""
    keys = _KINDS.get(str(part.get("type") or "text"), ())
    return next((part[key] for key in keys if isinstance(part.get(key), str)), None)


def thoughts_of(value: Any, key: str) -> str:
    """A reasoning key of a message that is a list or object: its one text.

    Raises:
        Dropped: it is something else; several texts could be put together in several ways.
    """
    inner = value[0] if isinstance(value, list) and len(value) == 1 else value
    keys = ("text", *_THOUGHTS)
    if isinstance(inner, dict) and all(name in (*keys, *_NO_WORDS) for name in inner):
        texts = [inner[name] for name in keys if not is_empty(inner.get(name))]
        inner = texts[0] if len(texts) == 1 else None
    if not isinstance(inner, str):
        raise Dropped("not_text", kind_of(value), key)
    return inner
