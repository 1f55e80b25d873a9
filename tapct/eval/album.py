"""The pictures of some test scans: one per task and one of the patch features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tapct.eval import pictures
from tapct.eval.contract import Task
from tapct.eval.features import DenseFeatures
from tapct.eval.results import Picture
from tapct.eval.scans import LabelledScan
from tapct.run_folder import EvaluationFolder


@dataclass(frozen=True)
class Outputs:
    """Features and predictions of one test scan, kept until its pictures are drawn.

    Args:
        dense: model name -> features.
        predictions: task name -> model name -> prediction.
    """

    dense: dict[str, DenseFeatures] = field(default_factory=dict)
    predictions: dict[str, dict[str, Any]] = field(default_factory=dict)


class Album:
    """Draws the pictures of test scans and keeps their entries for the results.

    Args:
        out: folder of results.json.
    """

    def __init__(self, out: Path) -> None:
        self.out, self.folder = out, EvaluationFolder(out).pictures
        self.of_task: dict[str, list[Picture]] = {}
        self.pca: list[Picture] = []

    def add(
        self,
        scan: LabelledScan,
        truths: Mapping[str, Any],
        tasks: Mapping[str, Task[Any, Any]],
        outputs: Outputs,
    ) -> None:
        """Draw one picture per task and one of the features of all models.

        Args:
            scan: test scan.
            truths: task name -> what its `truth` returned for the scan.
            tasks: task name -> task.
            outputs: what the models gave.
        """
        slices: tuple[int, int] | None = None  # axial and coronal slice of the feature picture
        for name, truth in truths.items():
            task, file = tasks[name], self.folder / name / f"{scan.id}.png"
            caption = task.draw(file, truth, outputs.predictions[name])
            if caption:
                picture = Picture(scan.id, self.below_out(file), caption)
                self.of_task.setdefault(name, []).append(picture)
            # the first task that names slices decides
            slices = slices or task.slices_of_interest(truth)
        hu_ZYX, spacing_mm = scan.volume.hu_ZYX, scan.volume.spacing_mm
        if slices is None:
            slices = (hu_ZYX.shape[0] // 2, hu_ZYX.shape[1] // 2)
        file = self.folder / f"{scan.id}_features.png"
        columns = [(name.replace("_", " "), dense) for name, dense in outputs.dense.items()]
        pictures.draw_pca(file, hu_ZYX, spacing_mm, columns, slices)
        caption = f"first three principal components of the patch features of {scan.id}"
        self.pca.append(Picture(scan.id, self.below_out(file), caption))

    def below_out(self, file: Path) -> str:
        """Path of a picture as results.json holds it."""
        return file.relative_to(self.out).as_posix()
