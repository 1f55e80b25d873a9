"""What one optimizer step reports: scalars that stay on the device until the loop fetches many steps at once."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tapct.engine.optim import UpdateReport
from tapct.ssl import health
from tapct.ssl.schedules import StepValues
from tapct.ssl.step import StepOutput

Record = dict[str, float]


@torch.no_grad()
def readings(outputs: Sequence[StepOutput], report: UpdateReport, with_rank: bool) -> list[tuple[str, Tensor]]:
    """All numbers of one optimizer step that live on the device.

    Args:
        outputs: of its micro-batches; terms are averaged, target statistics are summed, features are the last one's.
        report: of the optimizer step.
        with_rank: add RankMe, whose decomposition waits for a GPU.
    Returns:
        (name in metrics.jsonl, scalar), the same names in the same order at every step but for `health/rankme`.
    """
    numbers = [("loss/total", mean([output.total for output in outputs]))]
    for i, result in enumerate(outputs[0].results):
        for j, term in enumerate(result.terms):
            terms = [output.results[i].terms[j] for output in outputs]
            numbers.append((f"loss/{term.name}", mean([term.value for term in terms])))
            if term.cross_entropy is not None:
                entropies = [term.cross_entropy for term in terms if term.cross_entropy is not None]
                numbers.append((f"ce/{term.name}", mean(entropies)))
    numbers.extend((f"grad_norm/{name}", norm) for name, norm in report.grad_norms)
    for i, result in enumerate(outputs[0].results):
        stats = [output.results[i].targets for output in outputs]
        present = [one for one in stats if one is not None]
        if result.targets is None:
            continue
        sums = present[0].sums
        for one in present[1:]:
            sums = sums + one.sums
        life, name = health.target_health(sums), result.targets.name
        ln_k = math.log(len(sums.mass_K))
        numbers.extend(
            [
                (f"health/{name}_ln_k_minus_ce", ln_k - mean([one.cross_entropy for one in present])),
                (f"health/{name}_information", life.information),
                (f"health/{name}_marginal_entropy", life.marginal_entropy),
                (f"health/{name}_target_entropy", life.target_entropy),
                (f"health/{name}_prototypes_used", life.prototypes_used),
            ]
        )
    student, teacher = outputs[-1].tokens.student_global, outputs[-1].tokens.teacher_global
    numbers.append(("health/teacher_student_cosine", health.teacher_student_cosine(student.cls_BD, teacher.cls_BD)))
    numbers.append(("health/cls_std", health.cls_std(teacher.cls_BD)))
    numbers.append(("health/patch_norm_outliers", health.patch_norm_outliers(teacher.patches_BND)))
    if with_rank:
        numbers.append(("health/rankme", health.rankme(teacher.patches_BND.flatten(0, 1))))
    return numbers


def mean(values: Sequence[Tensor]) -> Tensor:
    """Mean of scalars, detached."""
    return torch.stack([value.detach().float() for value in values]).mean()


class StageTimer:
    """Seconds of the stages of a step: by the clock on a CPU, by events on a GPU, which are read only when fetched.

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
        self, step: int, samples: int, values: StepValues, numbers: list[tuple[str, Tensor]], timer: StageTimer
    ) -> None:
        """Keep one step's numbers; nothing is copied to the host.

        Args:
            step: finished optimizer steps, this one included.
            samples: seen so far.
            values: of the schedules.
            numbers: scalars on the device.
            timer: of this step.
        """
        host: Record = {
            "step": step,
            "samples": samples,
            "time": time.time(),
            "lr": values.lr,
            "wd": values.wd,
            "momentum": values.momentum,
            "teacher_temp": values.teacher_temp,
        }
        names = [name for name, _ in numbers]
        row = torch.stack([number.detach().float() for _, number in numbers])
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
        for name in sorted(names, key=lambda name: name == "loss/total" or name.startswith("grad_norm/")):
            if not math.isfinite(record[name]):
                return record, name
    return None
