"""Apply one function to many inputs in worker processes that an input may end, block or fill.

The workers of `tapct index` and `tapct pack` are these processes. The loader of a training run has
threads instead (`data.loader.workers`). A worker handles many inputs; it is killed and replaced
where an input takes longer or more memory than its limit. `concurrent.futures` can end neither, and
does not know which input ended a process. What runs in a worker: `worker_process`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Generic, TypeVar

from tapct.base.exits import UserError, single_line
from tapct.data.workers import worker_process

In = TypeVar("In")
Out = TypeVar("Out")

_MEMORY_SHARE = 0.8  # of the machine's memory, for all workers together
_LEAST_MEMORY = 1 << 29  # bytes that every worker may use
_POLL_SECONDS = 1.0  # longest wait between two looks at the clock
_PAUSE_SECONDS = 5.0  # a longer time between two looks: this process was stopped, as by Ctrl-Z
_LOG_BYTES = 1 << 26  # printed for one input: a library that writes more does not end
_TAIL_BYTES = 1 << 12
_MAX_TEXT = 200
_REAP_SECONDS = 2.0  # a process that waits for a broken disk cannot be killed at once
LOST = frozenset(("timed_out", "crashed", worker_process.NO_MEMORY))  # no result, see `Failure`
_LOST_WORKERS = 3  # in a row, before they had an input: the fault is not one of an input
_PROGRAM = (
    "import json, sys; given = json.loads(sys.argv[1]); sys.path[:] = given.pop('path'); "
    "from tapct.data.workers import worker_process; worker_process.serve(**given)"
)


@dataclass(frozen=True)
class ScanLimits:
    """What one input may use.

    Args:
        seconds: wall time of an input without bytes.
        mb_per_second: slowest reading that is still waited for; an input of N MB may take N /
            mb_per_second seconds more.
        memory_bytes: memory of all workers together; None is 80 % of what this machine, or the
            job's control group, has. An input that needs more than its worker's share is tried
            again alone.
    """

    seconds: float = 120.0
    mb_per_second: float = 1.0
    memory_bytes: int | None = None

    def seconds_for(self, num_bytes: int) -> float:
        """Longest wall time in seconds for an input of `num_bytes` bytes."""
        return self.seconds + num_bytes / 1e6 / self.mb_per_second

    def memory_for(self, workers: int) -> int:
        """Bytes that each of `workers` processes may use."""
        whole = self.memory_bytes or int(_MEMORY_SHARE * machine_memory())
        return whole // workers if self.memory_bytes else max(_LEAST_MEMORY, whole // workers)


DEFAULT_LIMITS = ScanLimits()


@dataclass(frozen=True)
class Failure:
    """Why an input has no result.

    Args:
        reason: `timed_out`, `out_of_memory` or `crashed`; `unreadable` where the function raised.
        detail: one line.
        printed: last line that a library printed before the process ended; it may hold texts of the
            file.
    """

    reason: str
    detail: str
    printed: str = ""


def map_unordered(
    function: Callable[[In], Out],
    inputs: Iterable[In],
    workers: int,
    on_failure: Callable[[In, Failure], Out],
    *,
    num_bytes: Callable[[In], int] = lambda item: 0,
    limits: ScanLimits = DEFAULT_LIMITS,
    modules: Sequence[str] = (),
) -> Generator[tuple[int, Out], None, None]:
    """Yield (index of the input, result) in the order in which the results become ready.

    An input whose worker dies (a reader library crashed) or has too little memory is tried again
    alone, after all others; `on_failure` gives the result of one that fails again.

    Args:
        function: function that can be pickled.
        inputs: values that can be pickled. Each is taken when a worker is free for it, so that an
            iterator may make them as they are needed; only those in work are kept.
        workers: number of processes; 0 works in this process, without protection and limits.
        on_failure: function that makes the result of an input that failed.
        num_bytes: size of an input, for its time limit.
        limits: time and memory of an input.
        modules: names of modules that the function needs, imported once for all workers of all
            calls with the same names.
    """
    if workers <= 0:
        for index, item in enumerate(inputs):
            yield index, _result(worker_process.outcome_of(function, item), item, on_failure)
        return
    modules = tuple(modules)
    waiting: dict[int, In] = {}
    todo = _Waiting(iter(inputs), waiting)
    failed_once: list[int] = []
    most = len(inputs) if isinstance(inputs, Sequence) else workers
    pool = _Pool(function, min(workers, most), modules, limits, num_bytes)
    with contextlib.closing(pool.run(waiting, todo)) as outcomes:
        for index, outcome in outcomes:
            if outcome[0] in ("crashed", worker_process.NO_MEMORY):
                failed_once.append(index)
            else:
                yield index, _result(outcome, waiting.pop(index), on_failure)
    if failed_once:
        pool = _Pool(function, 1, modules, limits, num_bytes)
        with contextlib.closing(pool.run(waiting, deque(failed_once))) as outcomes:
            for index, outcome in outcomes:
                yield index, _result(outcome, waiting.pop(index), on_failure)


class _Waiting(Generic[In]):
    """Numbers of the inputs that no worker has yet, in their order.

    Args:
        source: inputs, which are taken one at a time.
        taken: dict that receives the inputs by their numbers.
    """

    def __init__(self, source: Iterator[In], taken: MutableMapping[int, In]) -> None:
        self._source, self._taken = source, taken
        self._count = 0
        self._next: int | None = None

    def __bool__(self) -> bool:
        if self._next is None:
            for item in self._source:
                self._next = self._count
                self._taken[self._next] = item
                self._count += 1
                break
        return self._next is not None

    def popleft(self) -> int:
        """The number of the next input; as of a deque."""
        if not self:
            raise IndexError("no input is left")
        assert self._next is not None
        number, self._next = self._next, None
        return number


def _result(outcome: tuple[str, Any], item: In, on_failure: Callable[[In, Failure], Out]) -> Out:
    """The result of an input from the answer of its worker."""
    kind, value = outcome
    if kind == worker_process.DONE:
        result: Out = value
        return result
    if kind == worker_process.NO_MEMORY:
        value = "reading it needs more memory than one scan may use (--memory-gb)"
    if kind == "crashed":
        detail, printed = value
        return on_failure(item, Failure(kind, detail, printed))
    reason = "unreadable" if kind == worker_process.RAISED else kind
    return on_failure(item, Failure(reason, value))


def machine_memory() -> int:
    """Bytes of memory that this process and its children may use together: of the machine, or of
    its control group (a container, a SLURM job).
    """
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    files = [Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")]
    with contextlib.suppress(OSError, IndexError):
        group = Path("/proc/self/cgroup").read_text().splitlines()[-1].split(":", 2)[2]
        place = Path("/sys/fs/cgroup") / group.lstrip("/")
        files += [folder / "memory.max" for folder in (place, *place.parents)]
    for file in files:
        with contextlib.suppress(OSError, ValueError):  # `max` where there is no limit
            found.append(int(file.read_text()))
    return min(found)


class _Server:
    """The process that forks workers, see `worker_process.serve`."""

    def __init__(self, modules: Sequence[str]) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        given = {
            "control_fd": theirs.fileno(),
            "parent": os.getpid(),
            "modules": list(modules),
            "parent_is_main": threading.current_thread() is threading.main_thread(),
            "path": sys.path,
        }
        one_thread = dict.fromkeys(
            (
                *("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLOSC_NTHREADS"),
                *("ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", "NUMEXPR_MAX_THREADS"),
            ),
            "1",
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, json.dumps(given)],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **one_thread},
        )
        theirs.close()

    def ask(self, request: dict[str, Any], fds: Sequence[int] = ()) -> dict[str, Any]:
        """Send one request and return its answer. Raises: OSError where the server has ended."""
        try:
            socket.send_fds(self._control, [json.dumps(request).encode()], fds)
            answer = self._control.recv(1 << 16)
        except BaseException:  # an interrupt: a later request would get the answer of this one
            self._control.close()
            raise
        if not answer:
            raise ConnectionError("the server of the worker processes has ended")
        found: dict[str, Any] = json.loads(answer)
        return found

    def is_alive(self) -> bool:
        """Whether it runs; its workers end with it."""
        return self.process.poll() is None


@functools.cache
def _server_of(pid: int, modules: tuple[str, ...]) -> _Server:
    """The server of this process; a fork has another process id, and gets one of its own."""
    return _Server(modules)


@dataclass
class _Worker:
    """One worker process.

    Args:
        server: process that forked it.
        pid: process id.
        tasks: connection to it.
        log: file descriptor of its standard output and error.
        is_ready: whether it has loaded the function, which takes time of its own.
        index: input that it works on, None where it has none.
        began, limit: start on the clock, and seconds that the input may take.
    """

    server: _Server
    pid: int
    tasks: Connection
    log: int
    is_ready: bool = False
    index: int | None = None
    began: float = 0.0
    limit: float = math.inf

    def end(self) -> int | None:
        """Kill it and free what belongs to it; its exit code, None where it cannot be known."""
        self.tasks.close()
        os.close(self.log)
        code: int | None = None
        give_up = time.monotonic() + _REAP_SECONDS
        if not self.server.is_alive():
            return None
        with contextlib.suppress(OSError):
            # a process that has ended keeps its id until the server asks for its exit code
            os.kill(self.pid, signal.SIGKILL)
            while code is None and time.monotonic() < give_up:
                code = self.server.ask({"reap": self.pid})["exit_code"]
                if code is None:
                    time.sleep(0.005)
        return code

    def printed(self) -> int:
        """Number of bytes that it printed while it worked on its input."""
        return os.fstat(self.log).st_size

    def last_line(self) -> str:
        """The last line that it printed while it worked on its input."""
        text = os.pread(self.log, _TAIL_BYTES, max(0, self.printed() - _TAIL_BYTES))
        lines = [line for line in text.decode("utf-8", "replace").splitlines() if line.strip()]
        return single_line(lines[-1], _MAX_TEXT) if lines else ""


@dataclass
class _Pool(Generic[In]):
    """Workers for one function; arguments as in `map_unordered`."""

    function: Callable[[In], Any]
    size: int
    modules: tuple[str, ...]
    limits: ScanLimits
    num_bytes: Callable[[In], int]
    workers: list[_Worker] = field(default_factory=list)
    num_lost: int = 0

    def run(
        self, inputs: MutableMapping[int, In], todo: deque[int] | _Waiting[In]
    ) -> Generator[tuple[int, tuple[str, Any]], None, None]:
        """Yield (index, kind of outcome and value) for each index of `todo`."""
        try:
            looked = time.monotonic()
            while todo or any(worker.index is not None for worker in self.workers):
                self._hand_out(inputs, todo)
                ready = wait([worker.tasks for worker in self.workers], self._patience())
                now = time.monotonic()
                if now - looked > _PAUSE_SECONDS:
                    for worker in self.workers:
                        worker.began += now - looked
                looked = now
                finished = [self._outcome(w) for w in list(self.workers) if w.tasks in ready]
                finished += [self._stopped(w) for w in list(self.workers) if self._is_over(w)]
                self._hand_out(inputs, todo)  # before the results are used, which takes time
                for item in finished:
                    if item is not None:
                        yield item
                looked = time.monotonic() if finished else looked
        finally:
            for worker in self.workers:
                worker.end()
            self.workers.clear()

    def _patience(self) -> float:
        """Seconds until a time limit is reached, at most those between two looks."""
        ends = [w.began + w.limit for w in self.workers if w.index is not None]
        left = min(ends, default=math.inf) - time.monotonic()
        return min(max(left, 0.01), _POLL_SECONDS)

    def _hand_out(self, inputs: MutableMapping[int, In], todo: deque[int] | _Waiting[In]) -> None:
        """Give an input to every worker that has none; start workers that are missing."""
        while todo and len(self.workers) < self.size:
            self.workers.append(self._start())
        for worker in self.workers:
            if todo and worker.is_ready and worker.index is None:
                worker.index = todo.popleft()
                worker.began = time.monotonic()
                item = inputs[worker.index]
                worker.limit = self.limits.seconds_for(self.num_bytes(item))
                with contextlib.suppress(OSError):  # one that has died is found by `_outcome`
                    worker.tasks.send(item)

    def _start(self) -> _Worker:
        """Fork one worker; a server that was killed is started again."""
        key = (os.getpid(), self.modules)
        for last_try in (False, True):
            try:
                return self._fork(_server_of(*key))
            except OSError as error:
                _server_of.cache_clear()
                if last_try:
                    raise UserError(
                        f"no worker process can be started: {error.strerror or error}"
                    ) from error
        raise AssertionError("unreachable")

    def _fork(self, server: _Server) -> _Worker:
        ours, theirs = socket.socketpair()
        log = _new_log()
        request = {
            "path": sys.path,
            "folder": os.getcwd(),
            "memory_bytes": self.limits.memory_for(self.size),
        }
        with theirs:
            answer = server.ask(request, (theirs.fileno(), log))
        if "pid" not in answer:
            raise OSError(answer["error"])
        worker = _Worker(server, answer["pid"], Connection(ours.detach()), log)
        worker.tasks.send(self.function)
        return worker

    def _outcome(self, worker: _Worker) -> tuple[int, tuple[str, Any]] | None:
        """The answer of a worker, or how it died; None where it had no input.

        Raises:
            RuntimeError: the function cannot be loaded, or workers die without an input.
        """
        index = worker.index
        try:
            outcome = worker.tasks.recv()
        except (EOFError, OSError):
            line = worker.last_line()
            code = self._end(worker)
            outcome = ("crashed", (_crash_text(code), line))
            if index is None:
                self.num_lost += 1
                if self.num_lost >= _LOST_WORKERS:
                    text = f"worker processes die at once: {outcome[1][0]} {line}"
                    raise RuntimeError(text) from None
                return None
        else:
            self.num_lost = 0
            if outcome[0] == worker_process.BROKEN:
                raise RuntimeError(f"a worker process cannot load its work: {outcome[1]}")
            if outcome[0] == worker_process.NO_MEMORY:
                self._end(worker)  # what it has left may be in small pieces
        worker.is_ready, worker.index = True, None
        return None if index is None else (index, outcome)

    def _is_over(self, worker: _Worker) -> bool:
        """Whether a worker has used what one input may use."""
        if worker.index is None:
            return False
        is_late = time.monotonic() - worker.began > worker.limit
        return is_late or worker.printed() > _LOG_BYTES

    def _stopped(self, worker: _Worker) -> tuple[int, tuple[str, Any]]:
        """Kill a worker whose input takes too long, or prints without end."""
        assert worker.index is not None
        outcome: tuple[str, Any] = (
            "timed_out",
            f"reading it took longer than {worker.limit:.0f} s (--timeout)",
        )
        if worker.printed() > _LOG_BYTES:
            text = f"its reader printed more than {_LOG_BYTES} bytes"
            outcome = ("crashed", (text, worker.last_line()))
        self._end(worker)
        return worker.index, outcome

    def _end(self, worker: _Worker) -> int | None:
        self.workers.remove(worker)
        return worker.end()


def _new_log() -> int:
    """A file in memory that takes what a worker prints."""
    try:
        return os.memfd_create("tapct worker", os.MFD_CLOEXEC)
    except (AttributeError, OSError):
        return os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)


def _crash_text(code: int | None) -> str:
    """Why a process ended, as one line."""
    how = "it ended unexpectedly" if code is None else f"exit code {code}"
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            how = signal.Signals(-code).name
    return f"reading it ended the process ({how})"
