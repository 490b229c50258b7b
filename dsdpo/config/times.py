"""Times as options write them: `1d2h30m5s`."""

from __future__ import annotations

import re

TIME_WORDS = "a time above 0 with its units, such as 1d12h, 3h50m, 90m or 45s"
_TIME = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")
_CLOCK = re.compile(r"(?:(\d+)-)?(\d+):(\d\d)(?::(\d\d))?")  # SLURM's `1-12:00:00`


def seconds_of(text: str) -> float:
    """Of a time such as `1d2h30m5s`; 0 when it is none."""
    found = _TIME.fullmatch(text)
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups()) if found else (0, 0, 0, 0)
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def check_time(text: str | None) -> str | None:
    """The same text, if it is a time or empty. Raises ValueError."""
    if text is None or not text.strip():
        return None
    if not seconds_of(text):
        raise ValueError(f"must be {TIME_WORDS}")
    return text


def time_hint(text: str) -> str:
    """`did you mean x? ` for a number without a unit and for a clock's form, or an empty string."""
    if text.isdigit() and int(text):
        return f"did you mean {text}s or {text}m? "
    if clock := _CLOCK.fullmatch(text):
        parts = ((value, unit) for value, unit in zip(clock.groups(), "dhms") if int(value or 0))
        written = "".join(f"{int(value)}{unit}" for value, unit in parts)
        return f"did you mean {written}? " if written else ""
    compact = re.sub(r"\s+", "", text.lower())
    return f"did you mean {compact}? " if seconds_of(compact) else ""
