"""Preference tuning of language models with DeepSpeed: DPO from a laptop to many GPUs.

What Python code may use, beside the command line:

    import dsdpo

    result = dsdpo.train({"model_name_or_path": "Qwen/Qwen2.5-0.5B", "dataset": "pairs.jsonl", "output_dir": "out"})
    result.final, result.metrics

`train`, `prepare` and `load_config` are explained in dsdpo/api.py, what they raise in dsdpo/errors.py. All of it is
imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsdpo.api import TrainResult, load_config, prepare, train

__version__ = "0.1.0"
__all__ = ["TrainResult", "__version__", "load_config", "prepare", "train"]


def __getattr__(name: str) -> Any:
    if name == "train":  # the package of that name can be called
        return importlib.import_module("dsdpo.train")
    if name in __all__:
        return getattr(importlib.import_module("dsdpo.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
