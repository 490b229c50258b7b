"""The options of LLaMA-Factory that say what the data is, and how it is written."""

from __future__ import annotations

from typing import Any

from dsdpo.config.translation.rules import (
    NOT_SET,
    Given,
    Meaning,
    NoEffect,
    Refused,
    Rule,
    Sets,
    each,
    no_effect,
    only,
    option,
    refused,
)
from dsdpo.config.translation.trainer import PACKED

# System messages that LLaMA-Factory's templates bring for conversations without one; ours bring none.
SYSTEMS = {
    "alpaca": (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    ),
    "qwen": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "vicuna": (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    ),
    "zephyr": "You are Zephyr, a helpful assistant.",
}


def template(value: Any, given: Given) -> Meaning:
    """Its `default` is a template of its own; where none is named it takes the tokenizer's, too."""
    if value is None or value == "":
        return NoEffect(NOT_SET)
    if value == "default":
        return Refused(
            "in LLaMA-Factory that writes `Human:` and `Assistant:`; delete the line for the tokenizer's own template, "
            "or name another"
        )
    return Sets({"template": value})


def adapters(value: Any, given: Given) -> Meaning:
    if "," in str(value or ""):
        return Refused("one adapter is trained further: merge the others into the model before")
    return Sets({"adapter_name_or_path": value})


_HISTORY = "stage sft trains on the replies alone"

DATA: dict[str, Rule] = {
    "cutoff_len": option("max_length"),
    "max_source_length": no_effect("max_length counts prompt and completion together"),
    "max_target_length": no_effect("max_length counts prompt and completion together"),
    "reserved_label_len": no_effect("truncation_mode says what is cut"),
    "train_on_prompt": only("false", why=_HISTORY, remedy=f"{_HISTORY}: delete the line, or set stage: pt for texts"),
    **each(no_effect("prepared data is read in pieces"), "streaming buffer_size data_shared_file_system"),
    "overwrite_cache": no_effect("prepared data is found by its content"),
    "preprocessing_batch_size": no_effect("it is about speed alone"),
    **each(no_effect("the loss of padding counts nowhere"), "ignore_pad_token_for_loss eval_num_beams"),
    "eval_on_each_dataset": refused("held-out sets are evaluated together; delete the line"),
    **each(no_effect(PACKED), "packing neat_packing"),
    "tool_format": refused("the chat template writes tools; delete the line"),
    "enable_thinking": only(
        "true", why="the chat template decides", remedy="set enable_thinking in chat_template_kwargs of the records"
    ),
    "preserve_thinking": only(
        "false", why="the chat template decides", remedy="delete the line: the chat template decides"
    ),
    "tokenized_path": no_effect("prepared data is kept in cache_dir"),
}
