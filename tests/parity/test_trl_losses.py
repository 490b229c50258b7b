"""Every loss and every loss option of TRL 1.16 against TRL itself: the loss, and the gradient of every parameter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from trl import DPOConfig, DPOTrainer

from dsdpo.config.losses import LOSSES
from dsdpo.config.schema import RunConfig
from dsdpo.data.example import TokenizedExample
from dsdpo.data.packing import build_micro_batch
from dsdpo.model.attention.register import NAMES
from dsdpo.model.packed import PackedInputs, PackedModel
from dsdpo.objectives.pair_logps import PairFacts
from dsdpo.objectives.preference import PreferenceObjective
from dsdpo.objectives.sums import completion_sums
from tests.helpers.real import smollm2
from tests.helpers.tiny import VOCAB, random_pairs, save_model, save_tokenizer, tiny_llama_config

BEYOND_TRL = {"odpo", "simpo", "cpo", "orpo"}
DIVERGENCES: list[dict[str, Any]] = [
    {"f_divergence_type": "forward_kl"},
    {"f_divergence_type": "js_divergence"},
    {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
]


def _cases() -> Iterator[dict[str, Any]]:
    for name, spec in LOSSES.items():
        if name in BEYOND_TRL:
            continue
        losses = [name] if spec.preference else ["sigmoid", name]
        smoothed = "label_smoothing" in spec.options and name != "sigmoid"  # TRL leaves it out there
        smoothing = {"label_smoothing": 0.1} if smoothed else {}
        yield {"loss_type": losses, **smoothing}
        yield {"loss_type": losses, "ld_alpha": 0.4, **smoothing}
        if name not in ("sft", "hinge"):  # TRL weighs in place, which autograd refuses for these two
            yield {"loss_type": losses, "use_weighting": True, **smoothing}
        if spec.divergence and spec.preference:
            yield from ({"loss_type": losses, **smoothing, **divergence} for divergence in DIVERGENCES)
    yield {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}
    yield {"loss_type": ["robust"], "label_smoothing": 0.3, "beta": 0.5}
    yield {"loss_type": ["aot"], "label_smoothing": 0.0}
    yield {"loss_type": ["discopop"], "discopop_tau": 0.5}
    yield {"loss_type": ["sigmoid"], "ld_alpha": 0.0, "use_weighting": True, "f_divergence_type": "js_divergence"}


CASES = list(_cases())
# each loss once, each option once: a case takes 10 s
ON_SMOLLM2 = [case for case in CASES if case.keys() <= {"loss_type", "label_smoothing", "loss_weights"}] + [
    {"loss_type": ["sigmoid"], **options} for options in ({"ld_alpha": 0.4}, {"use_weighting": True}, *DIVERGENCES)
]
TRL_OPTIONS = {
    "beta",
    "label_smoothing",
    "ld_alpha",
    "use_weighting",
    "f_divergence_type",
    "f_alpha_divergence_coef",
    "discopop_tau",
    "loss_weights",
}
TRL_DEFAULTS = {field.name: field.default for field in fields(DPOConfig) if field.name in TRL_OPTIONS}


def name_of(case: dict[str, Any]) -> str:
    return " ".join(
        "+".join(value) if key == "loss_type" else f"{key}={value}"
        for key, value in case.items()
        if key != "label_smoothing"
    )


@dataclass
class Setting:
    """A model that has moved away from its reference, in TRL's form and in ours, and pairs of token ids."""

    trainer: DPOTrainer
    stock: PreTrainedModel
    packed: PackedModel
    reference: PackedModel
    pairs: list[TokenizedExample]
    scale: float

    def trl(self, case: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
        """TRL's loss and gradients. The trainer's settings are changed in place: making one takes seconds."""
        settings = {**TRL_DEFAULTS, **case}
        self.trainer.loss_types = settings.pop("loss_type")
        self.trainer.loss_weights = settings.pop("loss_weights") or [1.0] * len(self.trainer.loss_types)
        self.trainer.args.discopop_tau = settings.pop("discopop_tau")
        for option, value in settings.items():
            assert hasattr(self.trainer, option)
            setattr(self.trainer, option, value)
        keys = ("prompt_ids", "chosen_ids", "rejected_ids")
        parts = [map(np.ndarray.tolist, (pair.prompt_ids, *pair.completion_ids)) for pair in self.pairs]
        batch = self.trainer.data_collator([dict(zip(keys, ids)) for ids in parts])
        self.stock.zero_grad()
        loss = self.trainer.compute_loss(self.stock, batch)
        loss.backward()
        return loss.item(), {n: p.grad for n, p in self.stock.named_parameters() if p.grad is not None}

    def ours(self, case: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
        """Our loss and gradients, from one packed micro-batch."""
        config = RunConfig(model_name_or_path="-", dataset="-", output_dir="-", reference="live", **case)
        n = len(self.pairs)
        micro_batch = build_micro_batch(self.pairs, range(n), share_prefix=True)
        inputs = PackedInputs.of(micro_batch, torch.device("cpu"))
        tokens = torch.from_numpy(micro_batch.completions[:, 2]).view(-1, 2).float()
        with torch.no_grad():
            reference = completion_sums(self.reference(inputs), micro_batch.completions)[:, :2]
        self.packed.zero_grad()
        self.packed.weighting = config.use_weighting
        facts = PairFacts(tokens, torch.full((n,), torch.nan), tokens[:, 0].mean().item())
        sums = completion_sums(self.packed(inputs), micro_batch.completions)
        loss = PreferenceObjective(config).losses(sums, reference, facts).losses.mean()
        loss.backward()
        return loss.item(), {n: p.grad for n, p in self.packed.model.named_parameters() if p.grad is not None}

    def compare(self, case: dict[str, Any]) -> None:
        (expected_loss, expected), (loss, found) = self.trl(case), self.ours(case)
        assert loss == pytest.approx(expected_loss, rel=1e-5 * self.scale, abs=1e-6 * self.scale)
        assert found.keys() == expected.keys()
        size = torch.stack([gradient.norm() for gradient in expected.values()]).max()
        for name, gradient in expected.items():
            difference = (found[name] - gradient).norm()
            assert difference < 1e-3 * gradient.norm() + 1e-5 * size, f"{name}: {difference / gradient.norm():.1e}"


def setting(model: Path, pairs: list[TokenizedExample], noise: float, folder: Path, scale: float) -> Setting:
    """The model in `model` as the reference; with noise on every weight, as the policy."""

    def load(attention: str, perturbed: bool) -> PreTrainedModel:
        loaded = AutoModelForCausalLM.from_pretrained(model, attn_implementation=attention, dtype=torch.float32)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in loaded.parameters() if perturbed else ():
                drawn = torch.randn(parameter.shape, generator=generator)
                parameter.add_(drawn, alpha=noise * float(parameter.abs().mean()))
        return loaded.eval()

    stock = load("sdpa", perturbed=True)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    arguments = DPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_length=1024,
        report_to="none",
        use_weighting=True,
    )
    rows = [{"prompt": "w5 w6", "chosen": "w7", "rejected": "w8"}]
    trainer = DPOTrainer(
        stock,
        load("sdpa", perturbed=False),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    packed, reference = (PackedModel(load(NAMES["sdpa"], perturbed)) for perturbed in (True, False))
    return Setting(trainer, stock, packed, reference, pairs, scale)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder = tmp_path_factory.mktemp("tiny")
    save_model(folder, tiny_llama_config(tied=True))
    save_tokenizer(folder)
    return setting(folder, random_pairs(6), 0.05, folder / "trl", scale=1.0)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    pairs = random_pairs(4, seed=1, vocab=5000)
    return setting(smollm2(), pairs, 0.01, tmp_path_factory.mktemp("trl"), scale=3.0)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_tiny(tiny: Setting, case: dict[str, Any]) -> None:
    tiny.compare(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", ON_SMOLLM2, ids=name_of)
def test_smollm2(real: Setting, case: dict[str, Any]) -> None:
    real.compare(case)


def test_the_cases_have_every_loss() -> None:
    assert {loss for case in CASES for loss in case["loss_type"]} | BEYOND_TRL == set(LOSSES)
    assert VOCAB < 5000
