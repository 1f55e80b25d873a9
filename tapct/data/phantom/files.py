"""Write a phantom case: the scan as NIfTI with a side-car or as a DICOM series, the label map as
NIfTI.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel import orientations
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filewriter import dcmwrite
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from tapct.types import LabelMap, Volume


@dataclass(frozen=True)
class CaseFacts:
    """Facts of a case's header in plain text, since the phantom's patients do not exist.

    Args:
        name: file stem, P<patient>_T<visit>.
        patient_id: identifier of the patient, the same at both time points.
        uid_key: text from which all DICOM identifiers of the case are hashed.
        visit: number of the time point, 0 or 1.
        sex: M or F.
        age_years: age at this visit.
        study_date: YYYYMMDD.
        manufacturer: name of the scanner's maker.
        kernel: name of the reconstruction kernel.
        body_part: DICOM's BodyPartExamined.
        orientation: axis codes of the NIfTI's stored array.
        dicom: whether the scan is a DICOM series instead of a NIfTI.
    """

    name: str
    patient_id: str
    uid_key: str
    visit: int
    sex: str
    age_years: int
    study_date: str
    manufacturer: str
    kernel: str
    body_part: str
    orientation: str
    dicom: bool

    @property
    def path(self) -> str:
        """Path of the scan below the archive: a file or a DICOM folder."""
        return f"images/{self.name}" if self.dicom else f"images/{self.name}.nii.gz"

    def sidecar(self) -> dict[str, str]:
        """The facts with the keys of BIDS and dcm2niix."""
        return {
            "Modality": "CT",
            "PatientID": self.patient_id,
            "PatientSex": self.sex,
            "PatientAge": f"{self.age_years:03d}Y",
            "StudyDate": self.study_date,
            "Manufacturer": self.manufacturer,
            "ConvolutionKernel": self.kernel,
            "BodyPartExamined": self.body_part,
            "SeriesDescription": "synthetic phantom",
        }


def write_case(
    volume: Volume, labels: LabelMap, facts: CaseFacts, images: Path, label_folder: Path
) -> int:
    """Write one scan and its label map.

    Args:
        volume: scan.
        labels: label map on the same grid.
        facts: header facts and the choice of format.
        images: folder of scans; it exists.
        label_folder: folder of label maps; it exists.
    Returns:
        Number of bytes on disk.
    """
    grid = (volume.spacing_mm, volume.origin_mm)
    if facts.dicom:
        num_bytes = _write_series(volume, facts, images / facts.name)
    else:
        num_bytes = _write_nifti(
            volume.hu_ZYX, *grid, facts.orientation, images / f"{facts.name}.nii.gz", zlib.Z_RLE
        )
        num_bytes += _write_json(facts.sidecar(), images / f"{facts.name}.json")
    small = labels.labels_ZYX.astype(np.uint8)
    target = label_folder / f"{facts.name}.nii.gz"
    num_bytes += _write_nifti(small, *grid, facts.orientation, target, zlib.Z_DEFAULT_STRATEGY)
    names = {str(value): name for value, name in labels.names}
    return num_bytes + _write_json({"labels": names}, label_folder / f"{facts.name}.json")


def _write_json(content: dict, path: Path) -> int:
    """Write a side-car; returns its number of bytes."""
    return path.write_text(json.dumps(content, indent=1) + "\n")


def _write_nifti(
    array_ZYX: np.ndarray,
    spacing_mm: tuple[float, float, float],
    origin_mm: tuple[float, float, float],
    orientation: str,
    path: Path,
    strategy: int,
) -> int:
    """Write an LPS array as NIfTI with its axes in the given orientation.

    The gzip header holds no time, so that the same array gives the same bytes. Returns their
    number.
    """
    dz, dy, dx = spacing_mm
    x, y, z = origin_mm
    affine = np.array([[-dx, 0, 0, -x], [0, -dy, 0, -y], [0, 0, dz, z], [0, 0, 0, 1]], np.float64)
    image = nib.Nifti1Image(array_ZYX.transpose(2, 1, 0), affine)
    wanted = orientations.axcodes2ornt(tuple(orientation))
    image = image.as_reoriented(orientations.ornt_transform(nib.io_orientation(affine), wanted))
    image.set_sform(image.affine, 1)
    image.set_qform(image.affine, 1)
    image.header.set_xyzt_units("mm")
    packer = zlib.compressobj(1, zlib.DEFLATED, 31, 9, strategy)  # 31: gzip, with time 0
    packed = packer.compress(image.to_bytes()) + packer.flush()
    return path.write_bytes(packed)


def _write_series(volume: Volume, facts: CaseFacts, folder: Path) -> int:
    """Write one CT Image Storage file per slice, and return their bytes.

    Instance numbers count from the head for some scanners and from the feet for others.
    """
    folder.mkdir(exist_ok=True)
    signed = facts.manufacturer in ("GE MEDICAL SYSTEMS", "TOSHIBA")
    intercept = 0 if signed else -1024
    from_head = facts.manufacturer == "SIEMENS"
    template = _series_header(volume, facts, signed, intercept)
    depth = len(volume.hu_ZYX)
    num_bytes = 0
    for k in range(depth):
        z = depth - 1 - k if from_head else k
        position = volume.origin_mm[2] + z * volume.spacing_mm[0]
        template.SOPInstanceUID = generate_uid(entropy_srcs=[facts.uid_key, "instance", str(k)])
        template.file_meta.MediaStorageSOPInstanceUID = template.SOPInstanceUID
        template.InstanceNumber = k + 1
        template.ImagePositionPatient = _decimals(*volume.origin_mm[:2], position)
        template.SliceLocation = _decimals(position)[0]
        stored = (volume.hu_ZYX[z] - intercept).astype("<i2" if signed else "<u2")
        template.PixelData = stored.tobytes()
        path = folder / f"IMG{k + 1:04d}.dcm"
        dcmwrite(path, template, enforce_file_format=True)
        num_bytes += path.stat().st_size
    return num_bytes


def _decimals(*values: float) -> list[str]:
    """DICOM decimal strings of at most 16 characters."""
    return [f"{value:.6f}" for value in values]


def _series_header(volume: Volume, facts: CaseFacts, signed: bool, intercept: int) -> Dataset:
    """All elements that the slices of a series share."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds = Dataset()
    ds.file_meta = meta
    ds.SpecificCharacterSet = "ISO_IR 100"
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.SOPClassUID = CTImageStorage
    ds.StudyDate = ds.SeriesDate = ds.AcquisitionDate = facts.study_date
    ds.StudyTime = "120000"
    ds.AccessionNumber = ds.ReferringPhysicianName = ds.StudyID = ds.PatientBirthDate = ""
    ds.Modality = "CT"
    ds.Manufacturer = facts.manufacturer
    ds.SeriesDescription = "synthetic phantom"
    ds.PatientName = f"PHANTOM^{facts.patient_id}"
    ds.PatientID = facts.patient_id
    ds.PatientSex = facts.sex
    ds.PatientAge = f"{facts.age_years:03d}Y"
    ds.BodyPartExamined = facts.body_part
    ds.KVP = "120"
    ds.SliceThickness = _decimals(volume.spacing_mm[0])[0]
    ds.ConvolutionKernel = facts.kernel
    ds.PatientPosition = "HFS"
    ds.StudyInstanceUID = generate_uid(entropy_srcs=[facts.uid_key, "study"])
    ds.SeriesInstanceUID = generate_uid(entropy_srcs=[facts.uid_key, "series"])
    ds.FrameOfReferenceUID = generate_uid(entropy_srcs=[facts.uid_key, "frame"])
    ds.PositionReferenceIndicator = ""
    ds.SeriesNumber = 2
    ds.AcquisitionNumber = 1
    ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    ds.SamplesPerPixel = 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    _, ds.Rows, ds.Columns = volume.hu_ZYX.shape
    ds.PixelSpacing = _decimals(volume.spacing_mm[1], volume.spacing_mm[2])
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 16, 15
    ds.PixelRepresentation = int(signed)
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = intercept, 1, "HU"
    ds.WindowCenter, ds.WindowWidth = 40, 400
    return ds
