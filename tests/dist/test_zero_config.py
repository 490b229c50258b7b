"""A rank reads the DeepSpeed JSON once, from its start to its end."""

from __future__ import annotations

from pathlib import Path

from dsdpo.launch.task import Task
from dsdpo.launch.worker import join
from dsdpo.runtime.env import launched
from tests.dist.grid import zero_json
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import save_model, save_pairs, save_tokenizer, tiny_llama_config
from tests.helpers.zero import count_opens


def train(run: str, zero: str) -> int:
    """All that a rank does. Returns how often it has opened the file `zero`."""
    mesh = launched()
    assert mesh is not None
    opens = count_opens(Path(zero))
    assert join(Task("train", run, []), mesh, None) == 0
    return len(opens)


def test_a_rank_reads_it_once(tmp_path: Path) -> None:
    """With a frozen engine beside the policy's, which takes its config from it, too."""
    save_model(tmp_path / "model", tiny_llama_config())
    save_tokenizer(tmp_path / "model")
    save_pairs(tmp_path / "pairs.jsonl", 16)
    zero = zero_json(tmp_path, 3)
    (tmp_path / "run.yaml").write_text(
        f"model_name_or_path: {tmp_path}/model\nfinetuning_type: full\ndataset: pairs.jsonl\ndataset_dir: {tmp_path}\n"
        f"max_length: 64\nval_size: 4\ntrain_batch_size: 4\nmax_steps: 1\nprecision: fp32\nreference: live\n"
        f"save_steps:\ndeepspeed: {zero}\noutput_dir: {tmp_path}/out\n"
    )
    assert run_ranks("tests.dist.test_zero_config:train", 1, str(tmp_path / "run.yaml"), zero) == [1]
