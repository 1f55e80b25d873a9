"""Damaged files through `tapct index`: none ends it, blocks it or is accepted with other values."""

from __future__ import annotations

import collections
import contextlib
import math
import re
import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK
from mutants import nibabel_zyx, write_mutants

from tapct.base.exits import single_line
from tapct.data.digest import voxel_digest
from tapct.data.index.build import build_manifest
from tapct.data.manifest import Manifest, Row
from tapct.data.workers.process_pool import ScanLimits

DOCUMENT = Path(__file__).parents[2] / "docs" / "ingest.md"
LIMITS = ScanLimits(seconds=60, memory_bytes=3 << 30)


def documented_reasons() -> set[str]:
    """The closed list of reasons."""
    rows = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("| `")]
    return {reason for row in rows for reason in re.findall(r"`(\w+)`", row.split("|")[1])}


def check_row(row: Row, path: Path, reasons: set[str]) -> None:
    """A refusal has a known reason and one line; what is accepted is what other libraries read."""
    if row.status == "refused":
        assert row.reason in reasons, row
        assert row.detail and row.detail.isprintable(), row
        return
    spacing_mm = (row.spacing_z_mm, row.spacing_y_mm, row.spacing_x_mm)
    assert all(math.isfinite(mm) and 0.05 <= mm <= 50 for mm in spacing_mm), row
    assert min(row.depth, row.height, row.width) >= 1
    assert -1024 <= row.hu_p005 <= row.hu_p50 <= row.hu_p995 <= 32767
    if row.kind == "dicom":
        sizes: collections.Counter[tuple[int, int]] = collections.Counter()
        for file in path.parent.iterdir():
            with contextlib.suppress(Exception), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                head = pydicom.dcmread(file, force=True)
                sizes[head.Rows, head.Columns] += 1
        assert sizes[row.height, row.width] >= row.depth, row
        return
    if row.kind == "nifti":
        image = nibabel_zyx(path)
        values_ZYX = image.get_fdata().transpose(2, 1, 0)
        zooms = np.linalg.norm(image.affine[:3, :3], axis=0)[::-1]
        units = {"meter": 1000.0, "micron": 0.001}
        zooms = zooms * units.get(image.header.get_xyzt_units()[0], 1.0)
    else:
        image = SimpleITK.DICOMOrient(SimpleITK.ReadImage(str(path)), "LPS")
        values_ZYX = SimpleITK.GetArrayFromImage(image).astype(np.float64)
        zooms = np.asarray(image.GetSpacing()[::-1])
    assert values_ZYX.shape == (row.depth, row.height, row.width), row
    np.testing.assert_allclose(spacing_mm, zooms, rtol=1e-3, err_msg=str(row))
    hu_ZYX = np.maximum(np.rint(values_ZYX), -1024).astype(np.int16)
    assert voxel_digest(hu_ZYX) == row.digest or row.reason == "duplicate", row


def index_mutants(folder: Path, first: int, num: int) -> tuple[Manifest, list[Path]]:
    files = write_mutants(folder / "scans", first, num)
    manifest = build_manifest(
        folder / "scans", folder / "m.parquet", min_depth=1, workers=2, limits=LIMITS
    )
    return manifest, files


def check_mutants(folder: Path, first: int, num: int) -> collections.Counter[str]:
    """Index damaged files and check every row; how often each reason occurs."""
    manifest, files = index_mutants(folder, first, num)
    reasons = documented_reasons()
    rows = collections.defaultdict(list)
    for row in manifest.rows:
        rows[row.path.split("/")[0]].append(row)
    problems = []
    for file in files:
        found = rows.get(file.parent.name, [])
        if file.suffix != ".dcm" and len(found) != 1:
            problems.append(f"{file} has {len(found)} rows")
        for row in found:
            try:
                check_row(row, file, reasons)
            except Exception as error:
                problems.append(f"{file}: {row.reason} {row.detail}: {single_line(error, 400)}")
    assert not problems, "\n".join(problems)
    return collections.Counter(row.reason or row.status for row in manifest.rows)


def test_300_damaged_files(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = check_mutants(tmp_path, 0, 300)
    assert not found["crashed"] and not found["timed_out"], found
    assert found["accepted"] > 5 and found["truncated"] > 20, found
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_10_000_damaged_files(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found: collections.Counter[str] = collections.Counter()
    for first in range(1000, 11_000, 1000):
        found += check_mutants(tmp_path / str(first), first, 1000)
    assert sum(found.values()) >= 10_000
    assert not found["timed_out"], found
    assert capfd.readouterr() == ("", "")
    print(dict(found.most_common()))
