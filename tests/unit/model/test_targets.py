"""Names of lora_target against the modules of real models: what PEFT would adapt, and what it would leave out."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dsdpo.config.schema import RunConfig
from dsdpo.errors import ConfigError
from dsdpo.model.adapters import add_lora
from dsdpo.model.architecture import module_prefix
from dsdpo.model.targets import modules_of, target_problems
from dsdpo.runtime.weights import shapes, weight_files
from tests.helpers.tiny import FAMILIES

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}


def tiny(model_type: str) -> PreTrainedModel:
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 64} if model_type == "gpt2" else SMALL
    more = {"num_key_value_heads": 2, "pad_token_id": 0} if model_type != "gpt2" else {}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes, **more))


def adapted(model: PreTrainedModel, targets: str | list[str]) -> set[str]:
    """Last parts of the names of modules that PEFT adapts."""
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, task_type="CAUSAL_LM"))
    return {name.rsplit(".", 1)[-1] for name, module in tuned.named_modules() if hasattr(module, "lora_A")}


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "gpt_neox", "qwen3", "phi3"])
def test_files_name_the_layers_that_peft_adapts(tmp_path: Path, model_type: str) -> None:
    model = tiny(model_type)
    model.save_pretrained(tmp_path)
    linear, embeddings = modules_of(shapes(weight_files(tmp_path)[0]))
    names = {name.rsplit(".", 1)[-1] for name in linear} - {"lm_head", "embed_out"}
    assert names == adapted(model, "all-linear") - {"lm_head", "embed_out"}
    for name in names:
        assert not target_problems([name], linear, embeddings, module_prefix(model_type))
    for wrong in ("q_projj", ".*proj", "lm_headd", "norm"):
        assert [one.code for one in target_problems([*names, wrong], linear, embeddings)] == ["lora-target-unknown"]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_names_of_modules_begin_with(model_type: str) -> None:
    config = AutoConfig.for_model(model_type)
    assert MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].base_model_prefix == module_prefix(model_type)


@pytest.mark.parametrize(
    "targets", [["q_projj", "v_proj"], ["query_key_value"], ["x.model.layers.0.mlp.up_proj", "v_proj"]]
)
def test_ranks_refuse_a_name_that_peft_would_leave_out(targets: list[str]) -> None:
    """Where weights have no header, as pickles: PEFT itself trains what is left of the list."""
    config = RunConfig(model_name_or_path="m", dataset=["d"], output_dir="o", lora_target=targets)
    with pytest.raises(ConfigError) as caught:
        add_lora(tiny("llama"), config)
    assert [problem.code for problem in caught.value.problems] == ["lora-target-unknown"]


def test_ranks_adapt_what_is_named() -> None:
    config = RunConfig(
        model_name_or_path="m", dataset=["d"], output_dir="o", lora_target=["q_proj", "layers.1.mlp.up_proj"]
    )
    tuned = add_lora(tiny("llama"), config)
    found = {name for name, module in tuned.named_modules() if hasattr(module, "lora_A")}
    assert len(found) == 3 and sum("up_proj" in name for name in found) == 1
