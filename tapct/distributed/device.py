"""Choose the device of this process, and set up its CPU."""

from __future__ import annotations

import os

import torch

from tapct.base.exits import UserError


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """Pick the device of this process.

    Args:
        name: auto, cpu or cuda; auto picks a GPU where torch sees one.
        local_rank: number of this process on its node; picks its GPU if more than one is visible.
    Raises:
        UserError: the name is cuda and there is no GPU for this process.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            "device=cuda, but torch sees no GPU here; set device=cpu, or run where `nvidia-smi` "
            "lists one"
        )
    visible = torch.cuda.device_count()
    if visible == 1:  # SLURM may show each process only its own GPU
        return torch.device("cuda", 0)
    if local_rank >= visible:
        raise UserError(
            f"local rank {local_rank} has no GPU of its own: {visible} are visible; start at most "
            f"{visible} processes per node"
        )
    return torch.device("cuda", local_rank)


def prepare_cpu() -> None:
    """Set up the CPU for training or evaluation; call it before the first tensor."""
    flush_denormals()
    use_large_pages()


def use_large_pages() -> None:
    """Let torch ask Linux for pages of 2 MB instead of 4 kB for the memory of large tensors.

    The C library returns the memory of a tensor above 32 MB to the system when it is freed, and the
    next tensor gets new pages. On a virtual machine, the pages of such a tensor take longer than
    one pass over it (docs/benchmarks.md). torch reads the variable when it allocates its first
    tensor. A value that the user has set is kept. Where Linux does not offer large pages, nothing
    changes; GPU memory is not affected.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def flush_denormals() -> None:
    """Make the CPU replace denormal floats (below 1.2e-38) by 0: it computes with them very slowly.

    Call it before the first computation. The setting belongs to a thread; a new thread or a forked
    process inherits it from the thread that starts it. Measured on Linux, x86-64, torch 2.13:

    - Autograd on a CPU computes gradients on the thread that calls `backward`, so they are flushed.
    - Threads that start afterwards flush: the loader's, the checkpoint's, and OpenMP's workers.
    - OpenMP's workers start with the first operation that is large enough to be split, and never
      change. When the call came after such an operation, only the calling thread flushed: on two
      threads, half of a product stayed denormal.
    - Spawned processes, such as the loader's, do not inherit it. They only copy int16 voxels.

    A CPU that cannot flush is left as it is. GPUs are not affected.
    """
    torch.set_flush_denormal(True)
