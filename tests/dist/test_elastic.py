"""Checkpoints move between numbers of ranks, ZeRO stages and offloading: the same state by name, to the bit."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsdpo.checkpoint.commit import checkpoints
from dsdpo.checkpoint.fragments import Fragments
from dsdpo.engine.zero_state import STATES
from dsdpo.runtime.rundir import RunDir
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import save_model, save_tokenizer, tiny_llama_config

WORLDS = (1, 2, 3)
OFFLOADED = {"stage": 3, "offload": True}  # the parameters too, which is refused for quantized ones
PLACES = [{"stage": 0}, {"stage": 1}, {"stage": 2}, {"stage": 3}, OFFLOADED]
KINDS: dict[str, dict[str, Any]] = {
    "full": {"finetuning_type": "full", "weight_decay": 0.1},
    "lora": {"finetuning_type": "lora", "learning_rate": 1e-2},
    "reward": {"finetuning_type": "lora", "learning_rate": 1e-2, "objective": "rm"},
    "supervised": {"finetuning_type": "full", "objective": "sft", "neftune_noise_alpha": 5.0},
    "labelled": {"finetuning_type": "lora", "learning_rate": 1e-2, "objective": "kto"},
    "text": {"finetuning_type": "full", "objective": "pt"},
    "quantized": {"finetuning_type": "lora", "learning_rate": 1e-2, "quantization_bit": 4},
}
MORE_PLACES = [*PLACES, {"stage": 3, "persist": True}, {"stage": 2, "offload": True}]
CASES = [(world, place, kind) for world in WORLDS for place in range(len(PLACES)) for kind in ("full", "lora")]
FEWER = [kind for kind in KINDS if kind not in ("full", "lora")]
CASES += [(world, place, kind) for kind in FEWER for world in WORLDS for place in (1, 3)]
SAVED_AFTER, STEPS = 3, 6


def place_name(case: tuple[int, int, str]) -> str:
    world, place, kind = case
    return f"{kind}-{world}x-zero{PLACES[place]['stage']}{'-offload' * PLACES[place].get('offload', False)}"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose sizes no number of ranks divides."""
    folder = tmp_path_factory.mktemp("elastic")
    save_model(folder / "model", tiny_llama_config(hidden_size=36, intermediate_size=52, head_dim=10))
    save_tokenizer(folder / "model")
    return folder


def go(world: int, tasks: list[dict[str, Any]], fresh: bool = False) -> list[dict[str, Any]]:
    return run_ranks("tests.dist.moves:go", world, tasks, fresh=fresh)[0] if tasks else []


def task(base: Path, kind: str, folder: str, **more: Any) -> dict[str, Any]:
    common = {"model": str(base / "model"), "max_steps": STEPS, "lr_scheduler_type": "cosine"}
    return {**common, **KINDS[kind], "folder": str(base / folder), **more}


def saved_state(run: Path) -> dict[str, np.ndarray]:
    """What the newest checkpoint of a run holds, by name, read from its files."""
    newest = checkpoints(RunDir(run / "out"))[0]
    assert not newest.problem
    with Fragments(newest.path, newest.manifest["parameters"], newest.manifest["world_size"]) as fragments:
        return {f"{s}/{name}": fragments.read(name, s).numpy() for name in fragments.index for s in STATES}


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    different = [key for key in expected if not np.array_equal(found[key], expected[key])]
    assert not different, f"{len(different)} of {len(expected)} differ, such as {different[0]}"


@pytest.fixture(scope="module")
def canonical(base: Path) -> dict[str, dict[str, Any]]:
    """For each kind: the state after SAVED_AFTER steps on one rank without ZeRO, and the losses of a run to the end."""
    tasks = [task(base, kind, f"canonical-{kind}", until=SAVED_AFTER, save=True) for kind in KINDS]
    tasks += [task(base, kind, f"whole-{kind}", until=STEPS) for kind in KINDS]
    whole = go(1, tasks)[len(KINDS) :]
    states = [saved_state(base / f"canonical-{kind}") for kind in KINDS]
    return {kind: {"state": s, "losses": w["losses"]} for kind, s, w in zip(KINDS, states, whole)}


def resumed(base: Path, kind: str) -> dict[str, Any]:
    return {"resume_from_checkpoint": str(base / f"canonical-{kind}/out/checkpoints/step-{SAVED_AFTER:08d}")}


@pytest.fixture(scope="module")
def moved(base: Path, canonical: dict[str, Any]) -> dict[tuple[int, int, str], dict[str, Any]]:
    """The canonical state loaded in every setting, and saved again at once; then trained to the end."""
    results = {}
    for world in WORLDS:
        cases = [case for case in CASES if case[0] == world]
        tasks = []
        for case in cases:
            _, place, kind = case
            where = {**PLACES[place], **resumed(base, kind), "async_save": place % 2 == 1}
            name = place_name(case)
            tasks.append(task(base, kind, f"saved-{name}", **where, until=SAVED_AFTER, save=True, state=True))
            tasks.append(task(base, kind, f"trained-{name}", **where, max_tokens_per_row=160, until=STEPS))
        found = go(world, tasks)
        results.update({case: {"load": a, "train": b} for case, a, b in zip(cases, found[::2], found[1::2])})
    return results


@pytest.mark.parametrize("case", CASES, ids=place_name)
def test_a_load_gives_the_engine_that_state(moved: Any, canonical: Any, case: Any) -> None:
    """As DeepSpeed itself reads it back."""
    assert_same(moved[case]["load"]["state"], canonical[case[2]]["state"])


@pytest.mark.parametrize("case", CASES, ids=place_name)
def test_a_save_gives_the_file_that_state(base: Path, moved: Any, canonical: Any, case: Any) -> None:
    assert_same(saved_state(base / f"saved-{place_name(case)}"), canonical[case[2]]["state"])


@pytest.mark.parametrize("case", CASES, ids=place_name)
def test_training_goes_on_as_if_nothing_had_happened(moved: Any, canonical: Any, case: Any) -> None:
    losses = moved[case]["train"]["losses"]
    np.testing.assert_allclose(losses, canonical[case[2]]["losses"][SAVED_AFTER:], atol=1e-4)


@pytest.mark.slow
def test_chains_of_moves(base: Path, canonical: dict[str, Any]) -> None:
    """Save, move, save, move back: 12 random chains of one run each, a step or two in every place."""
    rng = random.Random(0)
    chains = []
    for number in range(12):
        first, second = rng.sample([case for case in CASES if case[2] == list(KINDS)[number % len(KINDS)]], 2)
        chains.append([first, second, first])
    losses: list[list[float]] = [[] for _ in chains]
    for stop, until in enumerate((2, 4, STEPS)):
        for world in WORLDS:
            mine = [number for number, chain in enumerate(chains) if chain[stop][0] == world]
            tasks = []
            for number in mine:
                _, place, kind = chains[number][stop]
                tasks.append(task(base, kind, f"chain-{number}", **PLACES[place], until=until, save=True))
            for number, found in zip(mine, go(world, tasks)):
                losses[number] = found["losses"]
    for chain, found in zip(chains, losses):
        np.testing.assert_allclose(found, canonical[chain[0][2]]["losses"], atol=1e-4, err_msg=str(chain))


@pytest.mark.parametrize("kind", KINDS)
def test_at_the_same_world_size_nothing_changes_at_all(base: Path, kind: str) -> None:
    """State and losses to the bit, with dropout, in every stage, saved beside the training or not.

    One kind in new interpreters: no thread may import what a forked rank has at its start.
    """
    more: dict[str, Any] = {"disable_dropout": True} if kind == "full" else {"lora_dropout": 0.2}
    places = [place for place in MORE_PLACES if kind != "quantized" or place != OFFLOADED]
    wholes = [task(base, kind, f"one-go-{kind}-{i}", **p, **more, until=STEPS, save=True) for i, p in enumerate(places)]
    halves = []
    for i, place in enumerate(places):
        where = {**place, **more, "async_save": i % 2 == 0}
        halves.append(task(base, kind, f"two-goes-{kind}-{i}", **where, until=2, save=True))
        halves.append(task(base, kind, f"two-goes-{kind}-{i}", **where, until=STEPS, save=True))
    found = go(2, [*wholes, *halves], fresh=kind == "lora")
    for i in range(len(places)):
        assert found[len(places) + 2 * i + 1]["losses"] == found[i]["losses"]
        assert_same(saved_state(base / f"two-goes-{kind}-{i}"), saved_state(base / f"one-go-{kind}-{i}"))
