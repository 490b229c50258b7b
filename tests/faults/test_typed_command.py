"""A command as users of LLaMA-Factory type it, without a run config: killed once, it comes to its end."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest
import yaml

from tests.faults.place import Place, Run, steps_done

pytest.importorskip("bitsandbytes")


def test_it_is_killed_and_comes_to_its_end_with_an_adapter_and_a_plot(tmp_path: Path) -> None:
    place, out = Place(tmp_path), tmp_path / "output"
    (tmp_path / "dataset_info.json").write_text('{"mm": {"file_name": "sft.jsonl"}}')
    typed = f"--stage sft --model_name_or_path {tmp_path / 'model'} --do_train --dataset mm --finetuning_type lora "
    typed += f"--quantization_bit 4 --overwrite_cache --output_dir {out} --per_device_train_batch_size 2 "
    typed += "--gradient_accumulation_steps 2 --lr_scheduler_type cosine --logging_steps 10 --save_steps 2 "
    typed += "--learning_rate 5e-5 --num_train_epochs 2.0 --plot_loss --lora_target q_proj,v_proj "
    typed += f"--dataset_dir {tmp_path} --cutoff_len 64"
    line = [sys.executable, "-m", "dsdpo", "train", *typed.split()]
    run = Run([*line, "--num_accelerators", "2"], out, {})
    assert run.until_step(5), run.output
    for rank in run.ranks():
        rank.send_signal(signal.SIGKILL)
    assert run.wait()[0] == 71, run.output
    before = steps_done(out)
    code, said = Run([*line, "--num_accelerators", "1"], out, {}).wait()
    assert code == 0, said
    recorded = yaml.safe_load((out / "run_config.yaml").read_text())
    assert recorded["train_batch_size"] == 2 * 2 * 2  # of the first start; one rank alone would make it 4
    assert before < steps_done(out) == 2 * 40 // 8
    assert (out / "loss.png").is_file() and (out / "final" / "adapter_model.safetensors").is_file()
    assert place.folder == tmp_path
