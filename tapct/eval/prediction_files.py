"""Predicted label maps as NIfTI files in the geometry of the original scans.

OUT/predictions/TASK/MODEL/ID.nii.gz     ID: scan ID, as in the columns of the manifest
OUT/predictions/TASK/MODEL/labels.json   label value -> name
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path

from tapct.base import console, files
from tapct.base.counted import counted
from tapct.data.manifest import Manifest, Row
from tapct.data.packed import label_files
from tapct.data.packed.label_files import FileGrid
from tapct.data.packed.store import ScanPlace, Store
from tapct.types import LabelMap, Refused

NO_MANIFEST = "the manifest that was packed is gone, has changed or is of an earlier version"


class PredictionFiles:
    """Writes the predictions of an evaluation.

    Args:
        folder: folder of all predictions.
        store: packed scans.
    """

    def __init__(self, folder: Path, store: Store) -> None:
        self.folder, self.store = folder, store
        self._not_original: dict[str, str] = {}  # scan ID -> reason
        self._grids: dict[str, FileGrid] = {}

    def write(self, task: str, model: str, scan_id: str, labels: LabelMap) -> None:
        """Write the prediction of one model on one test scan.

        Args:
            task: task name.
            model: model name.
            scan_id: scan ID.
            labels: label map on the grid of the packed scan.
        """
        place = self.folder / task / model
        place.mkdir(parents=True, exist_ok=True)
        if scan_id not in self._grids:
            self._grids = {scan_id: self._grid(scan_id, labels)}  # scans come one after another
        label_files.write(place / f"{scan_id}.nii.gz", labels.labels_ZYX, self._grids[scan_id])
        names = {str(value): name for value, name in labels.names}
        files.write_atomically(place / "labels.json", json.dumps(names, indent=1) + "\n")

    def report(self) -> None:
        """Print which predictions are not in the geometry of their original file."""
        if not self._not_original:
            return
        scan_id, reason = next(iter(self._not_original.items()))
        scans = counted(len(self._not_original), "scan")
        console.say(
            f"predictions of {scans} have the axes of the packed scan (LPS) and not those of the "
            f"original file; scan {scan_id}: {reason}"
        )

    def _grid(self, scan_id: str, labels: LabelMap) -> FileGrid:
        manifest, rows = self._manifest
        reason = NO_MANIFEST
        if manifest is not None and scan_id in rows:
            try:
                return label_files.original_grid(manifest, rows[scan_id])
            except Refused as error:
                reason = error.detail
        self._not_original[scan_id] = reason
        place = self._places.get(scan_id)
        z, y, x = labels.labels_ZYX.shape
        return label_files.lps_grid(
            (z, y, x),
            labels.spacing_mm,
            () if place is None else place.origin_mm,
            () if place is None else place.directions,
        )

    @functools.cached_property
    def _manifest(self) -> tuple[Manifest | None, Mapping[str, Row]]:
        manifest = self.store.manifest()
        rows = manifest.accepted if manifest is not None else ()
        return manifest, {row.id: row for row in rows}

    @functools.cached_property
    def _places(self) -> Mapping[str, ScanPlace]:
        return self.store.places()
