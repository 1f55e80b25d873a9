"""What is cut off, damaged, empty or misnamed is refused or read by its content."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from scan_files import compress_by_gdcm, make_ct, refusal, write_nifti, write_series

from tapct.data.scans.ingest import read_volume


@pytest.mark.parametrize("keep", [0.02, 0.5, 0.999, -9, -4])
def test_truncated_nii_gz_is_refused(tmp_path: Path, keep: float) -> None:
    path = write_nifti(tmp_path / "a.nii.gz", make_ct((20, 40, 40)))
    content = path.read_bytes()
    path.write_bytes(content[: int(keep)] if keep < 0 else content[: int(len(content) * keep)])
    assert refusal(path) == "truncated"


def test_corrupt_nii_gz_is_refused(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "a.nii.gz", make_ct())
    content = path.read_bytes()
    path.write_bytes(content[:-8] + bytes([content[-8] ^ 1]) + content[-7:])  # its checksum
    assert refusal(path) == "corrupt"


@pytest.mark.parametrize("suffix", [".nii", ".nrrd", ".nhdr", ".mha", ".mhd"])
@pytest.mark.parametrize("compressed", [False, True])
def test_truncated_voxels_are_refused_in_every_format(
    tmp_path: Path, suffix: str, compressed: bool
) -> None:
    if suffix == ".nii":
        path = data = write_nifti(tmp_path / "a.nii", make_ct())
    else:
        path = tmp_path / f"a{suffix}"
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(make_ct()), path, compressed)
        data = max(tmp_path.iterdir(), key=lambda file: file.stat().st_size)
    data.write_bytes(data.read_bytes()[:-30])
    assert refusal(path) == "truncated"


def test_truncated_dicom_is_refused(tmp_path: Path) -> None:
    for cut in (10, 600):
        folder = write_series(tmp_path / f"s{cut}", make_ct())
        victim = folder / "slice004.dcm"
        size = victim.stat().st_size
        victim.write_bytes(
            victim.read_bytes()[: size - cut if cut == 10 else size - 2 * 14 * 17 - 12]
        )
        assert refusal(folder) == "truncated"


@pytest.mark.parametrize("compressor", ["JPEG", "JPEG2000"])
def test_truncated_compressed_dicom_is_refused(tmp_path: Path, compressor: str) -> None:
    folder = write_series(tmp_path / "s", make_ct((5, 32, 32)))
    for path in sorted(folder.iterdir()):
        compress_by_gdcm(path, compressor)
    whole = read_volume(folder)
    np.testing.assert_array_equal(whole.hu_ZYX, make_ct((5, 32, 32)))
    victim = folder / "slice002.dcm"
    victim.write_bytes(victim.read_bytes()[:-100])
    assert refusal(folder) == "truncated"


def test_empty_and_unreadable_files_are_refused(tmp_path: Path) -> None:
    for name in ("a.nii.gz", "a.nii", "a.nrrd", "a.mha", "a.dcm"):
        (tmp_path / name).write_bytes(b"")
        assert refusal(tmp_path / name) == "empty_file"
        (tmp_path / name).write_bytes(b"this is a text, not a scan" * 40)
        assert refusal(tmp_path / name) in ("corrupt", "unreadable")
    (tmp_path / "b.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\xff" * 900)
    assert refusal(tmp_path / "b.dcm") == "corrupt"
    assert refusal(tmp_path / "missing.nii.gz") == "unreadable"


def test_plain_nifti_named_gz_and_gzip_named_nii_are_read(tmp_path: Path) -> None:
    plain = write_nifti(tmp_path / "a.nii", make_ct())
    (tmp_path / "b.nii.gz").write_bytes(plain.read_bytes())
    (tmp_path / "c.nii").write_bytes(gzip.compress(plain.read_bytes()))
    for name in ("b.nii.gz", "c.nii"):
        np.testing.assert_array_equal(read_volume(tmp_path / name).hu_ZYX, make_ct())


def test_gzip_of_several_members_is_read(tmp_path: Path) -> None:
    content = write_nifti(tmp_path / "a.nii", make_ct()).read_bytes()
    (tmp_path / "b.nii.gz").write_bytes(
        gzip.compress(content[:1000]) + gzip.compress(content[1000:])
    )
    np.testing.assert_array_equal(read_volume(tmp_path / "b.nii.gz").hu_ZYX, make_ct())


def test_detached_data_outside_its_folder_is_refused(tmp_path: Path) -> None:
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(make_ct()), tmp_path / "a.mhd", False)
    (tmp_path / "sub").mkdir()
    text = (tmp_path / "a.mhd").read_text().replace("a.raw", "../a.raw")
    (tmp_path / "sub" / "a.mhd").write_text(text)
    assert refusal(tmp_path / "sub" / "a.mhd") == "unsupported"
