"""A Python in which torch and tapct are loaded, and which forks the processes that tests start.

A Python of its own needs 4 seconds of processor time before `tapct train` begins and to end; a
forked one needs less than one. `forked.py` starts this program and connects to it: one connection
to its socket is one process. It gets the arguments of Python, the environment and the folder as a
line of JSON, with standard output and standard error, and answers with the process ID and, at the
end, with the exit code. A connection that is closed before ends the process.

A program of its own, since it forks: nothing but imports has happened in it. Threads that libraries
start when they are loaded (of jemalloc, in pyarrow) are lost in a forked process, and not missed.
All of these processes hash strings alike, which Pythons of their own would not.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import random
import runpy
import selectors
import signal
import socket
import sys
import threading
import types
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

# some of these are imported late, and then by every process for itself
import fsspec  # noqa: F401
import numpy as np
import numpy.ctypeslib
import pyarrow.dataset  # noqa: F401
import pydantic.types  # noqa: F401
import torch
import torch._dynamo
import torch.distributed.checkpoint._fsspec_filesystem
import torch.distributed.fsdp
import torch.distributed.run
import torch.distributed.tensor
from pydantic import TypeAdapter  # noqa: F401

import tapct
from tapct import cli  # noqa: F401
from tapct.config import load_config
from tapct.run import pretrain  # noqa: F401
from tapct.run.config import RunConfig

HOME = Path(tapct.__file__).resolve().parent.parent
OWN_PATHS = {str(Path(__file__).parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)}
LIBRARIES = [path for path in sys.path if path not in OWN_PATHS]


@dataclass
class Request:
    """What a test wants to run.

    Args:
        arguments: what would follow `python` on a command line.
        environment: all variables.
        folder: working directory.
        outputs: open files for standard output and standard error.
    """

    arguments: list[str]
    environment: dict[str, str]
    folder: str
    outputs: list[int]


def is_closed(connection: socket.socket) -> bool:
    """Whether the other end of a connection that can be read was closed, or its process killed."""
    try:
        return not connection.recv(1)
    except ConnectionResetError:  # it was killed before it had read all
        return True


@dataclass
class Nest:
    """The socket, and the processes that are running.

    Args:
        listener: socket that tests connect to.
        running: connection of each process ID.
    """

    listener: socket.socket
    running: dict[int, socket.socket] = field(default_factory=dict)

    def serve(self) -> Request | None:
        """Fork what is asked for; returns the request in a forked process, and None at the end."""
        woken, wake = socket.socketpair()
        for end in (woken, wake):
            end.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake.fileno())
        watched = selectors.DefaultSelector()
        for file in (sys.stdin, self.listener, woken):
            watched.register(file, selectors.EVENT_READ)
        while True:
            for key, _ in watched.select():
                if key.fileobj is sys.stdin:  # whoever started this program has ended
                    for process in list(self.running):
                        end_process(process)
                    return None
                if key.fileobj is woken:
                    with suppress(BlockingIOError):
                        woken.recv(4096)
                    self.collect(watched)
                elif key.fileobj is self.listener:
                    connection = self.listener.accept()[0]
                    request = receive(connection)
                    process = os.fork()
                    if not process:
                        signal.set_wakeup_fd(-1)
                        watched.close()
                        for one in (woken, wake, connection, *self.running.values()):
                            one.close()
                        self.listener.close()
                        return request
                    for output in request.outputs:
                        os.close(output)
                    self.running[process] = connection
                    with suppress(ConnectionError):  # it was killed meanwhile, as seen below
                        connection.sendall(f"{process}\n".encode())
                    watched.register(connection, selectors.EVENT_READ, process)
                elif is_closed(key.fileobj):  # type: ignore[arg-type]
                    watched.unregister(key.fileobj)
                    end_process(key.data)

    def collect(self, watched: selectors.BaseSelector) -> None:
        """Send the exit codes of all processes that have ended."""
        while True:
            try:
                process, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not process:
                return
            connection = self.running.pop(process)
            with suppress(KeyError, ValueError):  # it was closed before
                watched.unregister(connection)
            with suppress(OSError):
                connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
            connection.close()


def receive(connection: socket.socket) -> Request:
    """The request that comes over a new connection."""
    data, outputs, _, _ = socket.recv_fds(connection, 1 << 16, 2)
    while not data.endswith(b"\n"):
        data += connection.recv(1 << 16)
    return Request(**json.loads(data), outputs=outputs)


def end_process(process: int) -> None:
    """Kill a process and its group."""
    with suppress(ProcessLookupError):  # it has no group of its own yet
        os.killpg(process, signal.SIGKILL)
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def become(request: Request) -> None:
    """Do what makes a forked process as a new Python begins."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.setsid()
    for number, file in enumerate([os.open(os.devnull, os.O_RDONLY), *request.outputs]):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(request.environment)
    os.chdir(request.folder)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    # who draws without a key gets something else in every process
    random.seed()
    np.random.seed()


def run(arguments: list[str]) -> None:
    """Run what a Python would run with these arguments: -c CODE, -m MODULE or a file."""
    if arguments[0] == "-u":
        arguments = arguments[1:]
        sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
    kind, what = (arguments[0], arguments[1]) if arguments[0] in ("-c", "-m") else ("", "")
    first = {"-c": "", "-m": os.getcwd()}.get(kind) or str(Path(arguments[0]).resolve().parent)
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = ["" if kind == "-c" else first, *paths, *LIBRARIES]
    forget_another_tapct()
    sys.argv = arguments[1:] if kind == "-m" else [kind, *arguments[2:]] if kind else arguments
    if kind == "-c":
        module = types.ModuleType("__main__")
        sys.modules["__main__"] = module
        exec(compile(what, "<string>", "exec"), vars(module))
    elif kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(arguments[0], run_name="__main__")


def forget_another_tapct() -> None:
    """Unload tapct if the process would import another copy of it, e.g. the snapshot of a job."""
    for path in sys.path:
        if (Path(path) / "tapct" / "__init__.py").is_file():
            if Path(path).resolve() != HOME:
                for name in [name for name in sys.modules if name.split(".")[0] == "tapct"]:
                    del sys.modules[name]
            return


def run_and_leave(request: Request) -> NoReturn:
    """Run what was asked for and leave at once: Python would take torch apart, which takes long."""
    code: Any = 0
    try:
        run(request.arguments)
    except SystemExit as leave:
        code = leave.code
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        code = 1
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as Python does
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit((code or 0) & 0xFF)


def main() -> None:
    """Serve at the socket that the command line names, until standard input is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started this has it too
    load_config(RunConfig, None, [])  # plug-ins are loaded when a config names them
    # what is loaded is never collected: forked processes neither search it nor copy its memory
    gc.collect()
    gc.freeze()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(sys.argv[1])
    listener.listen(64)
    Path(sys.argv[1]).with_name("ready").touch()
    request = Nest(listener).serve()
    if request is not None:
        become(request)
        run_and_leave(request)


if __name__ == "__main__":
    main()
