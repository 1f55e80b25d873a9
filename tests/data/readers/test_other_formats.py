"""NIfTI pairs, Analyze and MGH; and what no reader takes is counted."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel
import numpy as np
import pytest
from scan_files import LPS, make_ct, patch_bytes, refusal, write_nifti, write_series

from tapct.base.exits import UserError
from tapct.data.index import build
from tapct.data.index.build import build_manifest
from tapct.data.readers import format_of
from tapct.data.scans.ingest import read_volume
from tapct.data.search import passed_over
from tapct.data.search.discover import search

AFFINE = np.array([[0.8, 0, 0, -10], [0, 0.7, 0, -20], [0, 0, 2.5, 100], [0, 0, 0, 1.0]])


def write_mgh(path: Path, hu_ZYX: np.ndarray, dtype: type = np.int16) -> Path:
    image = nibabel.MGHImage(hu_ZYX.transpose(2, 1, 0).astype(dtype), LPS @ AFFINE)
    nibabel.save(image, path)
    return path


@pytest.mark.parametrize("suffix", [".mgz", ".mgh"])
@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32])
def test_mgh_is_read_in_lps(tmp_path: Path, suffix: str, dtype: type) -> None:
    volume = read_volume(write_mgh(tmp_path / f"a{suffix}", make_ct(), dtype))
    np.testing.assert_array_equal(volume.hu_ZYX, make_ct())
    np.testing.assert_allclose(volume.spacing_mm, (2.5, 0.7, 0.8), rtol=1e-6)
    np.testing.assert_allclose(volume.origin_mm, (-10, -20, 100), atol=1e-4)


def test_damaged_mgh_is_refused_with_its_reason(tmp_path: Path) -> None:
    whole = write_mgh(tmp_path / "a.mgh", make_ct()).read_bytes()
    for reason, content in {
        "truncated": whole[:1000],
        "corrupt": b"\0\0\0\7" + whole[4:],
        "no_orientation": whole[:28] + b"\0\0" + whole[30:],
        "bad_spacing": whole[:30] + b"\0" * 4 + whole[34:],
        "bad_affine": whole[:42] + b"\x7f\xc0\0\0" + whole[46:],
        "not_3d": whole[:16] + b"\0\0\0\2" + whole[20:],
        "not_scalar": whole[:20] + b"\0\0\0\6" + whole[24:],
        "bad_shape": whole[:4] + b"\xff\xff\xff\xff" + whole[8:],
    }.items():
        (tmp_path / "b.mgh").write_bytes(content)
        assert refusal(tmp_path / "b.mgh") == reason
    (tmp_path / "c.mgz").write_bytes(gzip.compress(whole)[:-9])
    assert refusal(tmp_path / "c.mgz") == "truncated"


def test_a_nifti_pair_is_read_from_its_header(tmp_path: Path) -> None:
    write_nifti(tmp_path / "one.nii", make_ct(), AFFINE)
    pair = nibabel.Nifti1Pair(make_ct().transpose(2, 1, 0), LPS @ AFFINE)
    nibabel.save(pair, tmp_path / "pair.hdr")
    one, both = read_volume(tmp_path / "one.nii"), read_volume(tmp_path / "pair.hdr")
    np.testing.assert_array_equal(one.hu_ZYX, both.hu_ZYX)
    assert (one.spacing_mm, one.origin_mm) == (both.spacing_mm, both.origin_mm)
    (tmp_path / "pair.img").write_bytes((tmp_path / "pair.img").read_bytes()[:-10])
    assert refusal(tmp_path / "pair.hdr") == "truncated"
    (tmp_path / "pair.img").unlink()
    assert refusal(tmp_path / "pair.hdr") == "truncated"


def test_analyze_has_no_field_for_left_and_right(tmp_path: Path) -> None:
    pair = nibabel.AnalyzeImage(make_ct().transpose(2, 1, 0), np.diag([0.8, 0.7, 2.5, 1]))
    nibabel.save(pair, tmp_path / "a.hdr")
    assert refusal(tmp_path / "a.hdr") == "no_orientation"
    patch_bytes(tmp_path / "a.hdr", 0, b"ENVI")
    assert refusal(tmp_path / "a.hdr") == "corrupt"


def test_what_no_reader_takes_is_counted_by_kind(tmp_path: Path) -> None:
    root = tmp_path / "a"
    root.mkdir()
    write_nifti(root / "x.nii.gz", make_ct())
    pair = nibabel.Nifti1Pair(make_ct(seed=1).transpose(2, 1, 0), LPS @ AFFINE)
    nibabel.save(pair, root / "pair.hdr")
    others = "a.nii.bz2 b.zip c.zip d.npy e.dcm.gz notes.txt README dataset.json x.json .DS_Store"
    for name in others.split():
        (root / name).write_bytes(b"{}" if name == "x.json" else b"some bytes")
    (root / "gone.nii.gz").symlink_to(root / "nowhere")
    (root / ".git").mkdir()
    (root / "Meyer.Hans Peter").write_bytes(b"a name is not a suffix")
    listing = search(root)
    assert [source.path.name for source in listing.sources] == ["pair.hdr", "x.nii.gz"]
    assert listing.passed_over == {
        **{".zip": 2, ".nii.bz2": 1, ".npy": 1, ".dcm.gz": 1, ".txt": 1, ".json": 1},
        **{"without suffix": 2, "hidden": 1, "hidden folders": 1},
        "broken link": 1,
    }
    assert passed_over.summary(listing.passed_over) == (
        "11 files (2 .zip, 2 without suffix, 1 .dcm.gz, 1 .json, 1 .nii.bz2, 1 .npy, 1 .txt, "
        "1 broken link, 1 hidden) and 1 hidden folder"
    )
    assert passed_over.summary({}) == ""
    assert passed_over.advice(listing.passed_over) == (
        "if these files hold scans or labels: unpack .dcm.gz, .nii.bz2, .zip; write .npy as NIfTI, "
        "with spacing and directions"
    )
    assert passed_over.advice({".txt": 3, ".json": 1, "hidden": 2, ".zip": 0}) == ""


MAY_HOLD_SCANS = (
    *(".dcm.gz", ".dicom.gz", ".ima.gz", ".nii.bz2", ".nii.xz", ".nii.zst", ".nii.zip"),
    *(".mha.gz", ".nrrd.gz", ".mgz.gz", ".zip", ".tar", ".tar.gz", ".tgz", ".7z", ".rar", ".gz"),
    *(".npy", ".npy.gz", ".npz", ".mat", ".h5", ".mnc", ".vtk"),
)
# a format that gets a reader leaves this list by itself
NOT_READ = [kind for kind in MAY_HOLD_SCANS if format_of(Path(f"scan{kind}")) is None]


@pytest.mark.parametrize("kind", NOT_READ)
def test_every_kind_that_may_hold_scans_is_named_with_what_to_do(tmp_path: Path, kind: str) -> None:
    (tmp_path / f"scan{kind}").write_bytes(b"some bytes")
    assert search(tmp_path).passed_over == {kind: 1}
    assert kind in passed_over.summary({kind: 1})
    assert kind in passed_over.advice({kind: 1})
    page = Path(__file__).parents[3] / "docs" / "ingest.md"
    assert f"`{kind}`" in page.read_text(encoding="utf-8")


def test_an_index_from_which_nothing_can_be_used_is_an_error(tmp_path: Path) -> None:
    write_series(tmp_path / "a" / "s", make_ct(), edit=lambda i: {"Modality": "MR"})
    built = build_manifest(tmp_path / "a", tmp_path / "m.parquet")
    with pytest.raises(UserError, match="1 of 1 refused as not_ct"):
        build.check_usable(built, None)
    write_nifti(tmp_path / "a" / "x.nii.gz", make_ct())
    (tmp_path / "labels").mkdir()
    built = build_manifest(tmp_path / "a", tmp_path / "m.parquet", labels=tmp_path / "labels")
    build.check_usable(built, None)
    with pytest.raises(UserError, match="no label map"):
        build.check_usable(built, tmp_path / "labels")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "b.zip").write_bytes(b"x")
    with pytest.raises(UserError, match=r"holds no .* but 1 file \(1 \.zip\)"):
        build_manifest(tmp_path / "empty", tmp_path / "m.parquet")


def test_single_slices_are_refused_by_default(tmp_path: Path) -> None:
    write_nifti(tmp_path / "a1.nii.gz", make_ct((1, 34, 37)))
    write_nifti(tmp_path / "b2.nii.gz", make_ct((2, 34, 37)))
    rows = build_manifest(tmp_path, tmp_path / "m.parquet").rows
    assert [row.reason for row in rows] == ["too_few_slices", ""]
