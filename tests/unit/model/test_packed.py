"""What a packed model gives, against stock transformers; tests/parity has every family, and gradients."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    PretrainedConfig,
    PreTrainedModel,
)

from dsdpo.data.example import TokenizedExample
from dsdpo.data.packing import build_micro_batch, empty_micro_batch
from dsdpo.errors import ConfigError
from dsdpo.model.attention.register import NAMES
from dsdpo.model.packed import PackedInputs, PackedModel
from dsdpo.objectives.sums import completion_sums
from tests.helpers.alone import logps_alone, value_alone
from tests.helpers.tiny import VOCAB, random_examples, random_pairs, save_model, tiny_llama_config

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


def plain_sums(model: PreTrainedModel, pairs: list[TokenizedExample], shared_only: bool = False) -> torch.Tensor:
    """Sums of completion log-probs, [2P]; or over the places alone that both have."""
    found = []
    for pair in pairs:
        shortest = min(map(len, pair.completion_ids))
        found += [logps_alone(model, pair, k)[: shortest if shared_only else None].sum() for k in range(2)]
    return torch.stack(found)


def inputs(examples: list[TokenizedExample], share_prefix: bool) -> PackedInputs:
    return PackedInputs.of(build_micro_batch(examples, range(len(examples)), share_prefix), CPU)


def sums(packed: PackedModel, examples: list[TokenizedExample], share_prefix: bool = True) -> torch.Tensor:
    """fp32 [S, 2 or 3], of all completions."""
    micro_batch = build_micro_batch(examples, range(len(examples)), share_prefix)
    return completion_sums(packed(PackedInputs.of(micro_batch, CPU)), micro_batch.completions)


@pytest.fixture(params=FAMILIES)
def models(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[PreTrainedModel, PackedModel]:
    """The same weights twice: stock eager attention, and packed."""
    save_model(tmp_path, FAMILIES[request.param])
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float32)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=NAMES["sdpa"], dtype=torch.float32)
    return stock.eval(), PackedModel(packed.eval())


def rewarding(folder: Path) -> PackedModel:
    """The weights that `models` saved, with a value head."""
    valued = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, attn_implementation=NAMES["sdpa"], dtype=torch.float32
    )
    return PackedModel(valued.eval(), head="value")


MIXED: dict[str, dict[str, Any]] = {
    "mixed": {"counts": (1, 2, 4)},
    "masked": {"counts": (4, 1, 2), "masks": True},
    "empty prompts": {"counts": (2, 4, 1), "empty": True},
    "masked, empty prompts": {"counts": (1, 4), "masks": True, "empty": True},
}


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("kind", MIXED)
def test_log_probs_are_those_of_each_completion_alone(
    models: tuple[PreTrainedModel, PackedModel], kind: str, share_prefix: bool
) -> None:
    stock, packed = models
    examples = random_examples(9, seed=3, **MIXED[kind])
    found = packed(inputs(examples, share_prefix)).token_logps
    expected = [logps_alone(stock, e, k) for e in examples for k in range(len(e.completion_ids))]
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("kind", MIXED)
def test_values_are_those_of_each_last_token(
    models: tuple[PreTrainedModel, PackedModel], tmp_path: Path, kind: str, share_prefix: bool
) -> None:
    stock, _ = models
    examples = random_examples(6, seed=4, **MIXED[kind])
    valued = rewarding(tmp_path)
    score = valued.model.score.weight
    with torch.no_grad():
        score.copy_(torch.randn(score.shape, generator=torch.Generator().manual_seed(0)))
    expected = [value_alone(stock, score, e, k) for e in examples for k in range(len(e.completion_ids))]
    output = valued(inputs(examples, share_prefix))
    assert output.token_logps is None
    torch.testing.assert_close(output.values, torch.stack(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("head", ["logprob", "value"])
def test_an_empty_micro_batch_gives_nothing_but_a_gradient_path(
    models: tuple[PreTrainedModel, PackedModel], tmp_path: Path, head: Literal["logprob", "value"]
) -> None:
    """With ZeRO-3 every rank must take part in the backward of every layer."""
    packed = models[1] if head == "logprob" else rewarding(tmp_path)
    output = packed(PackedInputs.of(empty_micro_batch(), CPU))
    given = completion_sums(output, empty_micro_batch().completions) if head == "logprob" else output.values
    assert given.shape[0] == 0
    given.sum().backward()
    for parameter in packed.parameters():
        assert not parameter.requires_grad or (parameter.grad is not None and not parameter.grad.any())


def test_a_micro_batch_without_a_scored_token_has_a_gradient_path_too(
    models: tuple[PreTrainedModel, PackedModel],
) -> None:
    ids = np.array([5, 6, 7])
    example = TokenizedExample(ids, (ids, ids[:2]), (np.zeros(3, dtype=bool), np.zeros(2, dtype=bool)))
    found = sums(models[1], [example])
    assert found.shape == (2, 2) and not found.any()
    found.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in models[1].parameters())


@pytest.mark.parametrize("share_prefix", [True, False])
def test_sums_part_where_the_shorter_completion_ends(
    models: tuple[PreTrainedModel, PackedModel], share_prefix: bool
) -> None:
    stock, packed = models
    pairs = random_pairs(4, seed=3)
    found = sums(packed, pairs, share_prefix)
    torch.testing.assert_close(found[:, 0], plain_sums(stock, pairs, shared_only=True), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.sum(1), plain_sums(stock, pairs), rtol=1e-5, atol=1e-4)
    lengths = [[len(ids) for ids in pair.completion_ids] for pair in pairs]
    longer = torch.tensor([n > min(pair) for pair in lengths for n in pair])
    assert torch.equal(found[:, 1] != 0, longer)


def test_sums_are_the_same_bits_each_time(models: tuple[PreTrainedModel, PackedModel]) -> None:
    examples = random_examples(5, (1, 4, 2), seed=5, masks=True)
    assert torch.equal(sums(models[1], examples), sums(models[1], examples))


def test_the_third_sum_is_what_wpo_aligns_with(models: tuple[PreTrainedModel, PackedModel]) -> None:
    stock, packed = models
    packed.weighting = True
    pairs = random_pairs(1, seed=4)
    prompt = pairs[0].prompt_ids
    found = sums(packed, pairs)
    for side, answer in enumerate(pairs[0].completion_ids):
        ids = torch.from_numpy(np.concatenate([prompt, answer]))[None]
        logps = stock(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        aligned = logps.gather(1, torch.from_numpy(answer)[:, None])[:, 0] - (2 * logps).logsumexp(-1)
        torch.testing.assert_close(found[side, 2], aligned.sum(), rtol=1e-5, atol=1e-4)
    found[:, 2].sum().backward()
    assert not any(p.grad is not None and p.grad.any() for p in packed.parameters())


def test_examples_of_a_micro_batch_do_not_see_each_other(models: tuple[PreTrainedModel, PackedModel]) -> None:
    _, packed = models
    pairs = random_pairs(3, seed=2)
    others = [random_pairs(1, seed=9)[0], pairs[1], random_pairs(1, seed=10)[0]]
    together, changed = sums(packed, pairs), sums(packed, others)
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
