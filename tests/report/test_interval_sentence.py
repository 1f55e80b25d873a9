"""The sentence below the bars: what the intervals are, or why there are none."""

from __future__ import annotations

from tapct.eval.intervals import Interval
from tapct.eval.results.task_section import TaskSection
from tapct.eval.results.task_statistics import MetricStatistics, TaskStatistics
from tapct.eval.scores import Headline, TaskResults
from tapct.eval.statistics import ModelValue, PatientEstimate, Statistics
from tapct.report.statistics import sentence


def section(estimate: PatientEstimate) -> TaskSection:
    found = Statistics((ModelValue("pretrained", estimate, ()),), (), 2000, 0)
    statistics = TaskStatistics((MetricStatistics("mean AUROC", "higher", found),))
    headline = Headline("mean AUROC", {"pretrained": estimate.value}, "higher", "A probe.")
    return TaskSection(
        {}, "scan", 27, 13, 0, headline, TaskResults({"pretrained": {}}), statistics=statistics
    )


def test_the_sentence_promises_intervals_only_where_there_are_some() -> None:
    with_one = sentence(section(PatientEstimate(0.7, Interval(0.6, 0.8), 13, 11)))
    assert "Intervals hold the true value" in with_one and "2000 resamples" in with_one
    reason = "only 7 patients of one class"
    without = sentence(section(PatientEstimate(0.7, None, 13, 11, reason)))
    assert without == f'<p class="muted">No interval: {reason}.</p>'
    few = sentence(section(PatientEstimate(0.7, None, 5, 4, "only 4 patients")))
    assert "there are only 4 patients" in few and "Intervals hold" not in few
