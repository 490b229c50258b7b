from pathlib import Path

import numpy as np
import pytest

from dsdpo.reference.store import ReferenceStore, store_key
from tests.helpers.tiny import ListOfPairs, random_pairs


def digests(n: int, seed: int = 0) -> np.ndarray:
    return ListOfPairs(random_pairs(n, seed)).digests(np.arange(n))


def filled(folder: Path, n: int = 20) -> tuple[ReferenceStore, np.ndarray, np.ndarray]:
    keys = digests(n)
    logps = np.random.default_rng(0).normal(size=(n, 2)).astype(np.float32)
    store = ReferenceStore(folder)
    store.write_chunk(keys[: n // 2], logps[: n // 2])
    store.write_chunk(keys[n // 2 :], logps[n // 2 :])
    store.reload()
    return store, keys, logps


def test_what_was_written_is_found_in_any_order(tmp_path: Path) -> None:
    _, keys, logps = filled(tmp_path)
    store = ReferenceStore(tmp_path)
    store.reload()
    order = np.random.default_rng(1).permutation(len(keys))
    found, values = store.find(keys[order])
    assert found.all() and np.array_equal(values, logps[order])


def test_unknown_pairs_are_not_found(tmp_path: Path) -> None:
    store, keys, _ = filled(tmp_path)
    found, values = store.find(np.concatenate([keys[:3], digests(5, seed=99)]))
    assert found.tolist() == [True] * 3 + [False] * 5
    assert np.isnan(values[3:]).all() and not np.isnan(values[:3]).any()


def test_an_empty_store_finds_nothing(tmp_path: Path) -> None:
    store = ReferenceStore(tmp_path / "absent")
    store.reload()
    assert not store.find(digests(3))[0].any()


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
    found, _ = store.find(keys)
    assert found.sum() == len(keys) // 2


def test_writing_the_same_twice_changes_nothing(tmp_path: Path) -> None:
    store, keys, logps = filled(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    store.write_chunk(keys[:10], logps[:10])
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_every_setting_is_part_of_the_key() -> None:
    settings = {"weights": "x", "dtype": "float32", "attention": "sdpa", "share_prefix": True}
    keys = {store_key(settings)} | {store_key({**settings, name: "other"}) for name in settings}
    assert len(keys) == len(settings) + 1
    assert store_key(dict(reversed(settings.items()))) == store_key(settings)
