"""A model that answers conversations: loading it, with the settings of its run, and asking it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.streamers import BaseStreamer

from dsdpo.checkpoint.commit import MANIFEST
from dsdpo.config.hubs import ModelSource, hub_of, same_model
from dsdpo.config.quantization import Quantization
from dsdpo.data.dropped import Dropped
from dsdpo.data.messages import Message
from dsdpo.data.template_files import template_place
from dsdpo.data.templates import ExampleEncoder, load_tokenizer
from dsdpo.errors import CheckpointError, CommandLineError, DataError, Problem
from dsdpo.export.huggingface import finished_weights
from dsdpo.model.config_file import read_object
from dsdpo.model.files import folder_problems
from dsdpo.model.quantized import bitsandbytes_config, dequantize_in_forward
from dsdpo.runtime.command import command_line
from dsdpo.runtime.modelscope import OTHER_WEIGHTS
from dsdpo.tools.answers import DEFAULT_MAX_NEW_TOKENS, GREEDY, AnswerSettings, sampling
from dsdpo.tools.trained import TrainedRun

BATCH_SIZE = 8


class ChatModel:
    """A model that answers conversations, up to its template's end-of-turn token.

    Args:
        model: a causal language model, or a PEFT model over one.
        encoder: its tokenizer with the template.
        settings: how it answers.
        adapter: False answers as the base of a PEFT model.
    """

    def __init__(self, model: Any, encoder: ExampleEncoder, settings: AnswerSettings, adapter: bool = True) -> None:
        self.model = model
        self.tokenizer = encoder.tokenizer
        self.adapter = adapter
        self.settings = settings
        self.stop_ids = encoder.stop_ids
        self._encoder = encoder

    @classmethod
    def load(cls, name: str, settings: AnswerSettings = GREEDY, beside: TrainedRun | None = None) -> ChatModel:
        """A Hugging Face folder or hub id, a PEFT adapter folder, or the trained weights of a run's output_dir.

        Args:
            beside: the base of an adapter that is of no run is quantized as in this one.

        Raises:
            ConfigError: there is no such model, it cannot be loaded, or it does not fit the template.
            CheckpointError: a folder without weights, or a run that has not ended.
        """
        run = TrainedRun.find(name)
        settings = settings.of_run(run)
        folder = _weights(name)
        _check_answers(folder)
        encoder = _encoder(folder, settings)
        base = _base_of(folder)
        quantizing = run or beside
        quantization = None if quantizing is None else Quantization.of_saved(quantizing.config)
        model = _load(folder) if base is None else _with_adapter(_load(base, quantization), folder)
        return cls(model, encoder, settings)

    def answer(self, prompt: str | Sequence[Message], streamer: BaseStreamer | None = None) -> str:
        """The answer to one prompt or conversation. Raises DataError as `answers` does."""
        return self._generate([self._ids(prompt)], streamer)[0]

    def answers(self, prompts: Sequence[str | Sequence[Message]]) -> list[str]:
        """Answers in the same order, generated in batches. A text stands for one user message.

        With a seed, an answer depends on it and on the conversation alone, not on the others of its batch (but for
        rounding: the model sees padding beside shorter prompts).

        Raises:
            DataError: a conversation that the template cannot hold, or too long.
        """
        ids = [self._ids(prompt) for prompt in prompts]
        batches = (ids[start : start + BATCH_SIZE] for start in range(0, len(ids), BATCH_SIZE))
        return [answer for batch in batches for answer in self._generate(batch, None)]

    @property
    def longest(self) -> int | None:
        """Longest conversation with its answer, in tokens: max_length, or less where the model ends before."""
        limits = [getattr(self.model.config, "max_position_embeddings", None), self.settings.max_length]
        return min((limit for limit in limits if limit is not None), default=None)

    def _room(self, ids: list[int]) -> int:
        """Tokens that an answer to `ids` may have."""
        wanted = self.settings.max_new_tokens or DEFAULT_MAX_NEW_TOKENS
        return wanted if self.longest is None else min(wanted, self.longest - len(ids))

    def _ids(self, prompt: str | Sequence[Message]) -> list[int]:
        try:
            ids = self._encoder.prompt_ids(as_messages(prompt))
        except Dropped as dropped:
            raise DataError(f"the template cannot hold this conversation: {dropped}") from dropped
        needed = self.settings.max_new_tokens or 1
        if self._room(ids) < needed:
            model_ends = self.longest != self.settings.max_length
            limit = f"the model ends at {self.longest}" if model_ends else f"max_length is {self.longest}"
            more = "" if model_ends else ", raise --max_length"
            raise DataError(
                f"the conversation has {len(ids)} tokens and the answer may have {needed}, but {limit}; "
                f"shorten the prompt{more}, lower --max_new_tokens, or /reset"
            )
        return ids

    def _generate(self, batch: list[list[int]], streamer: BaseStreamer | None) -> list[str]:
        width = max(len(ids) for ids in batch)
        padding = [width - len(ids) for ids in batch]
        padded = [[self._encoder.eos_id] * some + ids for some, ids in zip(padding, batch)]
        seen = [[0] * some + [1] * len(ids) for some, ids in zip(padding, batch)]
        rooms = [self._room(ids) for ids in batch]
        generation = GenerationConfig(
            max_new_tokens=max(rooms),
            do_sample=False,  # where tokens are drawn, _Draws does it, and the likeliest is the one that was drawn
            eos_token_id=self.stop_ids,
            pad_token_id=self._encoder.eos_id,
        )
        with torch.inference_mode(), self._as_wanted():
            rows = self.model.generate(
                input_ids=torch.tensor(padded, device=self.model.device),
                attention_mask=torch.tensor(seen, device=self.model.device),
                generation_config=generation,
                logits_processor=sampling(self.settings, batch),
                streamer=streamer,
            )
        return [self._text(row[:room]) for row, room in zip(rows[:, width:].tolist(), rooms)]

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


def load_both(model: str, base: str, settings: AnswerSettings = GREEDY) -> list[ChatModel]:
    """[base, model]. Where `model` is an adapter over `base`, the base's weights are loaded once. Where both are
    adapters over one model, their difference is that of the adapters: it is quantized for both, or for none.

    Each answers with the settings of its own run; a base without one with those of the model's.

    Raises:
        ConfigError, CheckpointError: as `ChatModel.load`.
    """
    tuned = ChatModel.load(model, settings)
    run = TrainedRun.find(base)
    base_settings = settings.of_run(run) if run else tuned.settings
    folder, shared = _weights(base), _base_of(_weights(model))
    if shared is not None and same_model(shared, folder):
        return [ChatModel(tuned.model, _encoder(folder, base_settings), base_settings, adapter=False), tuned]
    of_base = None if shared is None else _base_of(folder)
    beside = TrainedRun.find(model) if shared and of_base and same_model(shared, of_base) else None
    return [ChatModel.load(base, base_settings, beside), tuned]


def base_of(name: str) -> str:
    """What a run or an adapter was trained from, as `load_both` takes it. Raises ConfigError as `base_source`."""
    return _local(base_source(name))


def base_source(name: str) -> ModelSource:
    """What a run or an adapter was trained from, as it was named. Raises ConfigError where `name` is neither."""
    run = TrainedRun.find(name)
    source = _adapter_base(name) if run is None else run.base_source
    if source is None or not source.name:
        text = f"--compare: {name} does not tell its base model; name one: --compare BASE"
        raise CommandLineError(Problem("compare-base", "--compare", text))
    return source


def _weights(name: str) -> str:
    """The folder to load from, or an id on Hugging Face."""
    run = TrainedRun.find(name)
    if run is not None:
        return str(run.weights("chat"))
    if not Path(name).is_dir():
        if problems := folder_problems(name, "MODEL"):
            raise CommandLineError(problems)
        return _local(ModelSource.named(name))
    weights = finished_weights(Path(name))
    if weights is None and (Path(name) / MANIFEST).is_file():
        target = f"{Path(name)}-exported"
        export = command_line(["export", str(Path(name)), "--to", target])
        raise CheckpointError(f"{name} is a checkpoint: run `{export}` and then `{command_line(['chat', target])}`")
    if weights is None:
        raise CheckpointError(
            f"{name} holds no weights: give the output_dir of a run, or a folder with a model's or an adapter's files"
        )
    return str(weights)


def _encoder(folder: str, settings: AnswerSettings) -> ExampleEncoder:
    try:
        tokenizer = load_tokenizer(folder)
    except (OSError, ValueError) as error:
        text = f"{folder}: no folder with a tokenizer here, and no model of the hub within reach: {error}"
        raise CommandLineError(Problem("tokenizer-missing", "model", text)) from error
    template = template_place(settings.template or "default", hub_of(Path(folder)))
    return ExampleEncoder(tokenizer, template, settings.system, settings.date)


def _base_of(folder: str) -> str | None:
    """Where to load from what a PEFT adapter folder was trained on; None for anything else."""
    source = _adapter_base(folder)
    return None if source is None else _local(source)


def _adapter_base(folder: str) -> ModelSource | None:
    """What a PEFT adapter folder was trained on; None for anything else."""
    if not (Path(folder) / "adapter_config.json").is_file():
        return None
    settings = PeftConfig.from_pretrained(folder)
    if not (base := settings.base_model_name_or_path):
        text = f"{folder}/adapter_config.json names no base_model_name_or_path; add it"
        raise CommandLineError(Problem("adapter-base", "model", text))
    return ModelSource(str(base), hub_of(Path(folder)), settings.revision)


def _local(source: ModelSource) -> str:
    """The name of a model, or a folder of a hub's cache that stands for an id of ModelScope or at a revision."""
    if source.is_folder:
        return source.name
    if source.hub == "modelscope":
        return str(source.local("model", whole=True, refresh=True))
    if source.revision is None:
        return source.name
    try:
        return str(snapshot_download(source.name, revision=source.revision, ignore_patterns=[*OTHER_WEIGHTS]))
    except (OSError, ValueError) as error:
        text = f"{source.name} at {source.revision} cannot be fetched: {error}"
        raise CommandLineError(Problem("model-load", "model", text)) from error


def _check_answers(folder: str) -> None:
    """Raises CommandLineError for a reward model: a head that gives tokens would be drawn at random."""
    signs = (("adapter_config.json", "task_type", "SEQ_CLS"), ("config.json", "architectures", "ForSequence"))
    for file, key, sign in signs:
        path = Path(folder) / file
        if path.is_file() and sign in str(read_object(path)[0].get(key)):
            text = (
                f"{folder} is a reward model, which gives no answers; `dsdpo eval` tells how well it tells them apart"
            )
            raise CommandLineError(Problem("reward-model", "model", text))


def _load(name: str, quantization: Quantization | None = None) -> Any:
    """A causal language model for answering: bf16 over the GPUs, fp32 on CPU; quantized as in training."""
    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    # None would hide what config.json says of weights that are stored quantized
    more = {} if quantization is None else {"quantization_config": bitsandbytes_config(quantization, dtype)}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, device_map="auto" if on_gpu else "cpu", **more
        ).eval()
        dequantize_in_forward(model)
    except (OSError, ValueError, ImportError) as error:
        text = f"{name} cannot be loaded as a language model: {error}"
        raise CommandLineError(Problem("model-load", "model", text)) from error
    # Else `generate` takes what its settings leave open, such as a repetition penalty, from the model's folder.
    model.generation_config = GenerationConfig()
    return model


def _with_adapter(base: Any, folder: str) -> Any:
    with _quiet_peft():
        return PeftModel.from_pretrained(base, folder).eval()


@contextmanager
def _quiet_peft() -> Iterator[None]:
    """PEFT asks transformers for an attribute by its old name, and peft 0.19 warns of merging an adapter on tied
    embeddings, which is not done here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`", UserWarning)
        yield
