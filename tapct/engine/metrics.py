"""What one optimizer step reports: scalars that stay on the device until the loop fetches many
steps at once.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tapct.distributed.collectives import Packet
from tapct.engine.optim import UpdateReport
from tapct.nn.prototypes import as_float
from tapct.ssl import health
from tapct.ssl.schedules import StepValues
from tapct.ssl.step import StepOutput
from tapct.types import TargetSums

Record = dict[str, float]


@torch.no_grad()
def collect(outputs: Sequence[StepOutput], packet: Packet) -> None:
    """Put all numbers of one optimizer step that live on the device into the packet that ranks add
    up.

    Args:
        outputs: of this rank's micro-batches; terms are averaged, target statistics are summed,
            features are the last one's.
        packet: gets entries `loss/...`, `ce/...` (with `rows/...`, which they are to be divided
            by), `health/...`.
    """
    packet.mean("loss/total", mean([output.total for output in outputs]))
    for i, result in enumerate(outputs[0].results):
        stats = [output.results[i].targets for output in outputs]
        rows = [
            one.sums.rows if one is not None else output.total.new_ones(())
            for one, output in zip(stats, outputs)
        ]
        packet.sum(f"rows/{i}", torch.stack(rows).sum())
        for j, term in enumerate(result.terms):
            terms = [output.results[i].terms[j] for output in outputs]
            packet.mean(f"loss/{term.name}", mean([term.value for term in terms]))
            if term.cross_entropy is not None:
                packet.sum(f"ce/{term.name}", weighted([one.cross_entropy for one in terms], rows))
        present = [one for one in stats if one is not None]
        if present:
            packet.sum(f"health/ce/{i}", weighted([one.cross_entropy for one in present], rows))
            packet.sum(f"health/mass/{i}", torch.stack([one.sums.mass_K for one in present]).sum(0))
            packet.sum(
                f"health/entropy/{i}", torch.stack([one.sums.entropy for one in present]).sum()
            )
    student, teacher = outputs[-1].tokens.student_global, outputs[-1].tokens.teacher_global
    packet.mean(
        "health/teacher_student_cosine",
        health.teacher_student_cosine(student.cls_BD, teacher.cls_BD),
    )
    packet.sum("health/cls", health.cls_moments(teacher.cls_BD))
    packet.mean("health/patch_norm_outliers", health.patch_norm_outliers(teacher.patches_BND))


@torch.no_grad()
def readings(
    outputs: Sequence[StepOutput], packet: Packet, report: UpdateReport, with_rank: bool
) -> list[tuple[str, Tensor]]:
    """The numbers of one optimizer step over all ranks.

    Args:
        outputs: what was collected; gives the names, and RankMe its features (those of this rank).
        packet: reduced.
        report: of the optimizer step.
        with_rank: add RankMe, whose decomposition waits for a GPU.
    Returns:
        (name in metrics.jsonl, scalar), the same names in the same order at every step but for
        `health/rankme`.
    """
    numbers = [("loss/total", packet["loss/total"])]
    for i, result in enumerate(outputs[0].results):
        for term in result.terms:
            numbers.append((f"loss/{term.name}", packet[f"loss/{term.name}"]))
            if term.cross_entropy is not None:
                numbers.append(
                    (
                        f"ce/{term.name}",
                        packet[f"ce/{term.name}"] / packet[f"rows/{i}"].clamp(min=1),
                    )
                )
    numbers.extend((f"grad_norm/{name}", norm) for name, norm in report.grad_norms)
    for i, result in enumerate(outputs[0].results):
        if result.targets is None:
            continue
        name, rows = result.targets.name, packet[f"rows/{i}"]
        sums = TargetSums(packet[f"health/mass/{i}"], packet[f"health/entropy/{i}"], rows)
        life = health.target_health(sums)
        gained = math.log(len(sums.mass_K)) - packet[f"health/ce/{i}"] / rows.clamp(min=1)
        numbers.extend(
            [
                (f"health/{name}_ln_k_minus_ce", gained),
                (f"health/{name}_information", life.information),
                (f"health/{name}_marginal_entropy", life.marginal_entropy),
                (f"health/{name}_target_entropy", life.target_entropy),
                (f"health/{name}_prototypes_used", life.prototypes_used),
            ]
        )
    numbers.append(("health/teacher_student_cosine", packet["health/teacher_student_cosine"]))
    numbers.append(("health/cls_std", health.cls_std(packet["health/cls"])))
    numbers.append(("health/patch_norm_outliers", packet["health/patch_norm_outliers"]))
    if with_rank:
        numbers.append(
            (
                "health/rankme",
                health.rankme(outputs[-1].tokens.teacher_global.patches_BND.flatten(0, 1)),
            )
        )
    return numbers


def arrivals(seconds_W: Tensor) -> list[tuple[str, Tensor]]:
    """Who came last to the step's first collective, how late, and the median: nothing for one rank.

    Args:
        seconds_W: from the beginning of the step, of every rank.
    """
    if len(seconds_W) == 1:
        return []
    slowest, rank = seconds_W.max(0)
    return [
        ("ranks/slowest", rank),
        ("ranks/slowest_s", slowest),
        ("ranks/median_s", seconds_W.quantile(0.5, interpolation="lower")),
    ]


def straggler(records: Sequence[Record], factor: float) -> str:
    """A line that names a rank which keeps the others waiting; empty if there is none.

    A rank is named when it came last in most of these steps, `factor` times later than the median
    rank, and when that cost more than a twentieth of the steps' time and a tenth of a second.
    """
    told = [record for record in records if "ranks/slowest" in record]
    if not told:
        return ""
    rank, times = Counter(int(record["ranks/slowest"]) for record in told).most_common(1)[0]
    late = statistics.fmean(record["ranks/slowest_s"] for record in told)
    median = statistics.fmean(record["ranks/median_s"] for record in told)
    whole = statistics.fmean(record["seconds/step"] for record in told)
    if 2 * times <= len(told) or late < factor * median or late - median < max(0.05 * whole, 0.1):
        return ""
    return (
        f"rank {rank} is slow: it comes {late:.2f} s into a step to what the ranks do together, "
        "the median rank "
        f"{median:.2f} s; look at its node's disk, its data.loader.workers and what else runs there"
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


class StageTimer:
    """Seconds of the stages of a step: by the clock on a CPU, by events on a GPU, which are read
    only when fetched.

    Args:
        device: where the work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.started = time.perf_counter()
        self.stages: list[tuple[str, object, object]] = []

    def now(self) -> object:
        """A point in time on the device."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time spent inside to a stage."""
        start = self.now()
        yield
        self.stages.append((name, start, self.now()))

    def seconds(self) -> Record:
        """Seconds by stage; on a GPU the events must have passed."""
        totals: Record = {}
        for name, start, end in self.stages:
            took = start.elapsed_time(end) / 1000 if self.on_gpu else end - start  # type: ignore[attr-defined,operator]
            totals[f"seconds/{name}"] = totals.get(f"seconds/{name}", 0.0) + took
        return totals


@dataclass
class Pending:
    """Steps whose numbers have not been fetched yet."""

    rows: list[tuple[Record, list[str], Tensor, StageTimer]] = field(default_factory=list)

    def add(
        self,
        step: int,
        samples: int,
        values: StepValues,
        numbers: list[tuple[str, Tensor]],
        timer: StageTimer,
        save_seconds: float = 0.0,
    ) -> None:
        """Keep one step's numbers; nothing is copied to the host.

        Args:
            step: finished optimizer steps, this one included.
            samples: seen so far.
            values: of the schedules.
            numbers: scalars on the device.
            timer: of this step.
            save_seconds: that training stood still for a checkpoint before this step.
        """
        host: Record = {
            "step": step,
            "samples": samples,
            "time": time.time(),
            "lr": values.lr,
            "wd": values.wd,
            "momentum": values.momentum,
            "teacher_temp": values.teacher_temp,
            "seconds/save": save_seconds,
        }
        names = [name for name, _ in numbers]
        row = torch.stack([number.detach().double() for _, number in numbers])
        self.rows.append((host, names, row, timer))

    def fetch(self) -> list[Record]:
        """All kept steps as plain numbers, in one copy, and forget them."""
        if not self.rows:
            return []
        flat = torch.cat([row for _, _, row, _ in self.rows]).tolist()
        records = []
        for host, names, row, timer in self.rows:
            numbers, flat = flat[: len(row)], flat[len(row) :]
            records.append({**host, **dict(zip(names, numbers, strict=True)), **timer.seconds()})
        self.rows.clear()
        return records


def first_not_finite(records: Sequence[Record]) -> tuple[Record, str] | None:
    """The first step and number of a loss or gradient norm that is not finite, if there is one.

    A term is named before the total that it spoils.
    """
    for record in records:
        names = [name for name in record if name.startswith(("loss/", "grad_norm/"))]
        for name in sorted(
            names, key=lambda name: name == "loss/total" or name.startswith("grad_norm/")
        ):
            if not math.isfinite(record[name]):
                return record, name
    return None
