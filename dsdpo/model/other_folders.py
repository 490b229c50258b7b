"""What a folder is that holds no model of transformers, by the names in it, and what to name instead."""

from __future__ import annotations

import re
from pathlib import Path

from dsdpo.runtime.command import command_line
from dsdpo.runtime.rundir import RunDir

# endings of files of weights in other forms -> what they are, and what to do
_OTHER_WEIGHTS = (
    (
        (".gguf", ".ggml"),
        "GGUF weights, which cannot be trained; name the model that they were made from",
    ),
    ((".pth",), "weights in their authors' own form; name a copy that was converted for transformers"),
    ((".h5", ".msgpack", ".onnx", ".npz", ".tflite"), "weights of another framework; name a copy in safetensors"),
    ((".incomplete", ".part", ".crdownload", ".aria2", ".tmp"), "an unfinished download; download it again"),
)
_SHARD = re.compile(r"(model|pytorch_model)-\d+-of-\d+\.(safetensors|bin)")
_VARIANT = re.compile(r"(model|pytorch_model)\.(\w+)\.(safetensors|bin)")


def what_it_is(folder: Path) -> str:
    """The end of a sentence that begins with the folder's name; empty where nothing in it is known."""
    names = sorted(path.name for path in folder.iterdir())
    if RunDir(folder).run_config.is_file():
        export = command_line(["export", str(folder), "--to", f"{folder}-exported"])
        return f"is the output_dir of a run that has not ended; `{export}` makes a model of its newest checkpoint"
    if (folder / "snapshots").is_dir():
        inner = sorted(str(path) for path in (folder / "snapshots").iterdir())
        return f"is a folder of the hub's cache; name the hub id, or {inner[-1] if inner else 'download it again'}"
    if (folder / "latest").is_file() or any(re.fullmatch(r"global_step\d+", name) for name in names):
        return "is a DeepSpeed checkpoint; `dsdpo import-checkpoint` makes a model of it"
    for name in names:
        path = folder / name
        if path.is_symlink() and not path.exists():
            return f"holds {name}, a link to {path.readlink()}, which is not there; download it again"
        if shard := _SHARD.fullmatch(name):
            return f"holds {name} without its index {shard[1]}.{shard[2]}.index.json; download that, too"
        if variant := _VARIANT.fullmatch(name):
            return f"holds {name}, a variant that is not looked for; rename it to {variant[1]}.{variant[3]}"
        for endings, what in _OTHER_WEIGHTS:
            if name.endswith(endings):
                return f"holds {name}, {what}"
    inner = [str(folder / name) for name in names if (folder / name / "config.json").is_file()]
    return f"holds models in folders inside; name one, such as {inner[-1]}" if inner else ""


def hub_id_in(name: str) -> str:
    """The hub id in the address of a model's page or file; empty in other text."""
    found = re.match(r"(?:https?://(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://(?:models/)?)([\w.-]+/[\w.-]+)", name)
    return found[1] if found else ""
