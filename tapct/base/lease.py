"""A lease: at most one process at a time writes a folder, also over a network file system.

The holder keeps a small file in the folder:

    {"host": "gpu07", "pid": 4711, "job": "77", "since": "2026-01-31 12:00:00 UTC", ...}
    0000000042                                          counts up every few seconds: the heartbeat

A process that wants the lease

    1. writes its own file under a temporary name, and links it to the name of the lease: only one
       process can, also over NFS, and no flock is needed;
    2. if the lease exists, finds out whether its holder is alive:
         same machine          by its process id and the start time of the process
         an earlier start of the same job (requeued by SLURM): it has ended
         another machine       by watching the heartbeat; clocks are not compared
    3. refuses to start if it is alive; else claims the lease of this very holder, which only one
       process can, and renames its own file over it.

The heartbeat is written through the open file and not through its name, so a holder that was
suspended never writes into the lease of the process that took over. `check` reads the file back:
a holder that has lost its lease must write nothing more.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from tapct.base import ranks
from tapct.base.exits import UserError

BEAT_S = 5.0  # between two heartbeats
STALE_S = 120.0  # without a heartbeat, after which a holder on another machine counts as dead
_COUNTER = "{:010d}\n"


class LostLease(UserError):
    """Another process has taken the lease over, or somebody has removed its file."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lease.

    Args:
        host: name of the machine, for people.
        machine: identity of the machine's present start and of its process ids; equal only where a
            process id means the same process.
        pid: process id.
        born: start time of the process in the machine's own unit; a later process with the same id
            has another one.
        job: SLURM job, or the run of torchrun; empty for neither.
        attempt: how often the launcher has started the job before.
        since: when the lease was taken, for people.
        token: random name of this lease.
    """

    host: str
    machine: str
    pid: int
    born: str
    job: str
    attempt: int
    since: str
    token: str

    def described(self) -> str:
        """The holder as a clause: host, process, job and time."""
        job = f", job {self.job}" if self.job else ""
        return f"host {self.host}, process {self.pid}{job}, since {self.since}"


@dataclass(frozen=True)
class _Seen:
    """What the file of a lease holds: its holder, None where the file is not readable, and all of
    its bytes, which change with every heartbeat.
    """

    holder: Holder | None
    content: bytes


class Lease:
    """The right to write a folder, for one process.

    Args:
        path: file of the lease; its folder is made.
        what: the folder as an error line names it, e.g. `the run folder runs/mine`.
        environment: environment variables, which name the job.
        beat_s: seconds between two heartbeats.
        stale_s: seconds without a heartbeat after which a holder on another machine counts as dead.
        option: setting or option that names another folder, e.g. `--out`.
        say: function that prints a line.
    """

    def __init__(
        self,
        path: Path,
        what: str,
        environment: Mapping[str, str],
        *,
        beat_s: float = BEAT_S,
        stale_s: float = STALE_S,
        option: str = "out=",
        say: Callable[[str], object] = lambda line: None,
    ) -> None:
        self.path, self.what, self.option, self.say = path, what, option, say
        self.beat_s, self.stale_s = beat_s, stale_s
        self.holder = this_process(environment)
        self.file = -1  # open while the lease is held
        self.is_lost = False
        self.has_made_folder = False
        self.over = threading.Event()
        self.heart: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the lease, or refuse.

        Raises:
            UserError: a process that is alive holds it.
            OSError: the folder cannot be written.
        """
        self.has_made_folder = not self.path.parent.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self._aside("new")
        self.file = os.open(aside, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            head = json.dumps(asdict(self.holder)).encode() + b"\n"
            self.counter_at = len(head)
            os.write(self.file, head + _COUNTER.format(0).encode())
            os.fsync(self.file)
            while not _link(aside, self.path):
                if self._take_over(aside):
                    break
        except BaseException:
            os.close(self.file)
            self.file = -1
            raise
        finally:
            with contextlib.suppress(FileNotFoundError):
                aside.unlink()
        self.check()
        self.heart = threading.Thread(target=self._beat, name="tapct-lease", daemon=True)
        self.heart.start()

    def check(self) -> None:
        """Raise LostLease where this process no longer holds the lease; cheap. A process that never
        asked for it (another rank) passes.

        A file system that does not answer is no proof of a loss.
        """
        if self.file < 0:
            return
        try:
            seen = _read(self.path)
        except OSError:
            return
        holder = seen.holder if seen is not None else None
        if holder is not None and holder.token == self.holder.token and not self.is_lost:
            return
        self.is_lost = True
        taken = "its lease was removed" if holder is None else f"it belongs to {holder.described()}"
        raise LostLease(
            f"{self.what} is no longer this process's to write: {taken}; nothing more is written "
            f"here. Start again in another {self.option}, or end the other process first"
        )

    def release(self) -> None:
        """Give the lease back; nothing happens where it is not held or lost.

        A folder that was made for the lease and is still empty is removed.
        """
        if self.file < 0:
            return
        self.over.set()
        if self.heart is not None:
            self.heart.join(10.0)  # it may wait for a disk that does not answer
        with contextlib.suppress(OSError):
            # claimed first, so that no other process replaces it between the look and the removal
            if not self.is_lost and self._claim(self.holder):
                seen = _read(self.path)
                if seen is not None and seen.holder == self.holder:
                    self.path.unlink()
                self._claim_file(self.holder).unlink()
        if self.has_made_folder:
            with contextlib.suppress(OSError):
                self.path.parent.rmdir()
        os.close(self.file)
        self.file = -1

    def _take_over(self, aside: Path) -> bool:
        """Replace the lease of a dead holder by this one.

        Returns:
            Whether it is done; False where the lease has changed meanwhile, so that the caller must
            look again.
        Raises:
            UserError: its holder is alive.
        """
        seen = _read(self.path)
        if seen is None:
            return False  # given back a moment ago
        why = self._why_dead(seen)
        if not self._claim(seen.holder):
            # another process takes over at this moment; a claim that stays is of one that died
            if self._waited_for_other_claim(seen.holder):
                self._claim_file(seen.holder).unlink(missing_ok=True)
            return False
        # only now: whoever replaces the lease of this holder has to claim it first
        now = _read(self.path)
        is_unchanged = now is not None and now.holder == seen.holder
        if is_unchanged:
            os.replace(aside, self.path)
        self._claim_file(seen.holder).unlink(missing_ok=True)
        if not is_unchanged:
            return False
        if seen.holder is not None:
            self.say(f"taking over {self.what} from {seen.holder.described()}: {why}")
        return True

    def _why_dead(self, seen: _Seen) -> str:
        """Why a holder counts as dead.

        Raises:
            UserError: it is alive.
        """
        other, me = seen.holder, self.holder
        if other is not None and other.machine == me.machine:
            if birth_of(other.pid) == other.born:
                raise self._refusal(other, "it is running")
            return "that process has ended"
        is_same_job = other is not None and me.job != "" and other.job == me.job
        if other is not None and is_same_job and me.attempt > other.attempt:
            return "the job was started again"
        shown = "an unknown process" if other is None else other.described()
        self.say(
            f"{self.what} is held by {shown}; waiting up to {self.stale_s:.0f} s for a sign of life"
        )
        until = time.monotonic() + self.stale_s
        while time.monotonic() < until:
            time.sleep(min(1.0, self.beat_s / 2))
            now = _read(self.path)
            if now is None or now.holder != other:
                return "it has changed"
            if now.content != seen.content:
                raise self._refusal(other, "its heartbeat continues")
        return f"no heartbeat for {self.stale_s:.0f} s"

    def _refusal(self, other: Holder | None, why: str) -> UserError:
        shown = "another process" if other is None else other.described()
        return UserError(
            f"{self.what} is being written by another process ({shown}; {why}); two would damage "
            f"it. Wait for that one, end it, or choose another {self.option}"
        )

    def _claim(self, holder: Holder | None) -> bool:
        """Whether this process alone may replace or remove the lease of this holder."""
        try:
            os.close(os.open(self._claim_file(holder), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        except FileExistsError:
            return False
        return True

    def _waited_for_other_claim(self, holder: Holder | None) -> bool:
        """Wait for the process that has claimed the lease; True if it did nothing all the time."""
        until = time.monotonic() + self.stale_s
        while time.monotonic() < until:
            time.sleep(min(0.2, self.beat_s / 2))
            now = _read(self.path)
            if now is None or now.holder != holder or not self._claim_file(holder).exists():
                return False
        return True

    def _claim_file(self, holder: Holder | None) -> Path:
        return self.path.with_name(
            f".{self.path.name}.{holder.token if holder else 'broken'}.claim"
        )

    def _aside(self, word: str) -> Path:
        return self.path.with_name(f".{self.path.name}.{self.holder.token}.{word}")

    def _beat(self) -> None:
        """The thread: count up in the open file until the end."""
        count = 0
        while not self.over.wait(self.beat_s):
            count += 1
            with contextlib.suppress(OSError):  # a full or absent disk: the next beat tries again
                os.pwrite(self.file, _COUNTER.format(count).encode(), self.counter_at)
                os.fsync(self.file)
            with contextlib.suppress(LostLease):
                self.check()


@contextmanager
def hold(
    path: Path, what: str, say: Callable[[str], object] = lambda line: None
) -> Iterator[Lease]:
    """Hold the lease of what a command writes to its `--out` within this context.

    Args:
        path: file of the lease.
        what: what is written, as an error line names it, e.g. `the store data/store`.
        say: function that prints a line.
    Raises:
        UserError: a process that is alive holds it.
        OSError: the folder cannot be written.
    """
    lease = Lease(path, what, os.environ, option="--out", say=say)
    lease.acquire()
    try:
        yield lease
    finally:
        lease.release()


def holder_of(path: Path) -> Holder | None:
    """Who holds or held a lease last, alive or not; None where its file is missing or damaged."""
    seen = _read(path)
    return None if seen is None else seen.holder


def has_ended(holder: Holder) -> bool:
    """Whether a holder on this machine is no longer alive; False for one on another machine."""
    return holder.machine == machine() and birth_of(holder.pid) != holder.born


def living_holder(path: Path, patience_s: float = 2 * BEAT_S + 2.0) -> Holder | None:
    """Who writes a folder now, without asking for the lease; None where nobody does.

    Args:
        path: file of the lease.
        patience_s: seconds within which a holder on another machine must show a heartbeat. One that
            is suspended or cut off from the disk for so long is not seen: this is a first look and
            replaces no lease.
    Raises:
        OSError: the folder cannot be read.
    """
    seen = _read(path)
    if seen is None or seen.holder is None:
        return None
    holder = seen.holder
    if holder.machine == machine():
        return None if has_ended(holder) else holder
    until = time.monotonic() + patience_s
    while time.monotonic() < until:
        time.sleep(min(0.5, patience_s / 10))
        now = _read(path)
        if now is None:
            return None
        if now.content != seen.content:
            return now.holder
    return None


def living_holders(paths: Sequence[Path]) -> list[Holder | None]:
    """`living_holder` of several folders, at the same time: each may take seconds.

    Args:
        paths: files of the leases.
    Raises:
        OSError: a folder cannot be read.
    """
    if not paths:
        return []
    with ThreadPoolExecutor(min(len(paths), 64)) as pool:
        return list(pool.map(living_holder, paths))


def this_process(environment: Mapping[str, str]) -> Holder:
    """Describe this process as the holder of a new lease."""
    job = environment.get("SLURM_JOB_ID") or environment.get("TORCHELASTIC_RUN_ID", "none")
    return Holder(
        host=socket.gethostname(),
        machine=machine(),
        pid=os.getpid(),
        born=birth_of(os.getpid()),
        job="" if job == "none" else job,
        attempt=ranks.restarts(environment),
        since=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        token=secrets.token_hex(8),
    )


def machine() -> str:
    """Identity within which a process id means one process: name, start and id space."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        # two containers on one machine can have the same host name and the same process ids
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def birth_of(pid: int) -> str:
    """Start time of a process that is alive; empty where there is none."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass  # of another user
    try:
        # after the name in brackets, which may hold blanks: state, ..., start time as the 20th
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "unknown"
    return "" if fields[0] in "ZX" else fields[19]


def _link(aside: Path, path: Path) -> bool:
    """Give a file the name of the lease; False where that exists."""
    try:
        os.link(aside, path)
    except FileExistsError:
        # NFS repeats a request whose answer was lost, and then reports its own success as this
        return os.stat(aside).st_nlink == 2
    except OSError:
        return _create(aside, path)
    return True


def _create(aside: Path, path: Path) -> bool:
    """`_link` where the file system has no links: an empty file is created, and replaced."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
    except FileExistsError:
        return False
    os.replace(aside, path)
    return True


def _read(path: Path) -> _Seen | None:
    """The content of a lease; None where there is none."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        return _Seen(Holder(**json.loads(content.partition(b"\n")[0])), content)
    except (ValueError, TypeError):
        return _Seen(None, content)
