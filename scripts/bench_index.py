"""Measure index and pack: files and megabytes per second, memory against the number of files, a
second index of an archive in which nothing changed, and an index that is killed again and again.

    python scripts/bench_index.py --json bench_index.json
    python scripts/bench_index.py --files 200000 --kills 0
    python scripts/bench_index.py --nifti --files 100000 --kills 0      # 100,000 scans
    python scripts/bench_index.py --archive /data/ct --workers 1,8 --kills 0     # your scans

The archive is made of tiny DICOM files, or of tiny NIfTI files, each of which is a scan: time per
file is measured, not the decoding of voxels. All files are in the page cache. Memory is that of the
process of the command, and that of the largest of its processes. Next to the commands, pydicom
reads header and pixels of some of the DICOM files in one process, and does nothing else; `of
pydicom` is the rate of the command divided by that rate.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import arguments
import nibabel
import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from tapct.base import exits
from tapct.base.files import write_atomically
from tapct.data.manifest import Manifest
from tapct.data.patients.key import KEY_FILE

CT_STORAGE = "1.2.840.10008.5.1.4.1.1.2"
# as wide as every number that replaces it, so that no length in the file changes
SERIES, SLICE, PLACE = "99999999", "77777777", "55555.50"
MB = 1e6
MOST_READ = 2000  # files that pydicom reads for the comparison


@dataclass(frozen=True)
class Measured:
    """One command.

    Args:
        seconds: wall time.
        own_mb: largest memory of its own process, in MB.
        memory_mb: largest memory of its processes, in MB.
        first_line_s: seconds until it printed its first line.
    """

    seconds: float
    own_mb: float
    memory_mb: float
    first_line_s: float


def template(size: int) -> bytes:
    """A slice of CT with placeholders in its header, up to its pixels."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = CT_STORAGE
    meta.MediaStorageSOPInstanceUID = f"1.2.3.{SERIES}.{SLICE}"
    data = Dataset()
    data.file_meta = meta
    data.SOPClassUID, data.SOPInstanceUID = CT_STORAGE, meta.MediaStorageSOPInstanceUID
    data.StudyInstanceUID, data.SeriesInstanceUID = f"1.2.4.{SERIES}", f"1.2.5.{SERIES}"
    data.Modality, data.PatientID, data.ImageType = "CT", f"P{SERIES}", ["ORIGINAL", "PRIMARY"]
    data.Manufacturer, data.ConvolutionKernel, data.StudyDate = "SIEMENS", "B30f", "20200101"
    data.InstanceNumber, data.SliceThickness, data.KVP = SLICE, "2.0", "120"
    data.ImagePositionPatient = ["0", "0", PLACE]
    data.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    data.PixelSpacing = [10.0, 10.0]
    data.Rows = data.Columns = size
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated = data.BitsStored = 16
    data.HighBit, data.PixelRepresentation = 15, 1
    data.RescaleSlope, data.RescaleIntercept = 1, 0
    data.PixelData = bytes(2 * size * size)
    file = BytesIO()
    data.save_as(file, enforce_file_format=True)
    return file.getvalue()[: -2 * size * size]


def make_archive(folder: Path, num_files: int, slices: int, size: int) -> int:
    """Write series of CT, one folder each; the bytes of all files."""
    head = template(size)
    rng = np.random.default_rng(0)
    grid_y, grid_x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    body_YX = np.where(grid_y**2 + (grid_x / 0.9) ** 2 < 0.7, 40, -1000)
    body_YX[(grid_y**2 + (grid_x - 0.4) ** 2) < 0.05] = -800
    num_bytes = 0
    for series in range(num_files // slices):
        home = folder / f"{series // 1000:03d}" / f"{series:06d}"
        home.mkdir(parents=True)
        noise_ZYX = rng.normal(0, 12, (slices, size, size))
        of_series = head.replace(SERIES.encode(), b"%08d" % (series + 10_000_000))
        for z in range(slices):
            content = of_series.replace(SLICE.encode(), b"%08d" % (z + 1))
            content = content.replace(PLACE.encode(), b"%8.2f" % (2.0 * z))
            pixels_YX = np.rint(body_YX + noise_ZYX[z]).clip(-1024, 3000).astype("<i2")
            num_bytes += (home / f"{z:04d}.dcm").write_bytes(content + pixels_YX.tobytes())
    return num_bytes


def make_nifti(folder: Path, num_files: int, size: int) -> int:
    """Write scans of CT of one NIfTI file each, 1000 in a folder; the bytes of all files."""
    image = nibabel.Nifti1Image(np.zeros((size,) * 3, np.int16), np.diag([10.0, 10.0, 2.0, 1.0]))
    head = image.to_bytes()[: -2 * size**3]
    rng = np.random.default_rng(0)
    body_XYZ = np.full((size,) * 3, -1000.0)
    body_XYZ[2:-2, 2:-2] = 40
    num_bytes = 0
    for scan in range(num_files):
        home = folder / f"{scan // 1000:04d}"
        home.mkdir(parents=True, exist_ok=True)
        hu_XYZ = np.rint(body_XYZ + rng.normal(0, 12, body_XYZ.shape)).astype("<i2")
        num_bytes += (home / f"p{scan:07d}.nii").write_bytes(head + hu_XYZ.tobytes(order="F"))
    return num_bytes


def command(words: Sequence[object]) -> list[str]:
    """A command line of tapct."""
    return [sys.executable, "-m", "tapct", *map(str, words)]


def measure(words: Sequence[object]) -> Measured:
    """Run a command of tapct."""
    began = time.perf_counter()
    process = subprocess.Popen(command(words), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    first, own, largest = 0.0, 0, 0
    os.set_blocking(process.stdout.fileno(), False)
    printed = b""
    while process.poll() is None:
        printed += process.stdout.read() or b""
        first = first or (time.perf_counter() - began if printed else 0.0)
        own = max(own, memory_of(process.pid))
        largest = max([largest, *map(memory_of, family_of(process.pid))])
        time.sleep(0.02 if not first else 0.2)
    printed += process.stdout.read() or b""
    if process.returncode:
        raise exits.UserError(f"tapct {' '.join(map(str, words))}: {printed.decode()[-500:]}")
    return Measured(time.perf_counter() - began, own / MB, largest / MB, first)


def family_of(pid: int) -> list[int]:
    """A process and all that it has started."""
    found, todo = [], [pid]
    while todo:
        each = todo.pop()
        found.append(each)
        try:
            todo += map(int, Path(f"/proc/{each}/task/{each}/children").read_text().split())
        except OSError:
            continue
    return found


def memory_of(pid: int) -> int:
    """Bytes of memory of a process, at its peak so far."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return 0


def rows_of(file: Path) -> list[str]:
    """All rows of a manifest as text, in which NaN equals NaN."""
    return [repr(dataclasses.astuple(row)) for row in Manifest.read(file).rows]


def resumed_is_equal(
    archive: Path, whole: Path, folder: Path, kills: int, whole_s: float
) -> dict[str, Any]:
    """Kill an index at random moments of its life, each time after it has resumed, and compare.

    Args:
        archive: folder of the scans.
        whole: archive folder of an index that nobody killed.
        folder: folder for the killed one.
        kills: number of kills.
        whole_s: seconds of an index that nobody kills. The kills come within twice its share of
            each call, so that most of them come before the index is done.
    """
    folder.mkdir()
    shutil.copy(whole / KEY_FILE, folder)
    words = ["index", archive, "--out", folder, "--workers", 2]
    draw = random.Random(0)
    num_killed, parts = 0, []
    for _ in range(kills):
        process = subprocess.Popen(
            command(words), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            process.wait(draw.uniform(0.3, max(0.4, 2 * whole_s / kills)))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            num_killed += 1
        parts.append(len(list((folder / "parts").glob("*.parquet"))))
    measure(words)
    return {"killed": num_killed, "equal": rows_of(folder) == rows_of(whole), "parts": parts}


def table_of(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as a table of Markdown."""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        shown = [
            f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()
        ]
        lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines)


def pydicom_rate(archive: Path) -> float:
    """Files per second that pydicom reads alone, header and pixels, in this process; NaN where the
    archive has no .dcm files.
    """
    paths = sorted(archive.rglob("*.dcm"))[:MOST_READ]
    if not paths:
        return math.nan
    began = time.perf_counter()
    for path in paths:
        assert pydicom.dcmread(path).pixel_array.ndim == 2
    return len(paths) / (time.perf_counter() - began)


def bench(
    archive: Path, num_files: int, num_bytes: int, workers: int, folder: Path, *, with_pack: bool
) -> list[dict[str, Any]]:
    """Index, index again and pack one archive."""
    plain = pydicom_rate(archive)
    out, store = folder / f"archive{workers}", folder / f"store{workers}"
    more = ["--workers", workers]
    commands = [
        ("index", ["index", archive, "--out", out, *more]),
        ("index again", ["index", archive, "--out", out, *more]),
        ("pack", ["pack", out, "--out", store, *more]),
    ]
    rows = []
    for name, words in commands if with_pack else commands[:2]:
        found = measure(words)
        rows.append(
            {
                "command": name,
                "files": num_files,
                "workers": workers,
                "seconds": round(found.seconds, 2),
                "files/s": round(num_files / found.seconds),
                "of pydicom": round(num_files / found.seconds / plain, 2),
                "MB/s": round(num_bytes / MB / found.seconds, 2),
                "own process MB": round(found.own_mb),
                "largest process MB": round(found.memory_mb),
                "first line s": round(found.first_line_s, 2),
            }
        )
        print(table_of(rows[-1:]).splitlines()[-1], flush=True)
    return rows


def main() -> None:
    """Run the measurements and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    positive = arguments.positive
    parser.add_argument(
        "--files",
        type=positive,
        default=20_000,
        help="tiny DICOM files to make, default %(default)s",
    )
    parser.add_argument(
        "--slices", type=positive, default=100, help="files of a series, default %(default)s"
    )
    parser.add_argument(
        "--size", type=positive, default=24, help="rows and columns of a slice, default %(default)s"
    )
    parser.add_argument(
        "--workers",
        type=arguments.positives,
        default=[1, 2],
        help="numbers of worker processes, with commas between them; default 1,2",
    )
    parser.add_argument(
        "--kills",
        type=arguments.whole,
        default=10,
        help="kills of an index that must resume, default %(default)s",
    )
    parser.add_argument(
        "--flat",
        type=arguments.positives_or_none,
        default=[4, 2],
        help="measure archives of 1/N of the files too, for the memory; empty for none; default "
        "4,2",
    )
    parser.add_argument(
        "--nifti", action="store_true", help="scans of one NIfTI file each in place of DICOM series"
    )
    parser.add_argument("--no-pack", action="store_true", help="do not measure tapct pack")
    parser.add_argument("--archive", type=Path, help="folder of scans instead of made ones")
    parser.add_argument("--json", type=Path, help="JSON file to write the figures to")
    given = parser.parse_args()
    if given.archive is None and given.files // max([1, *given.flat]) < given.slices:
        parser.error(
            f"--files {given.files} is less than a series of --slices {given.slices} in the "
            "smallest archive (--flat); make more files, or shorter series"
        )
    if given.archive is not None and not given.archive.is_dir():
        parser.error(f"--archive {given.archive} is no folder")
    counts = given.workers
    measured = functools.partial(bench, with_pack=not given.no_pack)

    def make(place: Path, num_files: int) -> int:
        if given.nifti:
            return make_nifti(place, num_files, given.size)
        return make_archive(place, num_files, given.slices, given.size)

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="bench_index") as place:
        folder = Path(place)
        for share in [] if given.archive else given.flat:
            small = folder / f"scans{share}"
            num_bytes = make(small, given.files // share)
            made = sum(path.is_file() for path in small.rglob("*"))
            (folder / str(share)).mkdir()
            rows += measured(small, made, num_bytes, counts[-1], folder / str(share))
        archive = given.archive or folder / "scans"
        if given.archive is None:
            make(archive, given.files)
        sizes = [path.stat().st_size for path in archive.rglob("*") if path.is_file()]
        for workers in counts:
            rows += measured(archive, len(sizes), sum(sizes), workers, folder)
        killed: dict[str, Any] = {}
        if given.kills:
            whole = folder / f"archive{counts[-1]}"
            num = 2 if given.no_pack else 3  # commands of the last measurement
            killed = resumed_is_equal(
                archive, whole, folder / "killed", given.kills, rows[len(rows) - num]["seconds"]
            )
    print()
    print(table_of(rows))
    if killed:
        print(f"killed {killed['killed']} times: the resumed index is equal: {killed['equal']}")
    if given.json:
        machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        content = {"machine": machine, "rows": rows, "killed": killed}
        write_atomically(given.json, json.dumps(content, indent=1) + "\n")
    if killed and not killed["equal"]:
        raise SystemExit(1)


if __name__ == "__main__":
    exits.leave(exits.exit_code_of(main))
