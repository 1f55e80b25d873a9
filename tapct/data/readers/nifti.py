"""NIfTI-1 and NIfTI-2 in one file (.nii, .nii.gz) or as a pair of header and voxels (.hdr, .img).
The content decides whether it is gzip, not the name.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from tapct.base.marks import file_name
from tapct.data.readers.raw import (
    Image,
    check_shape,
    check_size,
    inflate,
    is_gzip,
    opened,
    other_format,
    read_head,
    slack_of,
)
from tapct.types import Refused

if TYPE_CHECKING:
    import nibabel

_MM_PER_UNIT = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # xyzt_units: unknown, metre, mm, micron
_RGB_CODES = {128: "RGB", 2304: "RGBA"}
_REAL_CODES = {2, 4, 8, 16, 64, 256, 512, 768, 1024, 1280}
_MAX_CODE = 5  # of sform_code and qform_code: the coordinate systems that NIfTI defines
_COMPLEX_CODES = {32, 1792, 2048}
_LABEL = re.compile(rb'<Label\s+Key="(\d+)"[^>]*>\s*<!\[CDATA\[(.*?)\]\]>', re.DOTALL)


def read(files: Sequence[Path]) -> Image:
    """Read one NIfTI file.

    Rules: 4D is read when it holds one volume. Slope 0 or NaN means no scaling. One of sform and
    qform must be set; where both are, they must agree, and the sform is used. pixdim must be > 0
    and agree with the affine to 5 %.

    Args:
        files: path of the file, or of the header of a pair, alone.
    Returns:
        The voxels with scaling and affine, turned from NIfTI's RAS to LPS.
    Raises:
        Refused: truncated, corrupt, not_3d, not_scalar, bad_affine, bad_spacing, no_orientation,
            bad_shape, header_mismatch.
    """
    (path,) = files
    with path.open("rb") as file:
        return _read(path, file)


def _read(path: Path, file: BinaryIO) -> Image:
    """Read one file that is open, see `read`."""
    header = read_header(path, read_head(path, 540, file))
    shape = shape_of(header)
    affine = affine_of(header, shape)
    offset = _offset(header)
    itemsize = header.get_data_dtype().itemsize
    expected = offset + itemsize * math.prod(shape)
    slack = slack_of(shape, itemsize)
    data_file = _data_file(path, header)
    with opened(data_file, file if data_file == path else None) as voxel_file:
        if is_gzip(data_file, voxel_file):
            data = inflate(data_file, 0, expected, slack, voxel_file)
        else:
            check_size(data_file, data_file.stat().st_size, expected, slack)
            voxel_file.seek(0)
            data = voxel_file.read()
    header.set_data_shape(shape)
    voxels = header.raw_data_from_fileobj(io.BytesIO(data))
    slope, intercept = header.get_slope_inter()
    table = _LABEL.findall(data[:offset])  # extensions lie between header and voxels
    return Image(
        voxels_IJK=voxels,
        affine=affine,
        slope=1.0 if slope is None else float(slope),
        intercept=0.0 if intercept is None else float(intercept),
        names=tuple((int(key), name.decode("utf-8", "replace")) for key, name in table),
    )


def read_header(path: Path, head: bytes) -> nibabel.Nifti1Header:
    """Header of either version and byte order, from the first 540 bytes."""
    import nibabel

    if len(head) < 348:
        raise Refused(
            "truncated", f"{file_name(path)} holds {len(head)} bytes; a NIfTI header has 348"
        )
    sizes = {int.from_bytes(head[:4], "little"): "<", int.from_bytes(head[:4], "big"): ">"}
    for size, kind, magic in (
        (348, nibabel.Nifti1Header, head[344:348]),
        (540, nibabel.Nifti2Header, head[4:8]),
    ):
        if size not in sizes:
            continue
        if len(head) < size:
            raise Refused(
                "truncated", f"{file_name(path)} holds {len(head)} bytes; its header has {size}"
            )
        if magic not in (b"n+1\0", b"n+2\0", b"ni1\0", b"ni2\0"):
            raise Refused(
                "no_orientation",
                f"{file_name(path)} is an Analyze header, in which left and right are not defined; "
                "convert it to .nii.gz with the directions of the scanner",
            )
        header = kind(head[:size], endianness=sizes[size], check=False)
        if int(header["datatype"]) in _RGB_CODES or int(header["datatype"]) in _COMPLEX_CODES:
            code = int(header["datatype"])
            raise Refused(
                "not_scalar",
                f"voxels are {_RGB_CODES.get(code, 'complex')}; rule: one real value per voxel",
            )
        if int(header["datatype"]) not in _REAL_CODES:
            raise Refused(
                "unsupported",
                f"datatype is {int(header['datatype'])}; rule: integers, float32 or float64",
            )
        return header
    raise other_format(path, head, "NIfTI")


def _data_file(path: Path, header: nibabel.Nifti1Header) -> Path:
    """The file that holds the voxels: that of the header, or its partner `.img`."""
    if bytes(header["magic"])[:2] != b"ni":
        return path
    stem = path.name[: -len(path.suffix)]
    for suffix in (".img", ".img.gz", ".IMG"):
        partner = path.with_name(stem + suffix)
        if partner.is_file():
            return partner
    raise Refused(
        "truncated",
        f"{file_name(path)} has no voxels: {file_name(f'{stem}.img')} is missing beside it",
    )


def shape_of(header: nibabel.Nifti1Header) -> tuple[int, int, int]:
    """The three spatial sizes; axes after the third must have length 1."""
    num_dims = int(header["dim"][0])
    if not 1 <= num_dims <= 7:
        raise Refused("corrupt", f"dim[0] is {num_dims}; rule: 1 to 7")
    sizes = tuple(int(size) for size in header["dim"][1 : num_dims + 1])
    if len(sizes) < 3:
        raise Refused("not_3d", f"the image has {len(sizes)} axes {sizes}; rule: three")
    if any(size > 1 for size in sizes[3:]):
        raise Refused(
            "not_3d",
            f"the file holds {math.prod(sizes[3:])} volumes {sizes}; split it, one file per scan",
        )
    check_shape(sizes[:3])
    return sizes[0], sizes[1], sizes[2]


def _offset(header: nibabel.Nifti1Header) -> int:
    """The byte at which the voxels start, behind the header and the flag of its extensions."""
    is_pair = bytes(header["magic"])[:2] == b"ni"
    offset, least = float(header["vox_offset"]), 0 if is_pair else header.sizeof_hdr + 4
    if not offset.is_integer() or offset < least:
        raise Refused(
            "corrupt", f"vox_offset is {offset:g}; rule: a whole number, at least {least}"
        )
    return int(offset)


def affine_of(header: nibabel.Nifti1Header, shape: tuple[int, int, int]) -> np.ndarray:
    """The affine in LPS millimetres, checked against pixdim and the second affine."""
    pixdim = np.asarray(header["pixdim"][1:4], dtype=np.float64)
    if not np.isfinite(pixdim).all() or (pixdim <= 0).any():
        raise Refused("bad_spacing", f"pixdim is {pixdim.tolist()}; rule: three numbers > 0")
    for code in ("sform_code", "qform_code"):
        if not 0 <= int(header[code]) <= _MAX_CODE:
            raise Refused("bad_affine", f"{code} is {int(header[code])}; rule: 0 to {_MAX_CODE}")
    has_sform, has_qform = int(header["sform_code"]) > 0, int(header["qform_code"]) > 0
    if has_sform:
        affine = np.asarray(header.get_sform(), dtype=np.float64)
    elif has_qform:
        affine = _qform(header)
    else:
        raise Refused(
            "no_orientation",
            "sform_code and qform_code are 0, so left and right are unknown; set one of them",
        )
    if not np.isfinite(affine).all():
        raise Refused("bad_affine", "the affine holds NaN or infinity")
    norms = np.linalg.norm(affine[:3, :3], axis=0)
    if (np.abs(norms - pixdim) > 0.05 * pixdim).any():
        raise Refused(
            "bad_spacing",
            f"pixdim {pixdim.tolist()} and affine {norms.round(4).tolist()} differ by over 5 %",
        )
    if has_sform and has_qform:
        _check_forms(affine, _qform(header), shape)
    unit = int(header["xyzt_units"]) & 7
    affine[:3] *= _MM_PER_UNIT.get(unit, 1.0)
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def _qform(header: nibabel.Nifti1Header) -> np.ndarray:
    """The affine of quaternion, pixdim and offset."""
    quaternion = [float(header[f"quatern_{axis}"]) for axis in "bcd"]
    offsets = [float(header[f"qoffset_{axis}"]) for axis in "xyz"]
    if not np.isfinite(quaternion + offsets).all() or sum(q * q for q in quaternion) > 1.0 + 1e-3:
        raise Refused(
            "bad_affine",
            f"qform quaternion {quaternion} with offset {offsets} is not a rotation",
        )
    return np.asarray(header.get_qform(), dtype=np.float64)


def _check_forms(sform: np.ndarray, qform: np.ndarray, shape: tuple[int, int, int]) -> None:
    """Refuse two affines that put a corner of the volume at different places.

    One voxel and 1 % of the diagonal are allowed: a qform is always rectangular, and is rounded.
    """
    corners = np.array([(i, j, k, 1) for i in (0, 1) for j in (0, 1) for k in (0, 1)], float)
    corners[:, :3] *= np.asarray(shape) - 1
    difference = (corners @ (sform - qform).T)[:, :3]
    apart = float(np.linalg.norm(difference, axis=1).max())
    spacing = np.linalg.norm(sform[:3, :3], axis=0)
    allowed = float(spacing.max() + 0.01 * np.linalg.norm(spacing * np.asarray(shape)))
    if not apart <= allowed:
        raise Refused(
            "header_mismatch",
            f"sform and qform differ by {apart:.1f} (in the unit of the file) at a corner; rule: "
            f"at most {allowed:.1f}; set qform_code or sform_code of the wrong one to 0",
        )
