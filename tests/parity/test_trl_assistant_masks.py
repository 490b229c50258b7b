"""Dialogues through every chat template that TRL ships: the tokens that are trained are those of its assistant masks.

TRL's templates for training mark the assistant's words. They count white space after the end of a turn, and a tag that
the template puts in front of each reply, which a chat puts there by itself and no model needs to learn.
"""

from __future__ import annotations

import random

import pytest

from dsdpo.data.dropped import Dropped
from dsdpo.data.example import Example
from dsdpo.data.templates import EncodedExample, ExampleEncoder
from tests.parity.test_trl_chat_templates import NEVER_THE_SAME_PROMPT, ONLY_PARTS, TEMPLATES, tokenizer_for

NAMES = [name for name in TEMPLATES if name not in ONLY_PARTS | NEVER_THE_SAME_PROMPT]
# What else their masks hold: the second token at the end of a turn, the end of the text, the header of the turn.
MORE = {
    "cohere2_training": "<|END_OF_TURN_TOKEN|>",
    "phi3_training": "</s>",
    "phi3_5_training": "</s>",
    "gptoss_training": "<|start|>assistant",
    "muse_glimmer_training": "<|start|>assistant",
}
OPENED = "<think>"
_EMOJI = {0x1F600: None, 0xFFFD: None}  # transformers may mark a part of its bytes alone


def dialogue(seed: int) -> list[dict[str, str]]:
    rng = random.Random(seed)
    around = ["{}", "{} and {}", "# {}\n\n- {}", "\u00e4 {} \U0001f600", '"{}" & <b>{}</b>']
    turns = []
    for number in range(rng.choice([1, 2, 3, 5])):
        for role in ("user", "assistant"):
            turns.append({"role": role, "content": rng.choice(around).format(f"{role}{number}x", rng.random())})
    return [{"role": "system", "content": "Be kind."}, *turns] if rng.random() < 0.3 else turns


def encoded(name: str, turns: list[dict[str, str]], last_alone: bool = False) -> EncodedExample | Dropped:
    encoder = ExampleEncoder(tokenizer_for(TEMPLATES[name]), "default", date="2026-01-31")
    first = len(turns) - 1 if last_alone else next(n for n, turn in enumerate(turns) if turn["role"] == "assistant")
    return encoder.encode([Example(turns[:first], (turns[first:],), (None,), compares=False)])[0]


def learned(name: str, found: EncodedExample) -> list[str]:
    """The tokens of each completion that are in the loss, as text."""
    masks = found.loss_mask or [[True] * len(ids) for ids in found.completion_ids]
    tokenizer = tokenizer_for(TEMPLATES[name])
    return [
        tokenizer.decode([token for token, seen in zip(ids, mask) if seen])
        for ids, mask in zip(found.completion_ids, masks)
    ]


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("_training")])
def test_the_same_words_are_trained(name: str) -> None:
    tokenizer = tokenizer_for(TEMPLATES[name])
    compared = 0
    for seed in range(20):
        turns = dialogue(seed)
        found = encoded(name, turns)
        if isinstance(found, Dropped):
            continue
        compared += 1
        theirs = tokenizer.apply_chat_template(turns, return_assistant_tokens_mask=True, return_dict=True)
        expected = tokenizer.decode([i for i, seen in zip(theirs["input_ids"], theirs["assistant_masks"]) if seen])

        def bare(text: str) -> str:
            text = text.replace("<|return|>", "<|end|>")  # gpt-oss ends its last turn with another token
            for more in (MORE.get(name), OPENED):
                text = text.replace(more, "") if more else text
            text = text.replace("</think>", "").translate(_EMOJI)
            return "".join(text.split())

        assert bare("".join(learned(name, found))) == bare(expected), seed
    assert compared >= 15


@pytest.mark.parametrize("name", NAMES)
def test_each_reply_is_trained_as_if_it_were_the_last(name: str) -> None:
    """Whatever a template makes of earlier turns: what stands before a reply is what a chat would put there."""
    for seed in range(10):
        turns = dialogue(seed)
        found = encoded(name, turns)
        replies = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
        alone = [encoded(name, turns[: number + 1], last_alone=True) for number in replies]
        if isinstance(found, Dropped) or any(isinstance(some, Dropped) for some in alone):
            assert isinstance(found, Dropped) and any(isinstance(some, Dropped) for some in alone)
            continue
        assert sorted(_contexts(found)) == sorted(context for some in alone for context in _contexts(some)), seed


def _contexts(found: EncodedExample) -> list[tuple[int, ...]]:
    """For each token in the loss: all tokens up to it."""
    masks = found.loss_mask or [[True] * len(ids) for ids in found.completion_ids]
    return [
        (*found.prompt_ids, *ids[: place + 1])
        for ids, mask in zip(found.completion_ids, masks)
        for place, seen in enumerate(mask)
        if seen
    ]
