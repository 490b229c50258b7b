"""One job at a time in an output_dir: the file output_dir/LOCK, for shared file systems where flock cannot be trusted.

The file names its holder, who renews its date while it lives. A LOCK that says X is replaced or removed only by the
process that made the claim on X, a file named after X's hash, and only while LOCK still says X: so of several jobs that
find the same stale lock one takes it over, and nobody removes another's.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from dsdpo.errors import IOFailure
from dsdpo.runtime.env import slurm_job, slurm_restarts
from dsdpo.runtime.files import write_atomically
from dsdpo.runtime.rundir import RunDir

HEARTBEAT_S = 15.0  # between two renewals of the file's date
EXPIRED_S = 120.0  # without a renewal: a holder that cannot be asked, such as one on another host, is gone
_TRIES, _PAUSE_S = 100, 0.05  # while another job takes the same stale lock over
_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


class RunLock:
    """output_dir/LOCK, held from `acquire` to `release`.

    Attributes:
        token: what the file carries as long as it is ours; see `is_held_by`.
        previous: what the stale lock said that was taken over, None if there was none. What its holder noted,
            such as a session, may outlive it.
    """

    def __init__(self, run_dir: RunDir, content: bytes, previous: dict[str, Any] | None) -> None:
        self.token = str(_parse(content)["token"])
        self.previous = previous
        self._run_dir = run_dir
        self._file = run_dir.lock
        self._content = content
        self._lost = False
        self._pid = os.getpid()
        self._stop = threading.Event()
        threading.Thread(target=self._renew, name="run lock", daemon=True).start()

    @classmethod
    def acquire(cls, run_dir: RunDir, what: str) -> RunLock:
        """Take the lock; a stale one is taken over, and the folder is made if missing.

        Args:
            run_dir: folder of the run.
            what: the program as others are told it, such as "dsdpo train".

        Raises:
            IOFailure: another job holds the lock, or the file system refused.
        """
        file = run_dir.lock
        since = datetime.now(timezone.utc).isoformat(timespec="seconds")
        facts = {"token": uuid.uuid4().hex, "what": what, "since": since}
        content = _dump({**facts, **this_process(), "slurm_job": slurm_job(), "slurm_restarts": slurm_restarts()})
        with _io_failure(file):
            for _ in range(_TRIES):
                found = _read(file)
                previous = None if found is None else _parse(found)
                if previous is None or _is_stale(file, previous):
                    if _swap(file, found, content):
                        return cls(run_dir, content, previous)
                elif _read(file) == found:  # else its age was another lock's, made since it was read
                    raise IOFailure(_refusal(file, previous))
                time.sleep(_PAUSE_S)
        raise IOFailure(f"{file} is being taken over by another job; try again in {EXPIRED_S:.0f} s")

    @property
    def lost(self) -> bool:
        """True once the file was found gone or another's: this job must not write to output_dir any more."""
        return self._lost

    def note(self, **facts: Any) -> None:
        """Add facts that JSON can hold to the file. Raises IOFailure when the lock is lost or the write is refused."""
        content = _dump({**_parse(self._content), **facts, "token": self.token})
        with _io_failure(self._file):
            if not _swap(self._file, self._content, content):
                self._lost = True
                raise IOFailure(f"{self._file} is another job's by now, which took output_dir over: stop this one")
        self._content = content

    def release(self) -> None:
        """Remove the file if it is still ours. Where that is refused it stays, and is stale when this process ends."""
        if self._stop.is_set() or self._pid != os.getpid():
            return
        self._stop.set()
        with suppress(OSError, IOFailure):
            _swap(self._file, self._content, None)

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _renew(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            with suppress(OSError, IOFailure):  # a file system that is away for a while: the next beat tries again
                if not is_held_by(self._run_dir, self.token):
                    self._lost = not self._stop.is_set()
                    return
                os.utime(self._file)


def holder(run_dir: RunDir) -> dict[str, Any] | None:
    """What the lock of a run says: {} if that cannot be read as facts, None if there is no lock.

    Raises:
        IOFailure: the file system refused.
    """
    file = run_dir.lock
    with _io_failure(file):
        found = _read(file)
    return None if found is None else _parse(found)


def living_holder(run_dir: RunDir) -> dict[str, Any] | None:
    """What the lock of a run says, None if there is none or its holder is gone. Raises IOFailure as `holder`."""
    file = run_dir.lock
    facts = holder(run_dir)
    with _io_failure(file):
        return None if facts is None or _is_stale(file, facts) else facts


def is_held_by(run_dir: RunDir, token: str) -> bool:
    """Whether the lock of a run carries `token`: a rank asks before it commits. Raises IOFailure as `holder`."""
    return (holder(run_dir) or {}).get("token") == token


@contextmanager
def _io_failure(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise IOFailure(
            f"cannot use the lock {file}: {error.strerror or error}; make the folder writable or set another output_dir"
        ) from error


def _refusal(file: Path, facts: dict[str, Any]) -> str:
    who = "a job that its lock does not name"
    if facts:
        job = f", SLURM job {facts['slurm_job']}" if facts.get("slurm_job") else ""
        who = f"{facts.get('what')}, process {facts.get('pid')} on host {facts.get('host')}{job}"
    return (
        f"{file.parent} is in use by {who}, since {facts.get('since', 'an unknown time')}, last sign of life "
        f"{max(_age(file), 0):.0f} s ago: wait for it to end, stop it, or set another output_dir. If it is dead, try "
        f"again {EXPIRED_S:.0f} s after its last sign of life, or remove {file}"
    )


# --- who lives ---


def _place() -> dict[str, Any]:
    """Where process ids mean the same: host, boot and namespace of process ids (None where the system has no such)."""
    place: dict[str, Any] = {"host": socket.gethostname(), "boot_id": None, "pid_namespace": None}
    with suppress(OSError):
        place["boot_id"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        place["pid_namespace"] = os.readlink("/proc/self/ns/pid")
    return place


def this_process() -> dict[str, Any]:
    """What tells this process from every other, for `holder_is_gone`."""
    return {"pid": os.getpid(), "started": _status(os.getpid())[1], **_place()}


def _status(pid: int) -> tuple[bool, int | None]:
    """Whether a process has ended and waits to be reaped, and its start in clock ticks since boot (None: unknown).

    While one of its threads is still inside a system call, such as a write, the process has not ended.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return fields[0] in ("Z", "X") and int(fields[17]) <= 1, int(fields[19])
    except (OSError, IndexError):
        return False, None


def _is_alive(pid: int, started: int | None) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # another user's
    has_ended, start = _status(pid)
    return not has_ended and (None in (start, started) or start == started)


def _can_be_asked(facts: dict[str, Any], here: dict[str, Any]) -> bool:
    return isinstance(facts.get("pid"), int) and all(facts.get(key) == value for key, value in here.items())


def holder_is_gone(facts: dict[str, Any]) -> bool:
    """Whether the process of `this_process` is known to have ended: it was on this host, so that it can be asked.

    Never where process ids mean something else, as in another container on the host.
    """
    return _can_be_asked(facts, _place()) and not _is_alive(facts["pid"], facts.get("started"))


def _is_stale(file: Path, facts: dict[str, Any]) -> bool:
    """Whether the holder is gone: asked directly where its pid means something here, else judged by its last renewal.

    The same host name with another boot is this host before it restarted, or another one that bears the same name, as
    containers do: two missed renewals tell.
    """
    here = _place()
    if _can_be_asked(facts, here):
        return holder_is_gone(facts)
    restarted = facts.get("host") == here["host"] and facts.get("boot_id") != here["boot_id"]
    return _age(file) > (2 * HEARTBEAT_S if restarted else EXPIRED_S)


def _age(file: Path) -> float:
    """Seconds since `file` was renewed, by the file system's clock: that of a new file beside it. 0 if it is gone."""
    probe = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        probe.touch(exist_ok=False)
        with file.open("rb") as stream:  # opened: NFS answers stat() alone from a cache
            return probe.stat().st_mtime - os.fstat(stream.fileno()).st_mtime
    except FileNotFoundError:
        return 0.0
    finally:
        probe.unlink(missing_ok=True)


# --- the file ---


def _dump(facts: dict[str, Any]) -> bytes:
    return json.dumps(facts, indent=1).encode()


def _parse(content: bytes) -> dict[str, Any]:
    try:
        facts = json.loads(content)
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def _read(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _swap(file: Path, old: bytes | None, new: bytes | None) -> bool:
    """Put `new` in place of `old` (None: no file), whole at every moment; False if `old` is not what is there."""
    whole = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        if new is not None:
            write_atomically(whole, new)
        if old is None:
            with suppress(NotImplementedError):
                return _link(whole, file)
        claim = _claim(file, old)
        if claim is None:
            return False
        try:
            if _read(file) != old:
                return False
            if new is None:
                file.unlink()
            else:
                os.replace(whole, file)
            return True
        finally:
            claim.unlink(missing_ok=True)
    finally:
        whole.unlink(missing_ok=True)


def _link(whole: Path, file: Path) -> bool:
    """Give `whole` its name unless that is taken, which needs no claim. Raises NotImplementedError without links."""
    try:
        os.link(whole, file)
    except FileExistsError:
        return whole.stat().st_nlink == 2  # NFS may send a request again whose answer was lost
    except OSError as error:
        if error.errno in _NO_LINKS:
            raise NotImplementedError from error
        raise
    return True


def _claim(file: Path, old: bytes | None) -> Path | None:
    """The file that alone entitles to change a lock that says `old`; None while another process has it.

    A claim whose process died is never removed, since two could do so: the next number stands in for it.
    """
    name = hashlib.sha256(old or b"").hexdigest()[:32]
    for number in itertools.count():
        claim = file.with_name(f".{file.name}.{name}.{number}")
        try:
            claim.touch(exist_ok=False)
            return claim
        except FileExistsError:
            if _age(claim) <= EXPIRED_S:
                return None
    return None
