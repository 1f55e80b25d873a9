"""Pixels of a DICOM file as stored values, by pydicom where it can decode them, else by GDCM.

GDCM is the library behind SimpleITK. It reads what pydicom cannot decode alone: lossless JPEG,
JPEG-LS, and JPEG with 12 bits per pixel.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from tapct.base.geometry import times
from tapct.base.marks import file_name
from tapct.data.readers import dicom_elements as elements
from tapct.data.readers.raw import is_out_of_memory
from tapct.types import Refused

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_JPEG_8_BIT = "1.2.840.10008.1.2.4.50"
_JPEG_12_BIT = "1.2.840.10008.1.2.4.51"
_LOSSY = (_JPEG_8_BIT, _JPEG_12_BIT)  # JPEG-LS near-lossless and JPEG 2000 may be lossless
# what must be given for the pixels to be read
_DESCRIBED = (
    *("BitsAllocated", "BitsStored", "HighBit", "SamplesPerPixel", "PixelRepresentation"),
    *("PhotometricInterpretation", "Rows", "Columns"),
)
_ELSCINT_COMPRESSION, _ELSCINT_PIXELS = 0x07A11011, 0x07A1100A


def stored_values(
    path: Path, dataset: Dataset, num_frames: int, file: BinaryIO
) -> tuple[np.ndarray, bool]:
    """Decode the pixels of a file.

    Args:
        path: path of the file.
        dataset: whole content of the file.
        num_frames: number of images in the file.
        file: the file, which is open. GDCM, which opens a path, is given a copy of it in memory.
    Returns:
        Values (frames, rows, columns), and whether slope and intercept are applied already.
    Raises:
        Refused: truncated, header_mismatch, unsupported, corrupt.
    """
    rows, columns = elements.unsigned(dataset, "Rows"), elements.unsigned(dataset, "Columns")
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax.is_encapsulated and not _pydicom_decodes(dataset):
        if num_frames > 1:
            raise Refused(
                "unsupported",
                f"{file_name(path)} holds {num_frames} frames in {syntax.name}; decompress it",
            )
        pixels, is_rescaled = _by_gdcm(path, dataset, file), True
    else:
        if not syntax.is_encapsulated:
            bits = rows * columns * num_frames * elements.unsigned(dataset, "BitsAllocated")
            _check_length(path, len(dataset.PixelData), math.ceil(bits / 8))
        plain = _plain_words(dataset, num_frames * rows * columns)
        with elements.quiet():
            pixels, is_rescaled = dataset.pixel_array if plain is None else plain, False
    if pixels.size != num_frames * rows * columns:
        raise Refused(
            "corrupt",
            f"{file_name(path)} decodes to {times(pixels.shape)} pixels; its header gives "
            f"{rows} rows, {columns} columns",
        )
    return pixels.reshape(num_frames, rows, columns), is_rescaled


def _plain_words(dataset: Dataset, count: int) -> np.ndarray | None:
    """The values of a file that holds them as little-endian words of 16 bits, as most CT do; None
    where they need more than that. This is what pydicom returns, without its checks of everything
    else, which take longer than reading a small slice.

    Args:
        dataset: whole content of the file.
        count: number of values.
    """
    from pydicom import uid

    if dataset.file_meta.TransferSyntaxUID not in (
        uid.ImplicitVRLittleEndian,
        uid.ExplicitVRLittleEndian,
    ):
        return None
    if any(name not in dataset for name in _DESCRIBED) or dataset.get("NumberOfFrames"):
        return None
    allocated, stored, high, samples, is_signed = (
        elements.unsigned(dataset, name) for name in _DESCRIBED[:5]
    )
    if (allocated, high, samples) != (16, stored - 1, 1) or is_signed not in (0, 1):
        return None
    values = np.frombuffer(dataset.PixelData, "<i2" if is_signed else "<u2", count)
    least, most = (-(1 << high), (1 << high) - 1) if is_signed else (0, (1 << stored) - 1)
    # pydicom corrects the bits above those that are stored
    return values if values.size and least <= values.min() and values.max() <= most else None


def stored_type(dataset: Dataset) -> str:
    """Type of the stored values, e.g. uint16; empty where the header does not give it."""
    bits = elements.unsigned(dataset, "BitsAllocated")
    if not bits:
        return ""
    sign = "int" if elements.unsigned(dataset, "PixelRepresentation") else "uint"
    return f"{sign}{bits}"


def lossy_ratio(dataset: Dataset) -> float | None:
    """Ratio of a lossy compression of the pixels, now or at any time before.

    Returns:
        The largest ratio that the header declares, or that of the file itself; NaN where a lossy
        compression of unknown ratio is declared, None where none is.
    """
    syntax = str(dataset.file_meta.get("TransferSyntaxUID", ""))
    if elements.text(dataset, "LossyImageCompression") != "01" and syntax not in _LOSSY:
        return None
    declared = elements.numbers(dataset, "LossyImageCompressionRatio")
    ratios = [ratio for ratio in declared if math.isfinite(ratio) and ratio >= 1]
    if ratios:
        return max(ratios)
    pixels = dataset.get_item("PixelData")
    if syntax in _LOSSY and pixels is not None and pixels.value:
        frames = max(1, elements.whole(dataset, "NumberOfFrames"))
        size = elements.unsigned(dataset, "Rows") * elements.unsigned(dataset, "Columns")
        # the stored bits, since the empty ones of a word cost nothing
        bits = elements.unsigned(dataset, "BitsStored") or 8
        return frames * size * bits / 8 / len(pixels.value)
    return math.nan


def check_has_pixels(path: Path, dataset: Dataset) -> None:
    """Refuse a file without pixels that are stored as the standard requires."""
    private = elements.text(dataset, _ELSCINT_COMPRESSION)
    if _ELSCINT_PIXELS in dataset or private.startswith("PMSCT"):
        raise Refused(
            "private_compression",
            f"{file_name(path)} is compressed with a private method of ELSCINT1; convert it with "
            "gdcmconv --raw",
        )
    if "FloatPixelData" in dataset or "DoubleFloatPixelData" in dataset:
        raise Refused(
            "unsupported", f"{file_name(path)} holds pixels as floats; convert it to NIfTI"
        )
    if "PixelData" not in dataset:
        raise Refused("truncated", f"{file_name(path)} ends before its pixels; copy it again")


def _check_length(path: Path, num_bytes: int, expected: int) -> None:
    """Refuse pixels that are fewer or more than the header describes; one byte may pad them to an
    even length.
    """
    if num_bytes < expected:
        raise Refused(
            "truncated", f"{file_name(path)} holds {num_bytes} of {expected} bytes of pixels"
        )
    if num_bytes > expected + expected % 2:
        raise Refused(
            "header_mismatch",
            f"{file_name(path)} holds {num_bytes} bytes of pixels; its header describes {expected} "
            "(rows, columns, frames); export the series again",
        )


def _pydicom_decodes(dataset: Dataset) -> bool:
    """Whether pydicom can decode the compressed pixels with what is installed here."""
    from pydicom.pixels import get_decoder

    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax in _LOSSY and elements.unsigned(dataset, "BitsStored") > 8:
        return False  # pydicom claims to support it, but Pillow has no JPEG of 12 bits
    try:
        return bool(get_decoder(syntax).is_available)
    except NotImplementedError:
        return False


def _by_gdcm(path: Path, dataset: Dataset, file: BinaryIO) -> np.ndarray:
    """HU of one file, decoded by GDCM, which applies slope and intercept."""
    with _readable(path, file) as place:
        return _decoded(place, path, dataset)


@contextlib.contextmanager
def _readable(path: Path, file: BinaryIO) -> Iterator[str]:
    """A path under which GDCM can read a file that is open, without opening it again."""
    if not hasattr(os, "memfd_create"):
        yield str(path)
        return
    handle = os.memfd_create("tapct slice", os.MFD_CLOEXEC)
    try:
        file.seek(0)
        with os.fdopen(handle, "wb", closefd=False) as copy:
            shutil.copyfileobj(file, copy, 1 << 20)
        yield f"/proc/self/fd/{handle}"
    finally:
        os.close(handle)


def _decoded(place: str, path: Path, dataset: Dataset) -> np.ndarray:
    """HU of one file by GDCM.

    Args:
        place: path to read.
        path: path of the file.
        dataset: content of the file.
    """
    import SimpleITK

    _check_ends(path, dataset)
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    reader = SimpleITK.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(place)
    try:
        return SimpleITK.GetArrayFromImage(reader.Execute())
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        # not the text of the error: GDCM quotes paths and texts of the file
        syntax = dataset.file_meta.TransferSyntaxUID.name
        raise Refused(
            "unsupported",
            f"{file_name(path)} is compressed as {syntax}, which neither pydicom nor GDCM decodes; "
            "decompress it with gdcmconv --raw",
        ) from error


def _check_ends(path: Path, dataset: Dataset) -> None:
    """Refuse a JPEG stream without its end, which GDCM fills with grey instead of failing."""
    from pydicom.encaps import generate_frames

    try:
        (frame,) = generate_frames(dataset.PixelData, number_of_frames=1)
    except MemoryError:
        raise
    except Exception as error:
        raise Refused(
            "truncated", f"the compressed pixels of {file_name(path)} are cut off; copy it again"
        ) from error
    is_jpeg = frame[:2] == b"\xff\xd8"
    if is_jpeg and not frame.rstrip(b"\0").endswith(b"\xff\xd9"):
        raise Refused("truncated", f"the JPEG image in {file_name(path)} is cut off; copy it again")
