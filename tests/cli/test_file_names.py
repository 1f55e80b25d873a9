"""Names of files on the terminal."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
from scan_files import LPS, make_ct
from shell import Shell
from shell import shell as shell  # a fixture


def test_index_and_pack_print_control_characters_of_a_name_as_escapes(
    tmp_path: Path, shell: Shell
) -> None:
    root = tmp_path / "archive"
    root.mkdir()
    affine = LPS @ np.diag([0.8, 0.7, 2.0, 1.0])
    scan = nibabel.Nifti1Image(make_ct((12, 48, 48), 1).transpose(2, 1, 0), affine)
    name = "new\nline\x1b[31m"
    nibabel.save(scan, root / f"{name}good.nii.gz")
    (root / f"{name}bad.nii.gz").write_bytes(b"")
    manifest, store = tmp_path / "m.parquet", tmp_path / "store"
    indexed = shell.good("index", root, "--out", manifest, "--workers", 0, "--min-depth", 3)
    (root / f"{name}good.nii.gz").unlink()
    _, *packed = shell("pack", manifest, "--out", store, "--workers", 0)
    assert r"new\nline\x1b[31mbad" in indexed
    assert r"line\x1b[31mgood" in "".join(packed)
    assert "".join((indexed, *packed)).replace("\n", "").isprintable()
