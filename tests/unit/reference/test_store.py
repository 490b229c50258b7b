import tempfile
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save

from dsdpo.config.schema import RunConfig
from dsdpo.data.example import MAX_COMPLETIONS, Lengths
from dsdpo.engine.engine import Hardware
from dsdpo.reference import precompute
from dsdpo.reference.precompute import what_changes_a_logp
from dsdpo.reference.store import ReferenceStore, store_key
from dsdpo.runtime.env import Mesh
from tests.dist.grid import run_config
from tests.helpers.tiny import ListOfExamples, random_examples, random_pairs, save_model, tiny_llama_config


def digests(n: int, seed: int = 0) -> np.ndarray:
    return ListOfExamples(random_pairs(n, seed)).digests(np.arange(n))


def filled(folder: Path, n: int = 20) -> tuple[ReferenceStore, np.ndarray, np.ndarray]:
    """A store of pairs in two chunks; their digests; their log-probs, fp32 [n, 2, 2]."""
    keys = digests(n)
    logps = np.random.default_rng(0).normal(size=(n, 2, 2)).astype(np.float32)
    store = ReferenceStore(folder)
    for part in (slice(0, n // 2), slice(n // 2, n)):
        store.write_chunks(keys[part], np.full(n // 2, 2), logps[part].reshape(-1, 2))
    store.reload()
    return store, keys, logps


def find(store: ReferenceStore, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`store.find` of pairs."""
    found, values = store.find(keys, np.full(len(keys), 2))
    return found, values.reshape(-1, 2, 2)


def test_what_was_written_is_found_in_any_order(tmp_path: Path) -> None:
    _, keys, logps = filled(tmp_path)
    store = ReferenceStore(tmp_path)
    store.reload()
    order = np.random.default_rng(1).permutation(len(keys))
    found, values = find(store, keys[order])
    assert found.all() and np.array_equal(values, logps[order])


def test_chunks_of_pairs_are_those_that_stores_have_always_had(tmp_path: Path) -> None:
    """`digests`, uint64 [N, 2], and `logps`, fp32 [N, 2, 2]: as older versions write and read them."""
    _, keys, logps = filled(tmp_path / "new")
    chunks = [load_file(path) for path in (tmp_path / "new").iterdir()]
    assert {(key, str(value.dtype), value.shape[1:]) for chunk in chunks for key, value in chunk.items()} == {
        ("digests", "uint64", (2,)),
        ("logps", "float32", (2, 2)),
    }
    assert sorted(len(chunk["logps"]) for chunk in chunks) == [10, 10]
    content = save({"digests": keys.view("<u8").reshape(-1, 2), "logps": logps})
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / f"{sha256(content).hexdigest()[:32]}.safetensors").write_bytes(content)
    store = ReferenceStore(tmp_path / "old")
    store.reload()
    found, values = find(store, keys)
    assert found.all() and np.array_equal(values, logps)


@given(seed=st.integers(0, 10**6), counts=st.lists(st.integers(1, MAX_COMPLETIONS), min_size=1, max_size=5))
@settings(max_examples=25)
def test_examples_of_any_k_share_a_store(seed: int, counts: list[int]) -> None:
    examples = random_examples(14, tuple(counts), seed, masks=True, empty=True)
    lengths, keys = Lengths.of(examples), ListOfExamples(examples).digests(np.arange(14))
    rng = np.random.default_rng(seed)
    logps = rng.normal(size=(len(lengths.completions), 2)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        store = ReferenceStore(Path(folder))
        for some in np.array_split(rng.permutation(12), 3):  # the last two are never stored
            store.write_chunks(keys[some], lengths.counts[some], logps[_places(lengths, some)])
        store.reload()
        order = rng.permutation(14)
        found, values = store.find(keys[order], lengths.counts[order])
    assert np.array_equal(found, order < 12)
    expected = logps[_places(lengths, order)]
    expected[~np.repeat(found, lengths.counts[order])] = np.nan
    assert np.array_equal(values, expected, equal_nan=True)


def _places(lengths: Lengths, examples: np.ndarray) -> np.ndarray:
    """Where the completions of some examples are among all."""
    return np.concatenate([lengths.starts[i] + np.arange(lengths.counts[i]) for i in examples])


def test_unknown_pairs_are_not_found(tmp_path: Path) -> None:
    store, keys, _ = filled(tmp_path)
    found, values = find(store, np.concatenate([keys[:3], digests(5, seed=99)]))
    assert found.tolist() == [True] * 3 + [False] * 5
    assert np.isnan(values[3:]).all() and not np.isnan(values[:3]).any()


def test_an_empty_store_finds_nothing(tmp_path: Path) -> None:
    store = ReferenceStore(tmp_path / "absent")
    store.reload()
    assert not find(store, digests(3))[0].any()


@pytest.mark.parametrize("harm", ["flip", "cut", "empty"])
def test_a_damaged_chunk_is_as_if_absent(tmp_path: Path, harm: str) -> None:
    _, keys, _ = filled(tmp_path)
    victim = sorted(tmp_path.glob("*.safetensors"))[0]
    content = bytearray(victim.read_bytes())
    if harm == "flip":
        content[-1] ^= 1
    victim.write_bytes({"flip": bytes(content), "cut": bytes(content[:-5]), "empty": b""}[harm])
    store = ReferenceStore(tmp_path)
    store.reload()
    found, _ = find(store, keys)
    assert found.sum() == len(keys) // 2


def test_writing_the_same_twice_changes_nothing(tmp_path: Path) -> None:
    store, keys, logps = filled(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    store.write_chunks(keys[:10], np.full(10, 2), logps[:10].reshape(-1, 2))
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_every_setting_is_part_of_the_key() -> None:
    settings = {"weights": "x", "dtype": "float32", "attention": "sdpa", "share_prefix": True}
    keys = {store_key(settings)} | {store_key({**settings, name: "other"}) for name in settings}
    assert len(keys) == len(settings) + 1
    assert store_key(dict(reversed(settings.items()))) == store_key(settings)


def test_how_an_adapter_is_computed_is_part_of_the_key_where_one_is_in_the_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base model's log-probs are those of before, to the bit."""
    monkeypatch.setattr(precompute, "weights_digests", lambda *_: {"model": "x"})

    def key(fused: bool, adapter: str | None) -> str:
        config = run_config("model", tmp_path, finetuning_type="lora", adapter_name_or_path=adapter)
        monkeypatch.setattr(precompute, "uses_fused_lora", lambda _: fused)
        return precompute.open_store(config, Mesh(0, 1, 0), Hardware(torch.device("cpu"), "fp32")).folder.name

    assert key(True, None) == key(False, None)
    assert key(True, "adapter") != key(False, "adapter")


def test_kernels_belong_to_the_key_where_they_are_not_transformers_own(tmp_path: Path) -> None:
    """The key of `none` is that of stores from before the option."""
    save_model(tmp_path / "model", tiny_llama_config())
    places = {"model_name_or_path": str(tmp_path / "model"), "dataset": ["d"], "output_dir": "o"}

    def key(kernels: str, capability: tuple[int, int] | None = None, liger: bool = False) -> dict[str, object]:
        hardware = Hardware(torch.device("cpu"), "bf16", capability, liger)
        return what_changes_a_logp(RunConfig(**places, kernels=kernels), hardware, ["w"])

    known = {"format", "weights", "dtype", "attention", "share_prefix"}
    assert set(key("none")) == set(key("auto")) == set(key("auto", (9, 0))) == set(key("none", (9, 0), True)) == known
    assert key("compile")["kernels"] == "compile"
    assert key("auto", (9, 0), True)["kernels"] == key("liger", (9, 0), True)["kernels"] == "liger"
