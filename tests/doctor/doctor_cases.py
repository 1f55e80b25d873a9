"""Facts of many machines, and the finding of `tapct doctor` for each."""

from __future__ import annotations

import math
from dataclasses import replace

from tapct.doctor import verdicts
from tapct.doctor.facts import (
    AllReduce,
    AttentionKernels,
    Broken,
    Copy,
    Cpu,
    Finding,
    Gpu,
    Gpus,
    Limits,
    Package,
    Reads,
    Settings,
    Slurm,
    Space,
    Torch,
)

HUNG = Broken("no response within 45 s; it was ended")
H100 = Gpu("NVIDIA H100", 80 * 10**9, 79 * 10**9, (9, 0))
V100 = Gpu("Tesla V100", 32 * 10**9, 32 * 10**9, (7, 0))
ROOMY = Limits(65536, math.inf, math.inf, True)
PACKAGE = Package("numpy", ">=1.26", "2.0", True)
SLABS = Reads(10, 50.0, 5e8, 2, 24)


def room(found: Space | Broken) -> Finding:
    return verdicts.room("disk", found, 2e9, 20e9, "free some")


CASES: list[tuple[str, Finding, str, str]] = [
    # state, finding, part of its text, part of its remedy
    ("ok", verdicts.packages((PACKAGE,)), "all 1 requirements", ""),
    ("warn", verdicts.packages(Broken("tapct is not installed")), "not installed", "pip install"),
    (
        "fail",
        verdicts.packages((PACKAGE, Package("blosc2", ">=3", "", False))),
        "blosc2 is missing, required >=3",
        "pip",
    ),
    (
        "fail",
        verdicts.packages((Package("numpy", ">=1.26", "1.0", False),)),
        "numpy 1.0, required >=1.26",
        "pip",
    ),
    ("ok", verdicts.torch(Torch("2.13.0+cpu", "", ""), False), "built for CPUs", ""),
    (
        "fail",
        verdicts.torch(Torch("2.13.0+cpu", "", ""), True),
        "this machine has an NVIDIA GPU",
        "with CUDA",
    ),
    ("ok", verdicts.torch(Torch("2.13.0", "13.0", "13.0"), True), "driver supports 13.0", ""),
    ("ok", verdicts.torch(Torch("2.13.0", "12.8", "13.1"), True), "driver supports 13.1", ""),
    ("ok", verdicts.torch(Torch("2.13.0", "13.0", ""), False), "no NVIDIA driver", ""),
    (
        "warn",
        verdicts.torch(Torch("2.13.0", "12.8", "12.4"), True),
        "within one major",
        "newer driver",
    ),
    ("fail", verdicts.torch(Torch("2.13.0", "13.0", "12.8"), True), "too old", "built for CUDA 12"),
    ("fail", verdicts.torch(Torch("2.13.0", "13.0", ""), True), "does not respond", "nvidia-smi"),
    ("fail", verdicts.torch(Broken("ImportError: libcudart"), False), "libcudart", "pip install"),
    (
        "ok",
        verdicts.gpus(Gpus((H100, H100), "2.27"), Settings(precision="bf16"), True),
        "2 x NVIDIA H100, 80 GB each",
        "",
    ),
    ("ok", verdicts.gpus(Gpus(), Settings(device="cpu"), False), "sets device=cpu", ""),
    ("warn", verdicts.gpus(Gpus(), Settings(), False), "on the CPU", "srun"),
    (
        "warn",
        verdicts.gpus(Gpus((V100,)), Settings(precision="bf16"), True),
        "bf16 no",
        "train.precision=fp32",
    ),
    (
        "ok",
        verdicts.gpus(Gpus((V100,)), Settings(precision="fp32"), True),
        "capability 7.0, bf16 no",
        "",
    ),
    (
        "warn",
        verdicts.gpus(Gpus((H100, V100)), Settings(), True),
        "H100 / Tesla",
        "CUDA_VISIBLE_DEVICES",
    ),
    (
        "warn",
        verdicts.gpus(Gpus((H100, replace(H100, free=10**9))), Settings(), True),
        "GPU 1 is in use: 1 GB",
        "nvidia-smi",
    ),
    ("fail", verdicts.gpus(Gpus(), Settings(device="cuda"), False), "device=cuda", "device=cpu"),
    ("fail", verdicts.gpus(Gpus(), Settings(), True), "torch sees none", "CUDA_VISIBLE_DEVICES"),
    ("fail", verdicts.gpus(HUNG, Settings(), True), "no response", "administrator"),
    ("ok", verdicts.nccl(Gpus()), "not needed", ""),
    ("ok", verdicts.nccl(Gpus((H100,), "2.27.7")), "2.27.7", ""),
    ("warn", verdicts.nccl(Gpus((H100,))), "no NCCL", "pytorch.org"),
    ("fail", verdicts.nccl(Gpus((H100, H100))), "no NCCL", "pytorch.org"),
    ("ok", verdicts.copy(Copy(2.5e12, 5e10)), "2500 GB/s within the GPU, 50.0 GB/s", ""),
    ("warn", verdicts.copy(Copy(2.5e12, 1e9)), "1.0 GB/s from pinned", "PCIE"),
    ("warn", verdicts.copy(Copy(5e10, 5e10)), "50 GB/s within", "shared"),
    ("fail", verdicts.copy(Broken("OutOfMemoryError: CUDA")), "OutOfMemory", "nvidia-smi"),
    (
        "ok",
        verdicts.attention(AttentionKernels("cuda", ("flash", "math"), "0.0.33", True)),
        "flash, math; xformers 0.0.33",
        "",
    ),
    (
        "ok",
        verdicts.attention(
            AttentionKernels("cuda", ("flash",), "0.0.35", True, "its kernels do not load")
        ),
        "xformers 0.0.35 cannot be used (its kernels do not load), varlen yes",
        "",
    ),
    (
        "warn",
        verdicts.attention(AttentionKernels("cuda", ("math",), "", False)),
        "not installed (optional)",
        "smaller windows",
    ),
    (
        "fail",
        verdicts.attention(AttentionKernels("cuda", (), "", True)),
        "no kernel runs",
        "install a torch",
    ),
    ("fail", verdicts.attention(HUNG), "no response", "pip"),
    ("ok", verdicts.all_reduce(AllReduce(2, True, 2e9), "gloo"), "over 2 processes, 2 GB/s", ""),
    (
        "warn",
        verdicts.all_reduce(AllReduce(2, True, 1e7), "gloo"),
        "0.01 GB/s: slow",
        "GLOO_SOCKET_IFNAME",
    ),
    (
        "fail",
        verdicts.all_reduce(AllReduce(2, False, 2e9), "gloo"),
        "the sum is wrong",
        "GLOO_SOCKET_IFNAME",
    ),
    ("fail", verdicts.all_reduce(HUNG, "gloo"), "no response", "/etc/hosts"),
    ("ok", verdicts.all_reduce(AllReduce(8, True, 3e11), "nccl"), "over 8 processes, 300 GB/s", ""),
    ("warn", verdicts.all_reduce(AllReduce(8, True, 1e9), "nccl"), "slow", "NCCL_DEBUG=INFO"),
    ("fail", verdicts.all_reduce(HUNG, "nccl"), "no response", "NCCL_P2P_DISABLE"),
    ("ok", verdicts.config(Settings(), "a.yaml"), "a.yaml is valid", ""),
    ("fail", verdicts.config(Broken("a.yaml:3: no key x"), "a.yaml"), "no key x", "correct a.yaml"),
    (
        "fail",
        verdicts.config(
            Broken("override: optim.lrr = 1: unknown key; did you mean optim.lr?"), "a"
        ),
        "optim.lrr = 1: unknown key; did you mean optim.lr?",
        "correct this key=value on the command line",
    ),
    ("ok", verdicts.reads(None), "not measured", ""),
    (
        "ok",
        verdicts.reads(SLABS),
        "50 slabs of 24 slices per second with 2 threads, 500 MB/s: enough for 50 samples/s",
        "",
    ),
    ("warn", verdicts.reads(replace(SLABS, slabs=3.0)), "enough for 3 samples/s", "local disk"),
    ("fail", verdicts.reads(Broken("holds no store.parquet")), "store.parquet", "tapct pack"),
    ("fail", verdicts.reads(HUNG), "no response", "mount its disk"),
    ("ok", verdicts.cpu(Cpu(64, 16, None, None)), "64 CPUs, 16 allowed for this process", ""),
    ("ok", verdicts.cpu(Cpu(64, 64, 4.0, 4)), "4 allowed by its cgroup, OMP_NUM_THREADS=4", ""),
    ("warn", verdicts.cpu(Cpu(64, 64, 4.0, None)), "4 allowed by its cgroup", "OMP_NUM_THREADS=4"),
    ("warn", verdicts.cpu(Cpu(64, 4, None, 32)), "OMP_NUM_THREADS=32", "OMP_NUM_THREADS=4"),
    ("fail", verdicts.cpu(Cpu(64, 64, 0.5, None)), "0.5 allowed by its cgroup", "--cpus-per-task"),
    ("ok", verdicts.limits(ROOMY), "65536 open files, unlimited processes, unlimited locked", ""),
    ("ok", verdicts.limits(replace(ROOMY, infiniband=False, locked_bytes=8e6)), "8 MB locked", ""),
    (
        "warn",
        verdicts.limits(replace(ROOMY, locked_bytes=8e6)),
        "8 MB locked",
        "ulimit -l unlimited",
    ),
    ("warn", verdicts.limits(replace(ROOMY, open_files=512)), "512 open", "ulimit -n 65536"),
    ("fail", verdicts.limits(replace(ROOMY, processes=10)), "10 processes", "ulimit -u"),
    ("ok", room(Space("/r", 10**12, 10**11)), "/r: 100 GB free of 1 TB", ""),
    ("warn", room(Space("/r", 10**12, 10**10)), "10 GB free", "free some"),
    ("fail", room(Space("/r", 10**12, 10**9)), "1 GB free", "free some"),
    (
        "fail",
        room(Space("/r", 10**12, 10**12, "Read-only file system")),
        "Read-only",
        "no permission",
    ),
    ("fail", room(HUNG), "no response", "is its disk mounted?"),
    ("ok", verdicts.slurm(None), "not needed", ""),
    ("ok", verdicts.slurm(Slurm(("gpu", "cpu"), (), 3)), "gpu, cpu; your jobs: 3", ""),
    ("warn", verdicts.slurm(Slurm((), ("gpu",), 0)), "none of 1 partitions is up", "sinfo"),
    (
        "warn",
        verdicts.slurm(Broken("sinfo: fatal: no configuration source")),
        "fatal",
        "not needed",
    ),
    (
        "fail",
        verdicts.slurm(Broken("sinfo did not respond within 8 s")),
        "did not respond",
        "scontrol ping",
    ),
    ("ok", verdicts.wandb("disabled", False), "disabled; no internet needed", ""),
    ("ok", verdicts.wandb("offline", False), "RUN/wandb", ""),
    ("ok", verdicts.wandb("online", True), "has no internet", ""),
    ("fail", verdicts.wandb("online", False), "no key", "log.wandb.mode=offline"),
    ("ok", verdicts.umask(0o022), "0022: everybody can read", ""),
    ("ok", verdicts.umask(0o027), "0027: your group can read", ""),
    ("ok", verdicts.umask(0o077), "0077: only you can read", ""),
    ("warn", verdicts.umask(0o000), "loading a checkpoint trusts it", "umask 022"),
]
