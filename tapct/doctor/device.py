"""Probe of torch, GPUs, attention and collectives.

`python -m tapct.doctor.device torch {}`, or `... all_reduce ARGUMENTS`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from importlib import metadata, util
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tapct.doctor.facts import AllReduce, AttentionKernels, Copy, Gpu, Gpus, Torch
from tapct.doctor.probes import report
from tapct.nn import backends

MEET_SECONDS = 20
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def torch_build() -> Torch:
    """Versions of torch, of its CUDA, and of the CUDA that the driver supports."""
    # CPU builds lack this function. 13000 means CUDA 13.0, and 0 means that there is no driver.
    driver_version = getattr(torch._C, "_cuda_getDriverVersion", int)()
    driver = ""
    if driver_version:
        driver = f"{driver_version // 1000}.{driver_version % 1000 // 10}"
    return Torch(torch.__version__, torch.version.cuda or "", driver)


def gpus() -> Gpus:
    """The GPUs that torch sees.

    Raises:
        RuntimeError: CUDA does not start.
    """
    cards = []
    for i in range(torch.cuda.device_count()):
        free, memory = torch.cuda.mem_get_info(i)
        about = torch.cuda.get_device_properties(i)
        cards.append(Gpu(about.name, memory, free, (about.major, about.minor)))
    has_nccl = dist.is_available() and dist.is_nccl_available()
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if has_nccl else ""
    return Gpus(tuple(cards), nccl)


def gpu_seconds(work: Callable[[], object], repeats: int = 10) -> float:
    """Shortest time in seconds of a function on the GPU, after two calls of warm-up."""
    times = []
    for _ in range(repeats + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    return min(times[2:])


def copies() -> Copy:
    """Copy 256 MiB within the memory of the first GPU, and from the host to it."""
    size = 1 << 28
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    one, other = (torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    inside = gpu_seconds(lambda: other.copy_(one))
    return Copy(2 * size / inside, size / gpu_seconds(lambda: other.copy_(host, non_blocking=True)))


def attention(device: str) -> AttentionKernels:
    """Run each SDPA kernel forward and backward on small bf16 tensors, and look for other
    back-ends.

    Args:
        device: cpu or cuda.
    """
    usable = []
    for name, kernel in KERNELS.items():
        try:
            qkv = torch.randn(
                3, 2, 4, 128, 64, device=device, dtype=torch.bfloat16, requires_grad=True
            )
            q, k, v = qkv.unbind(0)
            with sdpa_kernel([kernel]):
                F.scaled_dot_product_attention(q, k, v).float().square().mean().backward()
            if qkv.grad is not None and bool(qkv.grad.isfinite().all()):
                usable.append(name)
        except RuntimeError:  # torch has no such kernel for this device
            continue
    version, failure = _xformers(device)
    has_varlen = util.find_spec("torch.nn.attention.varlen") is not None
    return AttentionKernels(device, tuple(usable), version, has_varlen, failure)


def _xformers(device: str) -> tuple[str, str]:
    """Installed version of xformers ("": none), and why its kernels cannot be used ("": they can).

    On a GPU they are run once; on a CPU only whether they load is known.
    """
    try:
        version = metadata.version("xformers")
    except metadata.PackageNotFoundError:
        return "", "not installed"
    if backends.xformers_ops() is None:
        return version, backends.xformers_failure()
    if device != "cuda":
        return version, "" if device == "cpu" else f"no kernels for {device}"
    try:
        qkv = torch.randn(3, 64, 2, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
        spans = (backends.Span(1, 40), backends.Span(2, 12))
        q, k, v = qkv.unbind(0)
        backends.attend_xformers(q, k, v, spans).float().square().mean().backward()
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return version, str(error).splitlines()[0]
    return version, ""


def all_reduce(backend: str, rank: int, world: int, meeting: str) -> AllReduce:
    """Sum a tensor over processes, several times.

    The bandwidth is counted as nccl-tests does: 2 (n - 1) / n bytes pass the bus for each byte of
    the tensor.

    Args:
        backend: gloo or nccl.
        rank: number of this process.
        world: number of processes.
        meeting: file at which the processes meet, or tcp://HOST:PORT.
    """
    is_on_one_node = not meeting.startswith("tcp://")
    card = rank if is_on_one_node else 0
    device = torch.device("cuda", card) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    wait = timedelta(seconds=MEET_SECONDS)
    url = meeting if meeting.startswith("tcp://") else f"file://{meeting}"
    dist.init_process_group(backend, init_method=url, rank=rank, world_size=world, timeout=wait)
    values = torch.full((1 << (26 if backend == "nccl" else 22),), float(rank + 1), device=device)
    dist.all_reduce(values)
    right = bool((values == world * (world + 1) / 2).all())
    fastest = min(_reduce_seconds(values) for _ in range(5))
    dist.destroy_process_group()
    return AllReduce(world, right, 2 * (world - 1) / world * values.nbytes / fastest)


def _reduce_seconds(values: Tensor) -> float:
    dist.barrier()
    begin = time.perf_counter()
    dist.all_reduce(values)
    if values.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def main(kind: str, arguments: dict[str, Any]) -> None:
    """Report on torch and the devices, or on a sum over processes."""
    if kind == "torch":
        report("torch", torch_build)
        seen = report("gpus", gpus)
        has_gpu = seen is not None and bool(seen.gpus)
        if has_gpu:
            report("copy", copies)
        report("attention", lambda: attention("cuda" if has_gpu else "cpu"))
    else:
        report("all_reduce", lambda: all_reduce(**arguments))
    os._exit(0)  # all is reported; threads of gloo sometimes abort an orderly exit


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
