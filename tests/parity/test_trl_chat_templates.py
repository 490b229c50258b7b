"""Random conversations through every chat template that TRL ships: nothing that a record says is lost.

What must be found is words that stand once in a record, so the check here needs to know nothing of templates.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import random
import re
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from dsdpo.data.dropped import REASONS, Dropped
from dsdpo.data.example import Example
from dsdpo.data.templates import ExampleEncoder
from dsdpo.errors import ConfigError
from tests.unit.data.conftest import make_tokenizer

FOLDER = Path(next(iter(importlib.util.find_spec("trl").submodule_search_locations)), "chat_templates")
TEMPLATES = {path.stem: path.read_text() for path in sorted(FOLDER.glob("*.jinja"))}
_TOKEN = re.compile(
    r"<\|[^|<>\s]{1,40}\|?>|<[a-z_]{1,20}\|>|<[a-z]+_of_[a-z]+>|<\uff5c[^\uff5c\s]{1,40}\uff5c>|\[/?INST\]"
)
# They read contents as lists of parts and write nothing of a text.
ONLY_PARTS = {"idefics3", "idefics3_training", "llava_next", "llava_next_training", "smolvlm", "smolvlm_training"}
# They open the thoughts for a reply, and write an answered conversation without any.
NEVER_THE_SAME_PROMPT = {name for name in TEMPLATES if name.startswith("deepseek")}


def tokenizer_for(template: str) -> PreTrainedTokenizerFast:
    """Byte-level, with the special tokens that the template names."""
    tokenizer = make_tokenizer("llama", template)
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(set(_TOKEN.findall(template)))})
    return tokenizer


class Speaker:
    """Makes up records whose every word is a new one, and notes what must be found where."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.numbers = itertools.count()
        self.prompt: list[str] = []
        self.replies: tuple[list[str], list[str]] = ([], [])

    def text(self, found_in: list[str] | None) -> str:
        """One word, or one character, or words with what templates trim, escape or look for."""
        number = next(self.numbers)
        if self.random.random() < 0.2:
            word = chr(0x4E00 + number)
        else:
            word = f"Word{number}x"
        if found_in is not None:
            found_in.append(word)
        around = [
            "{}",
            "{}",
            " {}",
            "{}\n",
            "\n\n{} \n",
            '"{}" & <b>',
            "{}: {{'a': 1}}",
            "# {}\n\n- two",
            "\u00e4 {} \U0001f600",
        ]
        return self.random.choice(around).format(word)

    def call(self, found_in: list[str]) -> dict:
        name, key, value = (f"{kind}{next(self.numbers)}z" for kind in ("name", "key", "value"))
        found_in += [name, key, value]
        arguments: dict = {key: self.random.choice([value, [value], {"deep": value}, f"{value}\n'quoted' \"twice\""])}
        as_text = self.random.random() < 0.5
        function = {"name": name, "arguments": json.dumps(arguments) if as_text else arguments}
        return {"id": f"call{next(self.numbers):05d}", "type": "function", "function": function}

    def message(self, role: str, found_in: list[str], thoughts_in: list[str] | None, may_call: bool) -> dict:
        """thoughts_in: where thoughts must be found; None where templates may leave them out."""
        message: dict = {"role": role, "content": self.text(found_in)}
        if self.random.random() < 0.2:
            message["mood"] = self.text(None)
        if role != "assistant":
            return message
        if self.random.random() < 0.3:
            key = self.random.choice(["reasoning_content", "reasoning", "thinking"])
            message[key] = self.text(thoughts_in)
        elif self.random.random() < 0.3:
            message["content"] = f"<think>\n{self.text(thoughts_in)}\n</think>\n\n{message['content']}"
        if may_call:
            if self.random.random() < 0.5:
                found_in[:] = [word for word in found_in if word not in str(message["content"])]
                message["content"] = self.random.choice(["", None])
            message["tool_calls"] = [self.call(found_in) for _ in range(self.random.choice([1, 1, 2]))]
        return message

    def example(self) -> Example:
        """A record with two replies."""
        chance = self.random.random
        with_tools = chance() < 0.4
        messages = []
        if chance() < 0.4:
            messages.append(self.message("system", self.prompt, None, False))
        for _ in range(self.random.choice([0, 0, 1, 2])):
            messages.append(self.message("user", self.prompt, None, False))
            if with_tools and chance() < 0.5:
                messages.append(self.message("assistant", self.prompt, None, True))
                for call in messages[-1]["tool_calls"]:
                    answer = self.message("tool", self.prompt, None, False)
                    messages.append({**answer, "name": call["function"]["name"], "tool_call_id": call["id"]})
            messages.append(self.message("assistant", self.prompt, None, False))
        messages.append(self.message("user", self.prompt, None, False))
        tools = [self.tool() for _ in range(self.random.choice([1, 2]))] if with_tools else None
        replies = tuple(
            [self.message("assistant", found, found, with_tools and chance() < 0.4)] for found in self.replies
        )
        variables = self.random.choice([{}, {}, {"enable_thinking": False}])
        return Example(messages, replies, (None, None), tools=tools, template_kwargs=variables)

    def tool(self) -> dict:
        name = f"tool{next(self.numbers)}z"
        self.prompt.append(name)
        properties = {"city": {"type": "string", "description": "A city."}}
        parameters = {"type": "object", "properties": properties, "required": ["city"]}
        return {"type": "function", "function": {"name": name, "description": "Looks.", "parameters": parameters}}


def lost_words(speaker: Speaker, prompt: str, completions: list[str]) -> list[str]:
    """Words that are not on their side."""
    sides = [(speaker.prompt, prompt), *zip(speaker.replies, completions)]
    return [word for words, text in sides for word in words if word not in text]


def strays(speaker: Speaker, prompt: str, completions: list[str]) -> list[str]:
    """Words of a reply in the prompt, and of the prompt in a reply."""
    found = [word for words in speaker.replies for word in words if word in prompt]
    return found + [word for word in speaker.prompt if any(word in text for text in completions)]


def check(name: str, conversations: int) -> None:
    tokenizer = tokenizer_for(TEMPLATES[name])
    try:
        encoder = ExampleEncoder(tokenizer, "default", date="2026-01-31")
    except ConfigError as refused:
        assert name in ONLY_PARTS, refused
        return
    assert name not in ONLY_PARTS
    accepted = 0
    for seed in range(conversations):
        speaker = Speaker(seed)
        example = speaker.example()
        found = encoder.encode([example])[0]
        if isinstance(found, Dropped):
            assert found.code in REASONS
            continue
        accepted += 1
        prompt, *completions = (tokenizer.decode(ids) for ids in (found.prompt_ids, *found.completion_ids))
        assert not lost_words(speaker, prompt, completions), (seed, example, prompt, completions)
        assert not strays(speaker, prompt, completions), (seed, example, prompt, completions)
    if name not in NEVER_THE_SAME_PROMPT:
        assert accepted >= conversations / 10, f"{accepted} of {conversations} are kept"


@pytest.mark.parametrize("name", TEMPLATES)
def test_nothing_that_a_record_says_is_lost(name: str) -> None:
    check(name, 200)


@pytest.mark.slow
@pytest.mark.parametrize("name", TEMPLATES)
def test_nothing_that_a_record_says_is_lost_in_many(name: str) -> None:
    check(name, 2000)
