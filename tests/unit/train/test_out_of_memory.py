"""What torch and its libraries raise when a GPU is full becomes exit code 72, and says what to lower."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dsdpo.config.schema import RunConfig
from dsdpo.config.zero import ZeroConfig
from dsdpo.errors import OutOfMemory
from dsdpo.runtime.env import Mesh
from dsdpo.train.out_of_memory import out_of_memory_told


def told(
    error: BaseException, row_tokens: int | None = None, recompute: str | None = None, ranks: int = 2, **options: Any
) -> None:
    config = RunConfig(model_name_or_path="m", dataset=["d"], output_dir="o", **options)
    with out_of_memory_told(config, ZeroConfig.load(config), Mesh(1, ranks, 1)) as memory:
        if row_tokens is not None:
            memory.row_tokens = lambda: row_tokens
        if recompute is not None:
            memory.recompute = lambda: recompute
        raise error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB"),
        torch.cuda.OutOfMemoryError("HIP out of memory."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("NCCL Error 1: unhandled cuda error\nncclUnhandledCudaError\nCuda failure 'out of memory'"),
    ],
)
def test_a_full_gpu_is_72(error: BaseException) -> None:
    with pytest.raises(OutOfMemory) as caught:
        told(error)
    assert caught.value.exit_code == 72 and "rank 1" in str(caught.value)


@pytest.mark.parametrize(
    "error", [RuntimeError("size mismatch"), ValueError("CUDA out of memory"), MemoryError(), KeyboardInterrupt()]
)
def test_other_errors_pass_as_they_are(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        told(error)
    assert caught.value is error


def test_the_message_names_what_decides_and_what_can_be_lowered() -> None:
    zero3 = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    with pytest.raises(OutOfMemory) as caught:
        told(full, 4096, max_length=512, max_tokens_per_row="auto")
    for part in (
        "4096 tokens",
        "max_length is 512",
        "ZeRO stage is 0",
        "= 1024",
        "deepspeed: zero3)",
        "gradient_checkpointing",
    ):
        assert part in str(caught.value)
    with pytest.raises(OutOfMemory) as caught:
        told(full, 4096, "full", max_length=512, gradient_checkpointing="auto")
    assert "gradient_checkpointing: full" not in str(caught.value)
    with pytest.raises(OutOfMemory) as caught:
        told(full, 1024, max_length=512, gradient_checkpointing="full", finetuning_type="full", deepspeed=zero3)
    for part in (
        "lower max_tokens_per_row (",
        "gradient_checkpointing: full",
        "deepspeed: zero3)",
        "deepspeed: zero3_offload",
    ):
        assert part not in str(caught.value)
