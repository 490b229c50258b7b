"""Named points at which a test kills this process or holds it, to prove that nothing is lost.

DSDPO_FAULT is `name@n`, `name@n#rank` or either with `=seconds` or `=oom`: at the n-th time (1-based) that this process
comes to that point, on every rank or one, it is killed as by a power cut, sleeps, or finds its GPU full. With `=oom:N`
the GPU is full from then on for more than N tokens. Without the variable, it costs a lookup.
"""

from __future__ import annotations

import os
import re
import signal
import time

from dsdpo.runtime.env import launched

_VARIABLE = "DSDPO_FAULT"
_FORM = re.compile(r"(?P<name>[\w:-]+)@(?P<count>\d+)(#(?P<rank>\d+))?(=(?P<seconds>[\d.]+|oom)(:(?P<tokens>\d+))?)?")
_passed: dict[str, int] = {}


def fault_point(name: str, tokens: int = 0) -> None:
    """Where a test may end this process.

    Args:
        tokens: for how many memory is asked here.
    """
    wanted = os.environ.get(_VARIABLE)
    if wanted is None:
        return
    form = _FORM.fullmatch(wanted)
    assert form, f"{_VARIABLE} is {wanted!r}"
    _passed[name] = _passed.get(name, 0) + 1
    mesh = launched()
    if form["name"] != name or mesh is None:
        return
    if form["tokens"] is None:
        is_now = int(form["count"]) == _passed[name]
    else:
        is_now = int(form["count"]) <= _passed[name] and tokens > int(form["tokens"])
    if not is_now:
        return
    if form["rank"] is not None and int(form["rank"]) != mesh.rank:
        return
    if form["seconds"] is None:
        os.kill(os.getpid(), signal.SIGKILL)
    if form["seconds"] == "oom":
        import torch

        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    time.sleep(float(form["seconds"]))
