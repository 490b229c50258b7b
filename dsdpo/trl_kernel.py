"""TRL's kernel for log-probs without logits, wherever the installed trl keeps it.

As in compat.py, imports stand inside the functions.
"""

from __future__ import annotations

import importlib.util
import sys
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dsdpo.errors import config_error

if TYPE_CHECKING:
    import torch


def chunked_logps(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    vocab_chunk: int,
    softcap: float | None,
    logit_scale: float,
    with_log_sum_sq: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """TRL's kernel for log p = log softmax(hidden @ weight.T + bias), without the [C, V] logits.

    Args:
        hidden: [C, H].
        weight, bias: [V, H] and [V] or None.
        targets: int64 [C].
        vocab_chunk: vocabulary columns computed at a time.
        softcap: cap on the logits' size through tanh, or None.
        logit_scale: factor on the logits.
        with_log_sum_sq: whether to give the second result.

    Returns:
        log p of the targets, fp32 [C]; log sum_v p_v^2, fp32 [C] without gradient, or None.

    Raises:
        ConfigError: this trl cannot give the second one.
    """
    kernel, takes_outputs = _trl_kernel()
    if with_log_sum_sq and not takes_outputs:
        raise config_error(
            "weighting", "use_weighting", "use_weighting needs trl 1.16 or newer, which needs Python 3.11: unset it"
        )
    extra: tuple[Any, ...] = (("log_sum_sq_probs",) if with_log_sum_sq else (),) if takes_outputs else ()
    logps, *others = kernel.apply(hidden, weight, bias, targets, 1.0, vocab_chunk, softcap, logit_scale, *extra)
    return logps, others[1] if with_log_sum_sq else None


@cache
def _trl_kernel() -> tuple[Any, bool]:
    """TRL's ChunkedLogProbFunction, and whether it takes the names of further outputs.

    Of trl 1.16 the kernel's file alone is loaded: `import trl` looks through all installed packages, and the kernel's
    backward would import the trainers, for a context that gathers a head which ZeRO-3 gathers for LogProbHead anyway.
    """
    for folder in getattr(importlib.util.find_spec("trl"), "submodule_search_locations", ()):
        path = Path(folder, "kernels", "chunked_logprob.py")
        if path.exists():
            return _load_kernel(path).ChunkedLogProbFunction, True
    from trl.trainer.utils import _ChunkedLogProbFunction  # trl 1.14, the last one for Python 3.10

    return _ChunkedLogProbFunction, False


def _load_kernel(path: Path) -> ModuleType:
    """Execute trl/kernels/chunked_logprob.py in a package of its own, in which the one relative import of its backward
    finds a context that does nothing."""
    trainer_utils = ModuleType("dsdpo_trl.trainer.utils")
    trainer_utils.maybe_gather_lm_head_ctx = lambda *_: nullcontext()  # type: ignore[attr-defined]
    spec = importlib.util.spec_from_file_location("dsdpo_trl.kernels.chunked_logprob", path)
    assert spec is not None and spec.loader is not None, f"{path} is a Python file"
    kernel = importlib.util.module_from_spec(spec)
    sys.modules.update({trainer_utils.__name__: trainer_utils, spec.name: kernel})
    spec.loader.exec_module(kernel)
    return kernel
