"""Kernels after builds that were killed: with ninja, a compiler and DeepSpeed's own builder."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from deepspeed.ops.op_builder.builder import OpBuilder
from torch.utils import cpp_extension
from torch.utils.cpp_extension import JIT_EXTENSION_VERSIONER

from dsdpo.runtime.builds import clear_leftovers, end_stale_builds, rebuild_broken_kernels

SOURCE = """
#include <Python.h>
static PyObject* answer(PyObject*, PyObject*) { return PyLong_FromLong(42); }
static PyMethodDef methods[] = {{"answer", answer, METH_NOARGS, ""}, {}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "dsdpo_answer", "", -1, methods};
PyMODINIT_FUNC PyInit_dsdpo_answer() { return PyModule_Create(&module); }
"""


class AnswerBuilder(OpBuilder):
    """A kernel that compiles in a second."""

    NAME = "dsdpo_answer"

    def __init__(self, source: Path) -> None:
        super().__init__(name=self.NAME)
        self._source = source

    def absolute_name(self) -> str:
        return self.NAME

    def sources(self) -> list[str]:
        return [str(self._source)]


def forget() -> None:
    """What a new process does not know of the kernel."""
    OpBuilder._loaded_ops.pop(AnswerBuilder.NAME, None)
    JIT_EXTENSION_VERSIONER.entries.pop(AnswerBuilder.NAME, None)


@pytest.fixture
def builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[AnswerBuilder]:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    load: Any = OpBuilder.jit_load
    monkeypatch.setattr(OpBuilder, "jit_load", getattr(load, "__wrapped__", load))  # undone at the end
    source = tmp_path / "answer.cpp"
    source.write_text(SOURCE)
    forget()
    yield AnswerBuilder(source)
    forget()


BY_FLOCK = not hasattr(cpp_extension, "FileBaton")
by_existence = pytest.mark.skipif(BY_FLOCK, reason="this torch's lock ends with the process that holds it")


def is_unlocked(folder: Path) -> bool:
    """Whether another process could build there."""
    if not BY_FLOCK:
        return not (folder / "lock").exists()
    with (folder / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return True


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "extensions" / AnswerBuilder.NAME


def test_an_object_file_that_was_cut_short_is_built_again(builder: AnswerBuilder, folder: Path) -> None:
    """As two compilers leave it that wrote one file at once: the build that ended first has it in ninja's log."""
    assert builder.load().answer() == 42
    compiled = folder / "answer.o"
    content, times = compiled.read_bytes(), compiled.stat()
    compiled.write_bytes(content[: len(content) // 2])
    os.utime(compiled, ns=(times.st_atime_ns, times.st_mtime_ns))
    (folder / "dsdpo_answer.so").unlink()  # it was never linked
    forget()
    with pytest.raises(RuntimeError, match=r"answer\.o"):  # without our care; so would every later start
        builder.load()
    forget()
    rebuild_broken_kernels()
    rebuild_broken_kernels()  # once is enough, twice does no harm
    assert builder.load().answer() == 42
    assert [path.name for path in folder.parent.iterdir()] == [folder.name] and is_unlocked(folder)


def test_a_lock_that_vanishes_under_its_waiter_leads_to_a_build(
    builder: AnswerBuilder, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch would import what nobody has built."""
    folder.mkdir(parents=True)
    (folder / "lock").touch()
    (folder / "build.ninja").touch()
    os.utime(folder / "build.ninja", (time.time() - 700,) * 2)
    threading.Timer(0.5, (folder / "lock").unlink).start()
    rebuild_broken_kernels()
    assert builder.load().answer() == 42


def test_a_source_that_does_not_compile_is_tried_once(builder: AnswerBuilder, folder: Path) -> None:
    builder._source.write_text("#error tried")
    rebuild_broken_kernels()
    with pytest.raises(RuntimeError) as failed:
        builder.load()
    assert failed.value.__context__ is not None and not isinstance(failed.value.__context__, RuntimeError)
    assert (folder / "build.ninja").exists()


def test_a_compiler_that_outlived_its_build_writes_elsewhere(tmp_path: Path) -> None:
    folder = tmp_path / "kernel"
    folder.mkdir()
    (folder / "old.o").touch()
    script = "import pathlib, sys; sys.stdin.read(); pathlib.Path('new.o').touch()"
    with subprocess.Popen([sys.executable, "-c", script], cwd=folder, stdin=subprocess.PIPE) as compiler:
        assert clear_leftovers(folder, time.time() + 1)
        compiler.communicate()
    assert list(folder.iterdir()) == []


def test_a_build_that_is_under_way_is_waited_for(tmp_path: Path) -> None:
    folder = tmp_path / "kernel"
    folder.mkdir()
    (folder / "old.o").touch()
    with (folder / "lock").open("w") as lock:
        if BY_FLOCK:
            fcntl.flock(lock, fcntl.LOCK_EX)
        threading.Timer(0.5, lock.close if BY_FLOCK else (folder / "lock").unlink).start()
        started = time.monotonic()
        assert clear_leftovers(folder, time.time() + 1) and (folder / "old.o").exists()
    assert time.monotonic() - started > 0.3


def test_a_library_that_another_process_has_built_meanwhile_stays(tmp_path: Path) -> None:
    folder = tmp_path / "kernel"
    folder.mkdir()
    (folder / "kernel.o").touch()
    os.utime(folder / "kernel.o", (time.time() - 700,) * 2)
    began = time.time() - 1
    (folder / "kernel.so").touch()
    assert clear_leftovers(folder, began)
    assert {path.name for path in folder.iterdir()} - {"lock"} == {"kernel.o", "kernel.so"}
    assert is_unlocked(folder)


def test_a_lock_file_that_nobody_holds_is_no_build(tmp_path: Path) -> None:
    """torch 2.15 leaves the file."""
    if not BY_FLOCK:
        pytest.skip("this torch locks by the file's existence")
    folder = tmp_path / "kernel"
    folder.mkdir()
    for name in ("lock", "old.o"):
        (folder / name).touch()
    assert clear_leftovers(folder, time.time() + 1) and list(folder.iterdir()) == []


@by_existence
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


@by_existence
def test_a_build_that_takes_longer_on_this_machine_keeps_its_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    with lock.open("w"):
        os.utime(lock, (time.time() - 700, time.time() - 700))
        waits = end_stale_builds()
        waits.join(1.0)
        assert lock.exists() and waits.is_alive()
    waits.join(30)
    assert not lock.exists()
