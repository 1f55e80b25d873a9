"""One writer at a time: a lock file that works on every file system, and between machines.

`flock` is missing on some network file systems (ENOSYS on Lustre without `-o flock`, ENOLCK on NFS
without a lock daemon), and on others it holds on one machine only. So the lock is a file that one
process creates (`O_EXCL` is atomic everywhere). It names its holder, which renews the file's time
while it works. A lock that is stale is taken over:

    holder on this machine    its process has ended; its process id with its start time tells
    holder elsewhere          the file was not renewed for `STALE_SECONDS`, on the clock of the file
                              system

A holder that was stopped for so long (a machine that was asleep) notices that its lock belongs to
another process, and must write nothing more: `Lock.check`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from tapct.base.exits import UserError

RENEW_SECONDS = 10.0
STALE_SECONDS = 120.0  # NFS may show a time that is a minute old
_TRIES = 5


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock.

    Args:
        token: random name of this lock.
        host: name of its machine.
        pid: process id.
        started: start of the process in the machine's own unit, empty where it is not known.
        machine: names the running system and its process ids; equal only where `pid` means the same
            process.
        job: SLURM job, empty outside of one.
        since: seconds since 1970 when it took the lock.
    """

    token: str
    host: str
    pid: int
    started: str
    machine: str
    job: str
    since: float

    @classmethod
    def this_process(cls) -> Holder:
        """Describe this process, with a new token."""
        pid = os.getpid()
        return cls(
            token=secrets.token_hex(8),
            host=socket.gethostname(),
            pid=pid,
            started=_start_of(pid),
            machine=_machine(),
            job=os.environ.get("SLURM_JOB_ID", ""),
            since=time.time(),
        )

    def has_ended(self) -> bool | None:
        """Whether its process has ended; None where that cannot be seen from here."""
        if not self.machine or self.machine != _machine():
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # of another user
            pass
        return self.started != _start_of(self.pid)

    def __str__(self) -> str:
        job = f" of job {self.job}" if self.job else ""
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.since))
        return f"process {self.pid}{job} on {self.host}, since {since}"


class Held(UserError):
    """Another process holds the lock."""


class Lock:
    """A lock that this process holds, made by `hold`.

    Args:
        path: lock file.
        holder: this process.
        renew_seconds: time between two renewals.
    """

    def __init__(self, path: Path, holder: Holder, renew_seconds: float) -> None:
        self.path, self.holder = path, holder
        self._renew_seconds = renew_seconds
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lock", daemon=True)
        self._thread.start()

    def is_ours(self) -> bool:
        """Whether the file still names this process; False too where it cannot be read."""
        with contextlib.suppress(OSError):
            found = _read(self.path)[0]
            return found is not None and found.token == self.holder.token
        return False

    def check(self) -> None:
        """Raise UserError where another process has taken the lock over."""
        if not self.is_ours():
            raise UserError(
                f"the lock {self.path} is gone or belongs to another process, so this one stops "
                "and writes nothing more. Run the command again."
            )

    def release(self) -> None:
        """End the renewals and remove the file."""
        self._done.set()
        self._thread.join()
        if self.is_ours():
            with contextlib.suppress(OSError):
                self.path.unlink()

    def _renew(self) -> None:
        while not self._done.wait(self._renew_seconds):
            with contextlib.suppress(OSError):  # a file system that fails for a moment
                if self.is_ours():
                    os.utime(self.path)


@contextmanager
def hold(
    path: Path,
    taken: str,
    *,
    renew_seconds: float = RENEW_SECONDS,
    stale_seconds: float = STALE_SECONDS,
) -> Iterator[Lock]:
    """Hold a lock within this context.

    Args:
        path: lock file, in a folder that exists.
        taken: beginning of the error line where it is held, e.g. "another `tapct pack` is writing
            to data/store".
        renew_seconds: time between two renewals.
        stale_seconds: age at which a lock of another machine is taken over.
    Raises:
        Held: another process holds it.
        OSError: the file cannot be written.
    """
    holder = Holder.this_process()
    for _ in range(_TRIES):
        if _create(path, holder):
            break
        found, content, age = _look(path)
        if content is None:
            continue  # it was released just now
        if not _is_stale(found, age, stale_seconds):
            who = f" ({found})" if found is not None else ""
            raise Held(
                f"{taken}{who}; wait for it or choose another place. If no such process runs any "
                f"more, the lock {path} is taken over {stale_seconds:.0f} s after its last renewal."
            )
        _remove_stale(path, content)
    else:
        raise Held(f"{taken}; wait for it or choose another place.")
    lock = Lock(path, holder, renew_seconds)
    try:
        yield lock
    finally:
        lock.release()


def _create(path: Path, holder: Holder) -> bool:
    """Create the file with its holder; False where it exists."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except FileExistsError:
        return False
    try:
        with open(fd, "w") as file:
            file.write(json.dumps(asdict(holder)))
    except OSError:
        with contextlib.suppress(OSError):
            path.unlink()
        raise
    return True


def _read(path: Path) -> tuple[Holder | None, bytes]:
    """Who holds a lock, None where the file does not tell; and its content."""
    content = path.read_bytes()
    try:
        return Holder(**json.loads(content)), content
    except (ValueError, TypeError):  # just being written, or of an earlier version
        return None, content


def _look(path: Path) -> tuple[Holder | None, bytes | None, float]:
    """Holder, content and seconds since the last renewal; a content of None: there is no file."""
    # another file of the folder gets its time from the same clock as the lock
    probe = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    try:
        found, content = _read(path)
        with open(probe, "xb") as file:
            now = os.fstat(file.fileno()).st_mtime
        with open(path, "rb") as file:
            return found, content, now - os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None, None, 0.0
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


def _is_stale(found: Holder | None, age: float, stale_seconds: float) -> bool:
    has_ended = None if found is None else found.has_ended()
    return age > stale_seconds if has_ended is None else has_ended


def _remove_stale(path: Path, content: bytes) -> None:
    """Remove a stale lock; one that another process has made since is put back."""
    aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    try:
        os.rename(path, aside)  # of several processes that try, one gets the file
    except FileNotFoundError:
        return
    if aside.read_bytes() != content:
        try:
            os.link(aside, path)
        except OSError as error:
            if error.errno != errno.EEXIST:  # a file system without links
                os.rename(aside, path)
                return
    aside.unlink()


def _start_of(pid: int) -> str:
    """Start time of a process, in ticks since the start of the machine; empty where unknown."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _machine() -> str:
    """Names this start of this machine and the name space of its process ids; empty if unknown."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
