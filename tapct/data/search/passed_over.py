"""What an archive holds beside scans and label maps, counted by kind, so that nothing is
skipped in silence.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tapct.base.counted import counted

HIDDEN_FILE, HIDDEN_FOLDER = "hidden", "hidden folders"
BROKEN_LINK, FIFO, SOCKET, DEVICE = "broken link", "FIFO", "socket", "device"
NO_ANSWER = "without an answer"  # of a disk that does not answer
WITHOUT_SUFFIX = "without suffix"
# suffixes of a file that belongs to another one with the same stem: side-cars, and voxels that a
# header names
COMPANIONS = (".json", ".raw", ".zraw", ".raw.gz", ".img", ".img.gz")
_PAIR, _RAW = (".img", ".img.gz"), (".raw", ".zraw", ".raw.gz")  # voxels of a header
_DETACHED = (".nhdr", ".mhd")  # headers that name the file of their voxels
_SUFFIX = re.compile(r"\.(?:[a-z][a-z0-9]{0,7}|7z)")
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")


def kind_of(name: str) -> str:
    """Kind of a file by its name: its suffix, with the one before it where it is compressed."""
    suffixes = [suffix for suffix in Path(name.lower()).suffixes if _SUFFIX.fullmatch(suffix)]
    if not suffixes or not name.lower().endswith(suffixes[-1]):
        return WITHOUT_SUFFIX
    if suffixes[-1] in _COMPRESSED and len(suffixes) > 1 and suffixes[-2] in _INSIDE:
        return suffixes[-2] + suffixes[-1]
    return suffixes[-1]


_INSIDE = (
    *(".nii", ".dcm", ".dicom", ".ima", ".nrrd", ".nhdr", ".mha", ".mhd", ".img", ".hdr", ".mgh"),
    *(".mgz", ".raw", ".npy", ".mnc", ".tar"),
)
_ARCHIVES = (".zip", ".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar", ".gz", ".bz2", ".xz", ".zst")
_ARRAYS = (".npy", ".npz", ".mat", ".h5", ".hdf5", ".zarr", ".b2nd", ".pt", ".pkl")
# scans of formats that no reader takes
NOT_READ = (".mnc", ".par", ".nrrd.gz", ".vti", ".vtk", ".gipl", ".analyze")


def advice(counts: Mapping[str, int]) -> str:
    """One line on what to do with files that may hold scans; empty where there are none.

    Args:
        counts: number of files of each kind.
    """
    parts = []
    for suffixes, what in (
        (_ARCHIVES, "unpack {}"),
        (_ARRAYS, "write {} as NIfTI, with spacing and directions"),
        (NOT_READ, "convert {} to NIfTI"),
    ):
        kinds = sorted(kind for kind, count in counts.items() if count and kind.endswith(suffixes))
        if kinds:
            parts.append(what.format(", ".join(kinds)))
    return f"if these files hold scans or labels: {'; '.join(parts)}" if parts else ""


def is_companion(name: str, stems: Iterable[str]) -> bool:
    """Whether a file is the side-car or the voxels of another file.

    Args:
        name: name of the file.
        stems: stems of the scans and label maps in its folder.
    """
    for suffix in COMPANIONS:
        if name.lower().endswith(suffix) and name[: -len(suffix)] in stems:
            return True
    return False


def not_of_others(names: Sequence[str], scans: Sequence[str]) -> list[str]:
    """The files of a folder that may be DICOM, so that they are opened: all but the side-cars and
    the voxels of other files, which their readers open.

    Args:
        names: names of the files without a suffix of a format.
        scans: names of the other files, which have one.
    """
    # the header of a pair has the name of its voxels
    pairs = {scan[:-4] for scan in scans if scan.lower().endswith(".hdr")}
    stems = {scan.removesuffix(".gz").rpartition(".")[0] for scan in scans}
    voxels = _named_by_headers(names, scans)
    found = []
    for name in names:
        stem, suffix = _divided(name)
        is_sidecar = suffix == ".json" and stem in stems
        is_voxels = suffix in _PAIR and stem in pairs
        if not (is_sidecar or is_voxels or name in voxels):
            found.append(name)
    return found


def _named_by_headers(names: Sequence[str], scans: Sequence[str]) -> set[str]:
    """The files that hold the voxels of a `.nhdr` or `.mhd`, as far as names show it.

    A header may name any file of its folder. So where there are no more `.raw` files of other names
    than headers without a `.raw` of their own name, all are taken as voxels. Where there are more,
    those of other names may be DICOM.
    """
    headers = {scan[: scan.rindex(".")] for scan in scans if scan.lower().endswith(_DETACHED)}
    raw = [name for name in names if _divided(name)[1] in _RAW] if headers else []
    own = {name for name in raw if _divided(name)[0] in headers}
    num_without = len(headers - {_divided(name)[0] for name in own})
    return set(raw) if len(raw) - len(own) <= num_without else own


def _divided(name: str) -> tuple[str, str]:
    """A name without its suffix, and the suffix in lower case, `.gz` and the one before as one."""
    stem = name.removesuffix(".gz").rpartition(".")[0]
    return stem, name[len(stem) :].lower()


def summary(counts: Mapping[str, int]) -> str:
    """One line, e.g. `7 files (3 .hdr, 2 .zip, 2 without suffix)`; empty where nothing was
    skipped.
    """
    files = {kind: count for kind, count in counts.items() if kind != HIDDEN_FOLDER and count}
    folders = counts.get(HIDDEN_FOLDER, 0)
    parts = []
    if files:
        by_count = sorted(files.items(), key=lambda item: (-item[1], item[0]))
        kinds = ", ".join(f"{count} {kind}" for kind, count in by_count)
        total = sum(files.values())
        parts.append(f"{counted(total, 'file')} ({kinds})")
    if folders:
        parts.append(counted(folders, "hidden folder"))
    return " and ".join(parts)
