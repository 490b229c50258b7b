"""What works around other packages."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from dsdpo.compat import end_stale_builds


def test_a_build_that_was_killed_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    stale, fresh = tmp_path / "py311_cpu/cpu_adam/lock", tmp_path / "deepspeed_shm_comm/lock"
    for lock in (stale, fresh):
        lock.parent.mkdir(parents=True)
        lock.touch()
        os.utime(lock, (time.time() - 700, time.time() - 700))
    (fresh.parent / "shm.o").touch()  # a long build goes on
    threading.Timer(1.0, fresh.unlink).start()
    started = time.monotonic()
    end_stale_builds().join(60)
    assert not stale.exists() and 0.5 < time.monotonic() - started < 50
