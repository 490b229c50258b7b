"""How answers are asked for: the options of `dsdpo chat`, and how tokens are drawn."""

from __future__ import annotations

import hashlib
import json
import secrets
from dataclasses import dataclass, replace

import torch
from transformers.generation.logits_process import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from dsdpo.config.templates import check_template
from dsdpo.errors import Problem
from dsdpo.tools.trained import TrainedRun

DEFAULT_MAX_NEW_TOKENS = 256
_SHORTEST = 8  # of max_length, as in a run config
_COLDEST, _HOTTEST = 0.01, 100.0


@dataclass(frozen=True)
class AnswerSettings:
    """How answers are asked for. What is None is taken from the model's run where it has one.

    Attributes:
        max_new_tokens: longest answer. None: 256, or less where max_length leaves less.
        template: as in a run config. None: the run's, or `default`.
        system: system message for conversations without one; "" is none.
        max_length: longest conversation with its answer, in tokens. None: the run's, or what the model can hold.
        temperature: 0 takes the likeliest token each time; else logits are divided by it, and tokens drawn.
        top_p: tokens are drawn from the likeliest ones, as few as have this probability together.
        seed: of the draws. None: others each time.
        date: day that the template writes as today's. None: the run's, or today.
    """

    max_new_tokens: int | None = None
    template: str | None = None
    system: str | None = None
    max_length: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    date: str | None = None

    def problems(self) -> list[Problem]:
        """Values that cannot be, as the command line names them."""
        found: list[tuple[str, str]] = []
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            found.append(("max_new_tokens", f"is {self.max_new_tokens}; allowed: at least 1"))
        if self.max_length is not None and self.max_length < _SHORTEST:
            found.append(("max_length", f"is {self.max_length}; allowed: at least {_SHORTEST}"))
        if self.temperature != 0 and not _COLDEST <= self.temperature <= _HOTTEST:
            allowed = f"0 (the likeliest token each time), or {_COLDEST:g} to {_HOTTEST:g}"
            found.append(("temperature", f"is {self.temperature:g}; allowed: {allowed}"))
        if not 0 < self.top_p <= 1:
            found.append(("top_p", f"is {self.top_p:g}; allowed: above 0, up to 1"))
        elif self.top_p < 1 and self.temperature == 0:
            found.append(("top_p", f"{self.top_p:g} has no effect with temperature 0; add --temperature 1, or another"))
        if self.seed is not None and self.seed < 0:
            found.append(("seed", f"is {self.seed}; allowed: at least 0"))
        if self.template is not None:
            try:
                check_template(self.template)
            except ValueError as error:
                found.append(("template", f"is {self.template!r}: {error}"))
        return [Problem("value", f"--{option}", f"--{option} {text}") for option, text in found]

    def of_run(self, run: TrainedRun | None) -> AnswerSettings:
        """With the options of a run in place of what is None."""
        if run is None:
            return self
        return replace(
            self,
            template=self.template or run.config.get("template"),
            system=run.config.get("default_system") if self.system is None else self.system,
            max_length=self.max_length or run.config.get("max_length"),
            date=self.date or run.template_date,
        )


GREEDY = AnswerSettings()


def sampling(settings: AnswerSettings, batch: list[list[int]]) -> LogitsProcessorList:
    """What makes the largest of the logits the next token, for the prompts of a batch."""
    if settings.temperature == 0:
        return LogitsProcessorList()
    draws = _Draws([_generator(settings.seed, ids) for ids in batch])
    warpers = [] if settings.top_p == 1 else [TopPLogitsWarper(settings.top_p)]
    return LogitsProcessorList([TemperatureLogitsWarper(settings.temperature), *warpers, draws])


class _Draws(LogitsProcessor):
    """Noise on logits with which the largest is a draw from their softmax (the Gumbel-max trick).

    Each row has a generator of its own, so that its draws do not depend on the other rows.
    """

    def __init__(self, generators: list[torch.Generator]) -> None:
        self._generators = generators

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """scores: [B, V], of the tokens that may be drawn; others are -inf."""
        waits = [torch.empty(scores.shape[1]).exponential_(generator=generator) for generator in self._generators]
        noise = torch.stack(waits).clamp_min(torch.finfo(torch.float32).tiny).log()
        return scores.float() - noise.to(scores.device)


def _generator(seed: int | None, ids: list[int]) -> torch.Generator:
    """For the answer to one conversation: the same for the same seed and token ids."""
    given = secrets.token_hex() if seed is None else str(seed)
    digest = hashlib.sha256(json.dumps([given, ids]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
