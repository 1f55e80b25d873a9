"""Index and pack open each file once, whatever its format and the layout of its folder.

The kernel reports the opens (inotify), so that those of native libraries and of worker processes
count too.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
from scan_files import LPS, compress_by_gdcm, make_ct, make_labels, make_slice, save_scan

from tapct.data.index.build import build_manifest
from tapct.data.packed.pack import pack

SHAPE_ZYX = (12, 32, 32)
_ACCESS, _CLOSED, _OPEN, _IS_FOLDER = 0x1, 0x18, 0x20, 0x40000000
_EVENT = struct.Struct("iIII")


@contextmanager
def opens(root: Path) -> Iterator[Counter[str]]:
    """Count how often each file below a folder is opened, by any process.

    Equal events in a row are reported once, so reads and closes are watched too: they stand between
    two opens.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    watcher = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    assert watcher >= 0, os.strerror(ctypes.get_errno())
    folders = {}
    for folder in [root, *(path for path in root.rglob("*") if path.is_dir())]:
        mask = _OPEN | _ACCESS | _CLOSED
        folders[libc.inotify_add_watch(watcher, os.fsencode(folder), mask)] = folder
    counts: Counter[str] = Counter()
    try:
        yield counts
        content = b""
        while True:
            try:
                content += os.read(watcher, 1 << 20)
            except BlockingIOError:
                break
        while content:
            number, mask, _, length = _EVENT.unpack_from(content)
            name = content[_EVENT.size : _EVENT.size + length].rstrip(b"\0")
            content = content[_EVENT.size + length :]
            assert number >= 0, "the queue of events was too short"
            if mask & _OPEN and not mask & _IS_FOLDER:
                counts[(folders[number] / os.fsdecode(name)).relative_to(root).as_posix()] += 1
    finally:
        os.close(watcher)


def test_the_counter_sees_native_libraries(tmp_path: Path) -> None:
    path = save_scan(tmp_path / "a.nii.gz", make_ct(SHAPE_ZYX))
    with opens(tmp_path) as counts:
        SimpleITK.ReadImage(str(path))
        np.asarray(nibabel.load(path).dataobj)
        path.read_bytes()
    assert counts["a.nii.gz"] >= 3


def write_slice(path: Path, plane: np.ndarray, number: int, series: int, compressor: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset = make_slice(plane, 2.0 * number, number + 1, PatientID=f"P{series}")
    dataset.SeriesInstanceUID, dataset.StudyInstanceUID = f"1.2.{series}", f"1.3.{series}"
    dataset.SOPInstanceUID = f"1.2.{series}.{number}"
    dataset.save_as(path, enforce_file_format=True)
    if compressor:
        compress_by_gdcm(path, compressor)


# layout of a series -> the file of one slice
DICOM_LAYOUTS = {
    "flat, mixed": "flat/{number:03d}_{series}.dcm",
    "nested": "nested/P{series}/study/CT/{number:03d}.dcm",
    "in two folders": "halves/{series}/{half}/{number:03d}",
    "a folder per slice": "slices/{series}/{number:03d}/image",
    "compressed": "jpeg/{series}/{number:03d}.dcm",
}


def write_dicom(root: Path) -> None:
    """Two series in each layout."""
    for place, (layout, name) in enumerate(DICOM_LAYOUTS.items()):
        for series in (10 * place + 1, 10 * place + 2):
            for number, plane in enumerate(make_ct(SHAPE_ZYX, series)):
                path = name.format(number=number, series=series, half=2 * number // SHAPE_ZYX[0])
                compressor = "JPEG" if layout == "compressed" else ""
                write_slice(root / path, plane, number, series, compressor)


def write_single_files(root: Path) -> None:
    """One scan in each format and form, most with a side-car or labels."""
    root.mkdir()
    for seed, suffix in enumerate((".nii", ".mgz"), 50):
        save_scan(root / f"plain{suffix}", make_ct(SHAPE_ZYX, seed))
    save_scan(root / "zipped.nii.gz", make_ct(SHAPE_ZYX, 53))
    save_scan(root / "zipped_seg.nii.gz", make_labels(SHAPE_ZYX))
    (root / "zipped.json").write_text('{"Manufacturer": "GE"}')
    pair = nibabel.Nifti1Pair(
        make_ct(SHAPE_ZYX, 54).transpose(2, 1, 0), LPS @ np.diag([0.8, 0.7, 2.0, 1.0])
    )
    nibabel.save(pair, root / "pair.hdr")
    for seed, name in enumerate(("a.nrrd", "b.nhdr", "c.mha", "d.mhd", "e_seg.nrrd", "e.nrrd"), 60):
        image = SimpleITK.GetImageFromArray(make_ct(SHAPE_ZYX, seed))
        if "seg" in name:
            image = SimpleITK.GetImageFromArray(make_labels(SHAPE_ZYX))
            image.SetMetaData("Segment0_LabelValue", "1")
            image.SetMetaData("Segment0_Name", "liver")
        image.SetSpacing((0.8, 0.7, 2.0))
        SimpleITK.WriteImage(image, str(root / name), useCompression=name == "d.mhd")
    # a header may name a file with another stem
    header = root / "b.nhdr"
    (raw,) = root.glob("b.raw*")
    raw.rename(root / "voxels.raw")
    header.write_bytes(header.read_bytes().replace(raw.name.encode(), b"voxels.raw"))


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, int]]:
    """Opens of each file by index and by pack, with worker processes."""
    folder = tmp_path_factory.mktemp("opens")
    root = folder / "scans"
    write_dicom(root)
    write_single_files(root / "files")
    with opens(root) as indexed:
        manifest = build_manifest(root, folder / "out", workers=2)
    assert len(manifest.accepted) == len(manifest.rows) == 2 * len(DICOM_LAYOUTS) + 9, [
        (row.path, row.reason, row.detail) for row in manifest.rows
    ]
    assert sum(bool(row.label_digest) for row in manifest.accepted) == 2
    with opens(root) as packed:
        report = pack(manifest, folder / "store", workers=2)
    assert len(report.packed) == len(manifest.rows) and report.num_labelled == 2
    names = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
    return {name: (indexed[name], packed[name]) for name in names}


@pytest.mark.parametrize("layout", DICOM_LAYOUTS)
def test_each_slice_is_opened_once_by_index_and_once_by_pack(
    counted: dict[str, tuple[int, int]], layout: str
) -> None:
    folder = DICOM_LAYOUTS[layout].partition("/")[0]
    of_layout = {name: times for name, times in counted.items() if name.startswith(f"{folder}/")}
    assert len(of_layout) == 2 * SHAPE_ZYX[0]
    assert set(of_layout.values()) == {(1, 1)}, of_layout


def test_each_single_file_is_opened_once_by_index_and_once_by_pack(
    counted: dict[str, tuple[int, int]],
) -> None:
    files = {name: times for name, times in counted.items() if name.startswith("files/")}
    assert {name for name, times in files.items() if times != (1, 1)} == set(), files
