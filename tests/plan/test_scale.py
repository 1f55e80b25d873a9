"""Memory and time of a plan against real networks, torch's own counters, and formulas written
out.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import io
import itertools
import re
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rich.console import Console, Group
from tiny_run import config_of, make_store
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore

from tapct.base.exits import UserError
from tapct.config import load_config, plugins
from tapct.data.packed.store import Store, packed_file
from tapct.distributed.world import mesh_of
from tapct.engine import compiled, fsdp, loop, optim, recompute
from tapct.losses import koleo
from tapct.nn.layers import DropKey
from tapct.plan import command, measure, memory, scale, tables
from tapct.run import pretrain
from tapct.run.config import RunConfig
from tapct.ssl import step as ssl_step
from tapct.ssl.schedules import Schedules
from tapct.ssl.student_teacher import StudentTeacher
from tapct.types import Masks, Views
from tapct.views import masks

ROOT = Path(__file__).resolve().parent.parent.parent
SAMPLES = 6
STEP = 3.0e12  # FLOPs
LARGE_STEP = 1.75e16  # tap_l_3d


def smoke(*overrides: str, name: str = "smoke") -> RunConfig:
    config: RunConfig = load_config(RunConfig, ROOT / "configs" / f"{name}.yaml", overrides).value
    return config


def sizes_of(config: RunConfig) -> memory.SampleShape:
    views, tokens = config.views, command.tokens_of(config)
    masked = command.masked_share(config) * views.num_globals * tokens
    return memory.SampleShape(
        views.num_globals, views.global_window, views.num_locals, views.local_window, tokens, masked
    )


@functools.cache
def counted(*overrides: str) -> memory.Footprint:
    config = smoke(*overrides)
    bf16 = config.train.precision == "bf16"
    how = {"dtype": config.train.dtype, "bf16": bf16, "every": config.train.recompute}
    return memory.count_bytes(config.model, config.losses, sizes_of(config), **how)


@functools.cache
def weights(*overrides: str) -> memory.ParameterCounts:
    config = smoke(*overrides)
    return memory.count_parameters(memory.Valueless(config.model, config.losses))


def real_inputs(config: RunConfig) -> tuple[Views, Masks]:
    """Random views of `SAMPLES` scans, masked as a step of the run would be."""
    sizes = sizes_of(config)
    grid = (2, 8, 8)
    in_scan = torch.ones(2, SAMPLES, sizes.num_tokens, dtype=torch.bool)
    counts = masks.counts(
        config.masks, num_crops_global=2 * SAMPLES, num_tokens=sizes.num_tokens, seed=0, step=0
    )
    drawn = masks.draw(counts, grid, in_scan, torch.arange(SAMPLES), config.masks, 0)
    views = Views(
        torch.randn(2, SAMPLES, *sizes.global_window),
        torch.randn(sizes.num_locals, SAMPLES, *sizes.local_window),
        in_scan,
        torch.ones(2, SAMPLES, 3),
        torch.ones(sizes.num_locals, SAMPLES, 3),
    )
    return views, drawn


def real_step(config: RunConfig, pair: StudentTeacher, inputs: tuple[Views, Masks]) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=config.train.precision == "bf16"):
        return ssl_step.forward(pair, *inputs, 0.04, DropKey(0, 0), pair.snapshot is not None).total


def peak_of(seen: profile) -> int:
    """Most bytes that were allocated and not yet freed, in a profile."""
    events = seen.profiler.kineto_results.events()  # type: ignore[union-attr]
    moves = sorted(
        (event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"
    )
    return max(itertools.accumulate(size for _, size in moves))


@pytest.fixture
def four_ranks() -> Iterator[None]:
    """This process as the first of four."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield
    dist.destroy_process_group()


GRAM = ("losses.gram.start=0",)
CASES = [
    (),
    ("model.drop_path=0.5",),
    ("model.dim=96", "model.heads=3", "views.num_locals=5"),
    ("train.precision=fp32",),
    GRAM,
]
AGAIN = ("train.recompute=1",)


@pytest.mark.parametrize("overrides", CASES, ids=" ".join)
def test_activations_are_what_autograd_saves(overrides: tuple[str, ...]) -> None:
    """torch's hooks see every tensor that a real forward pass saves."""
    config = smoke(*overrides)
    pair = StudentTeacher(config.model, config.losses, 0).train()
    linear = memory.count_parameters(pair).linear
    copies = 2 * linear if config.train.precision == "bf16" else 0
    assert counted(*overrides).of(SAMPLES).activations + copies == pytest.approx(
        bytes_saved(config, pair), rel=0.05
    )


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_what_compiled_blocks_save_is_counted(precision: str) -> None:
    """torch's hooks see what the graphs of a real forward pass save; it is more than without."""
    words = ("model.depth=1", f"train.precision={precision}")
    config = smoke(*words)
    bf16 = precision == "bf16"
    how = {"dtype": torch.float32, "bf16": bf16, "compiles": True}
    planned = memory.count_bytes(config.model, config.losses, sizes_of(config), **how)
    torch._dynamo.reset()
    pair = StudentTeacher(config.model, config.losses, 0).train()
    if bf16:  # as FSDP gathers them
        for network in (pair.student, pair.teacher):
            network.backbone.blocks.bfloat16()
    compiled.compile_blocks(pair, memory.PARTITIONED)
    found = bytes_saved(config, pair)
    assert planned.of(SAMPLES).activations == pytest.approx(found, rel=0.05)
    assert found > 1.1 * counted(*words).of(SAMPLES).activations


def bytes_saved(config: RunConfig, pair: StudentTeacher) -> int:
    """Bytes of what a real forward pass saves for its backward pass, weights aside."""
    known = {p.untyped_storage().data_ptr() for p in (*pair.parameters(), *pair.buffers())}
    saved: dict[int, int] = {}
    alive: list[Tensor] = []  # an address must not be given out twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    inputs = real_inputs(config)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        real_step(config, pair, inputs)
    return sum(saved.values())


def test_compiled_blocks_are_counted_where_the_run_will_compile_them() -> None:
    asked, not_asked = scale.Request(memory=8e10), scale.Request()
    large = smoke(name="tap_s_3d")
    assert command.counts_compiled(large, asked)
    assert not command.counts_compiled(large, not_asked)
    assert not command.counts_compiled(smoke("train.compile=never", name="tap_s_3d"), asked)
    assert not command.counts_compiled(smoke(), asked)  # device: cpu
    assert command.counts_compiled(smoke("train.compile=always"), asked)


@pytest.mark.parametrize("overrides", [*CASES, AGAIN], ids=" ".join)
def test_the_peak_is_what_the_profiler_sees(overrides: tuple[str, ...]) -> None:
    """torch's profiler notes every allocation of a real forward and backward pass."""
    config = smoke(*overrides)
    pair = StudentTeacher(config.model, config.losses, 0).train()
    recompute.recompute_blocks(pair.student.backbone, config.train.recompute)
    inputs = real_inputs(config)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        real_step(config, pair, inputs).backward()
    copies = 2 * memory.count_parameters(pair).linear if config.train.precision == "bf16" else 0
    each = counted(*overrides).of(SAMPLES)
    # with blocks computed again little is left but work, which two counts know less well
    tolerance = 0.05 if overrides in CASES else 0.1
    assert each.activations + each.work + copies == pytest.approx(peak_of(seen), rel=tolerance)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_peak_of_a_rank_is_what_the_profiler_sees(four_ranks: None, accumulation: int) -> None:
    """FSDP as a run uses it, on one of four ranks whose collectives move nothing: all of its
    buffers are real.

    The plan is a little above: it takes all gradients to be there while the activations still are.
    """
    config = smoke()
    mesh = mesh_of("cpu", 4, 4)

    def shard(network: Any, learns: bool) -> None:
        fsdp.shard(network, mesh, bf16=True, keeps_gradient=learns)

    pair = StudentTeacher(config.model, config.losses, 0, shard=shard).train()
    inputs = real_inputs(config)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        for micro in range(accumulation):
            if accumulation > 1:
                fsdp.sync_gradients(pair, micro == accumulation - 1)
            with torch.autocast("cpu", torch.bfloat16):
                output = ssl_step.forward(pair, *inputs, 0.04, DropKey(0, 0))
            output.total.backward()
    planned = row(4, SAMPLES, shard=4, global_batch=4 * SAMPLES * accumulation)
    held_before = 16 * weights().on_fullest_rank(4) + planned.inputs  # student, teacher, moments
    peak = peak_of(seen)
    assert peak <= planned.total - held_before <= 1.1 * peak


def test_a_plug_in_that_asks_for_values_leaves_the_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    def impatient(*words: Any) -> ssl_step.StepOutput:
        assert torch.ones(()).mul(2).item()
        raise AssertionError("a fake tensor has no values")

    monkeypatch.setattr(ssl_step, "forward", impatient)
    out = io.StringIO()
    Console(file=out, width=80).print(command.report(smoke(), command.Options()))
    printed = " ".join(out.getvalue().split())
    assert (
        "feed-forward" in printed
        and "memory and time are not estimated: one of vit, dino, ibot, koleo needs values"
        in printed
    )


def test_one_process_and_a_rank_leave_the_same_for_the_backward_pass() -> None:
    """The count is made with weights as FSDP gathers them; every line of a larger batch is on one
    straight line.
    """
    few, many = counted().few, counted().many
    assert many.activations / few.activations == pytest.approx(2, rel=0.1)
    assert many.inputs == 2 * few.inputs
    middle = counted().of(SAMPLES)
    assert few.activations < middle.activations < many.activations


@pytest.mark.parametrize("overrides", [(), GRAM], ids=" ".join)
def test_state_is_what_adamw_really_holds(overrides: tuple[str, ...]) -> None:
    config = smoke(*overrides)
    pair = StudentTeacher(config.model, config.losses, 0).train()
    updater = optim.Updater(pair, config.optim)
    real_step(config, pair, real_inputs(config)).backward()
    held = sum(p.nbytes for network in (pair.student, *pair.frozen()) for p in network.parameters())
    held += sum(p.grad.nbytes for p in pair.student.parameters() if p.grad is not None)
    updater.step(Schedules(config.optim, 10, 8).at(5), torch.zeros(()))
    held += sum(
        x.nbytes
        for state in updater.optimizer.state.values()
        for x in state.values()
        if x.numel() > 1
    )
    # as many bytes again as moments of a single number are left out above
    single = sum(p.numel() == 1 for p in pair.student.parameters())
    planned = scale.memory_of(
        DEMAND, weights(*overrides), counted(*overrides), gpus=1, shard=1, samples=4
    )
    assert planned.state == held + 8 * single


@pytest.mark.parametrize("shard", [2, 4])
def test_the_fullest_rank_holds_what_fsdp_gives_it(four_ranks: None, shard: int) -> None:
    config = smoke()
    pair = memory.Valueless(config.model, config.losses)
    mesh = mesh_of("cpu", 4, shard)
    fsdp.shard(pair.student, mesh, bf16=True, keeps_gradient=True)
    local = sum(p.to_local().numel() for p in pair.student.parameters())  # type: ignore[operator]
    assert weights().on_fullest_rank(shard) == local > weights().total / shard


def test_parameters_are_distinguished_by_how_ranks_gather_them() -> None:
    config = smoke()
    network = StudentTeacher(config.model, config.losses, 0).student
    all_blocks: Any = network.backbone.blocks
    blocks = [sum(p.numel() for p in block.parameters()) for block in all_blocks]
    assert weights().block == max(blocks)
    assert weights().total == sum(p.numel() for p in network.parameters())
    assert weights().total == weights().heads + weights().rest + sum(blocks)


KOLEO = koleo.build(koleo.Config())
ACROSS_RANKS = koleo.build(koleo.Config(cross_rank=True))
DEMAND = scale.RunSettings(
    global_batch=64,
    accumulation=1,
    steps=1000,
    shard=0,
    number_bytes=4,
    bf16=True,
    losses={"koleo": KOLEO},
    slab_depth=12,
    workers=2,
)


def row(gpus: int, samples: int = 4, shard: int = 1, **changes: Any) -> scale.Memory:
    demand = dataclasses.replace(DEMAND, **changes)
    return scale.memory_of(demand, weights(), counted(), gpus, shard, samples)


def table(
    asked: scale.Request | None = None,
    store: scale.StoreFacts | None = None,
    flops: float = STEP,
    **changes: Any,
) -> scale.Estimate:
    demand = dataclasses.replace(DEMAND, **changes)
    return scale.estimate(
        demand, asked or scale.Request(), weights(), counted(), flops_per_step=flops, store=store
    )


def test_copies_are_gathered_blocks_heads_and_whole_gradients() -> None:
    w = weights()
    assert row(gpus=1).copies == 2 * w.linear
    assert row(gpus=1, bf16=False).copies == 0
    # bf16: two blocks with gradients in bf16 and float32; float32: what is outside of the blocks
    gathered = 4 * (w.heads + w.rest) + 2 * w.block * (2 + 2 + 4)
    assert row(gpus=4, samples=16).copies == gathered
    assert row(gpus=4, samples=4).copies == gathered + 4 * w.total, (
        "whole gradients wait for the last micro-batch"
    )
    assert row(gpus=4, samples=16).kept == 0 < row(gpus=4, samples=4).kept


def test_the_largest_micro_batch_is_the_last_that_fits() -> None:
    limit = row(gpus=4, samples=8, shard=4).total / (1 - scale.RESERVE)
    (found,) = table(scale.Request(gpus=(4,), memory=limit)).largest
    assert found[1] is not None and (found[1].samples, found[1].accumulation) == (8, 2)
    (found,) = table(scale.Request(gpus=(4,), memory=0.999 * limit)).largest
    assert found[1] is not None and (found[1].samples, found[1].accumulation) == (4, 4)
    plan = table(scale.Request(gpus=(1, 4), memory=0.999 * limit, per_node=4))
    assert any("accumulation=1 does not fit on 1, 4 GPUs" in warning for warning in plan.warnings)


def test_time_is_flops_over_rate() -> None:
    store = scale.StoreFacts(scans=100, in_plane=1000.0, share=0.25)
    asked = scale.Request(gpus=(1, 8), rate=1e12, slabs_per_thread=4.0)
    one, eight = table(asked, store).paces
    assert (one.step_s, eight.step_s) == (3.0, 0.375)
    assert one.days == 1000 * 3.0 / (24 * 60 * 60)
    assert eight.slabs == 64 / 0.375
    assert eight.raw == eight.slabs * 12 * 1000 * 2 and eight.stored == eight.raw / 4
    assert table(asked).paces[0].stored is None
    assert eight.threads == pytest.approx(64 / 0.375 / 8 / 4)
    assert table(scale.Request(gpus=(1, 8))).paces == (), "no rate, no times"


def test_only_numbers_that_share_the_batch_are_rows() -> None:
    plan = table(scale.Request(gpus=(1, 3, 12, 16, 64)))
    assert [row.gpus for row in plan.as_set] == [1, 16]
    reasons = {counts: reason for reason, counts in plan.left_out}
    assert (
        "train.global_batch 64" in reasons[(3,)]
        and "do not divide" in reasons[(12,)]
        and "losses.koleo" in reasons[(64,)]
    )
    free = table(scale.Request(gpus=(64,)), losses={"koleo": ACROSS_RANKS})
    assert free.as_set[0].samples == 1


REFUSED: dict[str, tuple[scale.Request, dict[str, Any], str]] = {
    "batch": (
        scale.Request(gpus=(3, 5)),
        {},
        "3, 5: train.global_batch 64 is not shared equally at accumulation 1",
    ),
    "accumulation": (
        scale.Request(gpus=(8,)),
        {"accumulation": 16},
        "8: train.global_batch 64 .* at accumulation 16",
    ),
    "shard": (scale.Request(gpus=(8,)), {"shard": 3}, "8: the 3 GPUs that share a copy"),
    "neighbours": (scale.Request(gpus=(64,)), {}, "64: losses.koleo needs at least 2 samples"),
    "memory": (
        scale.Request(memory=1e6),
        {},
        r"nothing fits: 2 samples at a time on \d+ GPUs take",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_run_is_refused_with_the_reason(case: str) -> None:
    asked, changes, reason = REFUSED[case]
    with pytest.raises(UserError, match=reason):
        table(asked, **changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"gpus": "1,x"}, "--gpus 1,x"),
        ({"gpus": "0"}, "--gpus 0"),
        ({"memory_gb": -1.0}, "--memory is -1"),
        ({"tflops": 0.0}, "--tflops is 0"),
        ({"tflops": 1.0, "measure": True}, "exclude each other"),
        ({"utilisation": 0.5}, "--utilisation is a share"),
        ({"utilisation": 1.5, "tflops": 1.0}, "--utilisation is 1.5"),
    ],
)
def test_options_that_make_no_sense_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        command.request_of(smoke(), command.Options(**changes))


def test_a_rate_is_given_or_measured_and_never_made_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = smoke(f"data.store={tmp_path}")
    assert command.request_of(config, command.Options()).rate is None
    assert command.request_of(config, command.Options(tflops=200.0)).rate == 200e12
    assert (
        command.request_of(config, command.Options(tflops=1000.0, utilisation=0.25)).rate == 250e12
    )
    monkeypatch.setattr(
        measure, "gemm_rate", lambda device, dtype: 3e12 if dtype == torch.bfloat16 else 1e12
    )
    measured = command.request_of(config, command.Options(measure=True))
    assert measured.rate == 3e12 * command.UTILISATION and "assumption" in measured.rate_from
    assert measured.slabs_per_thread is None
    assert command.request_of(config, command.Options(measure=True, utilisation=0.5)).rate == 1.5e12


def test_the_measured_rate_is_that_of_a_matrix_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two FLOPs for each of 2048^3 multiply-adds, over the fastest of some products."""
    clock = itertools.accumulate(itertools.cycle([0.0, 4.0, 0.0, 0.5, 0.0, 2.0]))
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert measure.gemm_rate(torch.device("cpu"), torch.float32) == 2 * 2048**3 / 0.5


def test_a_store_gives_its_share_of_int16_and_its_slices(tmp_path: Path) -> None:
    assert measure.store_facts(tmp_path) is None
    found = make_store(tmp_path)
    facts, scans = measure.store_facts(found), Store(found).scans
    voxels = sum(z * y * x for z, y, x in (scan.shape_ZYX for scan in scans))
    assert facts is not None and facts.scans == len(scans)
    packed = sum(packed_file(found, scan.id).stat().st_size for scan in scans)  # without labels
    assert facts.share == packed / (2 * voxels)
    assert facts.in_plane == sum(y * x for _, y, x in (scan.shape_ZYX for scan in scans)) / len(
        scans
    )
    config = config_of(tmp_path / "here", found, "train.global_batch=8").value
    asked = command.request_of(config, command.Options(measure=True))
    plan = command.estimate_of(config, command.costs_of(config), asked)
    assert any("4 scans for a batch of 8" in warning for warning in plan.warnings)
    assert asked.slabs_per_thread is not None and plan.paces[0].threads is not None


@pytest.mark.parametrize("batch", [1, 2, 5, 64])
def test_the_masked_share_is_that_of_the_steps(batch: int) -> None:
    config = smoke(
        "losses.koleo=null",
        f"train.global_batch={batch}",
        "masks.probability=0.5",
        "masks.ratio=[0.1,0.5]",
    )
    crops, tokens = 2 * batch, 2 * 8 * 8
    steps = [
        masks.counts(config.masks, num_crops_global=crops, num_tokens=tokens, seed=3, step=step)
        for step in range(20)
    ]
    assert command.masked_share(config) == pytest.approx(
        sum(map(sum, steps)) / (20 * crops * tokens)
    )
    uses = {part.name: part for part in command.costs_of(config).parts}
    per_row = 2 * 64 * 256  # bottleneck x prototypes
    assert uses["ibot prototypes"].teacher_flops == pytest.approx(sum(steps[0]) / batch * per_row)


def test_sinkhorn_is_warned_of_by_the_rows_of_a_micro_batch() -> None:
    words = [
        "losses.dino.targets.kind=sinkhorn",
        "losses.dino.head.num_prototypes=1024",
        "train.global_batch=8",
    ]
    assert command.costs_of(smoke(*words)).warnings == ()
    (warning,) = command.costs_of(smoke(*words, "train.accumulation=4")).warnings
    assert "1024 prototypes for 4 rows" in warning


def planned(*overrides: str) -> str:
    out = io.StringIO()
    Console(file=out, width=200).print(command.report(smoke(*overrides), command.Options(gpus="1")))
    return out.getvalue()


def test_a_stage_is_named_with_the_arguments_that_plan_it() -> None:
    plan = planned(
        "train.steps=9", 'stages=[{start: 2, set: [seed=0, "losses[koleo].weight=1"]}, {start: 4}]'
    )
    assert (
        "Warning: stages[0] is not counted; for it give 'stages=[]' seed=0 losses[koleo].weight=1"
        in plan
    )
    assert "stages[1]" not in plan
    assert "is not counted" not in planned()


def test_the_snapshot_of_the_teacher_sees_the_global_crops_too() -> None:
    plain, gram = command.costs_of(smoke()), command.costs_of(smoke("losses.gram.start=10"))
    backbone = sum(
        part.teacher_flops for part in plain.parts if not part.name.startswith(("dino", "ibot"))
    )
    assert (
        gram.flops_per_sample - plain.flops_per_sample == pytest.approx(backbone) and backbone > 0
    )


def test_a_large_vit_is_planned_without_values() -> None:
    config = smoke(name="tap_l_3d")
    costs = command.costs_of(config)
    backbone = sum(
        part.parameters for part in costs.parts if not part.name.startswith(("dino", "ibot"))
    )
    # 24 blocks: 12 D^2 and 13 D, two LayerScales; embedding, positions, CLS, 4 registers, mask
    # token, last norm
    single = 1024 * ((4 * 8 * 8 + 1) + (3 * 28 * 28 + 1) + 1 + 4 + 1 + 2)
    assert backbone == 24 * (12 * 1024**2 + 13 * 1024 + 2 * 1024) + single


@pytest.mark.slow
def test_the_batches_that_a_config_names_for_a_large_vit_fit() -> None:
    config = smoke(name="tap_l_3d")
    plan = command.estimate_of(config, command.costs_of(config), scale.Request(memory=80e9))
    fits = dict(plan.largest)
    printed = re.findall(
        r"train.accumulation=(\d+) on (\d+) of them",
        (ROOT / "configs" / "tap_l_3d.yaml").read_text(),
    )
    assert printed
    for accumulation, gpus in printed:
        fitting = fits[int(gpus)]
        assert fitting is not None and fitting.accumulation <= int(accumulation)


@pytest.mark.parametrize(
    ("name", "published"), [("tap_b_3d", 87_083_520), ("tap_s_3d", None), ("smoke", None)]
)
def test_the_subtotal_of_the_backbone_is_the_size_of_the_real_model(
    name: str, published: int | None
) -> None:
    config = smoke(name=name)
    with torch.device("meta"):
        model = plugins.load("models", config.model.name).build(config.model.config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert published in (None, parameters)
    out = io.StringIO()
    costs = command.costs_of(config)
    Console(file=out, width=80).print(tables.cost_tables(costs))
    rows = {line.split("  ")[0].strip(): line.split() for line in out.getvalue().splitlines()}
    assert rows["backbone"][1] == f"{parameters:,}"
    backbone, heads, total = (
        int(rows[each][1].replace(",", "")) for each in ("backbone", "heads", "total")
    )
    assert backbone + heads == total == costs.parameters


@functools.cache
def whole_report(name: str) -> Group:
    """Everything that is printed of a config, with a snapshot of the teacher."""
    options = command.Options(memory_gb=80.0, tflops=200.0)
    return command.report(smoke("losses.gram.start=3", name=name), options)


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("name", ["smoke", pytest.param("tap_b_3d", marks=pytest.mark.slow)])
def test_everything_that_is_printed_fits_the_terminal(name: str, width: int) -> None:
    out = io.StringIO()
    Console(file=out, width=width).print(whole_report(name))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width and "…" not in out.getvalue()
    heading = next(line for line in lines if line.lstrip().startswith("part "))
    assert heading.split()[:2] == ["part", "parameters"]


def test_a_tiny_network_has_more_than_zero_flops() -> None:
    out = io.StringIO()
    costs = command.costs_of(smoke("model.dim=8", "model.heads=1", "model.depth=1"))
    Console(file=out, width=80).print(tables.cost_tables(costs))
    (row,) = [line.split() for line in out.getvalue().splitlines() if line.startswith(" backbone")]
    shown = [float(number) for number in row[2:5]]
    exact = [
        sum(getattr(part, name) for part in costs.backbone) / 1e9
        for name in ("student_flops", "teacher_flops", "step_flops")
    ]
    assert shown == pytest.approx(exact, rel=0.05) and min(shown) > 0


def test_tables_fit_80_columns_and_say_how_to_get_times() -> None:
    store = scale.StoreFacts(scans=10, in_plane=512.0**2, share=0.4)
    asked = scale.Request(memory=80e9, rate=2e14, rate_from="--tflops 200", slabs_per_thread=30.0)
    for plan in (
        table(asked, store, LARGE_STEP, global_batch=1024),
        table(asked, store),
        table(scale.Request(gpus=(1, 3))),
    ):
        out = io.StringIO()
        Console(file=out, width=80).print(tables.estimate_tables(plan))
        text = out.getvalue()
        assert max(map(len, text.splitlines())) <= 80 and "…" not in text
        assert (tables.HOW_TO_TIME[:20] in text) == (not plan.paces)
        assert all(warning[:20] in text for warning in plan.warnings)


def test_tokens_of_a_micro_batch_are_let_go_when_the_next_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(
        tmp_path,
        make_store(tmp_path),
        "train.accumulation=4",
        "train.global_batch=8",
        "train.steps=1",
    )
    seen: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    real = loop.Trainer.forward_backward

    def watched(self: loop.Trainer, *words: Any) -> ssl_step.StepOutput:
        gc.collect()
        alive.append(sum(each() is not None for each in seen))
        output = real(self, *words)
        seen.append(weakref.ref(output.tokens.student_global.patches_BND))
        return output

    monkeypatch.setattr(loop.Trainer, "forward_backward", watched)
    pretrain.train(config)
    assert alive == [0, 1, 1, 1]
