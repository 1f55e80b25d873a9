from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from tapct.base.exits import UserError
from tapct.ssl.schedules import OptimSchedule, Schedules, StepValues


def dinov2_array(
    base: float, final: float, total: int, warmup: int, start_warmup: float
) -> np.ndarray:
    """The reference: an array of all values, element by element."""
    values = np.zeros(total)
    ramp = np.linspace(start_warmup, base, warmup)
    for i in range(total):
        if i < warmup:
            values[i] = ramp[i]
        else:
            progress = (i - warmup) / (total - warmup)
            values[i] = final + 0.5 * (base - final) * (1 + np.cos(np.pi * progress))
    return values


def collect(schedules: Schedules, steps: int) -> dict[str, np.ndarray]:
    rows = [dataclasses.asdict(schedules.at(step)) for step in range(steps)]
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.parametrize(
    ("total", "batch", "warmup_share"),
    [(100, 256, 0.1), (37, 8, 0.2), (1000, 2048, 0.0), (10, 3, 0.95)],
)
def test_curves_equal_dinov2_arrays(total: int, batch: int, warmup_share: float) -> None:
    config = OptimSchedule(
        lr=4e-3, warmup_share=warmup_share, teacher_temp_warmup_share=0.3, freeze_last_layer_steps=3
    )
    got = collect(Schedules(config, total, batch), total)
    warmup = round(warmup_share * total)
    peak = 4e-3 * (batch / 1024) ** 0.5
    np.testing.assert_allclose(
        got["lr"], dinov2_array(peak, 1e-6, total, warmup, 0.0), rtol=1e-12, atol=1e-18
    )
    np.testing.assert_allclose(got["wd"], dinov2_array(0.04, 0.4, total, 0, 0.0), rtol=1e-12)
    np.testing.assert_allclose(got["momentum"], dinov2_array(0.992, 1.0, total, 0, 0.0), rtol=1e-12)
    temp_steps = round(0.3 * total)
    temp = np.concatenate([np.linspace(0.04, 0.07, temp_steps), np.full(total - temp_steps, 0.07)])
    np.testing.assert_allclose(got["teacher_temp"], temp, rtol=1e-12)
    np.testing.assert_array_equal(got["last_layer_frozen"], np.arange(total) < 3)


def test_warmup_starts_at_zero_and_takes_the_peak_twice() -> None:
    schedules = Schedules(
        OptimSchedule(lr=1e-3, lr_scaling="none", warmup_share=0.2), total_steps=50, global_batch=8
    )
    assert schedules.warmup_steps == 10
    assert schedules.at(0).lr == 0.0
    assert schedules.at(9).lr == schedules.at(10).lr == 1e-3
    assert schedules.at(11).lr < 1e-3


def test_every_curve_keeps_its_end_after_the_last_step() -> None:
    schedules = Schedules(OptimSchedule(), total_steps=20, global_batch=64)
    end = StepValues(lr=1e-6, wd=0.4, momentum=1.0, teacher_temp=0.07, last_layer_frozen=False)
    assert schedules.at(20) == schedules.at(500) == end


def test_square_root_rule_scales_lr_and_leaves_min_lr() -> None:
    scaled = Schedules(OptimSchedule(warmup_share=0.0), 10, 256)
    absolute = Schedules(OptimSchedule(warmup_share=0.0, lr_scaling="none"), 10, 256)
    assert scaled.at(0).lr == pytest.approx(0.5 * absolute.at(0).lr)
    assert absolute.at(0).lr == 4e-3
    assert scaled.at(10).lr == absolute.at(10).lr == 1e-6


CHANGED: dict[str, Any] = {
    "lr": 1e-3,
    "lr_scaling": "none",
    "min_lr": 1e-5,
    "warmup_share": 0.5,
    "weight_decay": (0.04, 0.04),
    "momentum": (0.996, 1.0),
    "teacher_temp": (0.04, 0.04),
    "teacher_temp_warmup_share": 0.1,
    "freeze_last_layer_steps": 4,
}


def test_every_field_changes_something() -> None:
    assert set(CHANGED) == {field.name for field in dataclasses.fields(OptimSchedule)}
    default = collect(Schedules(OptimSchedule(), 30, 128), 30)
    for name, value in CHANGED.items():
        other = collect(
            Schedules(dataclasses.replace(OptimSchedule(), **{name: value}), 30, 128), 30
        )
        assert any((default[key] != other[key]).any() for key in default), name


@pytest.mark.parametrize(("steps", "batch"), [(0, 8), (10, 0)])
def test_empty_runs_are_refused(steps: int, batch: int) -> None:
    with pytest.raises(UserError, match="at least 1"):
        Schedules(OptimSchedule(), steps, batch)


def test_peak_below_min_lr_is_refused_with_the_numbers() -> None:
    with pytest.raises(UserError, match=r"below min_lr 0.001.*lr_scaling=none"):
        Schedules(OptimSchedule(lr=4e-3, min_lr=1e-3), total_steps=10, global_batch=4)
