"""Charts: the data that the page carries is the data of the run, in few enough points."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from test_report import Page

from tapct.report import charts, series
from tapct.report.charts import Curve, ReferenceLine


def content_of(html: str) -> dict[str, Any]:
    (content,) = Page(html).data
    found: dict[str, Any] = content
    return found


def test_a_short_curve_is_written_as_it_is() -> None:
    x, y = np.arange(1.0, 12.0), np.array([5.0, 4, 4.5, 3, 2, 2.5, 1, 1.5, 1, 0.5, 0.25])
    (curve,) = content_of(charts.line_chart("t", "u", [Curve("c", x, y)]))["curves"]
    assert curve["x"] == x.tolist() and curve["mean"] == y.tolist() and curve["size"] == 1
    assert "low" not in curve and "first" not in curve


def test_a_long_curve_keeps_every_spike_its_mean_and_its_steps() -> None:
    num = 125_000
    x = np.arange(1.0, num + 1)
    y = np.sin(x / 9000) + np.random.default_rng(0).normal(0, 0.1, num)
    y[[31_234, 70_001]] = 50, -50
    y[[5, 99_999]] = np.nan, np.inf
    found = series.grouped(x, y)
    assert len(found.mean) == series.MAX_GROUPS and found.size in (83, 84)
    place, start = 0, 0
    for place in range(series.MAX_GROUPS):  # the groups follow each other and leave nothing out
        part = y[start : int(found.last[place])]
        finite = part[np.isfinite(part)]
        assert found.first[place] == start + 1
        assert (found.low[place], found.high[place]) == (finite.min(), finite.max())
        assert found.mean[place] == pytest.approx(finite.mean(), abs=1e-9)
        start = int(found.last[place])
    assert start == num and found.high.max() == 50 and found.low.min() == -50
    content = content_of(charts.line_chart("t", "u", [Curve("c", x, y)]))
    (curve,) = content["curves"]
    assert max(curve["high"]) == 50 and curve["x"][-1] == num and curve["num_broken"] == 2
    assert len(json.dumps(content)) < 80_000


def test_a_group_without_a_finite_value_is_a_gap() -> None:
    y = np.ones(10_000)
    y[100:300] = np.nan
    found = series.grouped(np.arange(10_000.0), y, 1000)
    assert np.isnan(found.mean[10:30]).all() and np.isfinite(found.mean[[9, 30]]).all()
    (curve,) = content_of(charts.line_chart("t", "", [Curve("", np.arange(10_000.0), y)]))["curves"]
    assert None in curve["mean"] and curve["broken"] == 100


def test_medians_drop_single_slow_steps() -> None:
    y = np.full(1000, 2.0)
    y[::50] = 99.0
    x, medians = series.group_medians(np.arange(1000.0), y, 40)
    assert len(x) == 40 and (medians == 2.0).all() and x[-1] == 999


@pytest.mark.parametrize("y", [[2.0], [0.0], [7.0, 7.0, 7.0], [math.nan]])
def test_one_step_and_constant_curves_have_charts(y: list[float]) -> None:
    curve = Curve("c", np.arange(len(y)) + 1.0, np.array(y))
    html = charts.line_chart("t", "u", [curve], references=[ReferenceLine("r", 1.0)])
    (drawn,) = content_of(html)["curves"]
    assert drawn["mean"] == [None if math.isnan(one) else one for one in y]


def test_names_cannot_end_the_script_that_carries_them() -> None:
    curve = Curve("</script><b>", np.ones(1), np.ones(1))
    html = charts.line_chart("<i>", "", [curve])
    assert "<b>" not in html and "<i>" not in html
    assert content_of(html)["curves"][0]["label"] == "</script><b>"


def test_the_areas_of_a_stack_are_the_parts() -> None:
    x = np.arange(30.0)
    parts = [Curve("a", x, np.full(30, 1.0)), Curve("b", x, np.full(30, 0.5))]
    content = content_of(charts.area_chart("t", "s", parts))
    assert [curve["mean"] for curve in content["curves"]] == [[1] * 30, [0.5] * 30]


def test_shares_of_a_bar_add_up() -> None:
    html = charts.share_bar([("a", 3.0), ("b", 1.0)], {"a": "0:03", "b": "0:01"})
    words = Page(html).words
    assert "width:75.00%" in html and "width:25.00%" in html
    assert "a3.0075.00:03" in words and "b1.0025.00:01" in words
