"""The public scans, laid out for one evaluation (docs/benchmarks.md, "Real scans")."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import SimpleITK

from tapct.base.exits import UserError

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


@pytest.fixture
def real_scans(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(SCRIPTS), *sys.path])
    import real_scans

    return real_scans


def test_real_scans_are_laid_out_with_their_lungs(
    real_scans: ModuleType, real_ct: Path, tmp_path: Path
) -> None:
    real_scans.main([str(real_ct), str(tmp_path)])
    with (tmp_path / "split.csv").open(newline="") as file:
        rows = {row["path"]: row for row in csv.DictReader(file)}
    facts = json.loads((tmp_path / "dataset.json").read_text())
    medians = {}
    for path in rows:
        scan = SimpleITK.ReadImage(str(tmp_path / path))
        name = Path(path).name.replace("_0000", "")
        labels = SimpleITK.ReadImage(str(tmp_path / "labelsTr" / name))
        assert labels.GetSize() == scan.GetSize() and labels.GetOrigin() == scan.GetOrigin()
        hu_ZYX, labels_ZYX = (SimpleITK.GetArrayFromImage(one) for one in (scan, labels))
        medians[name] = float(np.median(hu_ZYX[labels_ZYX == facts["labels"]["lung"]]))
        assert set(np.unique(labels_ZYX).tolist()) <= {*facts["labels"].values()}
    assert len(medians) == 4 and all(-960 < median < -700 for median in medians.values())
    tested = {row["patient"] for row in rows.values() if row["split"] == "test"}
    trained = {row["patient"] for row in rows.values() if row["split"] == "train"}
    assert tested == {"body"} and not tested & trained


def test_a_missing_scan_is_an_error_of_one_line(real_scans: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give the folder of the public scans"):
        real_scans.main([str(tmp_path), str(tmp_path / "out")])
