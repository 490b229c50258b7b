"""Preparing a set: what is kept, cut and refused, what it is found again by, and that a crash leaves nothing half."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from dsdpo.config.schema import RunConfig
from dsdpo.data.dropped import Dropped
from dsdpo.data.encode import Limits, fit
from dsdpo.data.example import DIGEST_BYTES
from dsdpo.data.fingerprint import known_tokenizer, tokenizer_digest
from dsdpo.data.prepare import open_prepared, prepare, summary, wait_prepared
from dsdpo.data.shards import BATCH_ROWS, DROPPED_ROWS, MANIFEST, SCHEMA, PreparedSet, write_shards
from dsdpo.data.tally import Tally
from dsdpo.data.templates import EncodedExample, load_tokenizer
from dsdpo.errors import ConfigError, DataError, HangError, IOFailure
from tests.helpers.real import shared_file
from tests.helpers.tiny import ListOfExamples
from tests.unit.data.conftest import make_tokenizer

ROOT = Path(__file__).parents[3]


def rows(n: int) -> list[dict[str, object]]:
    return [
        {"prompt": f"question {i}?", "chosen": f" yes {i}", "rejected": f" no {i}", "chosen_score": float(i)}
        for i in range(n)
    ]


def write(path: Path, content: list[dict[str, object]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    settled = time.time() - 60  # hashes of files that changed just now are not remembered
    os.utime(path, (settled, settled))


@pytest.fixture
def settings(tmp_path, model_folder):
    write(tmp_path / "data/pairs.jsonl", rows(20))
    return {
        "model_name_or_path": str(model_folder),
        "dataset": ["pairs.jsonl"],
        "dataset_dir": str(tmp_path / "data"),
        "output_dir": str(tmp_path / "runs/first"),
        "max_length": 64,
    }


def prepared(settings, split="train", **changes) -> PreparedSet:
    found = prepare(RunConfig(**{**settings, **changes}), split)
    assert found is not None
    return found


def parts(pairs: PreparedSet, index: int) -> list[np.ndarray]:
    """Token ids of an example's prompt and completions."""
    example = pairs.example(index)
    return [example.prompt_ids, *example.completion_ids]


def texts(pairs: PreparedSet) -> list[list[str]]:
    tokenizer = make_tokenizer("chatml")
    return [[tokenizer.decode(ids) for ids in parts(pairs, i)] for i in range(len(pairs))]


# --- what comes out ---


def test_pairs_in_order_with_lengths_scores_and_sources(settings):
    pairs = prepared(settings)
    assert len(pairs) == 20
    assert texts(pairs) == [[f"question {i}?", f" yes {i}<|im_end|>", f" no {i}<|im_end|>"] for i in range(20)]
    lengths = pairs.lengths(np.arange(20))
    assert all(array.dtype == np.int64 for array in vars(lengths).values()) and lengths.per_pair.shape == (20, 3)
    assert lengths.per_pair.tolist() == [[len(ids) for ids in parts(pairs, i)] for i in range(20)]
    assert lengths.loss_tokens.tolist() == lengths.completions.tolist()
    assert pairs.lengths(np.array([7, 3])).per_pair.tolist() == lengths.per_pair[[7, 3]].tolist()
    assert pairs.lengths(np.array([], dtype=np.int64)).per_pair.shape == (0, 3)
    assert all(ids.dtype == np.int64 for ids in parts(pairs, 3)) and pairs.example(3).loss_mask is None
    assert pairs.where(4) == "pairs.jsonl:5"
    shuffled = np.random.default_rng(0).permutation(20)
    assert np.array_equal(
        pairs.digests(shuffled), ListOfExamples([pairs.example(i) for i in range(20)]).digests(shuffled)
    )
    assert np.array_equal(pairs.scores(np.array([4, 2])), [4.0, np.nan, 2.0, np.nan], equal_nan=True)
    assert pairs.weights(shuffled).tolist() == [1.0] * 20
    assert pairs.digests(shuffled[:0]).shape == pairs.scores(shuffled[:0]).shape == (0,)
    with pytest.raises(IndexError):
        pairs.example(20)


def test_counts_and_refused_rows_are_told(settings, tmp_path):
    content = [*rows(8), {"prompt": "p", "chosen": "c"}, {"prompt": "p", "chosen": "", "rejected": "r"}]
    write(tmp_path / "data/pairs.jsonl", content)
    with (tmp_path / "data/pairs.jsonl").open("a") as stream:
        stream.write('{"prompt": \n')
    pairs = prepared(settings, max_refused=0.3)
    told = pairs.manifest
    assert (told["rows"], told["examples"]) == (11, 8)
    assert told["refused"] == {"no rejected": 1, "empty chosen": 1, "not valid JSON": 1}
    lengths = pairs.lengths(np.arange(8)).per_pair
    names = ("prompt", "completion 1", "completion 2")
    assert told["mean_tokens"] == dict(zip(names, lengths.mean(axis=0).tolist()))
    assert told["longest"] == dict(zip(names, lengths.max(axis=0).tolist()))
    listed = [json.loads(line) for line in (pairs.path / DROPPED_ROWS).read_text().splitlines()]
    assert [row["source"] for row in listed] == [f"pairs.jsonl:{i}" for i in (9, 10, 11)]
    assert listed[0]["reason"] == "no rejected" and listed[0]["excerpt"] == '{"prompt": "p", "chosen": "c"}'
    assert {found["code"]: found["count"] for found in told["dropped"].values()} == {
        "column_missing": 1,
        "empty_chosen": 1,
        "not_json": 1,
    }
    assert told["dropped"]["not valid JSON"]["source"] == "pairs.jsonl:11"
    said = summary(pairs)
    assert all(part in said for part in ("11 records, 8 examples", "3 dropped", "pairs.jsonl:9", "pairs.jsonl:11"))


def test_too_many_refused_rows_stop_the_run_and_stay_listed(settings, tmp_path):
    write(tmp_path / "data/pairs.jsonl", [*rows(3), {"prompt": "p", "chosen": "c"}])
    with pytest.raises(
        DataError,
        match=r"(?s)1 of 4 records are dropped, max_refused allows 1\.00%.*1 x no rejected \(first pairs\.jsonl:4",
    ) as caught:
        prepared(settings)
    listed = str(caught.value).split("listed in ")[1].split(";")[0]
    assert json.loads(Path(listed).read_text())["source"] == "pairs.jsonl:4"
    folder = tmp_path / "runs/.dsdpo_cache/prepared"
    assert not list(folder.glob("*/manifest.json")) and not list(folder.glob(".*"))
    write(tmp_path / "data/pairs.jsonl", [{"prompt": "p", "chosen": "c", "rejected": ""}])
    with pytest.raises(DataError, match="no record is left"):
        prepared(settings, max_refused=1.0)


def test_no_row_and_unknown_format(settings, tmp_path):
    write(tmp_path / "data/pairs.jsonl", [])
    with pytest.raises(DataError, match=r"pairs\.jsonl:1, byte 0: the file is empty"):
        prepared(settings)
    write(tmp_path / "data/pairs.jsonl", [{"words": "a line", "id": 1}])
    with pytest.raises(DataError, match=r"has the columns id, words; describe it in dataset_info\.json"):
        prepared(settings)
    info = {"mine": {"file_name": "none.csv", "formatting": "trl"}}
    (tmp_path / "data/dataset_info.json").write_text(json.dumps(info))
    (tmp_path / "data/none.csv").write_text("prompt,chosen,rejected\n")
    with pytest.raises(DataError, match="holds no record"):
        prepared(settings, dataset=["mine"])


def test_mistakes_in_names_and_template_are_config_errors(settings, tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        prepared(settings, dataset=["gone.jsonl"])
    with pytest.raises(ConfigError, match="template llama3 needs the token"):
        prepared(settings, template="llama3")
    make_tokenizer("chatml").save_pretrained(tmp_path / "bare")
    talk = {"prompt": [{"role": "user", "content": "p"}]}
    talk |= {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    write(tmp_path / "data/talk.jsonl", [talk])
    with pytest.raises(ConfigError, match="set template"):
        prepared(settings, dataset=["talk.jsonl"], model_name_or_path=str(tmp_path / "bare"))


def test_several_sets_are_joined_in_order_and_cut_to_max_samples(settings, tmp_path):
    write(tmp_path / "data/more.jsonl", [{"question": "q", "context": "c", "answer": "SELECT 1"}] * 4)
    info = {"sql": {"file_name": "more.jsonl", "allow_empty_rejected": True}}
    (tmp_path / "data/dataset_info.json").write_text(json.dumps(info))
    pairs = prepared(settings, dataset=["sql", "pairs.jsonl"], max_samples=2, max_length=128)
    assert [pairs.where(i) for i in range(len(pairs))] == [
        "more.jsonl:1",
        "more.jsonl:2",
        "pairs.jsonl:1",
        "pairs.jsonl:2",
    ]
    assert texts(pairs)[0][1:] == ["SELECT 1<|im_end|>", "<|im_end|>"]


def test_entry_without_formatting_keeps_its_system_column(settings, tmp_path):
    row = {"system": "Be brief.", "question": "Name a cat.", "chosen": "Tom", "rejected": " Sure! Tom"}
    write(tmp_path / "data/orca.jsonl", [row])
    columns = {"prompt": "question", "chosen": "chosen", "rejected": "rejected", "system": "system"}
    info = {
        "orca": {"file_name": "orca.jsonl", "ranking": True, "columns": columns},
        "lists": {"file_name": "lists.jsonl", "ranking": True, "columns": {"messages": "messages"}},
    }
    (tmp_path / "data/dataset_info.json").write_text(json.dumps(info))
    pairs = prepared(settings, dataset=["orca"], template="chatml", max_length=128)
    assert pairs.manifest["datasets"] == ["orca (alpaca)"]
    prompt, chosen, _ = texts(pairs)[0]
    assert prompt.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nName a cat.<|im_end|>")
    assert chosen == "Tom<|im_end|>"
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    row = {"messages": talk, "chosen": talk, "rejected": [talk[0], {"role": "assistant", "content": "No."}]}
    write(tmp_path / "data/lists.jsonl", [row])
    with pytest.raises(DataError, match=r"lists looks like trl, which does not read columns\.messages; it"):
        prepared(settings, dataset=["lists"])


def test_workers_do_not_change_the_set(settings):
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    one = prepared(settings, cache_dir=settings["output_dir"] + "/one")
    two = prepared(settings, cache_dir=settings["output_dir"] + "/two", preprocessing_num_workers=3)
    assert texts(one) == texts(two) and one.fingerprint == two.fingerprint
    assert [one.where(i) for i in range(20)] == [two.where(i) for i in range(20)]
    assert os.environ.get("TOKENIZERS_PARALLELISM") == before


@pytest.mark.parametrize("workers", [1, 2])
def test_memory_does_not_grow_with_the_number_of_records(settings, tmp_path, monkeypatch, workers):
    """What Arrow holds while the last batches are counted is what it held for the first ones."""
    monkeypatch.setattr("dsdpo.data.pipeline._BATCH_RECORDS", 32)
    monkeypatch.setattr("dsdpo.data.shards.BATCH_ROWS", 64)
    held, sizes = [], []

    def add(tally: Tally, batch: pa.RecordBatch) -> None:
        held.append(pa.total_allocated_bytes())
        sizes.append(batch.nbytes)
        counted(tally, batch)

    counted = Tally.add
    monkeypatch.setattr(Tally, "add", add)
    long = [{**row, "prompt": f"{row['prompt']} {'why? ' * 8}"} for row in rows(1200)]
    write(tmp_path / "data/pairs.jsonl", long)
    before = pa.total_allocated_bytes()
    pairs = prepared(settings, preprocessing_num_workers=workers)
    assert len(pairs) == 1200 and len(held) == 38
    late, early = (max(part) - before for part in (held[19:], held[:19]))
    assert late < 1.3 * early + 50_000 and max(early, late) < sum(sizes) / 2, (early, late, sum(sizes))


# --- held-out pairs ---


@pytest.mark.parametrize(("val_size", "held_out"), [(0.25, 5), (7, 7)])
def test_val_size_splits_without_overlap(settings, val_size, held_out):
    train = prepared(settings, val_size=val_size)
    held = prepared(settings, "eval", val_size=val_size)
    assert (len(train), len(held)) == (20 - held_out, held_out)
    sources = [pairs.where(i) for pairs in (train, held) for i in range(len(pairs))]
    assert sorted(sources) == sorted(f"pairs.jsonl:{i + 1}" for i in range(20))
    assert train.path == held.path and train.fingerprint != held.fingerprint
    again = prepared(settings, "eval", val_size=val_size, seed=7)
    assert [again.where(i) for i in range(held_out)] != [held.where(i) for i in range(held_out)]
    assert train.lengths(np.arange(3)).per_pair.tolist() == [[len(ids) for ids in parts(train, i)] for i in range(3)]


def test_eval_is_its_own_set_or_none(settings, tmp_path):
    assert prepare(RunConfig(**settings), "eval") is None
    assert open_prepared(RunConfig(**settings), "eval") is None
    write(tmp_path / "data/held.jsonl", rows(3))
    assert len(prepared(settings, "eval", eval_dataset=["held.jsonl"], val_size=0.5)) == 3
    assert len(prepared(settings, "train", eval_dataset=["held.jsonl"], val_size=0.5)) == 20


def test_val_size_must_leave_both_parts(settings):
    for val_size in (20, 0.001):
        with pytest.raises(DataError, match="each part needs one"):
            prepared(settings, val_size=val_size)


# --- finding it again ---


def test_a_prepared_set_is_opened_and_not_made_again(settings):
    first = prepared(settings)
    before = (first.path / MANIFEST).stat().st_mtime_ns
    assert (prepared(settings).path / MANIFEST).stat().st_mtime_ns == before
    assert open_prepared(RunConfig(**settings), "train").path == first.path


def test_fingerprint_follows_what_changes_token_ids(settings, tmp_path, model_folder):
    first = prepared(settings).path
    same = {
        "seed": 3,
        "beta": 0.3,
        "learning_rate": 1e-4,
        "preprocessing_num_workers": 2,
        "max_tokens_per_row": 500,
        "share_prefix": False,
        "max_refused": 0.5,
    }
    for key, value in same.items():
        assert prepared(settings, **{key: value}).path == first, key
    copy = tmp_path / "copy"
    make_tokenizer("chatml", (model_folder / "chat_template.jinja").read_text()).save_pretrained(copy)
    assert prepared(settings, model_name_or_path=str(copy)).path == first, "the path of the tokenizer does not matter"
    other = {
        "max_length": 48,
        "truncation_mode": "keep_start",
        "max_samples": 4,
        "template": "chatml",
        "default_system": "Hi",
        "max_tokens_per_row": 100,
    }
    paths = {prepared(settings, **{key: value}).path for key, value in other.items()}
    assert len(paths) == len(other) and first not in paths
    make_tokenizer("chatml").save_pretrained(tmp_path / "bare")
    paths.add(prepared(settings, model_name_or_path=str(tmp_path / "bare")).path)
    (tmp_path / "data/dataset_info.json").write_text(
        json.dumps({"mine": {"file_name": "pairs.jsonl", "num_samples": 9}})
    )
    paths.add(prepared(settings, dataset=["mine"]).path)
    write(tmp_path / "data/pairs.jsonl", rows(21))
    paths.add(prepared(settings).path)
    assert len(paths) == len(other) + 3 and first not in paths


def test_same_size_and_time_but_other_content_is_seen_unless_settled(settings, tmp_path):
    """A file changed within the clock's grain of its hash is read again."""
    path = tmp_path / "data/pairs.jsonl"
    path.write_text(path.read_text())
    now = path.stat().st_mtime_ns
    first = prepared(settings).path
    path.write_text(path.read_text().replace("yes", "yep"))
    os.utime(path, ns=(now, now))
    assert prepared(settings).path != first


def test_a_tokenizer_is_loaded_again_only_when_its_files_or_packages_change(tmp_path, monkeypatch):
    monkeypatch.setattr("dsdpo.runtime.files._SETTLED_NS", 0)
    folder, loads = tmp_path / "tokenizer", []
    make_tokenizer("chatml").save_pretrained(folder)

    def load():
        loads.append(1)
        return load_tokenizer(str(folder))

    def digest() -> str:
        return known_tokenizer(folder, load, tmp_path / "stamps").digest

    first = digest()
    assert first == tokenizer_digest(load_tokenizer(str(folder)))
    assert digest() == first and len(loads) == 1
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    second = digest()
    assert second != first and second == digest() and len(loads) == 2
    monkeypatch.setattr("dsdpo.data.fingerprint._version", lambda package: "0.0")
    assert digest() == second and len(loads) == 3


def test_a_tokenizer_that_changed_just_now_is_loaded_each_time(tmp_path):
    make_tokenizer("chatml").save_pretrained(tmp_path / "tokenizer")
    loads = []

    def load():
        loads.append(1)
        return load_tokenizer(str(tmp_path / "tokenizer"))

    for _ in range(2):
        known_tokenizer(tmp_path / "tokenizer", load, tmp_path / "stamps")
    assert len(loads) == 2


def test_open_needs_a_prepared_set(settings):
    with pytest.raises(DataError, match="run `dsdpo prepare` first"):
        open_prepared(RunConfig(**settings), "train")


def test_waiting_ends_with_the_set_or_in_time(settings):
    config = RunConfig(**settings)
    with pytest.raises(HangError, match="waited 0 s for the train data"):
        wait_prepared(config, "train", timeout=0)
    assert wait_prepared(config, "eval", timeout=0) is None
    maker = multiprocessing.get_context("fork").Process(target=prepare, args=(config, "train"))
    maker.start()
    try:
        assert len(wait_prepared(config, "train", timeout=120)) == 20
    finally:
        maker.join()


# --- crashes and company ---


def test_two_processes_at_once_both_end_up_fine(settings):
    config = RunConfig(**settings)
    context = multiprocessing.get_context("fork")
    makers = [context.Process(target=prepare, args=(config, "train")) for _ in range(2)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
    assert [maker.exitcode for maker in makers] == [0, 0]
    pairs = open_prepared(config, "train")
    assert len(pairs) == 20
    assert [entry.name for entry in pairs.path.parent.iterdir() if entry.name.startswith(".")] == []


def test_killed_at_the_end_leaves_nothing_that_looks_complete(settings):
    """Killed right before the rename, with everything written: the set is absent, and is made again."""
    script = textwrap.dedent(f"""
        import os, signal
        from dsdpo.config.schema import RunConfig
        from dsdpo.data import make, prepare
        make._publish = lambda temporary, path: os.kill(os.getpid(), signal.SIGKILL)
        prepare.prepare(RunConfig(**{settings!r}), "train")
    """)
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False)
    assert ended.returncode == -signal.SIGKILL
    with pytest.raises(DataError):
        open_prepared(RunConfig(**settings), "train")
    folder = Path(settings["output_dir"]).parent / ".dsdpo_cache/prepared"
    [left] = folder.glob(".*.tmp")
    assert len(prepared(settings)) == 20 and left.exists(), "it may be another process's: young ones stay"
    os.utime(left, (0, 0))
    settled = folder / left.name.split(".")[1]
    settled.rename(folder / "elsewhere")
    assert len(prepared(settings)) == 20 and not left.exists()


def test_workers_end_with_the_process_that_was_killed(settings, tmp_path):
    """A worker waits for its next batch, and the pipe that it waits at never ends."""
    script = textwrap.dedent(f"""
        import multiprocessing, os, signal
        from dsdpo.config.schema import RunConfig
        from dsdpo.data import make, prepare
        def kill(batch):
            with open({str(tmp_path / "pids")!r}, "w") as stream:
                stream.write(" ".join(str(child.pid) for child in multiprocessing.active_children()))
            os.kill(os.getpid(), signal.SIGKILL)
        make.check_fatal = kill
        prepare.prepare(RunConfig(**{settings!r}, preprocessing_num_workers=2), "train")
    """)
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False)
    assert ended.returncode == -signal.SIGKILL
    workers = [Path("/proc") / pid for pid in (tmp_path / "pids").read_text().split()]
    deadline = time.monotonic() + 10
    while any(worker.exists() and "Z" not in _state(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert len(workers) == 2 and len(prepared(settings)) == 20


def _state(process: Path) -> str:
    try:
        return (process / "stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "Z"


def test_unwritable_cache_is_an_io_failure(settings, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(IOFailure):
        prepared(settings, cache_dir=str(tmp_path / "file"))


# --- limits ---


def limits(mode="keep_start", row_tokens=None, share_prefix=True) -> Limits:
    return Limits(max_length=10, truncation_mode=mode, row_tokens=row_tokens, share_prefix=share_prefix)


def encoded(prompt: int, chosen: int, rejected: int) -> EncodedExample:
    completions = [list(range(100, 100 + chosen)), list(range(200, 200 + rejected))]
    return EncodedExample(list(range(prompt)), completions, False)


def sizes(example: EncodedExample) -> tuple[int, ...]:
    return len(example.prompt_ids), *map(len, example.completion_ids)


def test_pairs_within_max_length_are_left_alone():
    pair = encoded(5, 5, 2)
    for mode in ("keep_start", "keep_end", "refuse"):
        assert fit(pair, limits(mode), None) == (pair, False)


def test_keep_start_cuts_each_completion_alone():
    pair, cut = fit(encoded(6, 9, 2), limits(), None)
    assert cut and sizes(pair) == (6, 4, 2) and pair.completion_ids[0] == [100, 101, 102, 103]
    assert sizes(fit(encoded(9, 5, 5), limits(), None)[0]) == (9, 1, 1)
    with pytest.raises(Dropped, match="the prompt alone reaches max_length: 10 tokens"):
        fit(encoded(10, 1, 1), limits(), None)
    same_start = EncodedExample([1] * 8, [[5, 6, 7, 9], [5, 6, 8, 9]], False)
    with pytest.raises(Dropped, match="the same once cut"):
        fit(same_start, limits(), None)


def test_keep_end_drops_the_oldest_prompt_tokens_for_both_and_keeps_bos():
    pair, cut = fit(encoded(8, 4, 1), limits("keep_end"), None)
    assert cut and sizes(pair) == (6, 4, 1) and pair.prompt_ids == [2, 3, 4, 5, 6, 7]
    pair, _ = fit(encoded(8, 4, 1), limits("keep_end"), bos_id=0)
    assert pair.prompt_ids == [0, 3, 4, 5, 6, 7]
    assert fit(encoded(8, 9, 1), limits("keep_end"), None)[0].prompt_ids == [7]
    assert not pair.notes


def test_keep_end_cuts_completions_where_too_little_would_be_left_to_the_prompt():
    for prompt, chosen, bos, kept in ((8, 10, None, [7]), (8, 9, 0, [0, 7]), (0, 11, 0, []), (1, 12, 0, [0])):
        pair, cut = fit(encoded(prompt, chosen, 1), limits("keep_end"), bos)
        assert cut and pair.prompt_ids == kept and sizes(pair)[1:] == (10 - len(kept), 1)
        assert len(pair.notes) == 1
    pair, _ = fit(encoded(100, 95, 3), replace(limits("keep_end"), max_length=80), None)
    assert sizes(pair) == (10, 70, 3) and pair.prompt_ids == list(range(90, 100))
    same_start = EncodedExample([1] * 8, [[5] * 11 + [7], [5] * 11 + [8]], False)
    with pytest.raises(Dropped) as caught:
        fit(same_start, limits("keep_end"), None)
    assert caught.value.code == "same_once_cut"


def test_refuse_and_the_row_limit():
    with pytest.raises(Dropped, match="longer than max_length: 11 tokens, max_length is 10"):
        fit(encoded(6, 5, 1), limits("refuse"), None)
    assert sizes(fit(encoded(4, 4, 4), limits(row_tokens=12), None)[0]) == (4, 4, 4)
    with pytest.raises(Dropped, match="longer than max_tokens_per_row: 16 tokens"):
        fit(encoded(4, 4, 4), limits(row_tokens=12, share_prefix=False), None)


def test_limits_hold_for_any_number_of_completions():
    """The longest one decides for max_length, and all of them for a micro-batch."""
    for lengths in ((4,), (4, 1, 4, 2)):
        example = EncodedExample(
            list(range(5)), [list(range(100 * k, 100 * k + n)) for k, n in enumerate(lengths, 1)], False
        )
        assert fit(example, limits(), None) == (example, False)
        tokens = {True: 5 + sum(lengths), False: 5 * len(lengths) + sum(lengths)}
        for share_prefix, total in tokens.items():
            assert fit(example, limits(row_tokens=total, share_prefix=share_prefix), None) == (example, False)
            with pytest.raises(Dropped, match=f"longer than max_tokens_per_row: {total} tokens"):
                fit(example, limits(row_tokens=total - 1, share_prefix=share_prefix), None)
        long = EncodedExample(list(range(7)), example.completion_ids, False)
        cut, is_cut = fit(long, limits(), None)
        assert is_cut and sizes(cut) == (7, *(min(n, 3) for n in lengths))


def test_row_limit_counts_only_where_a_pair_can_exceed_it(settings):
    assert Limits.of(RunConfig(**settings, max_tokens_per_row=128)).row_tokens is None
    narrow = RunConfig(**settings, max_tokens_per_row=127, share_prefix=False)
    assert (Limits.of(narrow).row_tokens, Limits.of(narrow).share_prefix) == (127, False)


def test_cut_pairs_are_counted(settings, tmp_path):
    write(tmp_path / "data/pairs.jsonl", [*rows(3), {"prompt": "p", "chosen": "long " * 90, "rejected": "no"}])
    pairs = prepared(settings)
    assert pairs.manifest["truncated"] == 1 and pairs.lengths(np.array([3])).per_pair[0, :2].sum() == 64
    assert "1 cut to max_length 64 (keep_end)" in summary(pairs)
    assert pairs.manifest["notes"] == {"with a completion cut at its end, too": 1}
    assert set(pairs.earlier_fingerprints) == {4, 5}  # version 3 dropped such a record
    write(tmp_path / "data/pairs.jsonl", rows(3))
    assert set(prepared(settings).earlier_fingerprints) == {3, 4, 5}


def test_the_sizes_of_several_sets(settings, tmp_path):
    """Dropped records and held-out ones do not count."""
    write(tmp_path / "data/one.jsonl", [*rows(30), {"prompt": "", "chosen": "a", "rejected": "b"}])
    write(tmp_path / "data/two.jsonl", rows(50)[30:])
    several = {**settings, "dataset": ["one.jsonl", "two.jsonl"], "max_refused": 0.1}
    assert prepared(several).sizes == [30, 20]
    write(tmp_path / "data/gone.jsonl", [{"prompt": "", "chosen": "a", "rejected": "b"}])
    with_gone = {**several, "dataset": ["one.jsonl", "gone.jsonl"], "max_refused": 0.5}
    assert prepared(with_gone).sizes == [30, 0]
    parts = {split: prepared({**several, "val_size": 0.2}, split=split) for split in ("train", "eval")}
    for part in parts.values():
        told = [part.where(i).split(":")[0] for i in range(len(part))]
        assert [told.count("one.jsonl"), told.count("two.jsonl")] == part.sizes and told == sorted(told)
    assert sum(sum(part.sizes) for part in parts.values()) == 50


# --- shards ---


def twice(n: int) -> np.ndarray:
    """0, 0, 1, 1, … n-1, n-1."""
    return np.repeat(np.arange(n), 2)


def pair_lists(values: pa.Array) -> pa.Array:
    """Values two by two, as lists."""
    return pa.ListArray.from_arrays(pa.array(np.arange(0, len(values) + 1, 2, dtype=np.int32)), values)


def batches(n: int, size: int, tokens: int):
    """Record batches of `size` pairs; pair i holds i everywhere."""
    for start in range(0, n, size):
        ids = np.arange(start, min(start + size, n), dtype=np.int32)
        lists = pa.FixedSizeListArray.from_arrays(pa.array(np.repeat(ids, tokens)), tokens).cast(pa.list_(pa.int32()))
        lengths = pa.array(np.full(len(ids), tokens, dtype=np.int32))
        digests = pa.array([int(i).to_bytes(DIGEST_BYTES, "little") for i in ids], pa.binary(DIGEST_BYTES))
        scores = pair_lists(pa.array(np.repeat(np.where(ids % 3 == 0, np.nan, ids), 2)))
        columns = {
            "prompt_ids": lists,
            "completion_ids": pair_lists(lists.take(pa.array(twice(len(ids))))),
            "loss_mask": pa.nulls(len(ids), SCHEMA.field("loss_mask").type),
            "prompt_length": lengths,
            "completion_lengths": pair_lists(pa.array(np.full(2 * len(ids), tokens, dtype=np.int32))),
            "loss_tokens": pair_lists(pa.array(np.full(2 * len(ids), tokens, dtype=np.int32))),
            "digest": digests,
            "scores": scores,
            "weight": pa.array(1.0 + ids),
            "source": pa.array([f"f:{i}" for i in ids]),
        }
        yield pa.record_batch([columns[name] for name in SCHEMA.names], schema=SCHEMA)


@pytest.mark.parametrize("size", [1, 700, BATCH_ROWS, 5000])
def test_shards_hold_every_pair_whatever_the_batches(tmp_path, monkeypatch, size):
    monkeypatch.setattr("dsdpo.data.shards.SHARD_ROWS", 2 * BATCH_ROWS)
    n = 5 * BATCH_ROWS + 17 if size > 1 else 50
    write_shards(batches(n, size, 2), tmp_path)
    (tmp_path / MANIFEST).write_text(json.dumps({"examples": n, "fingerprint": "x"}))
    pairs = PreparedSet(tmp_path)
    assert len(list(tmp_path.glob("*.arrow"))) == (3 if size > 1 else 1)
    for i in [0, 1, n // 2, n - 1, min(2 * BATCH_ROWS, n - 1), min(2 * BATCH_ROWS - 1, n - 1)]:
        assert [ids.tolist() for ids in parts(pairs, i)] == [[i, i]] * 3 and pairs.where(i) == f"f:{i}"
    ids = np.random.default_rng(0).permutation(np.append(np.arange(n), [0, n - 1]))
    assert (pairs.lengths(ids).per_pair == 2).all() and (pairs.lengths(ids).loss_tokens == 2).all()
    digests = pairs.digests(ids)
    assert (digests["high"] == ids).all() and not digests["low"].any()
    expected = np.where(ids % 3 == 0, np.nan, ids)
    assert np.array_equal(pairs.scores(ids), np.repeat(expected, 2), equal_nan=True)
    assert (pairs.weights(ids) == 1 + ids).all()


def test_columns_are_read_from_the_map_and_not_copied(tmp_path):
    """Every buffer that is read lies in a mapped shard, and Arrow's pool holds nothing after reading 100k pairs."""
    n = 100_000
    write_shards(batches(n, BATCH_ROWS, 2), tmp_path)
    (tmp_path / MANIFEST).write_text(json.dumps({"examples": n, "fingerprint": "x"}))
    pairs = PreparedSet(tmp_path)
    before, copied = pa.total_allocated_bytes(), []
    for read in (pairs.lengths, pairs.digests):
        assert len(read(np.arange(n))) == n
        copied.append(pa.total_allocated_bytes() - before)
    assert copied == [0, 0]
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    maps = [tuple(int(end, 16) for end in line[0].split("-")) for line in lines]
    assert len(maps) == 2
    for number in (0, n // BATCH_ROWS):
        for column in pairs._batch(number).columns:
            for buffer in filter(None, column.buffers()):
                assert any(start <= buffer.address and buffer.address + buffer.size <= end for start, end in maps)


def test_opening_and_reading_do_not_take_memory_with_the_data(tmp_path):
    """A set of 190 MB opens at once, and reading from all over it allocates next to nothing."""
    n = 60 * BATCH_ROWS
    write_shards(batches(n, BATCH_ROWS, 256), tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.glob("*.arrow")) > 180e6
    (tmp_path / MANIFEST).write_text(json.dumps({"examples": n, "fingerprint": "x"}))
    script = textwrap.dedent(f"""
        import numpy as np, time
        from pathlib import Path
        from dsdpo.data.shards import PreparedSet

        def anonymous():
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

        PreparedSet(Path({str(tmp_path)!r})).example(0)
        before, start = anonymous(), time.perf_counter()
        pairs = PreparedSet(Path({str(tmp_path)!r}))
        opened = time.perf_counter() - start
        for i in range(0, {n}, 101):
            assert pairs.example(i).completion_ids[0][0] == i
        assert pairs.lengths(np.arange(0, {n}, 97)).padded > 0
        print(opened, anonymous() - before)
    """)
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True)
    opened, grown = (float(number) for number in ended.stdout.split())
    assert opened < 0.05 and grown < 20, f"{opened} s, {grown} MiB"


# --- real data ---


def test_hh_rlhf_test_split(settings, tmp_path):
    source = shared_file("hh_harmless_base_test.jsonl.gz")
    pairs = prepared(settings, dataset=[source.name], dataset_dir=str(source.parent), max_length=4096)
    assert pairs.manifest["rows"] == 2312
    assert pairs.manifest["refused"] == {
        "a side has more than one message after the prompt": 5,
        "empty chosen": 4,
        "roles do not alternate": 4,
    }
    assert len(pairs) == 2299 and pairs.manifest["diverged"] == 0
    refused = [json.loads(line)["source"] for line in (pairs.path / DROPPED_ROWS).read_text().splitlines()]
    assert len(refused) == 13 and f"{source.name}:1255" in refused


def test_dpo_en_demo(settings):
    source = shared_file("dpo_en_demo.json")
    pairs = prepared(settings, dataset=[source.name], dataset_dir=str(source.parent), max_length=16384)
    assert pairs.manifest["datasets"] == ["dpo_en_demo.json (sharegpt)"] and len(pairs) == 300


@pytest.mark.parametrize(("chosen", "rejected"), [(2.0, 2.0), (1.0, 2.0), (None, 2.0), (3.0, None)])
def test_odpo_takes_only_pairs_whose_chosen_side_scores_higher(settings, chosen, rejected) -> None:
    scored = [{**row, "chosen_score": 2.5, "rejected_score": 1.0} for row in rows(20)]
    write(Path(settings["dataset_dir"]) / "pairs.jsonl", scored)
    assert prepare(RunConfig(**settings, loss_type="odpo"), "train")
    scored[7] |= {"chosen_score": chosen, "rejected_score": rejected}
    write(Path(settings["dataset_dir"]) / "pairs.jsonl", scored)
    assert prepare(RunConfig(**settings), "train")
    with pytest.raises(DataError, match=r"odpo needs a chosen_score above .*pairs\.jsonl:8 has"):
        prepare(RunConfig(**settings, loss_type="odpo"), "train")
