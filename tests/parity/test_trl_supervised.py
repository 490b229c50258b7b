"""The same loss and gradients as TRL's SFTTrainer and KTOTrainer on the same records, on SmolLM2, in fp32."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from deepspeed import comm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from trl import KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

from dsdpo.config.schema import RunConfig
from dsdpo.data.example import TokenizedExample
from dsdpo.data.loader import Batch, BatchLoader
from dsdpo.data.packing import MicroBatch
from dsdpo.data.prepare import prepare
from dsdpo.model.attention.register import NAMES
from dsdpo.model.packed import ModelOutput, PackedInputs, PackedModel
from dsdpo.objectives.base import Objective
from dsdpo.objectives.stages import objective_of
from dsdpo.objectives.sums import completion_sums
from dsdpo.runtime.env import Mesh
from tests.helpers.alone import logps_alone
from tests.helpers.real import hh_rows, smollm2

N = 6
CPU = torch.device("cpu")
# SmolLM2's template, with the marks that TRL's mask is made of: each reply and the token that ends it.
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def load(attention: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(smollm2(), attn_implementation=attention, dtype=torch.float32).eval()


def dialogues() -> list[list[dict[str, str]]]:
    """Real ones of several turns."""
    found = []
    for row in hh_rows(40, longest=500):
        turns = [part.split(": ", 1) for part in row["chosen"].strip().split("\n\n") if ": " in part]
        roles = ["user" if speaker == "Human" else "assistant" for speaker, _ in turns]
        if len(turns) >= 4 and roles == ["user", "assistant"] * (len(turns) // 2):
            found.append([{"role": role, "content": said} for role, (_, said) in zip(roles, turns)])
    return found[:N]


def step_of(folder: Path, records: list[dict[str, Any]], share_prefix: bool, **options: Any) -> tuple[Batch, Objective]:
    """All records as one step of several micro-batches, prepared as a run does."""
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = RunConfig(
        model_name_or_path=str(smollm2()),
        dataset=["rows.jsonl"],
        dataset_dir=str(folder),
        output_dir=str(folder / "out"),
        max_refused=0.0,
        **options,
    )
    source = prepare(config, "train")
    assert source is not None and len(source) == len(records)
    tokens = source.lengths(np.arange(len(source))).packed(share_prefix)
    longest = max(int(tokens.max()), int(tokens.sum()) // 2)
    batch = BatchLoader(source, Mesh(0, 1, 0), longest, share_prefix).batch(np.arange(len(source)))
    assert len(batch.micro_batches) > 1
    return batch, objective_of(config)


def compare(stock: PreTrainedModel, wanted: torch.Tensor, batch: Batch, objective: Objective) -> None:
    """The loss to 1e-5 and each gradient to 1e-3. The reference is the untrained policy times 0.9."""
    wanted.backward()
    packed = PackedModel(load(NAMES["sdpa"]), "logprob")

    def forward(micro_batch: MicroBatch) -> ModelOutput:
        return packed(PackedInputs.of(micro_batch, CPU))

    reference = torch.zeros(len(batch.lengths.completions), 2) if objective.needs_reference else None
    if reference is not None:
        with torch.no_grad():
            for micro_batch in batch.micro_batches:
                at = torch.from_numpy(batch.completion_indices(micro_batch))
                reference[at] = 0.9 * completion_sums(forward(micro_batch), micro_batch.completions)
    loss_of, loss = objective.bind(batch, reference, forward), 0.0
    for micro_batch in batch.to_compute(objective.first_alone):
        part = loss_of(micro_batch, forward(micro_batch)).total / objective.denominator(batch)
        part.backward()
        loss += part.item()
    assert loss == pytest.approx(wanted.item(), rel=1e-5)
    gradients = {name: p.grad for name, p in stock.named_parameters() if p.grad is not None}
    ours = {name: p.grad for name, p in packed.model.named_parameters() if p.grad is not None}
    assert ours.keys() == gradients.keys()
    for name, expected in gradients.items():
        assert (ours[name] - expected).norm() / expected.norm() < 1e-3, name


def sft_trainer(folder: Path, records: list[dict[str, Any]], **options: Any) -> SFTTrainer:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": N,
        "report_to": "none",
        "max_length": None,
        "dataset_num_proc": None,
        **options,
    }
    return SFTTrainer(
        load("sdpa"),
        args=SFTConfig(**settings),
        train_dataset=Dataset.from_list(records),
        processing_class=AutoTokenizer.from_pretrained(smollm2()),
    )


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("kind", ["dialogue", "last reply", "text"])
def test_supervised(tmp_path: Path, kind: str, share_prefix: bool) -> None:
    """All replies of dialogues, as with assistant_only_loss; the last one alone; prompt and completion as text."""
    turns = dialogues()
    assert len(turns) == N
    options: dict[str, Any] = {"stage": "sft", "max_length": 400}
    template: dict[str, Any] = {}
    if kind == "text":
        records: list[dict[str, Any]] = [
            {"prompt": some[0]["content"], "completion": " " + some[1]["content"]} for some in turns
        ]
    elif kind == "last reply":
        records = [{"prompt": some[:-1], "completion": some[-1:]} for some in turns]
    else:
        records = [{"messages": some} for some in turns]
        template = {"assistant_only_loss": True, "chat_template_path": str(tmp_path / "marked.jinja")}
        (tmp_path / "marked.jinja").write_text(MARKED)
        options["template"] = str(tmp_path / "marked.jinja")
    trainer = sft_trainer(tmp_path / "trl", records, **template)
    rows = trainer.data_collator([trainer.train_dataset[i] for i in range(N)])
    batch, objective = step_of(tmp_path / "ours", records, share_prefix, **options)
    scored = int((rows["labels"] != -100).sum())
    after_turns = sum(len(some) // 2 for some in turns) if kind == "last reply" else 0  # TRL trains the newline behind
    assert batch.lengths.loss_tokens.sum() == scored - (N if after_turns else 0)
    if after_turns:
        for row in rows["labels"]:
            row[(row != -100).nonzero()[-1]] = -100
    compare(trainer.model, trainer.compute_loss(trainer.model.eval(), rows), batch, objective)


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone, over which the mean of a step is taken."""
    comm.init_distributed(
        "gloo", auto_mpi_discovery=False, init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    yield
    comm.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("share_prefix", [True, False])
def test_labelled(tmp_path: Path, share_prefix: bool) -> None:
    """KTO with the step as one micro-batch of TRL's."""
    turns = dialogues()
    records = [
        {"prompt": some[:-1], "completion": some[-1:], "label": number % 3 != 0} for number, some in enumerate(turns)
    ]
    weights = {"desirable_weight": 0.8, "undesirable_weight": 1.2, "beta": 0.3}
    batch, objective = step_of(tmp_path / "ours", records, share_prefix, stage="kto", max_length=400, **weights)
    stock = load("sdpa")
    trainer = KTOTrainer(
        stock,
        ref_model=load("sdpa"),
        args=KTOConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=N,
            train_sampling_strategy="sequential",
            report_to="none",
            max_length=400,
            **weights,
        ),
        train_dataset=Dataset.from_list(records),
        processing_class=AutoTokenizer.from_pretrained(smollm2()),
    )
    rows = [dict(trainer.train_dataset[i]) for i in range(N)]
    for row in rows:
        row["completion_ids"] = row["completion_ids"][:-1]  # TRL trains the newline behind the end of the turn
    for number, row in enumerate(rows):  # TRL gives the first example the answer of the last one, dsdpo of the second
        row["KL_completion_ids"] = rows[number - 1 if number else 1]["completion_ids"]
        for key, ids in (("ref_logps", "completion_ids"), ("ref_KL_logps", "KL_completion_ids")):
            alone = TokenizedExample(np.array(row["prompt_ids"]), (np.array(row[ids]),))
            row[key] = 0.9 * logps_alone(stock, alone, 0).sum().item()
    trainer.precompute_ref_logps = True
    compare(stock, trainer.compute_loss(stock.eval(), trainer.data_collator(rows)), batch, objective)
