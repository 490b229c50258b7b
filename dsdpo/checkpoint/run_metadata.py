"""What a run is: written beside each checkpoint, and compared before one is continued."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from deepspeed import DeepSpeedEngine
from peft import PeftModel

from dsdpo import __version__
from dsdpo.config.schema import RunConfig
from dsdpo.data.loader import ExampleSource
from dsdpo.engine.engine import Hardware
from dsdpo.engine.row_tokens import Rows
from dsdpo.model.load import weights_digests
from dsdpo.runtime.env import Mesh

_PACKAGES = ("torch", "deepspeed", "transformers", "peft", "trl")


def identity(config: RunConfig, mesh: Mesh, hardware: Hardware, train_set: ExampleSource) -> dict[str, Any]:
    """What must be the same for a checkpoint to be continued: settings, precision, content of weights and data.

    A collective call.
    """
    return {
        "config": config.model_dump(mode="json") | {"hub": config.model_source.hub},
        "dtype": str(hardware.dtype).removeprefix("torch."),
        "fingerprints": {**weights_digests(config, mesh, hardware.device), "data": train_set.fingerprint},
        "earlier_fingerprints": train_set.earlier_fingerprints,
        "template_date": train_set.template_date,
        "examples": len(train_set),
    }


def run_metadata(
    config: RunConfig, mesh: Mesh, engine: DeepSpeedEngine, train_set: ExampleSource, epoch: int, rows: Rows
) -> dict[str, Any]:
    """What may change from one process to the next. epoch: its examples."""
    model = engine.module.model
    adapter = model.peft_config["default"].to_dict() if isinstance(model, PeftModel) else None
    generation = getattr(model, "generation_config", None)
    return {
        "order": {
            "examples": len(train_set),
            "epoch": epoch,
            "train_batch_size": config.train_batch_size,
            "seed": config.seed,
        },
        "world_size": mesh.world_size,
        "zero_stage": engine.zero_optimization_stage(),
        "row_facts": rows.facts,
        "model_config": model.config.to_diff_dict(),
        "generation_config": generation and generation.to_diff_dict(),
        "adapter_config": adapter and {key: sorted(x) if isinstance(x, set) else x for key, x in adapter.items()},
        "versions": {"dsdpo": __version__, **{name: importlib.metadata.version(name) for name in _PACKAGES}},
    }
