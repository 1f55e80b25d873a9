"""What one optimizer step reports: scalars that stay on the device until the loop fetches many
steps at once.

Axes: W ranks, K prototypes, N patch tokens of all crops, D channels.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tapct.base import metric_names as names
from tapct.distributed.collectives import Packet
from tapct.engine.optim import UpdateReport
from tapct.nn.prototypes import as_float
from tapct.ssl import health
from tapct.ssl.schedules import StepValues
from tapct.ssl.step import StepOutput
from tapct.types import TargetSums

Record = dict[str, float]


@dataclass(frozen=True)
class PacketKeys:
    """Entries of the step's packet that hold sums over the targets of one loss.

    Args:
        loss: place of the loss in the config.
    """

    loss: int

    @property
    def rows(self) -> str:
        """Number of targets, by which the sums of cross-entropies are divided."""
        return f"rows/{self.loss}"

    @property
    def cross_entropy(self) -> str:
        """Cross-entropy, nats."""
        return f"health/ce/{self.loss}"

    @property
    def mass(self) -> str:
        """Mass of each prototype."""
        return f"health/mass/{self.loss}"

    @property
    def entropy(self) -> str:
        """Entropy of the targets, nats."""
        return f"health/entropy/{self.loss}"


CLS_MOMENTS = "health/cls"  # entry of the packet that `cls_std` is made of


def append_output(outputs: list[StepOutput], output: StepOutput) -> None:
    """Add the output of a micro-batch to those of the step before it, without their tokens.

    Only the last micro-batch's tokens are read for health; those of all would fill the memory.
    """
    for i, earlier in enumerate(outputs):
        outputs[i] = replace(earlier, tokens=output.tokens)
    outputs.append(output)


@torch.no_grad()
def collect(outputs: Sequence[StepOutput], packet: Packet) -> None:
    """Put all numbers of one optimizer step that live on the device into the packet that ranks add
    up.

    Args:
        outputs: outputs of this rank's micro-batches; terms are averaged, target statistics are
            summed, features are the last one's.
        packet: gets the losses and `PacketKeys` of every loss, and what health needs.
    """
    packet.mean(names.loss(names.TOTAL), mean([output.total for output in outputs]))
    for i, result in enumerate(outputs[0].results):
        keys = PacketKeys(i)
        stats = [output.results[i].targets for output in outputs]
        rows = []
        for output, one in zip(outputs, stats, strict=True):
            # a loss without targets counts each micro-batch once
            rows.append(one.sums.rows if one is not None else output.total.new_ones(()))
        packet.sum(keys.rows, torch.stack(rows).sum())
        for j, term in enumerate(result.terms):
            terms = [output.results[i].terms[j] for output in outputs]
            packet.mean(names.loss(term.name), mean([term.value for term in terms]))
            if term.cross_entropy is not None:
                summed = weighted([one.cross_entropy for one in terms], rows)
                packet.sum(names.cross_entropy(term.name), summed)
        present = [one for one in stats if one is not None]
        if present:
            packet.sum(keys.cross_entropy, weighted([one.cross_entropy for one in present], rows))
            packet.sum(keys.mass, torch.stack([one.sums.mass_K for one in present]).sum(0))
            packet.sum(keys.entropy, torch.stack([one.sums.entropy for one in present]).sum())
    student, teacher = outputs[-1].tokens.student_global, outputs[-1].tokens.teacher_global
    cosine = health.teacher_student_cosine(student.cls_BD, teacher.cls_BD)
    packet.mean(names.feature_health(names.COSINE), cosine)
    packet.sum(CLS_MOMENTS, health.cls_moments(teacher.cls_BD))
    outliers = health.patch_norm_outliers(teacher.patches_BND)
    packet.mean(names.feature_health(names.NORM_OUTLIERS), outliers)


@torch.no_grad()
def readings(
    outputs: Sequence[StepOutput], packet: Packet, report: UpdateReport, with_rankme: bool
) -> list[tuple[str, Tensor]]:
    """The numbers of one optimizer step over all ranks.

    Args:
        outputs: what was collected; gives the names, and RankMe its features (those of this rank).
        packet: packet of `collect`, reduced.
        report: report of the optimizer step.
        with_rankme: whether to add RankMe, whose decomposition waits for a GPU.
    Returns:
        (name in metrics.jsonl, scalar), the same names in the same order at every step but for
        RankMe.
    """
    total = names.loss(names.TOTAL)
    numbers = [(total, packet[total])]
    for i, result in enumerate(outputs[0].results):
        rows = packet[PacketKeys(i).rows]
        for term in result.terms:
            name = names.loss(term.name)
            numbers.append((name, packet[name]))
            if term.cross_entropy is not None:
                name = names.cross_entropy(term.name)
                numbers.append((name, packet[name] / rows.clamp(min=1)))
    for part, norm in report.grad_norms:
        numbers.append((names.grad_norm(part), norm))
    for i, result in enumerate(outputs[0].results):
        if result.targets is None:
            continue
        keys = PacketKeys(i)
        rows = packet[keys.rows]
        sums = TargetSums(packet[keys.mass], packet[keys.entropy], rows)
        life = health.target_health(sums)
        ln_k = math.log(len(sums.mass_K))
        values = {
            names.LN_K_MINUS_CE: ln_k - packet[keys.cross_entropy] / rows.clamp(min=1),
            names.INFORMATION: life.information,
            names.MARGINAL_ENTROPY: life.marginal_entropy,
            names.TARGET_ENTROPY: life.target_entropy,
            names.PROTOTYPES_USED: life.prototypes_used,
        }
        for reading in names.TARGET_READINGS:
            numbers.append((names.target_health(result.targets.name, reading), values[reading]))
    cosine = names.feature_health(names.COSINE)
    numbers.append((cosine, packet[cosine]))
    numbers.append((names.feature_health(names.CLS_STD), health.cls_std(packet[CLS_MOMENTS])))
    outliers = names.feature_health(names.NORM_OUTLIERS)
    numbers.append((outliers, packet[outliers]))
    if with_rankme:
        patches_ND = outputs[-1].tokens.teacher_global.patches_BND.flatten(0, 1)
        numbers.append((names.feature_health(names.RANKME), health.rankme(patches_ND)))
    return numbers


def arrivals(seconds_W: Tensor, data_seconds_W: Tensor) -> list[tuple[str, Tensor]]:
    """Which rank came last to the step's first collective, how late, and the median rank; nothing
    for one rank.

    Args:
        seconds_W: seconds from the beginning of the step, of every rank.
        data_seconds_W: seconds of these in which the rank waited for data.
    """
    if len(seconds_W) == 1:
        return []
    slowest, rank = seconds_W.max(0)
    return [
        (names.ranks(names.SLOWEST), rank),
        (names.ranks(names.SLOWEST_S), slowest),
        (names.ranks(names.SLOWEST_DATA_S), data_seconds_W.gather(0, rank[None])[0]),
        (names.ranks(names.MEDIAN_S), seconds_W.quantile(0.5, interpolation="lower")),
    ]


def straggler(
    records: Sequence[Record], factor: float, node_of: Callable[[int], str] = lambda rank: ""
) -> str:
    """A line that names a rank which keeps the others waiting; empty if there is none.

    A rank is named when it came last in most of these steps, `factor` times later than the median
    rank, and when that cost more than a twentieth of the steps' time and a tenth of a second.

    Args:
        records: numbers of steps.
        factor: how many times later than the median rank it comes.
        node_of: function that returns the name of a rank's node, empty where it is unknown.
    """
    timed = [record for record in records if names.ranks(names.SLOWEST) in record]
    if not timed:
        return ""
    last_ranks = Counter(int(record[names.ranks(names.SLOWEST)]) for record in timed)
    rank, times = last_ranks.most_common(1)[0]
    late = statistics.fmean(record[names.ranks(names.SLOWEST_S)] for record in timed)
    median = statistics.fmean(record[names.ranks(names.MEDIAN_S)] for record in timed)
    step_s = statistics.fmean(record[names.seconds("step")] for record in timed)
    is_usual = 2 * times > len(timed)
    is_late = late >= factor * median and late - median >= max(0.05 * step_s, 0.1)
    if not (is_usual and is_late):
        return ""
    first, last = (int(record["step"]) for record in (timed[0], timed[-1]))
    data = statistics.fmean(record[names.ranks(names.SLOWEST_DATA_S)] for record in timed)
    if 2 * data > late:
        phase, remedy = "data", "check its node's disk and its data.loader.workers"
    else:
        phase, remedy = "views", "check the clock of its GPU and what else runs there"
    node = node_of(rank)
    return (
        f"rank {rank}{f' on {node}' if node else ''} is slow in the phase {phase} of steps {first} "
        f"to {last}: it comes {late:.2f} s into a step to what the ranks do together, the median "
        f"rank {median:.2f} s; {remedy}"
    )


def weighted(values: Sequence[Tensor | None], weights: Sequence[Tensor]) -> Tensor:
    """Sum of values times weights, detached; absent values are left out."""
    pairs = zip(values, weights, strict=True)
    return torch.stack(
        [value.detach() * weight for value, weight in pairs if value is not None]
    ).sum()


def mean(values: Sequence[Tensor]) -> Tensor:
    """Mean of scalars, detached, in float32 at least."""
    return torch.stack([as_float(value.detach()) for value in values]).mean()


class PhaseTimer:
    """Seconds of the phases of a step: by the clock on a CPU, by events on a GPU, which are read
    only when fetched.

    Args:
        device: where the work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.started = time.perf_counter()
        self.phases: list[tuple[str, object, object]] = []

    def now(self) -> object:
        """A point in time on the device."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside to a phase."""
        start = self.now()
        yield
        self.phases.append((name, start, self.now()))

    def seconds(self) -> Record:
        """Seconds by phase; on a GPU the events must have passed."""
        totals: Record = {}
        for name, start, end in self.phases:
            if self.on_gpu:
                took = start.elapsed_time(end) / 1000  # type: ignore[attr-defined]
            else:
                took = end - start  # type: ignore[operator]
            totals[names.seconds(name)] = totals.get(names.seconds(name), 0.0) + took
        return totals


@dataclass
class Pending:
    """Steps whose numbers have not been fetched yet."""

    rows: list[tuple[Record, list[str], Tensor, PhaseTimer]] = field(default_factory=list)

    def add(
        self,
        step: int,
        samples: int,
        values: StepValues,
        numbers: list[tuple[str, Tensor]],
        timer: PhaseTimer,
        save_seconds: float = 0.0,
    ) -> None:
        """Keep one step's numbers; nothing is copied to the host.

        Args:
            step: finished optimizer steps, this one included.
            samples: samples seen so far.
            values: values of the schedules.
            numbers: scalars on the device.
            timer: timer of this step.
            save_seconds: seconds that training waited for a checkpoint before this step.
        """
        host: Record = {
            "step": step,
            "samples": samples,
            "time": time.time(),
            "lr": values.lr,
            "wd": values.wd,
            "momentum": values.momentum,
            "teacher_temp": values.teacher_temp,
            names.seconds("save"): save_seconds,
        }
        labels = [name for name, _ in numbers]
        row = torch.stack([number.detach().double() for _, number in numbers])
        self.rows.append((host, labels, row, timer))

    def fetch(self) -> list[Record]:
        """All kept steps as plain numbers, in one copy, and forget them."""
        if not self.rows:
            return []
        flat = torch.cat([row for _, _, row, _ in self.rows]).tolist()
        records = []
        for host, labels, row, timer in self.rows:
            numbers, flat = flat[: len(row)], flat[len(row) :]
            records.append({**host, **dict(zip(labels, numbers, strict=True)), **timer.seconds()})
        self.rows.clear()
        return records


def first_not_finite(records: Sequence[Record]) -> tuple[Record, str] | None:
    """The first step and number of a loss or gradient norm that is not finite, if there is one.

    A term is named before the total that it spoils.
    """
    for record in records:
        checked = [name for name in record if names.must_be_finite(name)]
        for name in sorted(checked, key=names.is_sum_of_others):
            if not math.isfinite(record[name]):
                return record, name
    return None
