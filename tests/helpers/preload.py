"""What the server of `tests.helpers.ranks` imports once, so that the ranks that it forks have it.

Importing this starts no thread and no process group. `THREADS` is what was counted at its end: a fork keeps only the
thread that forks, and a lock that another one holds is never released.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os

MODULES = (
    "torch",
    "deepspeed",
    "transformers",
    "transformers.models.llama.modeling_llama",
    "transformers.models.llama.tokenization_llama",
    "peft",
    "trl.kernels" if importlib.util.find_spec("trl.kernels") else "trl.trainer.utils",
    "safetensors.torch",
    "dsdpo.cli",
    "dsdpo.train.tasks",
    "dsdpo.launch.worker",
    "dsdpo.launch.supervisor",
)
for _module in MODULES:
    importlib.import_module(_module)

gc.collect()
gc.freeze()  # a collection in a rank would copy every page of what is shared
THREADS = len(os.listdir("/proc/self/task"))
