"""Talking to a model, or to two side by side: in a terminal, or over a file of prompts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from transformers import TextStreamer

from dsdpo.data.dropped import Dropped
from dsdpo.data.formats.conversations import SQL_PROMPT
from dsdpo.data.messages import Message, check_prompt, read_message
from dsdpo.errors import CommandLineError, ConfigError, DataError, OutOfMemory, Problem
from dsdpo.runtime.progress import show_library_progress
from dsdpo.tools.answers import AnswerSettings
from dsdpo.tools.chat_model import BATCH_SIZE, ChatModel, as_messages, base_of, base_source, load_both
from dsdpo.tools.screen import Screen
from dsdpo.train.out_of_memory import is_out_of_memory

_ROLES = {role: role for role in ("system", "user", "assistant", "tool")}


# --- prompts from a file ---


def read_prompts(path: Path) -> list[list[Message]]:
    """Conversations to answer. `.txt`: a prompt a line. `.jsonl`: `prompt` (text or messages), `messages`, or a
    text-to-SQL row (`question`, `context`).

    Raises:
        ConfigError: another kind of file, or none.
        DataError: a line that holds no prompt, by number; a file without any.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise _prompts_error(f"{path} is neither .txt (a prompt a line) nor .jsonl")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise _prompts_error(f"{path} cannot be read: {error}") from error
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


def _prompts_error(text: str) -> ConfigError:
    return CommandLineError(Problem("prompts-file", "--prompts", f"--prompts: {text}"))


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


def chat(model: str, compare: str | None, prompts: str | None, settings: AnswerSettings) -> None:
    """`dsdpo chat`: answer a file's prompts, or what is typed, with `model` and beside it `compare`.

    Args:
        model: output_dir of a run, folder of weights, or hub id.
        compare: another one, "" for the base model of `model`, or None.
        prompts: path of a file.

    Raises:
        ConfigError, CheckpointError: a setting, model, template or file that is not there or does not fit.
        DataError: prompts that cannot be read, or are too long.
        OutOfMemory: a GPU has no memory left.
    """
    if problems := settings.problems():
        raise CommandLineError(problems)
    asked = read_prompts(Path(prompts)) if prompts is not None else None
    show_library_progress()
    try:
        _answer(model, compare, asked, settings)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise OutOfMemory(
                "the GPUs have no memory left for this model and its answers: lower --max_new_tokens or --max_length, "
                "leave --compare away, or take GPUs with more memory"
            ) from error
        raise


def _answer(model: str, compare: str | None, asked: list[list[Message]] | None, settings: AnswerSettings) -> None:
    base = base_of(model) if compare == "" else compare
    models = [ChatModel.load(model, settings)] if base is None else load_both(model, base, settings)
    shown = base_source(model).name if compare == "" else base
    screen = Screen([model] if shown is None else [shown, model])
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
    print("/reset starts a new conversation, /exit (or Ctrl-D) ends, Ctrl-C stops an answer")
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
    """One question to each model; the histories with it and its answers, or as they were when it does not fit, or the
    answer was stopped by Ctrl-C."""
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
    except KeyboardInterrupt:
        print("\nstopped; the conversation is as it was before this question")
        return histories
    return [[*messages, {"role": "assistant", "content": text}] for messages, text in zip(asked, texts)]
