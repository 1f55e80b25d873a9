"""A rank that keeps the others waiting is named with its node, its steps and its phase."""

from __future__ import annotations

import torch

from tapct.base import metric_names as names
from tapct.engine import metrics


def records(slowest_s: float, data_s: float) -> list[metrics.Record]:
    return [
        {
            "step": step,
            names.seconds("step"): 2.0,
            names.ranks(names.SLOWEST): 3.0,
            names.ranks(names.SLOWEST_S): slowest_s,
            names.ranks(names.SLOWEST_DATA_S): data_s,
            names.ranks(names.MEDIAN_S): 0.1,
        }
        for step in range(41, 51)
    ]


def test_the_phase_is_the_one_that_takes_most_of_the_time() -> None:
    for data_s, phase in ((1.4, "data"), (0.2, "views")):
        line = metrics.straggler(records(1.5, data_s), 2.0, lambda rank: f"gpu{rank}")
        start = f"rank 3 on gpu3 is slow in the phase {phase} of steps 41 to 50: it comes 1.50 s"
        assert line.startswith(start)
        assert ("data.loader.workers" in line) == (phase == "data")
    assert metrics.straggler(records(1.5, 1.4), 2.0).startswith("rank 3 is slow")
    assert metrics.straggler(records(0.15, 0.1), 2.0) == ""


def test_the_time_for_data_is_that_of_the_slowest_rank() -> None:
    late, data = torch.tensor([0.1, 0.9, 0.2]), torch.tensor([0.05, 0.7, 0.1])
    found = dict(metrics.arrivals(late, data))
    assert found[names.ranks(names.SLOWEST)] == 1
    assert found[names.ranks(names.SLOWEST_DATA_S)] == data[1]
    assert metrics.arrivals(late[:1], data[:1]) == []
