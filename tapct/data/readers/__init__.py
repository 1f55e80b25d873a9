"""Readers of scan files, and the one list of the formats that tapct reads (`FORMATS`).

To add a format such as MINC:

1. Write `readers/minc.py` with a function `read(files)` that returns a `raw.Image`: the voxels as
   the file stores them, the affine from voxel indices to LPS millimetres, slope and intercept to
   HU, and the facts of the header. The reader checks the file itself: it reads it to
   its end, and raises `Refused` with a reason code where the file is truncated or damaged, or where
   its header gives no orientation. `raw` holds the checks that readers share.
2. Import the library that decodes the format inside the function that needs it. Every rank of a
   training run imports this package, and none of them reads a scan file.
3. Import the module here and add one line to `FORMATS`: name, suffixes, function, libraries.
   `discover` then finds the files by their suffixes, and `ingest` reads them.
4. Add the name to `TITLES` in `data/formats.py`, from where help texts and messages take it.
5. docs/extending.md, "A scan format", lists the rest: dependencies, a test, and the pages that name
   the formats.

All other checks are not the reader's job and hold for every format: orientation and spacing
(`scans.geometry`), whether the values are HU (`checks.ct_check`), side-car files and facts
(`scans.headers`), patient identifiers (`patients.identity`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tapct.data.readers import dicom, meta, mgh, nifti, nrrd
from tapct.data.readers.raw import Image


@dataclass(frozen=True)
class Format:
    """One format of scan files.

    Args:
        name: name of the format, the column `kind` of the manifest; `formats.TITLES` has its name
            for people.
        suffixes: endings of its file names, in lower case; longer ones first.
        read: function that reads the files of one scan; all formats but DICOM have one file.
        libraries: Python packages that decode the format, loaded with the first file.
        is_series: whether a scan is a series of files, which `discover` recognises by their content
            and groups by their headers.
    """

    name: str
    suffixes: tuple[str, ...]
    read: Callable[[Sequence[Path]], Image]
    libraries: tuple[str, ...]
    is_series: bool = False


DICOM = Format(
    "dicom", (".dcm", ".dicom", ".ima"), dicom.read, ("pydicom", "SimpleITK"), is_series=True
)
NRRD = Format("nrrd", (".nrrd", ".nhdr"), nrrd.read, ("numpy",))
FORMATS = (
    Format("nifti", (".nii.gz", ".nii", ".hdr"), nifti.read, ("nibabel",)),
    NRRD,
    Format("meta", (".mha", ".mhd"), meta.read, ("numpy",)),
    Format("mgh", (".mgz", ".mgh"), mgh.read, ("nibabel",)),
    DICOM,
)


LIBRARIES = tuple(dict.fromkeys(library for known in FORMATS for library in known.libraries))


def format_named(name: str) -> Format:
    """The format with this name; KeyError where there is none."""
    return {known.name: known for known in FORMATS}[name]


def format_of(path: Path) -> Format | None:
    """The format of a single file by its name; None for other names, and for DICOM."""
    for known in FORMATS:
        if not known.is_series and path.name.lower().endswith(known.suffixes):
            return known
    return None


def stem_of(path: Path) -> str:
    """File name without the suffix of its format (`.nii.gz` is one suffix); a folder's whole
    name.
    """
    for known in FORMATS:
        for suffix in known.suffixes:
            if path.name.lower().endswith(suffix):
                return path.name[: -len(suffix)]
    return path.name


def load_libraries() -> None:
    """Load all libraries that decode scans, so that a broken one ends the command at once and does
    not refuse every scan.

    Raises:
        ImportError: nibabel, pydicom or SimpleITK cannot be loaded.
    """
    for library in LIBRARIES:
        importlib.import_module(library)
