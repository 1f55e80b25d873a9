"""Writes label maps as NIfTI in the geometry of another file."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tapct.base.files import write_atomically
from tapct.data.readers import nifti
from tapct.data.readers.raw import read_head

if TYPE_CHECKING:
    import nibabel

HEAD_BYTES = 540
# what places voxels in space; texts such as `descrip` may hold the name of a patient
_GEOMETRY = (
    *("pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
)


def read_grid(path: Path) -> tuple[tuple[int, int, int], np.ndarray]:
    """Number of voxels along I, J, K and affine (i, j, k, 1) -> LPS mm of a NIfTI file, whose
    voxels are not read.

    Raises:
        Refused: the header breaks a rule, see `nifti.read`.
    """
    header = nifti.read_header(path, read_head(path, HEAD_BYTES))
    shape = nifti.shape_of(header)
    return shape, nifti.affine_of(header, shape)


def write(path: Path, labels_IJK: np.ndarray, affine: np.ndarray, like: Path | None = None) -> None:
    """Write a label map, gzip-compressed, whole or not at all.

    Args:
        path: file to write, .nii.gz.
        labels_IJK: labels along the axes of the file.
        affine: 4x4 matrix, (i, j, k, 1) -> LPS mm.
        like: NIfTI file of the same shape whose number of axes and geometry are copied to the bit;
            nothing else of it is. None writes `affine`.
    """
    import nibabel

    dtype = np.uint8 if int(labels_IJK.max(initial=0)) < 256 else np.uint16
    if like is None:
        image = nibabel.Nifti1Image(
            labels_IJK.astype(dtype), np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
        )
        image.header.set_xyzt_units("mm")
        image.set_sform(image.affine, 1)
        image.set_qform(image.affine, 1)
    else:
        image = _image_like(labels_IJK.astype(dtype), like)
    write_atomically(path, gzip.compress(image.to_bytes(), 6, mtime=0))


def _image_like(labels_IJK: np.ndarray, like: Path) -> nibabel.Nifti1Image:
    import nibabel

    old = nifti.read_header(like, read_head(like, HEAD_BYTES))
    kind = nibabel.Nifti2Image if old.sizeof_hdr == HEAD_BYTES else nibabel.Nifti1Image
    new = kind.header_class()
    new.set_data_dtype(labels_IJK.dtype)
    new.set_data_shape(old.get_data_shape())
    for name in _GEOMETRY:
        new[name] = old[name]
    # the affine of the header as it is: giving it again would round it and change the codes
    return kind(labels_IJK.reshape(old.get_data_shape()), None, new)
