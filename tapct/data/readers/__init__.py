"""Readers of scan files, one per family of formats."""

from __future__ import annotations


def load_libraries() -> None:
    """Load what reads scans, before many of them are read: a library that is broken is not the
    fault of every scan.

    Raises:
        ImportError: nibabel, pydicom or SimpleITK cannot be loaded.
    """
    import nibabel  # noqa: F401
    import pydicom  # noqa: F401
    import SimpleITK  # noqa: F401
