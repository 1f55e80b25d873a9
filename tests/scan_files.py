"""Scans for tests, written by other libraries than the readers under test, or byte by byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian

from tapct.data.scans.ingest import read_volume
from tapct.types import Refused

SHAPE_ZYX = (9, 14, 17)
CT_STORAGE = "1.2.840.10008.5.1.4.1.1.2"
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def make_ct(shape_ZYX: tuple[int, int, int] = SHAPE_ZYX, seed: int = 0) -> np.ndarray:
    """A noisy body with lung in air, no two orientations alike."""
    rng = np.random.default_rng(seed)
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, size) for size in shape_ZYX), indexing="ij")
    hu = np.full(shape_ZYX, -1000.0)
    hu[(y**2 + x**2 + 0.3 * z) < 0.7] = 40
    hu[((y - 0.1) ** 2 + (x - 0.4) ** 2) < 0.08] = -800
    hu[((y + 0.4) ** 2 + (x + 0.2) ** 2) < 0.02] = 700
    return np.rint(np.maximum(hu + rng.normal(0, 8, shape_ZYX), -1024)).astype(np.int16)


def write_nifti(
    path: Path, hu_ZYX: np.ndarray, affine_lps: np.ndarray | None = None, **header: object
) -> Path:
    """Write (Z, Y, X) voxels whose file axes are x, y, z."""
    affine = np.diag([0.8, 0.7, 2.5, 1.0]) if affine_lps is None else affine_lps
    image = nibabel.Nifti1Image(np.asarray(hu_ZYX).transpose(2, 1, 0), LPS @ affine)
    for key, value in header.items():
        image.header[key] = value
    nibabel.save(image, path)
    return path


def patch_bytes(path: Path, offset: int, data: bytes) -> Path:
    """Overwrite bytes of an uncompressed file."""
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(content)
    return path


def make_slice(pixels: np.ndarray, z_mm: float, number: int = 1, **tags: object) -> FileDataset:
    """One CT slice; `tags` replace or, where None, remove elements."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = CT_STORAGE
    meta.MediaStorageSOPInstanceUID = f"1.2.3.{number}"
    dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    values: dict[str, object] = {
        "SOPClassUID": CT_STORAGE,
        "SOPInstanceUID": f"1.2.3.{number}",
        "SeriesInstanceUID": "1.2.3",
        "StudyInstanceUID": "1.2",
        "Modality": "CT",
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
        "PatientID": "P-007",
        "PatientSex": "F",
        "PatientAge": "063Y",
        "StudyDate": "20200131",
        "Manufacturer": "ACME",
        "ConvolutionKernel": ["B30f", "3"],
        "InstanceNumber": number,
        "SliceThickness": 5.0,
        "ImagePositionPatient": [-10.0, -20.0, z_mm],
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "PixelSpacing": [0.7, 0.8],
        "RescaleSlope": 1,
        "RescaleIntercept": -1024,
        "Rows": pixels.shape[0],
        "Columns": pixels.shape[1],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 16,
        "BitsStored": 16,
        "HighBit": 15,
        "PixelRepresentation": 0,
    }
    for tag, value in {**values, **tags}.items():
        if value is not None:
            setattr(dataset, tag, value)
    intercept = float(dataset.get("RescaleIntercept", -1024) or 0)
    slope = float(dataset.get("RescaleSlope", 1) or 1)
    stored = np.rint((pixels.astype(np.float64) - intercept) / slope)
    dataset.PixelData = stored.astype(
        np.int16 if dataset.PixelRepresentation else np.uint16
    ).tobytes()
    return dataset


def write_series(
    folder: Path,
    hu_ZYX: np.ndarray,
    positions_mm: list[float] | None = None,
    edit: Callable[[int], dict[str, object]] = lambda index: {},
) -> Path:
    """One file a slice, 2 mm apart, thickness 5 mm."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, pixels in enumerate(hu_ZYX):
        z_mm = 100.0 + 2.0 * index if positions_mm is None else positions_mm[index]
        dataset = make_slice(pixels, z_mm, index + 1, **edit(index))
        dataset.save_as(folder / f"slice{index:03d}.dcm", enforce_file_format=True)
    return folder


def refusal(path: Path) -> str:
    """The reason for which a scan is refused; its detail must be one plain line."""
    with pytest.raises(Refused) as caught:
        read_volume(path)
    assert caught.value.detail
    assert "\n" not in caught.value.detail
    return caught.value.reason


def make_labels(shape_ZYX: tuple[int, int, int] = SHAPE_ZYX) -> np.ndarray:
    """Blocks of labels up to 782, background between."""
    labels = np.zeros(shape_ZYX, dtype=np.uint16)
    labels[1:5, 2:8, 2:7], labels[4:8, 6:12, 8:15], labels[2:6, 9:13, 3:7] = 1, 782, 256
    return labels


def compress_by_gdcm(path: Path, compressor: str) -> None:
    """Replace the pixels by a lossless JPEG stream that another library made of the stored
    values.
    """
    plain = pydicom.dcmread(path)
    writer = SimpleITK.ImageFileWriter()
    writer.SetFileName(str(path.with_suffix(".tmp.dcm")))
    writer.UseCompressionOn()
    writer.SetCompressor(compressor)
    writer.Execute(SimpleITK.GetImageFromArray(plain.pixel_array[None]))
    packed = pydicom.dcmread(path.with_suffix(".tmp.dcm"))
    path.with_suffix(".tmp.dcm").unlink()
    plain.PixelData, plain.file_meta.TransferSyntaxUID = (
        packed.PixelData,
        packed.file_meta.TransferSyntaxUID,
    )
    plain["PixelData"].is_undefined_length = True
    assert plain.file_meta.TransferSyntaxUID.is_compressed
    plain.save_as(path)


def noise_ct(seed: int, depth: int = 6) -> np.ndarray:
    """A small body with the noise of this seed, (Z, Y, X)."""
    return make_ct((depth, 24, 26), seed)


def save_scan(
    path: Path, values_ZYX: np.ndarray, spacing: tuple[float, ...] = (0.8, 0.7, 2.0)
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(
        nibabel.Nifti1Image(values_ZYX.transpose(2, 1, 0), LPS @ np.diag([*spacing, 1.0])), path
    )
    return path


def save_labels(path: Path, depth: int = 6, spacing: tuple[float, ...] = (0.8, 0.7, 2.0)) -> Path:
    labels = np.zeros((depth, 24, 26), dtype=np.uint16)
    labels[1:4, 2:9, 2:9], labels[2:5, 9:11, 3:12] = 1, 300
    return save_scan(path, labels, spacing)


def write_enhanced(
    path: Path,
    hu_ZYX: np.ndarray,
    edit: Callable[[Dataset], None] = lambda dataset: None,
    *,
    first_mm: float = 100.0,
    shared_rescale: bool = False,
) -> Path:
    """A multi-frame file, its frames in a mixed order, each with its own intercept."""
    order = np.random.default_rng(5).permutation(len(hu_ZYX))
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset = make_slice(
        hu_ZYX[0],
        0.0,
        SOPClassUID=CT_STORAGE + ".1",
        NumberOfFrames=len(hu_ZYX),
        **dict.fromkeys(
            ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness")
        ),
        RescaleSlope=None,
        RescaleIntercept=None,
    )
    dataset.file_meta.MediaStorageSOPClassUID = CT_STORAGE + ".1"
    frames, stored = [], []
    for place in order:
        intercept = -1024 if shared_rescale else -1024 - int(place)
        frames.append(
            item(
                PlanePositionSequence={"ImagePositionPatient": [-10, -20, first_mm + 2.0 * place]},
                FrameContentSequence={"InStackPositionNumber": int(place) + 1},
                **(
                    {}
                    if shared_rescale
                    else {"PixelValueTransformationSequence": rescale_by(intercept)}
                ),
            )
        )
        stored.append(hu_ZYX[place] - intercept)
    shared = item(
        PlaneOrientationSequence={"ImageOrientationPatient": [1, 0, 0, 0, 1, 0]},
        PixelMeasuresSequence={"PixelSpacing": [0.7, 0.8], "SliceThickness": 5.0},
        CTReconstructionSequence={"ConvolutionKernel": "B30f"},
        **({"PixelValueTransformationSequence": rescale_by(-1024)} if shared_rescale else {}),
    )
    dataset.SharedFunctionalGroupsSequence = Sequence([shared])
    dataset.PerFrameFunctionalGroupsSequence = Sequence(frames)
    dataset.PixelData = np.stack(stored).astype(np.uint16).tobytes()
    del dataset.ConvolutionKernel
    edit(dataset)
    dataset.save_as(path, enforce_file_format=True)
    return path


def rescale_by(intercept: int) -> dict[str, object]:
    """What a sequence of PixelValueTransformation holds."""
    return {"RescaleSlope": 1, "RescaleIntercept": intercept, "RescaleType": "HU"}


def item(**sequences: dict[str, object]) -> Dataset:
    """A data set of sequences with one item each."""
    dataset = Dataset()
    for name, content in sequences.items():
        inner = Dataset()
        for key, value in content.items():
            setattr(inner, key, value)
        setattr(dataset, name, Sequence([inner]))
    return dataset
