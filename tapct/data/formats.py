"""Names of the scan formats for help texts and messages.

They are apart from `readers.FORMATS`, because help texts must not wait for numpy and the readers.
"""

from __future__ import annotations

# name of a format in `readers.FORMATS` -> name for people, in the same order; a test compares them
TITLES = {
    "nifti": "NIfTI",
    "nrrd": "NRRD",
    "meta": "MetaImage",
    "mgh": "MGH",
    "dicom": "DICOM",
}


def listed(last: str, *, without: str = "") -> str:
    """The formats as part of a sentence, e.g. `NIfTI, NRRD or DICOM`.

    Args:
        last: word before the last format, `and` or `or`.
        without: name of a format to leave out; empty to list all.
    """
    *first, final = (title for name, title in TITLES.items() if name != without)
    return f"{', '.join(first)} {last} {final}"
