"""A folder of each named template, with plain transformers: the ids that were trained, and an end that was trained."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig

from dsdpo.compat import set_end_ids
from dsdpo.config.schema import RunConfig
from dsdpo.config.templates import NAMES
from dsdpo.data.exported import ExportedTemplate
from dsdpo.data.formats.dialogues import preference
from dsdpo.data.messages import assistant
from dsdpo.data.named_templates import NAMED
from dsdpo.data.templates import ExampleEncoder
from dsdpo.export.huggingface import _write_folder, adapter_remark, merged
from tests.unit.data.conftest import make_tokenizer

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi!"},
    {"role": "user", "content": "The sky?"},
]
REPLY = {"role": "assistant", "content": "It is blue."}
MARKER = re.compile(r"<[|\uff5c]?[a-zA-Z_\u2581]+[|\uff5c]?>")


def tokenizer_of(template: str, family: str = "llama"):
    """One with the special tokens that the template needs."""
    tokenizer = make_tokenizer(family)
    tokens = {*NAMED[template].tokens, *MARKER.findall(NAMED[template].jinja)} - {"<think>"}
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(tokens)})
    return tokenizer


def saved(template: str, folder: Path, family: str = "llama") -> tuple[list[int], list[int], int]:
    """A folder as a run with this template exports it: ids of prompt and completion, and the token that ends it."""
    tokenizer = tokenizer_of(template, family)
    encoder = ExampleEncoder(tokenizer, template)
    example = preference(TURNS, [REPLY], assistant("Green"))
    encoded = encoder.encode([example])[0]
    end = encoder.end_token(example)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    run = RunConfig(model_name_or_path="m", dataset=["d"], output_dir="o", template=template)
    exported = ExportedTemplate.of(tokenizer, run, end, None)
    set_end_ids(model, exported.end_ids(tokenizer, tokenizer.eos_token_id))
    exported.put_into(tokenizer)
    _write_folder(folder, model, tokenizer, None)
    return encoded.prompt_ids, encoded.completion_ids[0], encoder.end_id


@pytest.mark.parametrize("template", NAMES)
def test_a_folder_of_each_named_template_asks_and_stops_as_it_was_trained(template: str, tmp_path: Path) -> None:
    prompt, completion, end = saved(template, tmp_path / "final")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "final")
    asked = tokenizer.apply_chat_template(TURNS, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert asked == prompt
    whole = tokenizer.apply_chat_template([*TURNS, REPLY], tokenize=True, return_dict=False)
    assert whole[: len(prompt) + len(completion)] == prompt + completion
    assert whole[len(prompt) + len(completion) :].count(end) == 0 and completion[-1] == end
    assert tokenizer.eos_token_id == end

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    with torch.no_grad():  # every state gives the end token the highest logit
        model.lm_head.weight.zero_()
        model.model.norm.weight.zero_()
    model.lm_head.bias = torch.nn.Parameter(torch.eye(len(tokenizer))[end])
    said = model.generate(torch.tensor([asked]), max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert said[0, len(asked) :].tolist() == [end]


def test_chatml_writes_bos_where_the_run_put_it_in_front(tmp_path: Path) -> None:
    for family, begins in (("llama", "<s>"), ("chatml", "<|im_start|>")):
        prompt, _, _ = saved("chatml", tmp_path / family, family)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / family)
        assert tokenizer.convert_ids_to_tokens(prompt[0]) == begins
        assert tokenizer.apply_chat_template(TURNS, add_generation_prompt=True, return_dict=False) == prompt


def test_a_template_that_writes_eos_keeps_it() -> None:
    """The end of a turn is another token there; both stop the generation."""
    tokenizer = make_tokenizer("chatml", NAMED["chatml"].jinja + "{{ eos_token if not add_generation_prompt }}")
    tokenizer.eos_token = "<|endoftext|>"
    run = RunConfig(model_name_or_path="m", dataset=["d"], output_dir="o")
    exported = ExportedTemplate.of(tokenizer, run, None, None)
    exported.put_into(tokenizer)
    ids = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert tokenizer.eos_token == "<|endoftext|>" and exported.end_ids(tokenizer, ids[1]) == ids


@pytest.mark.parametrize("in_generation_config", [True, False])
def test_an_adapter_says_where_its_base_does_not_stop(in_generation_config: bool, tmp_path: Path) -> None:
    """transformers takes the generation config of the base; the one beside the adapter stops at the trained end."""
    saved("chatml", tmp_path / "base")
    tokenizer = tokenizer_of("chatml")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    eos = tokenizer.eos_token_id
    model.generation_config.eos_token_id = eos  # as a base model comes
    model.save_pretrained(tmp_path / "base")
    if not in_generation_config:
        (tmp_path / "base/generation_config.json").unlink()
    adapter = get_peft_model(model, LoraConfig(r=1, target_modules=["q_proj"]))
    exported = ExportedTemplate.of(
        tokenizer, RunConfig(model_name_or_path="m", dataset=["d"], output_dir="o", template="chatml"), None, None
    )
    set_end_ids(adapter, exported.end_ids(tokenizer, eos))
    exported.put_into(tokenizer)
    _write_folder(tmp_path / "final", adapter, tokenizer, None)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end in GenerationConfig.from_pretrained(tmp_path / "final").eos_token_id
    ids = AutoModelForCausalLM.from_pretrained(tmp_path / "final").generation_config.eos_token_id
    assert (end in (ids if isinstance(ids, list) else [ids])) == (
        "<|im_end|>" not in adapter_remark(tmp_path / "final")
    )
    assert "<|im_end|>" in adapter_remark(tmp_path / "final") and adapter_remark(tmp_path / "base") == ""
    _write_folder(tmp_path / "merged", merged(tmp_path / "final"), tokenizer, None)
    assert end in AutoModelForCausalLM.from_pretrained(tmp_path / "merged").generation_config.eos_token_id
    set_end_ids(model, [end, eos])
    model.generation_config.save_pretrained(tmp_path / "base")
    assert adapter_remark(tmp_path / "final") == ""


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o007])
def test_weight_files_get_the_mode_of_new_files(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        saved("chatml", tmp_path / "final")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "final").iterdir()}
    assert "model.safetensors" in modes and set(modes.values()) == {0o666 & ~umask}
