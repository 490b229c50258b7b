"""Talking to a model, or to two side by side: in a terminal, or over a file of prompts."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig, TextStreamer
from transformers.generation.streamers import BaseStreamer

from dsdpo.data.dropped import Dropped
from dsdpo.data.formats.preference import SQL_PROMPT
from dsdpo.data.messages import Message, check_prompt, read_message
from dsdpo.data.templates import ExampleEncoder, load_tokenizer
from dsdpo.errors import CheckpointError, ConfigError, DataError
from dsdpo.export.huggingface import finished_weights
from dsdpo.runtime.rundir import RunDir
from dsdpo.tools.screen import Screen

BATCH_SIZE = 8
_ROLES = {role: role for role in ("system", "user", "assistant", "tool")}


@dataclass(frozen=True)
class AnswerSettings:
    """How answers are asked for: longest answer in tokens, template as in a run config, system message."""

    max_new_tokens: int = 256
    template: str = "default"
    system: str | None = None


class ChatModel:
    """A model that answers conversations greedily, up to its template's end-of-turn token.

    Args:
        model: a causal language model, or a PEFT model over one.
        encoder: its tokenizer with the template.
        max_new_tokens: longest answer.
        adapter: False answers as the base of a PEFT model.
    """

    def __init__(self, model: Any, encoder: ExampleEncoder, max_new_tokens: int, adapter: bool = True) -> None:
        self.model = model
        self.tokenizer = encoder.tokenizer
        self.adapter = adapter
        self.max_new_tokens = max_new_tokens
        self.stop_ids = list(dict.fromkeys([encoder.end_id, encoder.eos_id]))
        self._encoder = encoder

    @classmethod
    def load(cls, name: str, settings: AnswerSettings = AnswerSettings()) -> ChatModel:
        """A Hugging Face folder or hub id, a PEFT adapter folder, or the newest weights of a run's output_dir.

        Raises:
            ConfigError: there is no such model, it cannot be loaded, or it does not fit the template.
            CheckpointError: a folder without weights.
        """
        folder = _weights(name)
        encoder = _encoder(folder, settings)
        base = _base_of(folder)
        model = _load(folder) if base is None else PeftModel.from_pretrained(_load(base), folder).eval()
        return cls(model, encoder, settings.max_new_tokens)

    def answer(self, prompt: str | Sequence[Message], streamer: BaseStreamer | None = None) -> str:
        """The answer to one prompt or conversation. Raises DataError as `answers` does."""
        return self._generate([self._ids(prompt)], streamer)[0]

    def answers(self, prompts: Sequence[str | Sequence[Message]]) -> list[str]:
        """Answers in the same order, generated in batches. A text stands for one user message.

        Raises:
            DataError: a conversation that the template cannot hold, or too long for the model.
        """
        ids = [self._ids(prompt) for prompt in prompts]
        batches = (ids[start : start + BATCH_SIZE] for start in range(0, len(ids), BATCH_SIZE))
        return [answer for batch in batches for answer in self._generate(batch, None)]

    def _ids(self, prompt: str | Sequence[Message]) -> list[int]:
        try:
            ids = self._encoder.prompt_ids(as_messages(prompt))
        except Dropped as refused:
            raise DataError(f"the template cannot hold this conversation: {refused}") from refused
        longest = getattr(self.model.config, "max_position_embeddings", None)
        needed = len(ids) + self.max_new_tokens
        if longest is not None and needed > longest:
            raise DataError(
                f"the conversation has {len(ids)} tokens and the answer may have {self.max_new_tokens}, but the model "
                f"ends at {longest}; shorten the prompt, lower --max_new_tokens, or /reset"
            )
        return ids

    def _generate(self, batch: list[list[int]], streamer: BaseStreamer | None) -> list[str]:
        width = max(len(ids) for ids in batch)
        padding = [width - len(ids) for ids in batch]
        padded = [[self._encoder.eos_id] * some + ids for some, ids in zip(padding, batch)]
        seen = [[0] * some + [1] * len(ids) for some, ids in zip(padding, batch)]
        generation = GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            eos_token_id=self.stop_ids,
            pad_token_id=self._encoder.eos_id,
        )
        with torch.inference_mode(), self._as_wanted():
            rows = self.model.generate(
                input_ids=torch.tensor(padded, device=self.model.device),
                attention_mask=torch.tensor(seen, device=self.model.device),
                generation_config=generation,
                streamer=streamer,
            )
        return [self._text(row) for row in rows[:, width:].tolist()]

    def _as_wanted(self) -> AbstractContextManager[None]:
        return nullcontext() if self.adapter else self.model.disable_adapter()

    def _text(self, ids: list[int]) -> str:
        """Text up to the first stop token; a row that ended early is padded behind it."""
        end = next((i for i, token in enumerate(ids) if token in self.stop_ids), len(ids))
        return str(self.tokenizer.decode(ids[:end], skip_special_tokens=True)).strip()


def as_messages(prompt: str | Sequence[Message]) -> list[Message]:
    """A text as one user message; a conversation as it stands."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


# --- loading ---


def load_both(model: str, base: str, settings: AnswerSettings = AnswerSettings()) -> list[ChatModel]:
    """[base, model]. Where `model` is an adapter over `base`, the base's weights are loaded once.

    Raises:
        ConfigError, CheckpointError: as `ChatModel.load`.
    """
    tuned = ChatModel.load(model, settings)
    folder, shared = _weights(base), _base_of(_weights(model))
    if shared is not None and _same(shared, folder):
        return [ChatModel(tuned.model, _encoder(folder, settings), settings.max_new_tokens, adapter=False), tuned]
    return [ChatModel.load(base, settings), tuned]


def _weights(name: str) -> str:
    """The folder to load from, or the hub id as it stands."""
    if not Path(name).is_dir():
        return name
    weights = finished_weights(Path(name))
    if weights is None:
        raise CheckpointError(
            f"{name} holds no weights: expected {RunDir(Path(name)).final.name}/ or a model's own files; "
            "`dsdpo export` makes them of a checkpoint"
        )
    return str(weights)


def _encoder(folder: str, settings: AnswerSettings) -> ExampleEncoder:
    try:
        tokenizer = load_tokenizer(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{folder}: no folder with a tokenizer here, and no model of the hub within reach: {error}"
        ) from error
    return ExampleEncoder(tokenizer, settings.template, settings.system)


def _base_of(folder: str) -> str | None:
    """What a PEFT adapter folder was trained on; None for anything else."""
    if not (Path(folder) / "adapter_config.json").is_file():
        return None
    base = PeftConfig.from_pretrained(folder).base_model_name_or_path
    if not base:
        raise ConfigError(f"{folder}/adapter_config.json names no base_model_name_or_path; add it")
    return str(base)


def _same(one: str, other: str) -> bool:
    return one == other or (Path(one).is_dir() and Path(one).resolve() == Path(other).resolve())


def _load(name: str) -> Any:
    """A causal language model for answering: bf16 over the GPUs, fp32 on CPU."""
    on_gpu = torch.cuda.is_available()
    try:
        return AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.bfloat16 if on_gpu else torch.float32, device_map="auto" if on_gpu else "cpu"
        ).eval()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name} cannot be loaded as a language model: {error}") from error


# --- prompts from a file ---


def read_prompts(path: Path) -> list[list[Message]]:
    """Conversations to answer. `.txt`: a prompt a line. `.jsonl`: `prompt` (text or messages), `messages`, or a
    text-to-SQL row (`question`, `context`).

    Raises:
        ConfigError: another kind of file, or none.
        DataError: a line that holds no prompt, by number; a file without any.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise ConfigError(f"--prompts: {path} is neither .txt (a prompt a line) nor .jsonl")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts: {path} cannot be read: {error}") from error
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            prompts.append(as_messages(line.strip()) if path.suffix == ".txt" else _row_messages(line))
        except Dropped as refused:
            raise DataError(f"{path}:{number}: {refused}") from refused
    if not prompts:
        raise DataError(f"{path} holds no prompt")
    return prompts


def _row_messages(line: str) -> list[Message]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise Dropped("not_json", str(error)) from error
    if not isinstance(row, dict):
        raise Dropped("not_object", type(row).__name__)
    if isinstance(row.get("question"), str) and isinstance(row.get("context"), str):
        return as_messages(SQL_PROMPT.format(context=row["context"], question=row["question"]))
    prompt = row.get("prompt", row.get("messages"))
    if isinstance(prompt, list):
        return check_prompt([read_message(raw, "role", "content", _ROLES) for raw in prompt])
    if isinstance(prompt, str):
        return check_prompt(as_messages(prompt))
    raise Dropped("no_prompt", f"it has {', '.join(row) or 'nothing'}")


# --- the command ---


def chat(
    model: str, compare: str | None, prompts: str | None, max_new_tokens: int, template: str, system: str | None
) -> None:
    """`dsdpo chat`: answer a file's prompts, or what is typed, with `model` and beside it `compare`.

    Raises:
        ConfigError, CheckpointError: a model, template or file that is not there or does not fit.
        DataError: prompts that cannot be read, or are too long.
    """
    if max_new_tokens < 1:
        raise ConfigError(f"--max_new_tokens is {max_new_tokens}; it must be at least 1")
    asked = read_prompts(Path(prompts)) if prompts is not None else None
    settings = AnswerSettings(max_new_tokens, template, system)
    models = [ChatModel.load(model, settings)] if compare is None else load_both(model, compare, settings)
    screen = Screen([model] if compare is None else [compare, model])
    if asked is None:
        _loop(models, screen)
    else:
        _batch(models, asked, screen)


def _batch(models: list[ChatModel], prompts: list[list[Message]], screen: Screen) -> None:
    for start in range(0, len(prompts), BATCH_SIZE):
        batch = prompts[start : start + BATCH_SIZE]
        answers = [model.answers(batch) for model in models]
        for number, (messages, *texts) in enumerate(zip(batch, *answers), start + 1):
            screen.prompt(number, len(prompts), messages)
            screen.answers(texts)


def _loop(models: list[ChatModel], screen: Screen) -> None:
    """Read and answer until /exit or end of input; each model goes on with its own answers."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  gives input() line editing and a history
    print("/reset forgets the conversation, /exit (or Ctrl-D) ends")
    histories: list[list[Message]] = [[] for _ in models]
    while True:
        try:
            said = input("\n> ").strip()
        except EOFError:
            print()
            return
        if said == "/exit":
            return
        if said == "/reset":
            histories = [[] for _ in models]
        elif said:
            histories = _turn(models, histories, said, screen)


def _turn(models: list[ChatModel], histories: list[list[Message]], said: str, screen: Screen) -> list[list[Message]]:
    """One question to each model; the histories with it and its answers, or as they were when it does not fit."""
    asked = [[*history, *as_messages(said)] for history in histories]
    try:
        if len(models) == 1:
            streamer = TextStreamer(models[0].tokenizer, skip_prompt=True, skip_special_tokens=True)
            texts = [models[0].answer(asked[0], streamer)]
        else:
            texts = [model.answer(messages) for model, messages in zip(models, asked)]
            screen.answers(texts)
    except DataError as error:
        print(error)
        return histories
    return [[*messages, {"role": "assistant", "content": text}] for messages, text in zip(asked, texts)]
