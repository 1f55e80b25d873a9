"""results.json: what one evaluation measured, on which scans, and how it was made."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tapct.base import files
from tapct.eval import old_formats
from tapct.eval.contract import Breakdown, Headline, ScanScore, TaskResults
from tapct.run_folder import EvaluationFolder

SCHEMA = 2


@dataclass(frozen=True)
class SplitRecord:
    """Which scans were used for what.

    Args:
        mode: `patients` or `blocks`.
        held_out_from_pretraining: True if pretraining saw none of the test patients.
        train: IDs of the scans that tasks learned from.
        test: IDs of the scans that models were evaluated on.
        note: what a reader must know about the split; may be empty.
    """

    mode: str
    held_out_from_pretraining: bool
    train: tuple[str, ...]
    test: tuple[str, ...]
    note: str = ""


@dataclass(frozen=True)
class Picture:
    """One picture of a test scan.

    Args:
        scan: scan ID.
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
        labels: labels that it needs: `voxels`, `scan`, `pairs` or `none`.
        num_train: scans that it learned from.
        num_test: scans that it evaluated.
        skipped: scans without the labels that it needs.
        headline: the number per model that people read.
        results: all its numbers.
        pictures: its pictures of test scans.
    """

    config: Mapping[str, Any]
    labels: str
    num_train: int
    num_test: int
    skipped: int
    headline: Headline
    results: TaskResults
    pictures: tuple[Picture, ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """The content of results.json.

    Args:
        tasks: task name -> its results, in the order of the config.
        split: which scans were used for what.
        preprocess: settings of `eval.preprocess`.
        patch: voxels (z, y, x) of a patch.
        seed: random seed of the split and of the choice of training patches.
        pca: pictures of patch features.
        versions: package -> version.
        command: command line that made it; empty where it was called from Python.
        seconds: wall time.
    """

    tasks: Mapping[str, TaskSection]
    split: SplitRecord
    preprocess: Mapping[str, Any]
    patch: tuple[int, ...]
    seed: int
    pca: tuple[Picture, ...] = ()
    versions: Mapping[str, str] | None = None
    command: str = ""
    seconds: float = math.nan

    def to_json(self) -> dict[str, Any]:
        """The object that is written; NaN becomes null."""
        tasks = {name: _section_to_json(section) for name, section in self.tasks.items()}
        content = {
            "schema": SCHEMA,
            "tasks": tasks,
            "split": asdict(self.split),
            "preprocess": self.preprocess,
            "patch": self.patch,
            "seed": self.seed,
            "pca": [asdict(picture) for picture in self.pca],
            "versions": self.versions or {},
            "command": self.command,
            "seconds": self.seconds,
        }
        plain: dict[str, Any] = _plain(content)
        return plain

    def lines(self) -> list[str]:
        """Headlines as lines for a terminal."""
        lines = []
        for name, section in self.tasks.items():
            headline = section.headline
            if len(self.tasks) > 1:
                lines.append(f"{name} ({headline.direction} is better)")
            for model, value in headline.values.items():
                lines.append(f"{model:<24} {headline.metric} {shown(value)}")
        return lines

    def write(self, folder: Path) -> None:
        """Write FOLDER/results.json; the file is either the old or the new one, never half."""
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n"
        files.write_atomically(EvaluationFolder(folder).results, text)


def title_of(task: str) -> str:
    """Heading of a task: `mylab.tasks.lung_depth` becomes `Lung depth`."""
    return task.rpartition(".")[2].replace("_", " ").capitalize()


def shown(value: float) -> str:
    """A headline value with three decimals, or three digits where that would hide it."""
    if not math.isfinite(value):
        return "–"
    return f"{value:.3f}" if value == 0 or 1e-3 <= abs(value) < 1e3 else f"{value:.3g}"


def from_json(content: Mapping[str, Any]) -> Evaluation:
    """Rebuild an evaluation from what `Evaluation.to_json` wrote, of this or an earlier schema.

    Raises:
        ValueError: the content is no evaluation, or of a later schema.
    """
    schema = content.get("schema", 1)
    if schema == 1:
        content = old_formats.results_from_schema_1(content)
    elif schema != SCHEMA:
        raise ValueError(f"it has schema {schema}, this version of tapct reads up to {SCHEMA}")
    try:
        split = content.get("split", {})
        record = SplitRecord(
            str(split.get("mode", "")),
            bool(split.get("held_out_from_pretraining", False)),
            tuple(split.get("train", ())),
            tuple(split.get("test", ())),
            str(split.get("note", "")),
        )
        return Evaluation(
            {name: _section_from_json(section) for name, section in content["tasks"].items()},
            record,
            content.get("preprocess", {}),
            tuple(content.get("patch", ())),
            int(content.get("seed", 0)),
            _pictures(content.get("pca", ())),
            content.get("versions", {}),
            str(content.get("command", "")),
            _number(content.get("seconds")),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"it is no evaluation ({type(error).__name__}: {error})") from error


def read(folder: Path) -> tuple[Evaluation | None, str]:
    """Read FOLDER/results.json.

    Returns:
        The evaluation and an empty text, or None and the reason.
    """
    path = EvaluationFolder(folder).results
    if not path.is_file():
        return None, f"{path.name} is not there"
    try:
        content = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except OSError as error:
        return None, f"{path.name} cannot be read: {error.strerror}"
    except json.JSONDecodeError:
        content = None
    if not isinstance(content, dict):
        return None, f"{path.name} is damaged: it holds no JSON object"
    try:
        return from_json(content), ""
    except ValueError as error:
        return None, f"{path.name} cannot be used: {error}"


def _section_to_json(section: TaskSection) -> dict[str, Any]:
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
        "pictures": [asdict(picture) for picture in section.pictures],
    }


def _section_from_json(content: Mapping[str, Any]) -> TaskSection:
    headline = content["headline"]
    limits = headline.get("range")
    scores = (
        ScanScore(
            str(one["scan"]), str(one["model"]), _number(one["value"]), _numbers(one["parts"])
        )
        for one in content["scans"]
    )
    table = content.get("breakdown")
    breakdown = None
    if table is not None:
        values = {str(row): _numbers(models) for row, models in table["values"].items()}
        breakdown = Breakdown(str(table["title"]), str(table["row"]), values)
    return TaskSection(
        content.get("config", {}),
        str(content.get("labels", "")),
        int(content["num_train"]),
        int(content["num_test"]),
        int(content.get("skipped", 0)),
        Headline(
            str(headline["metric"]),
            _numbers(headline["values"]),
            str(headline["direction"]),
            str(headline["meaning"]),
            None if limits is None else (float(limits[0]), float(limits[1])),
        ),
        TaskResults(content["models"], tuple(scores), breakdown),
        _pictures(content.get("pictures", ())),
    )


def _pictures(content: Sequence[Mapping[str, Any]]) -> tuple[Picture, ...]:
    return tuple(
        Picture(str(one.get("scan", "")), str(one.get("file", "")), str(one.get("caption", "")))
        for one in content
    )


def _number(value: object) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number else math.nan  # type: ignore[arg-type]


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {str(name): _number(value) for name, value in values.items()}


def _plain(value: Any) -> Any:
    """What JSON can hold: numpy's numbers as Python's, arrays and tuples as lists, NaN as null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
