"""The pictures of an evaluation: of some test scans, one per task and one of the patch features,
and of all test scans together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from tapct.base import console
from tapct.eval.contract import Task
from tapct.eval.features.dense import DenseFeatures, PatchGrid
from tapct.eval.passes.failures import ends_all, reason_of
from tapct.eval.passes.reader import ModelOnScan
from tapct.eval.pictures import drawing, volumes
from tapct.eval.pictures.volumes import FeatureLayer, LabelLayer
from tapct.eval.results.json_file import Picture
from tapct.eval.scans.body import body_mask
from tapct.eval.scans.labelled_scan import LabelledScan
from tapct.run_folder import EvaluationFolder


@dataclass(frozen=True)
class Outputs:
    """Features and predictions of one test scan, kept until its pictures are drawn.

    Args:
        dense: model name -> features.
        predictions: task name -> patch grid -> model name -> prediction.
    """

    dense: dict[str, DenseFeatures] = field(default_factory=dict)
    predictions: dict[str, dict[PatchGrid, dict[str, Any]]] = field(default_factory=dict)

    def add(self, task: str, one: ModelOnScan, prediction: Any) -> None:
        """Keep what a task predicted of one model."""
        of_grid = self.predictions.setdefault(task, {}).setdefault(one.dense.grid, {})
        of_grid[one.model.name] = prediction


class Album:
    """Draws the pictures of test scans and keeps their entries for the results. A picture that
    cannot be drawn is named and left out.

    Args:
        out: folder of results.json.
    """

    def __init__(self, out: Path) -> None:
        self.out, self.folder = out, EvaluationFolder(out).pictures
        self.of_task: dict[str, list[Picture]] = {}
        self.pca: list[Picture] = []
        self.volumes: list[Picture] = []

    def add(
        self,
        scan: LabelledScan,
        truths: Mapping[PatchGrid, Mapping[str, Any]],
        tasks: Mapping[str, Task[Any, Any]],
        outputs: Outputs,
    ) -> None:
        """Draw one picture per task, or several where models differ in their patch grid, and one of
        the features of all models; write the scan with all of this for the viewer of the report.

        Args:
            scan: test scan.
            truths: patch grid -> task name -> what its `truth` returned for the scan.
            tasks: task name -> task, of those that have not failed.
            outputs: what the models gave.
        """
        slices: tuple[int, int] | None = None  # axial and coronal slice of the feature picture
        layers: list[LabelLayer] = []
        for number, (grid, truth_of) in enumerate(truths.items(), start=1):
            for name, task in tasks.items():
                if name not in truth_of:
                    continue
                truth, predictions = truth_of[name], outputs.predictions[name][grid]
                ending = "" if number == 1 else f"_{number}"
                file = self.folder / name / f"{scan.id}{ending}.png"
                with _lost(f"task {name}", f"draw() of scan {scan.id}"):
                    caption = task.draw(file, truth, predictions)
                    if caption:
                        picture = Picture(scan.id, self.below_out(file), caption)
                        self.of_task.setdefault(name, []).append(picture)
                with _lost(f"task {name}", f"layers() of scan {scan.id}"):
                    drawn = task.layers(truth, predictions)
                    known = {layer.title for layer in layers}  # the truth is the same on every grid
                    layers += [layer for layer in drawn if layer.title not in known]
                with _lost(f"task {name}", f"slices_of_interest() of scan {scan.id}"):
                    # the first task that names slices decides
                    slices = slices or task.slices_of_interest(truth)
        with _lost("features", f"drawing scan {scan.id}"):
            self._add_features(scan, layers, outputs, slices)

    def _add_features(
        self,
        scan: LabelledScan,
        layers: Sequence[LabelLayer],
        outputs: Outputs,
        slices: tuple[int, int] | None,
    ) -> None:
        hu_ZYX, spacing_mm = scan.volume.hu_ZYX, scan.volume.spacing_mm
        if slices is None:
            slices = (hu_ZYX.shape[0] // 2, hu_ZYX.shape[1] // 2)
        file = self.folder / f"{scan.id}_features.png"
        body_ZYX, columns = body_mask(hu_ZYX), []
        for name, dense in outputs.dense.items():
            colours_CZYX = drawing.feature_colours(dense, body_ZYX)
            columns.append((name.replace("_", " "), dense.grid, colours_CZYX))
        drawing.draw_pca(file, hu_ZYX, spacing_mm, columns, body_ZYX, slices)
        caption = f"first three principal components of the patch features of {scan.id}"
        self.pca.append(Picture(scan.id, self.below_out(file), caption))
        self._add_volume(scan, body_ZYX, layers, columns, slices)

    def _add_volume(
        self,
        scan: LabelledScan,
        body_ZYX: np.ndarray,
        layers: Sequence[LabelLayer],
        columns: Sequence[tuple[str, PatchGrid, Tensor]],
        slices: tuple[int, int],
    ) -> None:
        features = []
        for title, grid, colours_CZYX in columns:
            rgb_ZYXC = (colours_CZYX * 255).round().byte().permute(1, 2, 3, 0).numpy()
            features.append(FeatureLayer(title, rgb_ZYXC, grid.patches_per_voxel))
        names = list(dict.fromkeys(name for layer in layers for name in layer.names.values()))
        volume = volumes.reduced(
            scan.id,
            scan.volume.hu_ZYX,
            body_ZYX,
            scan.volume.spacing_mm,
            labels=layers,
            features=features,
            colour_of=drawing.hex_colours(names),
            start=slices,
        )
        file = self.folder / f"{scan.id}_volume.npz"
        volume.write(file)
        caption = f"reduced voxels of {scan.id} with label maps and feature colours"
        self.volumes.append(Picture(scan.id, self.below_out(file), caption))

    def add_results(self, tasks: Mapping[str, Task[Any, Any]]) -> None:
        """Draw the pictures of tasks that have one of all test scans."""
        for name, task in tasks.items():
            file = self.folder / name / "all_scans.png"
            with _lost(f"task {name}", "draw_results()"):
                caption = task.draw_results(file)
                if caption:
                    picture = Picture("", self.below_out(file), caption)
                    self.of_task.setdefault(name, []).append(picture)

    def below_out(self, file: Path) -> str:
        """Path of a picture as results.json holds it."""
        return file.relative_to(self.out).as_posix()


@contextmanager
def _lost(what: str, doing: str) -> Iterator[None]:
    """Within this context, an error costs a picture, which is printed, and nothing else.

    Args:
        what: what the picture shows, e.g. `task depth`.
        doing: what is being done, for an error that a user cannot correct.
    """
    try:
        yield
    except Exception as error:
        if ends_all(error):
            raise
        console.say_line(f"{what}: a picture is left out: {reason_of(f'{what}: ', doing, error)}")
