"""What `template` may name. The texts of the named templates stand in data/named_templates.py."""

from __future__ import annotations

import difflib
from datetime import date

OWN = "default"
PLAIN = ("none", "gpt2")
NAMES = (
    "alpaca",
    "chatml",
    "cohere",
    "deepseek3",
    "gemma",
    "gemma2",
    "gemma3",
    "llama2",
    "llama3",
    "mistral",
    "phi",
    "phi3",
    "phi4",
    "qwen",
    "qwen3",
    "qwen3_nothink",
    "vicuna",
    "yi",
    "zephyr",
)
_SUFFIXES = (".jinja", ".jinja2", ".j2", ".txt", ".json")
_KNOWN = (OWN, *PLAIN, *NAMES)
TEMPLATE_WORDS = (
    f"one of {', '.join(_KNOWN)}, the path of a .jinja file, a model folder (./folder) or model id (org/name) whose "
    "chat template is taken, or the template itself"
)
DATE_WORDS = "a day such as 2026-11-26 (YYYY-MM-DD)"


def is_text(template: str) -> bool:
    """Whether it is a chat template itself, and not the name of one."""
    return "{%" in template or "{{" in template


def is_path(template: str) -> bool:
    """Whether the text is a path of a file, a model folder or a model id, and no name."""
    return not is_text(template) and (template.endswith(_SUFFIXES) or "/" in template or "\\" in template)


def check_template(template: str) -> str:
    """The same text, if it can be a template. Raises ValueError. Whether a file is there is seen when it is read."""
    if template in _KNOWN or is_text(template) or is_path(template):
        return template
    raise ValueError(f"{template_hint(template)}must be {TEMPLATE_WORDS}")


def template_hint(template: str) -> str:
    """`did you mean x? ` for the closest known name, or an empty string."""
    close = difflib.get_close_matches(template, _KNOWN, n=1)
    return f"did you mean {close[0]}? " if close else ""


def check_date(text: str | None) -> str | None:
    """The same text, if it is a day as YYYY-MM-DD or empty. Raises ValueError."""
    if not text:
        return None
    try:
        return date.fromisoformat(text).isoformat()
    except ValueError:
        raise ValueError(f"must be {DATE_WORDS}, or empty") from None
