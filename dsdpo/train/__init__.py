"""The training: what a rank sets up, the loop, what follows a step.

The package is the function `dsdpo.train(config)`, too: Python has one attribute for both, and sets it to the package
whenever a module in it is imported.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self, config: Any, **settings: Any) -> Any:
        """See `train` in dsdpo/api.py, which is above this package."""
        return importlib.import_module("dsdpo.api").train(config, **settings)


sys.modules[__name__].__class__ = _Callable
