"""A number of a run has one value: in the report's tiles and charts, in compare, and in jobs."""

from __future__ import annotations

import json
import math
import random
import re
import statistics
from pathlib import Path

import pytest
from test_report import Page, record

from tapct.base.recent import last_mean, window_in_words
from tapct.cluster.jobs import Submission, read_progress
from tapct.report import compare, compare_page, page
from tapct.report.history import read_history
from tapct.report.markup import number


@pytest.mark.parametrize("steps", [1, 7, 19, 20, 21, 400])
def test_the_loss_is_the_same_everywhere(tmp_path: Path, steps: int) -> None:
    draw, rows = random.Random(steps), []
    for step in range(1, steps + 1):
        rows.append(record(step) | {"loss/total": 9 - step / 100 + draw.random()})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    slow = statistics.fmean([row["loss/total"] for row in rows][-20:])
    assert read_history(tmp_path / "metrics.jsonl").recent("loss/total") == pytest.approx(slow)

    html = page.write(tmp_path).read_text()
    words = Page(html).words
    shown = number(slow)
    assert f"Total loss{shown}first step" in words, "tile"
    assert re.search(rf'Total loss <span.*?<b class="val">{shown}</b>', html), "chart"
    window = f"mean of the last {min(20, steps)} steps" if steps > 1 else "value of the only step"
    assert f"Losses and health: {window}" in words
    comparison = compare.read([tmp_path])
    assert dict(compare.numbers(comparison))["Total loss"] == [shown]
    assert f'<b class="val">{shown}</b>' in compare_page.render(comparison)
    submission = Submission("1", 1e9, 1000, 20, str(tmp_path))
    assert read_progress(tmp_path, submission, None).loss == pytest.approx(slow)


def test_the_window_counts_steps_and_not_values() -> None:
    assert last_mean([10, 20, 30], [1.0, 2.0, 4.0], 30) == 3.0  # 10 is 20 steps ago
    assert last_mean([10, 20], [1.0, 2.0], 100) == 2.0  # the newest one
    assert math.isnan(last_mean([], [], 100))
    assert math.isnan(last_mean([99, 100], [math.nan, 1.0], 100))
    assert window_in_words(1) == "value of the only step"
    assert window_in_words(100) == "mean of the last 20 steps"
