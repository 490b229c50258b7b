"""Noise on embeddings: the same numbers for an example however it is packed, and uniform."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from dsdpo.data.loader import BatchLoader
from dsdpo.model.attention.register import NAMES
from dsdpo.model.noise import embedding_noise
from dsdpo.model.packed import PackedInputs, PackedModel
from dsdpo.runtime.env import Mesh
from tests.helpers.tiny import ListOfExamples, random_examples, save_model, tiny_llama_config

SIZE, ALPHA = 8, 5.0
SOURCE = ListOfExamples(random_examples(6, (1, 3)))


def noise_of(step: int, ranks: int, share_prefix: bool, seed: int = 1) -> dict[tuple[int, int, int], np.ndarray]:
    """(example, completion, position) -> the noise on that token, over all ranks; of a prompt, that of each copy."""
    found: dict[tuple[int, int, int], np.ndarray] = {}
    for rank in range(ranks):
        loader = BatchLoader(SOURCE, Mesh(rank, ranks, rank), 120, share_prefix, ALPHA)
        [batch] = loader.training_batches(range(step, step + 1), 6, seed)
        for micro_batch in batch.micro_batches:
            if micro_batch.noise is None:
                assert not len(micro_batch.examples)
                continue
            noise = embedding_noise(*map(torch.from_numpy, micro_batch.noise), SIZE).numpy()
            for example, completion, _ in micro_batch.completions:
                ids = SOURCE.example(int(batch.example_ids[example]))
                end = int(
                    micro_batch.last_positions[
                        list(map(tuple, micro_batch.completions[:, :2])).index((example, completion))
                    ]
                )
                p, n = len(ids.prompt_ids), len(ids.completion_ids[completion])
                segment = next(s for s in micro_batch.segments if s.start <= end < s.start + s.length)
                prompt = segment.prefix_start if share_prefix else segment.start
                for position in range(p + n):
                    at = prompt + position if position < p else end - n + 1 + position - p
                    found[int(batch.example_ids[example]), int(completion), position] = noise[at]
    return found


def test_an_example_has_its_own_noise_in_each_step() -> None:
    wanted = noise_of(0, 1, share_prefix=False)
    for ranks in (1, 2, 3):
        for share_prefix in (True, False):
            found = noise_of(0, ranks, share_prefix)
            assert found.keys() == wanted.keys()
            assert all(np.array_equal(found[key], wanted[key]) for key in wanted)
    for other in (noise_of(1, 1, False), noise_of(0, 1, False, seed=2)):
        assert not any(np.array_equal(other[key], wanted[key]) for key in wanted)
    assert not np.array_equal(wanted[1, 0, 0], wanted[1, 0, 1])


def test_it_is_uniform_and_as_strong_as_the_paper_says() -> None:
    keys = torch.randint(-(2**62), 2**62, (2000,), generator=torch.Generator().manual_seed(0))
    noise = embedding_noise(keys, torch.full((2000,), ALPHA / 10.0), 64)  # 100 tokens
    bound = ALPHA / (100 * 64) ** 0.5
    assert noise.abs().max() <= bound and noise.mean().abs() < bound / 100
    assert noise.std().item() == pytest.approx(bound / 3**0.5, rel=0.01)
    counts = np.histogram(noise.numpy(), 10, (-bound, bound))[0]
    assert counts.min() > 0.97 * counts.mean()
    assert abs(np.corrcoef(noise[:, 0], noise[:, 1])[0, 1]) < 0.1


def test_it_is_added_in_training_alone(tmp_path: Path) -> None:
    save_model(tmp_path, tiny_llama_config(tied=True))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=NAMES["sdpa"], dtype=torch.float32)
    packed = PackedModel(model)
    loader = BatchLoader(SOURCE, Mesh(0, 1, 0), 4096, True, ALPHA)
    [trained] = loader.training_batches(range(1), 6, seed=1)
    [evaluated] = loader.in_order(trained.example_ids, 6)
    assert evaluated.micro_batches[0].noise is None
    noisy, clean = (
        packed(PackedInputs.of(some.micro_batches[0], torch.device("cpu"))) for some in (trained, evaluated)
    )
    again = packed(PackedInputs.of(evaluated.micro_batches[0], torch.device("cpu")))
    assert torch.equal(clean.token_logps, again.token_logps) and not torch.equal(noisy.token_logps, clean.token_logps)
