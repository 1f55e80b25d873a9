"""The program of the processes that `process_pool` starts: a server, and the workers it forks.

The server imports the libraries once and forks a worker in milliseconds, so that a worker that was
killed is replaced cheaply. It is a process of its own, because a fork of a process with threads
copies the locks that these threads hold. It does not import the main module of the program that
uses it, so a script needs no `if __name__ == "__main__"`.

No process outlives the one that started it, however that one ends. The kernel kills a worker when
the server ends. The server ends when its parent does: its socket is closed, or it has another
parent (looked at twice a second), or the kernel kills it.

Standard output and error of a worker are a file in memory: what a library prints there never
reaches the terminal, and its last line explains a crash.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import resource
import select
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from tapct.base.exits import single_line

# kinds of a worker's answer: first READY or BROKEN, then one of the others for each input
READY, BROKEN = "ready", "broken"
DONE, RAISED, NO_MEMORY = "done", "raised", "out_of_memory"

_LOOK_SECONDS = 0.5  # between two looks at the parent
_PR_SET_PDEATHSIG = 1
_REQUEST_BYTES = 1 << 17


def outcome_of(function: Callable[[Any], Any], item: Any) -> tuple[str, Any]:
    """Call a function; the kind of its outcome, and its result or one line with its error."""
    try:
        return DONE, function(item)
    except MemoryError as error:
        return NO_MEMORY, single_line(error)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too: no input may end the process
        return RAISED, single_line(f"{type(error).__name__}: {error}")


def serve(control_fd: int, parent: int, modules: Sequence[str], parent_is_main: bool) -> NoReturn:
    """The server: fork a worker for each request, and report how a worker ended.

    Args:
        control_fd: socket to the parent; each request gets one answer.
        parent: process id of the parent.
        modules: names of modules to import before the first fork.
        parent_is_main: whether the main thread of the parent started this process. The kernel's
            signal comes when the *thread* ends that started a process.
    """
    if parent_is_main:
        _end_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    control = socket.socket(fileno=control_fd)
    for name in modules:
        with contextlib.suppress(Exception):  # a worker that needs it reports the error
            importlib.import_module(name)
    while True:
        ready, _, _ = select.select([control], [], [], _LOOK_SECONDS)
        if os.getppid() != parent:
            os._exit(0)
        if ready:
            message, fds, _, _ = socket.recv_fds(control, _REQUEST_BYTES, 2)
            if not message:
                os._exit(0)
            control.send(json.dumps(_answer(control, json.loads(message), fds)).encode())


def _answer(control: socket.socket, request: dict[str, Any], fds: list[int]) -> dict[str, Any]:
    """Do what one request asks for."""
    if "reap" in request:
        pid, status = os.waitpid(request["reap"], os.WNOHANG)
        return {"exit_code": os.waitstatus_to_exitcode(status) if pid else None}
    server = os.getpid()
    try:
        pid = os.fork()
    except OSError as error:
        return {"error": error.strerror}
    finally:
        if os.getpid() == server:
            for fd in fds:
                os.close(fd)
    if pid == 0:
        try:
            control.close()
            tasks_fd, log_fd = fds
            _work(server, tasks_fd, log_fd, **request)
        finally:
            os._exit(1)
    return {"pid": pid}


def _work(
    server: int, tasks_fd: int, log_fd: int, path: list[str], folder: str, memory_bytes: int
) -> NoReturn:
    """One worker: receive a function, then inputs, and send back outcomes.

    Args:
        server: process id of the server.
        tasks_fd: socket to the parent.
        log_fd: file that takes standard output and error.
        path: `sys.path` of the parent.
        folder: working directory of the parent.
        memory_bytes: memory that the worker may use beyond what it has now.
    """
    _end_with_parent(server)
    os.dup2(log_fd, 1)
    os.dup2(log_fd, 2)
    sys.path[:] = path
    with contextlib.suppress(OSError):
        os.chdir(folder)
    _limit_memory(memory_bytes)
    tasks = Connection(tasks_fd)
    try:
        kind, function = outcome_of(lambda _: tasks.recv(), None)
        tasks.send((READY, None) if kind == DONE else (BROKEN, function))
        while True:
            item = tasks.recv()
            with contextlib.suppress(OSError):  # it is /dev/null where memory has no files
                os.ftruncate(log_fd, 0)
                os.lseek(log_fd, 0, os.SEEK_SET)
            tasks.send(outcome_of(function, item))
    except (EOFError, OSError):  # the parent has closed the pool, or ended
        os._exit(0)


def _end_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when its parent ends (Linux)."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the kernel was asked
        os._exit(0)


def _limit_memory(memory_bytes: int) -> None:
    """Limit this process, and make it the first that a machine without memory ends."""
    with contextlib.suppress(OSError):
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    with contextlib.suppress(OSError, ValueError):
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = used + memory_bytes
        if hard != resource.RLIM_INFINITY:
            limit = min(limit, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
