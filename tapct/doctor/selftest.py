"""`tapct doctor CONFIG --selftest`: proves on this machine what the tests of tapct cannot try.

Every proof runs the real loop on synthetic scans and compares it with another way to compute the
same: another device, precision, compiler, attention kernel or number of ranks. A proof that this
machine cannot run is reported as not proven, with the reason; it never counts as passed.

Most proofs use the config with two blocks and a few samples, because what they compare does not
depend on the size. Memory and speed on a GPU are measured with all blocks.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

from tapct.base import console, metric_names
from tapct.base.exits import UserError
from tapct.base.files import check_new_file, write_atomically
from tapct.base.ranks import Ranks
from tapct.data.loading import loader
from tapct.data.packed.store import INDEX_NAME, Store
from tapct.distributed.device import pick_device, prepare_cpu
from tapct.distributed.world import World
from tapct.doctor import selftest_ranks, short_run
from tapct.doctor.host_waits import host_waits
from tapct.doctor.selftest_ranks import BLOCKS, SAMPLES
from tapct.engine import checkpoint, compiled
from tapct.engine.checkpoint import Checkpoints, Meta
from tapct.nn.backends import BACKENDS, GPU_ONLY, Span
from tapct.plan import command, measure, scale
from tapct.run.config import RunConfig
from tapct.run.rules import load_run_config

State = Literal["ok", "fail", "not proven"]
STEPS = 20
EQUAL = 1e-3  # relative difference of losses that are computed in two ways
BF16 = 5e-2  # the same between bf16, which has 8 bits, and float32
SPANS = (Span(3, 70), Span(5, 33), Span(1, 1))
NO_GPU = "there is no GPU here"


@dataclass(frozen=True)
class Proof:
    """The result of one proof.

    Args:
        name: what is proven.
        state: ok, fail, or not proven.
        text: what was measured, or why nothing was.
        values: the numbers behind it.
        seconds: duration.
    """

    name: str
    state: State
    text: str
    values: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Subject:
    """What is tested.

    Args:
        path, overrides: config and settings, for processes of their own.
        config: the config as it is.
        device: device of the runs.
    """

    path: Path
    overrides: tuple[str, ...]
    config: RunConfig
    device: torch.device

    @property
    def small(self) -> RunConfig:
        """The config with few blocks and samples, in float32."""
        fewer = short_run.shrunk(self.config, SAMPLES, BLOCKS)
        return short_run.with_precision(fewer, "fp32")

    @property
    def has_gpu(self) -> bool:
        """Whether the runs are on a GPU."""
        return self.device.type == "cuda"

    def losses(
        self,
        config: RunConfig,
        steps: int = STEPS,
        device: torch.device | None = None,
        backend: str = "",
    ) -> list[dict[str, float]]:
        """Losses of the first steps of a run."""
        world = World(Ranks(), device or self.device)
        return short_run.start(config, world, backend).losses(steps)


def within(name: str, difference: float, limit: float, what: str) -> Proof:
    """A proof that a difference stays below a limit."""
    state: State = "ok" if difference <= limit else "fail"
    text = f"{what}: largest relative difference {difference:.1e}, allowed {limit:.0e}"
    return Proof(name, state, text, {"difference": difference, "limit": limit})


def devices_agree(subject: Subject) -> Iterator[Proof]:
    """float32 losses on CPU and GPU are equal; on a CPU, those in float32 and float64 are."""
    steps = f"losses of {STEPS} steps"
    on_cpu = subject.losses(subject.small, device=torch.device("cpu"))
    if subject.has_gpu:
        found = short_run.largest_difference(subject.losses(subject.small), on_cpu)
        yield within("fp32 on CPU and GPU", found, EQUAL, steps)
        return
    exact = subject.losses(short_run.with_precision(subject.small, "fp64"))
    found = short_run.largest_difference(on_cpu, exact)
    yield within("fp32 and fp64", found, EQUAL, f"{steps} on the CPU")
    yield Proof("fp32 on CPU and GPU", "not proven", NO_GPU)


def bf16_agrees(subject: Subject) -> Iterator[Proof]:
    """Losses in bf16 are those in float32 up to its rounding."""
    narrow = subject.losses(short_run.with_precision(subject.small, "bf16"))
    found = short_run.largest_difference(narrow, subject.losses(subject.small))
    yield within("bf16 and fp32", found, BF16, f"losses of {STEPS} steps")


def compiled_agrees(subject: Subject) -> Iterator[Proof]:
    """Compiled blocks give the same losses, in whole graphs."""
    plain = subject.losses(subject.small, 6)
    backend = "inductor"
    if not compiled.decide("auto", subject.device):
        backend = "eager"
        yield Proof("compiled kernels", "not proven", f"{NO_GPU}; graphs were executed uncompiled")
    torch._dynamo.reset()
    run = short_run.start(subject.small, World(Ranks(), subject.device), backend)
    run.steps(3)  # warm-up: graphs are made
    counters.clear()
    found = short_run.largest_difference(run.losses(3), plain)
    breaks = sum(counters["graph_break"].values())
    yield within("compiled blocks", found, EQUAL, f"losses of 6 steps, graphs by {backend}")
    text = f"{breaks} graph breaks in 3 steps after warm-up"
    yield Proof("whole graphs", "fail" if breaks else "ok", text, {"graph_breaks": breaks})


def attention_agrees(subject: Subject) -> Iterator[Proof]:
    """Every attention back-end gives the values and gradients of `sdpa`."""
    rows = sum(span.rows for span in SPANS)
    draw = torch.Generator().manual_seed(0)
    qkv = torch.randn(rows, 3, 4, 64, generator=draw).to(subject.device, torch.bfloat16)
    weight = torch.randn(rows, 4, 64, generator=draw).to(subject.device, torch.bfloat16)

    def results(name: str, dtype: torch.dtype) -> torch.Tensor:
        leaf = qkv.to(dtype).clone().requires_grad_()
        q, k, v = leaf.unbind(1)
        out = BACKENDS[name](q, k, v, SPANS)
        (gradient,) = torch.autograd.grad((out * weight.to(dtype)).sum(), leaf)
        return torch.cat([out.detach()[:, None], gradient], 1).double()

    exact = results("sdpa", torch.float64)
    for name in BACKENDS:
        title = f"attention {name}"
        if name in GPU_ONLY and not subject.has_gpu:
            yield Proof(title, "not proven", NO_GPU)
            continue
        try:
            error = (results(name, torch.bfloat16) - exact).abs().max()
        except UserError as missing:
            yield Proof(title, "not proven", str(missing))
            continue
        found = float(error / exact.abs().max())
        yield within(title, found, 2e-2, "values and gradients in bf16 against float64")


def ranks_agree(subject: Subject) -> Iterator[Proof]:
    """Two ranks that share a batch give the losses of one."""
    gpus = torch.cuda.device_count() if subject.has_gpu else 0
    if gpus == 1:
        yield Proof("2 ranks by NCCL", "not proven", "there is one GPU; two ranks need two")
    kind = "cuda" if gpus > 1 else "cpu"
    group = "NCCL" if gpus > 1 else "gloo"
    device = subject.device if gpus > 1 else torch.device("cpu")
    config = short_run.comparable_over_ranks(subject.small)
    lengths = {"fp32": STEPS, "bf16": 2}  # each bf16 step enlarges the rounding of the one before
    together = selftest_ranks.losses_of(subject.path, subject.overrides, lengths, kind, num_ranks=2)
    for precision, steps in lengths.items():
        title = f"2 ranks by {group}, {precision}"
        if isinstance(together, str):
            yield Proof(title, "fail", together)
            continue
        alone = subject.losses(short_run.with_precision(config, precision), steps, device)
        found = short_run.largest_difference(together[precision], alone)
        yield within(title, found, EQUAL, f"losses of {steps} steps")
    if not subject.has_gpu:
        yield Proof("2 ranks by NCCL", "not proven", NO_GPU)


def host_never_waits(subject: Subject) -> Iterator[Proof]:
    """No operation of a step makes the host wait for the GPU."""
    if not subject.has_gpu:
        waits = host_waits(short_run.with_precision(subject.small, subject.config.train.precision))
        found = "; ".join(waits.lines()) or f"none in {waits.operations} operations"
        state: State = "fail" if waits.waits else "ok"
        yield Proof("host waits, fake GPU", state, found, {"waits": len(waits.waits)})
        yield Proof("host waits, real GPU", "not proven", NO_GPU)
        return
    run = short_run.start(subject.small, World(Ranks(), subject.device))
    run.steps(2)
    torch.cuda.set_sync_debug_mode("error")  # a wait raises
    try:
        run.trainer.optimizer_step(2, run.feed)
        yield Proof("host waits, real GPU", "ok", "none in a step", {"waits": 0})
    except RuntimeError as error:
        yield Proof("host waits, real GPU", "fail", str(error).splitlines()[0], {"waits": 1})
    finally:
        torch.cuda.set_sync_debug_mode("default")


def memory_is_planned(subject: Subject) -> Iterator[Proof]:
    """The peak of memory is within a tenth of `tapct plan`."""
    config = measured_config(subject)
    samples = config.train.global_batch
    planned = planned_memory(config)
    run = short_run.start(config, World(Ranks(), subject.device))
    if subject.has_gpu:
        run.steps(2)
        torch.cuda.reset_peak_memory_stats()
        run.steps(2)
        peak, wanted = float(torch.cuda.max_memory_allocated()), planned.total
    else:
        # of the process, only what is allocated in the forward and backward pass is known
        (batch,) = next(run.feed)
        counts = run.trainer.stage.inputs.mask_counts(0, samples)
        views, masks = run.trainer.make_inputs(0, 0, batch, counts)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            run.trainer.forward_backward(0, 0, views, masks, 0.05)
        peak, wanted = float(peak_of(seen)), planned.activations + planned.work + planned.copies
    ratio = peak / wanted
    text = f"{peak / 1e6:.1f} MB measured, {wanted / 1e6:.1f} MB planned, {samples} samples"
    state: State = "ok" if 0.9 <= ratio <= 1.1 else "fail"
    yield Proof("peak memory", state, text, {"measured": peak, "planned": wanted, "ratio": ratio})


def measured_config(subject: Subject) -> RunConfig:
    """The config whose memory and speed are measured: on a GPU with all blocks."""
    config = subject.config
    samples = config.train.global_batch // config.train.accumulation
    if subject.has_gpu:
        return short_run.shrunk(config, min(samples, 16))
    return short_run.shrunk(config, min(samples, 8), BLOCKS)


def planned_memory(config: RunConfig) -> scale.Memory:
    """Memory of one rank with this config, as `tapct plan` counts it."""
    request = scale.Request(gpus=(1,))
    (planned,) = command.estimate_of(config, command.costs_of(config), request).as_set
    return planned


def peak_of(seen: profile) -> int:
    """Most bytes that were allocated and not yet freed, in a profile."""
    events: Any = seen.profiler.kineto_results.events()  # type: ignore[union-attr]
    moves = sorted((each.start_ns(), each.nbytes()) for each in events if each.name() == "[memory]")
    return max(accumulate(size for _, size in moves))


def speed(subject: Subject) -> Iterator[Proof]:
    """Seconds of a step, the share of the matrix-product rate, and the share of reading."""
    config = measured_config(subject)
    store = config.data.folders[0]
    backend = "inductor" if compiled.decide(config.train.compile, subject.device) else ""
    has_store = (store / INDEX_NAME).is_file()

    def timed(feed: Any) -> tuple[float, float]:
        run = short_run.start(config, World(Ranks(), subject.device), backend, feed)
        rows = run.steps(8)[3:]
        names = metric_names.seconds("step"), metric_names.seconds("data")
        step_s, data_s = (statistics.median(row[name] for row in rows) for name in names)
        return step_s, data_s

    step_s, _ = timed(None)
    dtype = torch.bfloat16 if config.train.precision == "bf16" else config.train.dtype
    rate = measure.gemm_rate(subject.device, dtype)
    share = command.costs_of(config).flops_per_step / step_s / rate
    text = (
        f"{step_s:.3f} s a step of {config.train.global_batch} samples, {share:.0%} of the "
        f"{rate / 1e12:.2f} TFLOP/s of {config.train.precision} matrix products"
    )
    yield Proof("step time", "ok", text, {"seconds": step_s, "mfu": share, "gemm": rate})
    if not has_store:
        yield Proof("share of reading", "not proven", f"the store {store} does not exist")
        return
    packed = Store(store)
    with loader.build(
        config.data.loader, packed, seed=config.seed, rank=0, world=1, accumulation=1,
        global_batch=config.train.global_batch, start_step=0, pin=subject.has_gpu,
        rows=list(range(len(packed))),
    ) as batches:  # fmt: skip
        step_s, data_s = timed(batches)
    share = data_s / step_s
    text = f"a step waits {share:.1%} of its time for scans"
    yield Proof("share of reading", "ok" if share < 0.1 else "fail", text, {"share": share})


def resume_is_equal(subject: Subject) -> Iterator[Proof]:
    """A run that is saved and resumed gives the losses of one that was not interrupted."""
    config, world = subject.small, World(Ranks(), subject.device)
    straight = short_run.start(config, world).losses(6)
    first = short_run.start(config, world)
    first.steps(3)
    with tempfile.TemporaryDirectory() as folder:
        saves = Checkpoints(Path(folder), keep=1, device=subject.device)
        saves.begin(Meta(3, 3 * SAMPLES), first.trainer.pair, first.trainer.updater.optimizer)
        saved = saves.finish()
        saves.close()
        assert saved is not None
        second = short_run.start(config, world)
        checkpoint.load(saved, second.trainer.pair, second.trainer.updater.optimizer)
    second.rows.extend(first.rows)
    second.feed = short_run.synthetic(config, Ranks(), subject.device, first_step=3)
    found = short_run.largest_difference(second.losses(3), straight)
    # kernels of a GPU may add up in another order at every call
    yield within("resume", found, 1e-6 if subject.has_gpu else 0.0, "losses of 6 steps")


PROOFS: tuple[Callable[[Subject], Iterator[Proof]], ...] = (
    devices_agree,
    bf16_agrees,
    compiled_agrees,
    attention_agrees,
    ranks_agree,
    host_never_waits,
    memory_is_planned,
    speed,
    resume_is_equal,
)


def proofs(subject: Subject) -> Iterator[Proof]:
    """Run all proofs; yields each result as soon as it is known.

    A proof that raises counts as failed, with the error as its text.
    """
    prepare_cpu()
    for prove in PROOFS:
        began = time.perf_counter()
        try:
            for found in prove(subject):
                yield replace(found, seconds=time.perf_counter() - began)
                began = time.perf_counter()
        except Exception as error:  # of any kind: a plug-in may raise what it likes
            title = prove.__name__.replace("_", " ")
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            yield Proof(title, "fail", reason, seconds=time.perf_counter() - began)


def verdict(found: list[Proof]) -> str:
    """The last line: what failed, and how much was not proven."""
    failed = [each.name for each in found if each.state == "fail"]
    unproven = [each.name for each in found if each.state == "not proven"]
    proven = len(found) - len(failed) - len(unproven)
    parts = [f"{proven} proven"]
    if failed:
        parts.append(f"{len(failed)} failed: {', '.join(failed)}")
    if unproven:
        parts.append(f"{len(unproven)} not proven: {', '.join(unproven)}")
    return "; ".join(parts)


def report(path: Path, overrides: list[str], json_path: Path) -> bool:
    """Run the self-test of a config, print a table and write a JSON file.

    Args:
        path: config.
        overrides: settings that replace those of the config.
        json_path: file that is written.
    Returns:
        Whether no proof failed.
    """
    check_new_file(json_path, "--json")
    config: RunConfig = load_run_config(path, overrides).value
    subject = Subject(path, tuple(overrides), config, pick_device(config.device))
    console.say(f"self-test of {path} on {device_name(subject.device)}, torch {torch.__version__}")
    found = []
    for proof in proofs(subject):
        console.say(f"{proof.state:<11}{proof.name:<24}{proof.seconds:6.1f} s  {proof.text}")
        found.append(proof)
    passed = not any(each.state == "fail" for each in found)
    content = {
        "config": str(path),
        "overrides": overrides,
        "device": device_name(subject.device),
        "torch": torch.__version__,
        "passed": passed,
        "verdict": verdict(found),
        "seconds": sum(each.seconds for each in found),
        "proofs": [asdict(each) for each in found],
    }
    write_atomically(json_path, json.dumps(content, indent=1) + "\n")
    console.say(f"{verdict(found)} ({content['seconds']:.0f} s); written to {json_path}")
    return passed


def device_name(device: torch.device) -> str:
    """Name of the GPU, or of the CPU with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads of {os.cpu_count()} cores"
