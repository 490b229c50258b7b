"""Importing a stock DeepSpeed checkpoint: what is refused, with which words, and that nothing is written then."""

from __future__ import annotations

import json
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dsdpo import cli
from dsdpo.errors import CheckpointError
from dsdpo.export.deepspeed_import import PICKLE_WARNING, import_checkpoint
from tests.helpers.tiny import save_adapter, save_model, save_tokenizer, tiny_llama_config

STEP = "global_step5"
MODEL_STATES = "mp_rank_00_model_states.pt"
OPTIM_STATES = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A ZeRO-2 checkpoint of 2 ranks, as DeepSpeed lays it out, with config and tokenizer."""
    folder = tmp_path / "run" / "checkpoint-5"
    model = save_model(tmp_path / "model", tiny_llama_config())
    model.config.save_pretrained(folder)
    save_tokenizer(folder)
    write_zero(folder / STEP, dict(model.named_parameters()), {"lm_head.weight": "model.embed_tokens.weight"})
    (folder / "latest").write_text(STEP)
    return folder


def write_zero(folder: Path, parameters: dict[str, torch.Tensor], shared: dict[str, str]) -> None:
    """The files of 2 ranks under ZeRO-2."""
    folder.mkdir()
    flat = torch.cat([parameter.detach().flatten() for parameter in parameters.values()])
    model = {
        "module": {},
        "buffer_names": [],
        "param_shapes": [OrderedDict((name, parameter.shape) for name, parameter in parameters.items())],
        "shared_params": shared,
        "ds_version": "0.19.8",
    }
    torch.save(model, folder / MODEL_STATES)
    for rank, part in enumerate(flat.chunk(2)):
        state = {"zero_stage": 2, "partition_count": 2, "single_partition_of_fp32_groups": [part.clone()]}
        torch.save({"optimizer_state_dict": state}, folder / OPTIM_STATES.format(rank))


def write_whole(folder: Path, module: dict[str, Any]) -> None:
    """The file of a run without ZeRO, and `latest`."""
    (folder / STEP).mkdir(parents=True)
    torch.save({"module": module, "param_shapes": None}, folder / STEP / MODEL_STATES)
    (folder / "latest").write_text(STEP)


def refused(source: Path, to: Path, **options: Any) -> str:
    """What the import says; it must have written nothing."""
    before = sorted(to.parent.iterdir())
    with pytest.raises(CheckpointError) as caught:
        import_checkpoint(source, to, **options)
    assert sorted(to.parent.iterdir()) == before
    return str(caught.value)


def test_the_warning_comes_before_anything_is_read(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    load = torch.load

    def watched(*args: Any, **kwargs: Any) -> Any:
        said.append(capsys.readouterr().err)
        return load(*args, **kwargs)

    monkeypatch.setattr(torch, "load", watched)
    assert import_checkpoint(checkpoint, tmp_path / "out") == checkpoint / STEP
    assert PICKLE_WARNING in said[0]
    assert capsys.readouterr().out == ""


def test_the_command_line_reads_warns_and_writes(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["import-checkpoint", str(checkpoint), "--to", str(tmp_path / "out")]) == 0
    output = capsys.readouterr()
    assert PICKLE_WARNING in output.err
    assert output.out == f"imported {checkpoint / STEP} to {tmp_path / 'out'}\n"
    expected = load_file(tmp_path / "model" / "model.safetensors")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert sorted(stored) == sorted(expected)
    assert all(torch.equal(stored[name], expected[name]) for name in expected)


def test_help_warns_of_pickles(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["import-checkpoint", "--help"])
    assert "import only what you trust" in " ".join(capsys.readouterr().out.split())


def test_a_config_in_the_parent_is_found_and_an_empty_target_is_filled(checkpoint: Path, tmp_path: Path) -> None:
    for file in checkpoint.glob("*.json"):
        file.rename(checkpoint.parent / file.name)
    (tmp_path / "out").mkdir()
    import_checkpoint(checkpoint, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def test_without_latest_the_tags_are_listed(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "latest").unlink()
    for step in (10, 9):
        (checkpoint / f"global_step{step}").mkdir()
        (checkpoint / f"global_step{step}" / MODEL_STATES).touch()
    said = refused(checkpoint, tmp_path / "out")
    assert "no file latest; choose with --tag: global_step5, global_step9, global_step10" in said
    assert import_checkpoint(checkpoint, tmp_path / "out", STEP) == checkpoint / STEP


@pytest.mark.parametrize(("latest", "tag"), [("global_step7", None), (STEP, "global_step7")])
def test_a_tag_that_is_not_there_is_told_with_those_that_are(
    checkpoint: Path, tmp_path: Path, latest: str, tag: str | None
) -> None:
    (checkpoint / "latest").write_text(latest)
    said = refused(checkpoint, tmp_path / "out", tag=tag)
    assert "no folder global_step7" in said
    assert f"choose with --tag: {STEP}" in said


def test_the_steps_folder_with_another_tag_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    assert "leave --tag global_step7 away" in refused(checkpoint / STEP, tmp_path / "out", tag="global_step7")


def test_the_folder_of_a_run_names_its_checkpoints(checkpoint: Path, tmp_path: Path) -> None:
    assert "give one of the checkpoints in it: checkpoint-5" in refused(checkpoint.parent, tmp_path / "out")
    assert "is it a DeepSpeed checkpoint?" in refused(tmp_path / "model", tmp_path / "out")


def test_a_target_in_use_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").touch()
    (tmp_path / "file").touch()
    for target in ("out", "file"):
        assert "is not empty: choose another folder for --to" in refused(checkpoint, tmp_path / target)


def test_a_target_that_cannot_be_written_is_exit_74(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert cli.main(["import-checkpoint", str(checkpoint), "--to", str(tmp_path / "file" / "out")]) == 74
    assert "cannot write" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        (OPTIM_STATES.format(0), "lacks rank 0's optim states"),
        (OPTIM_STATES.format(1), "Expected 2 of '*_optim_states.pt'"),
        (MODEL_STATES, "lacks rank 0's model states, rank 1's model states"),
    ],
)
def test_a_missing_file_is_told(checkpoint: Path, tmp_path: Path, lost: str, said: str) -> None:
    (checkpoint / STEP / lost).unlink()
    assert said in refused(checkpoint, tmp_path / "out")


def test_model_states_of_zero_without_any_shard_are_no_weights(checkpoint: Path, tmp_path: Path) -> None:
    for rank in range(2):
        (checkpoint / STEP / OPTIM_STATES.format(rank)).unlink()
    assert "lacks the ZeRO shards" in refused(checkpoint, tmp_path / "out")


def test_a_file_cut_short_is_named_before_any_is_read(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint / STEP / OPTIM_STATES.format(1)
    path.write_bytes(path.read_bytes()[:-100])
    assert f"cut short, or not written by torch.save: {path.name}" in refused(checkpoint, tmp_path / "out")
    assert PICKLE_WARNING not in capsys.readouterr().err


@pytest.mark.parametrize("name", [MODEL_STATES, OPTIM_STATES.format(0)])
def test_a_file_of_something_else_is_told(checkpoint: Path, tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(checkpoint / STEP / name, "w") as archive:
        archive.writestr("archive/data.pkl", b"not a pickle")
    assert "are the files of all ranks there and whole?" in refused(checkpoint, tmp_path / "out")


@pytest.mark.parametrize("name", ["mp_rank_01_model_states.pt", "layer_00-model_states.pt"])
def test_a_model_split_by_tensors_or_layers_is_refused(checkpoint: Path, tmp_path: Path, name: str) -> None:
    (checkpoint / STEP / name).touch()
    said = refused(checkpoint, tmp_path / "out")
    assert name in said
    assert "only data-parallel checkpoints" in said


def test_without_a_config_the_model_is_asked_for(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "config.json").unlink()
    assert "no config.json in" in refused(checkpoint, tmp_path / "out")
    assert "--model: no_such_model is no folder" in refused(checkpoint, tmp_path / "out", base="no_such_model")
    import_checkpoint(checkpoint, tmp_path / "out", base=str(tmp_path / "model"))


@pytest.mark.parametrize("content", ["{", '{"model_type": "nope"}', '{"model_type": "llama", "hidden_size": "x"}'])
def test_a_broken_config_is_told(checkpoint: Path, tmp_path: Path, content: str) -> None:
    (checkpoint / "config.json").write_text(content)
    assert "config.json describes no causal language model" in refused(checkpoint, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 3}, "missing: model.layers.2.self_attn.q_proj.weight, "),
        ({"num_hidden_layers": 1}, "unexpected: model.layers.1.self_attn.q_proj.weight, "),
        ({"vocab_size": 100}, "of another shape: model.embed_tokens.weight (96, 32), not (100, 32)"),
    ],
)
def test_another_model_is_told_by_its_tensors(
    checkpoint: Path, tmp_path: Path, changes: dict[str, int], said: str
) -> None:
    tiny_llama_config(**changes).save_pretrained(tmp_path / "other")
    message = refused(checkpoint, tmp_path / "out", base=str(tmp_path / "other"))
    assert said in message
    assert str(tmp_path / "other") in message


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module._orig_mod."])
@pytest.mark.parametrize("tied", [True, False])
def test_without_zero_the_module_is_imported_under_any_prefix(tmp_path: Path, prefix: str, tied: bool) -> None:
    config = tiny_llama_config(tied, dtype="bfloat16")
    model = save_model(tmp_path / "model", config)
    write_whole(tmp_path / "run", {prefix + name: tensor for name, tensor in model.state_dict().items()})
    config.save_pretrained(tmp_path / "run")
    import_checkpoint(tmp_path / "run", tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert sorted(stored) == sorted(name for name, _ in model.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(stored[name], parameter.to(torch.bfloat16))


def test_weights_that_are_tied_in_the_config_alone_are_refused(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", tiny_llama_config(tied=False))
    write_whole(tmp_path / "run", dict(model.state_dict()))
    tiny_llama_config(tied=True).save_pretrained(tmp_path / "run")
    said = refused(tmp_path / "run", tmp_path / "out")
    assert "tied by the config, but different: lm_head.weight and model.embed_tokens.weight" in said


def test_a_head_that_the_model_lacks_is_refused(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", tiny_llama_config())
    write_whole(tmp_path / "run", {**model.state_dict(), "v_head.weight": torch.ones(1, 32)})
    assert "unexpected: v_head.weight" in refused(tmp_path / "run", tmp_path / "out", base=str(tmp_path / "model"))


def test_an_adapter_is_held_against_its_base(tmp_path: Path) -> None:
    base = save_model(tmp_path / "model", tiny_llama_config())
    save_adapter(tmp_path / "adapter", base, tmp_path / "model")
    expected = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    module = {name.replace(".weight", ".default.weight"): tensor for name, tensor in expected.items()}
    write_whole(tmp_path / "run", module)
    (tmp_path / "run" / "adapter_config.json").write_bytes((tmp_path / "adapter/adapter_config.json").read_bytes())
    import_checkpoint(tmp_path / "run", tmp_path / "out")
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert sorted(stored) == sorted(expected)
    assert all(torch.equal(stored[name], expected[name]) for name in expected)

    tiny_llama_config(num_hidden_layers=1, intermediate_size=48).save_pretrained(tmp_path / "other")
    said = refused(tmp_path / "run", tmp_path / "out2", base=str(tmp_path / "other"))
    assert "unexpected: base_model.model.model.layers.1." in said
    assert "mlp.gate_proj.lora_B.default.weight (64, 4), not (48, 4)" in said


def test_an_adapters_initialization_stays_in_its_config(tmp_path: Path) -> None:
    """PiSSA and its kin would decompose weights that are not there."""
    base = save_model(tmp_path / "model", tiny_llama_config())
    save_adapter(tmp_path / "run", base, tmp_path / "model")
    module = load_file(tmp_path / "run" / "adapter_model.safetensors")
    write_whole(tmp_path / "run", {name.replace(".weight", ".default.weight"): t for name, t in module.items()})
    file = tmp_path / "run" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "init_lora_weights": "pissa"}))
    import_checkpoint(tmp_path / "run", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["init_lora_weights"] == "pissa"


def test_no_half_of_an_adapter_is_imported(tmp_path: Path) -> None:
    base = save_model(tmp_path / "model", tiny_llama_config())
    save_adapter(tmp_path / "run", base, tmp_path / "model")
    module = load_file(tmp_path / "run" / "adapter_model.safetensors")
    module = {name.replace(".weight", ".default.weight"): t for name, t in module.items() if "lora_A" in name}
    write_whole(tmp_path / "run", module)
    assert "lora_B.default.weight" in refused(tmp_path / "run", tmp_path / "out")
    (tmp_path / "run" / "adapter_config.json").write_text("{")
    assert "adapter_config.json cannot be read" in refused(tmp_path / "run", tmp_path / "out")
