"""Why a process of a job ends, left in a file for the batch script, which may start the job again.

The file has one line with the kind of the end, one with the nodes that are at fault, and one with
the reason. The first process that leaves it decides: when a rank fails, srun ends the others with
SIGTERM, and they look as if they were preempted; when a signal ends one rank early, the others may
fail because it is missing.

    stopped   by a signal or the time limit, and saved
    failed    by an error that a new start would repeat
    lost      by a fault of a machine: another rank is gone or hangs, a GPU or a disk does not work
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
from collections.abc import Iterable, Mapping
from typing import Literal

from tapct.base.exits import LOST_RANK, single_line

MARK = "TAPCT_MARK"  # environment variable: path of the file
UNKNOWN = "-"  # in place of the nodes
MOST_CHARACTERS = 300  # of the reason

# Errors of CUDA and NCCL for which another node may be the remedy. Memory that does not suffice and
# an index outside of its bounds (a device-side assert) come again on every node.
FAULTY_GPU = re.compile(
    r"CUDA error: (uncorrectable|unspecified launch failure|an illegal memory access|unknown error"
    r"|the launch timed out|all CUDA-capable devices are busy|no CUDA-capable device"
    r"|initialization error|hardware stack error|system not yet initialized|driver shutting down"
    r"|.*\b(ECC|NVLink)\b)"
    r"|fallen off the bus|GPU is lost|nccl(SystemError|InternalError|UnhandledCudaError)",
    re.IGNORECASE,
)
# A disk or a network disk that answers with an error.
FAULTY_DISK = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ENODEV)


def node_name(environment: Mapping[str, str]) -> str:
    """Name of this node: SLURM's name for it, or else the host name.

    Args:
        environment: environment variables, `os.environ`.
    """
    return environment.get("SLURMD_NODENAME") or socket.gethostname()


def leave(
    end: Literal["stopped", "failed", "lost"], why: str = "", nodes: Iterable[str] = ()
) -> None:
    """Leave the end of this process for the batch script; nothing happens outside of a job that
    `tapct submit` has written, or where another process was first.

    Args:
        end: kind of the end.
        why: reason, as one line.
        nodes: names of the nodes that are at fault, as far as they are known.
    """
    path = os.environ.get(MARK)
    if not path:
        return
    text: str = end
    if why:
        text += f"\n{','.join(sorted(set(nodes))) or UNKNOWN}\n{single_line(why, MOST_CHARACTERS)}"
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        pass
    except OSError as error:
        # the process must still end; the batch script then decides by the exit code
        line = f"cannot write {path}: {error.strerror or error}\n".encode()
        with contextlib.suppress(OSError):
            os.write(2, line)  # no buffer: a signal handler calls this function as well


def leave_error(error: BaseException) -> Literal["failed", "lost"]:
    """Leave an error that ends this process as `lost` or `failed`; returns which of them it is.

    Args:
        error: exception that nothing has caught.
    """
    if getattr(error, "exit_code", 0) == LOST_RANK:
        leave("lost", str(error), getattr(error, "nodes", ()))
        return "lost"
    if is_fault_of_machine(error):
        why = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        leave("lost", why, [node_name(os.environ)])
        return "lost"
    leave("failed")
    return "failed"


def is_fault_of_machine(error: BaseException) -> bool:
    """Whether an error comes from this machine, so that a start on another one may succeed."""
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno in FAULTY_DISK
    is_out_of_memory = "out of memory" in str(error)  # of a GPU: it comes again
    return (
        isinstance(error, RuntimeError)
        and FAULTY_GPU.search(str(error)) is not None
        and not is_out_of_memory
    )
