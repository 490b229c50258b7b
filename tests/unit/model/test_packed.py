"""The sums that a packed row gives, against stock transformers; tests/parity has every family, and gradients."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, PretrainedConfig, PreTrainedModel

from dsdpo.data.packing import TokenPair, build_row
from dsdpo.errors import ConfigError
from dsdpo.model.attention.register import NAMES
from dsdpo.model.packed import PackedModel, RowTensors
from tests.helpers.tiny import VOCAB, random_pairs, save_model, tiny_llama_config

CPU = torch.device("cpu")
GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "initializer_range": 0.2,
}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": tiny_llama_config(tied=True),
    "gpt2": GPT2Config(**GPT2, **NO_DROPOUT, bos_token_id=0, eos_token_id=1),
}


def plain_logps(model: PreTrainedModel, pairs: list[TokenPair]) -> torch.Tensor:
    """Sums of completion log-probs, [2P], from full logits of prompt + completion alone."""
    sums = []
    for prompt, *answers in pairs:
        for answer in answers:
            ids = torch.from_numpy(np.concatenate([prompt, answer]))[None]
            logps = model(ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
            sums.append(logps.gather(1, torch.from_numpy(answer)[:, None]).sum())
    return torch.stack(sums)


@pytest.fixture(params=FAMILIES)
def models(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[PreTrainedModel, PackedModel]:
    """The same weights twice: stock eager attention, and packed rows."""
    save_model(tmp_path, FAMILIES[request.param])
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float32)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=NAMES["sdpa"], dtype=torch.float32)
    return stock.eval(), PackedModel(packed.eval())


@pytest.mark.parametrize("share_prefix", [True, False])
def test_sums_part_where_the_shorter_completion_ends(
    models: tuple[PreTrainedModel, PackedModel], share_prefix: bool
) -> None:
    stock, packed = models
    pairs = random_pairs(4, seed=3)
    found = packed(RowTensors.from_row(build_row(pairs, range(4), share_prefix), CPU))
    cut = [TokenPair(p, c[: min(len(c), len(r))], r[: min(len(c), len(r))]) for p, c, r in pairs]
    torch.testing.assert_close(found[:, 0], plain_logps(stock, cut), rtol=1e-5, atol=1e-4)
    lengths = [(len(c), len(r)) for _, c, r in pairs]
    longer = torch.tensor([n > min(pair) for pair in lengths for n in pair])
    assert torch.equal(found[:, 1] != 0, longer)


def test_the_third_sum_is_what_wpo_aligns_with(models: tuple[PreTrainedModel, PackedModel]) -> None:
    stock, packed = models
    packed.weighting = True
    (prompt, chosen, rejected), *_ = pairs = random_pairs(1, seed=4)
    found = packed(RowTensors.from_row(build_row(pairs, range(1), True), CPU))
    for side, answer in enumerate((chosen, rejected)):
        ids = torch.from_numpy(np.concatenate([prompt, answer]))[None]
        logps = stock(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        aligned = logps.gather(1, torch.from_numpy(answer)[:, None])[:, 0] - (2 * logps).logsumexp(-1)
        torch.testing.assert_close(found[side, 2], aligned.sum(), rtol=1e-5, atol=1e-4)
    found[:, 2].sum().backward()
    assert not any(p.grad is not None and p.grad.any() for p in packed.parameters())


def test_pairs_of_a_row_do_not_see_each_other(models: tuple[PreTrainedModel, PackedModel]) -> None:
    _, packed = models
    pairs = random_pairs(3, seed=2)
    together = packed(RowTensors.from_row(build_row(pairs, range(3), True), CPU))
    others = [random_pairs(1, seed=9)[0], pairs[1], random_pairs(1, seed=10)[0]]
    changed = packed(RowTensors.from_row(build_row(others, range(3), True), CPU))
    torch.testing.assert_close(changed[2:4], together[2:4], rtol=1e-5, atol=1e-5)


def test_a_stock_call_of_a_packed_model_is_refused(models: tuple[PreTrainedModel, PackedModel]) -> None:
    with pytest.raises(RuntimeError, match="packed_layout"):
        models[1].model(torch.tensor([[5, 6, 7]]))


def test_every_parameter_has_one_name(models: tuple[PreTrainedModel, PackedModel]) -> None:
    names = [name for name, _ in models[1].named_parameters()]
    assert all(name.startswith("model.") for name in names)


@pytest.mark.parametrize(
    "tuned",
    [
        {"target_modules": ".*(q_proj|lm_head)"},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
)
def test_an_adapter_of_the_output_head_is_refused(tmp_path: Path, tuned: dict[str, Any]) -> None:
    """The head reads the base's weight, so that such an adapter would be left out of every log-prob."""
    model = get_peft_model(save_model(tmp_path, tiny_llama_config(tied=False)), LoraConfig(r=2, **tuned))
    with pytest.raises(ConfigError, match="tunes the output head, whose weights stay frozen here"):
        PackedModel(model)
