"""The results of one task in results.json."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tapct.eval.results import task_statistics
from tapct.eval.results.task_statistics import TaskStatistics
from tapct.eval.scores import Breakdown, FurtherMetric, Headline, ScanScore, TaskResults


@dataclass(frozen=True)
class Picture:
    """One picture of a test scan, or of all of them.

    Args:
        scan: scan ID; empty for a picture of all test scans.
        file: path below the folder of results.json.
        caption: what it shows.
    """

    scan: str
    file: str
    caption: str


@dataclass(frozen=True)
class TaskSection:
    """The results of one task.

    Args:
        config: settings of the task.
        labels: labels that it needs: `voxels`, `scan`, `landmarks`, `pairs` or `none`.
        num_train: scans that it learned from.
        num_test: scans that it evaluated.
        skipped: scans without the labels that it needs.
        headline: the number per model that people read.
        results: all its numbers.
        pictures: its pictures of test scans.
        statistics: intervals and paired differences; None in results of earlier versions.
    """

    config: Mapping[str, Any]
    labels: str
    num_train: int
    num_test: int
    skipped: int
    headline: Headline
    results: TaskResults
    pictures: tuple[Picture, ...] = ()
    statistics: TaskStatistics | None = None


def section_to_json(section: TaskSection) -> dict[str, Any]:
    """The object in results.json."""
    breakdown = section.results.breakdown
    return {
        "config": section.config,
        "labels": section.labels,
        "num_train": section.num_train,
        "num_test": section.num_test,
        "skipped": section.skipped,
        "headline": asdict(section.headline),
        "models": section.results.models,
        "breakdown": None if breakdown is None else asdict(breakdown),
        "scans": [asdict(score) for score in section.results.scans],
        "mean_over_parts": section.results.mean_over_parts,
        "further": [asdict(one) for one in section.results.further],
        "statistics": task_statistics.to_json(section.statistics),
        "pictures": [asdict(picture) for picture in section.pictures],
    }


def section_from_json(content: Mapping[str, Any]) -> TaskSection:
    """Rebuild what `section_to_json` wrote, of this version or an earlier one."""
    headline = content["headline"]
    table = content.get("breakdown")
    breakdown = None
    if table is not None:
        values = {str(row): numbers(models) for row, models in table["values"].items()}
        breakdown = Breakdown(str(table["title"]), str(table["row"]), values)
    return TaskSection(
        content.get("config", {}),
        str(content.get("labels", "")),
        int(content["num_train"]),
        int(content["num_test"]),
        int(content.get("skipped", 0)),
        Headline(
            str(headline["metric"]),
            numbers(headline["values"]),
            str(headline["direction"]),
            str(headline["meaning"]),
            _range(headline.get("range")),
            str(headline.get("mean_of", "")),
        ),
        TaskResults(
            content["models"],
            _scores(content["scans"]),
            breakdown,
            bool(content.get("mean_over_parts", False)),
            tuple(_further(one) for one in content.get("further", ())),
        ),
        pictures_from_json(content.get("pictures", ())),
        task_statistics.from_json(content.get("statistics")),
    )


def _further(content: Mapping[str, Any]) -> FurtherMetric:
    return FurtherMetric(
        str(content["metric"]),
        str(content["direction"]),
        str(content["meaning"]),
        _scores(content["scans"]),
        _range(content["range"]),
    )


def _scores(content: Sequence[Mapping[str, Any]]) -> tuple[ScanScore, ...]:
    return tuple(
        ScanScore(str(one["scan"]), str(one["model"]), number(one["value"]), numbers(one["parts"]))
        for one in content
    )


def _range(limits: Sequence[float | None] | None) -> tuple[float, float] | None:
    """Lowest and highest value; an open end, which JSON cannot hold, was written as null."""
    if limits is None:
        return None
    low, high = limits
    return (-math.inf if low is None else float(low), math.inf if high is None else float(high))


def pictures_from_json(content: Sequence[Mapping[str, Any]]) -> tuple[Picture, ...]:
    """Rebuild the list of pictures."""
    return tuple(
        Picture(str(one.get("scan", "")), str(one.get("file", "")), str(one.get("caption", "")))
        for one in content
    )


def number(value: object) -> float:
    """A number from JSON; NaN where there is none."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number else math.nan  # type: ignore[arg-type]


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Numbers by name from JSON; NaN where there is none."""
    return {str(name): number(value) for name, value in values.items()}
