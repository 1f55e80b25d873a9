"""No name that a file holds, or is called by, is in anything that tapct writes or prints, but for
the columns of paths in the manifest and the lines of `index` and `pack` about these paths.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import blosc2
import nibabel
import numpy as np
import pyarrow.parquet
import pydicom
import pytest
import SimpleITK
import torch
from pydicom.datadict import dictionary_VR
from pydicom.dataset import Dataset
from scan_files import LPS, make_ct, make_labels, make_slice
from shell import Shell
from shell import shell as shell  # a fixture
from tiny_run import write_config

from tapct.config.plugins import Plugin
from tapct.data.index.build import build_manifest
from tapct.data.packed.store import Store
from tapct.data.patients.key import KEY_FILE, KEY_VARIABLE
from tapct.data.patients.split import patients_below
from tapct.eval.features.preprocess import Preprocess
from tapct.models import vit
from tapct.types import HUContract
from tapct.weights.card import FeatureSettings
from tapct.weights.export import save_export

IN_HEADERS = "Zebedee"  # the beginning of every name that is planted in a header or side-car
IN_PATHS = "Quillfeather"  # the same for files and folders
SHAPE_ZYX = (12, 48, 48)
PATH_COLUMNS = ("path", "label_path", "file_paths", "folder", "name")  # the last: of a journal
TEXT_VRS = ("LO", "SH", "LT", "ST", "UT", "PN", "CS", "AE", "UC")
TEXT_ELEMENTS = """
    PatientName PatientComments ReferringPhysicianName PerformingPhysicianName OperatorsName
    InstitutionName InstitutionAddress StationName StudyDescription SeriesDescription ProtocolName
    ImageComments AccessionNumber StudyID OtherPatientNames PatientBirthName
    PatientMotherBirthName EthnicGroup Occupation AdditionalPatientHistory
    RequestedProcedureDescription DeviceSerialNumber ManufacturerModelName SoftwareVersions
    ConvolutionKernel Manufacturer BodyPartExamined PatientID DerivationDescription FilterType
    ContrastBolusAgent IssuerOfPatientID
"""
# elements that decide whether a file is read as CT at all
KEPT = ("Modality", "ImageType", "RescaleType", "PhotometricInterpretation", "PatientSex")


def write_dicom(folder: Path, seed: int) -> None:
    """A series with a name in every element of text and in private ones."""
    folder.mkdir(parents=True)
    hu_ZYX = make_ct(SHAPE_ZYX, seed)
    names = {
        keyword: f"{IN_HEADERS}^{number}" for number, keyword in enumerate(TEXT_ELEMENTS.split())
    }
    assert all(dictionary_VR(keyword) in TEXT_VRS for keyword in names)
    for z, plane in enumerate(hu_ZYX):
        dataset = make_slice(plane, 2.0 * z, z + 1, **names, SOPInstanceUID=f"1.2.{seed}.{z}")
        dataset.SeriesInstanceUID, dataset.StudyInstanceUID = f"1.2.{seed}", f"1.3.{seed}"
        block = dataset.private_block(0x0009, f"{IN_HEADERS} CREATOR", create=True)
        block.add_new(0x01, "LO", f"{IN_HEADERS} private")
        inner = Dataset()
        inner.PatientName = f"{IN_HEADERS}^inner"
        dataset.OtherPatientIDsSequence = [inner]
        dataset.save_as(folder / f"{IN_PATHS}{z}.dcm", enforce_file_format=True)


def write_nifti(file: Path, voxels_ZYX: np.ndarray) -> None:
    """A file with a name in each of its text fields, in an extension and in its side-car."""
    file.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(voxels_ZYX.transpose(2, 1, 0), LPS @ np.diag([0.8, 0.7, 2.0, 1.0]))
    for field in ("descrip", "aux_file", "intent_name", "db_name"):
        image.header[field] = f"{IN_HEADERS} {field}"[: image.header[field].dtype.itemsize]
    comment = nibabel.nifti1.Nifti1Extension("comment", f"{IN_HEADERS} comment".encode())
    image.header.extensions.append(comment)
    nibabel.save(image, file)


def write_side_car(scan: Path) -> None:
    """A side-car whose texts are all names."""
    content: dict[str, object] = {key: f"{IN_HEADERS} {key}" for key in TEXT_ELEMENTS.split()}
    content |= {"PatientSex": IN_HEADERS, "PatientAge": IN_HEADERS, "StudyDate": IN_HEADERS}
    content |= {"Modality": "CT", "StudyInstanceUID": f"{IN_HEADERS}.1", IN_HEADERS: [IN_HEADERS]}
    scan.with_name(scan.name.replace(".nii.gz", ".json")).write_text(json.dumps(content))


def write_itk(file: Path, voxels_ZYX: np.ndarray) -> None:
    """A NRRD or MetaImage file with names in its keys and values."""
    file.parent.mkdir(parents=True, exist_ok=True)
    image = SimpleITK.GetImageFromArray(voxels_ZYX)
    for key in ("content", "PatientName", "Comment", f"{IN_HEADERS}_key"):
        image.SetMetaData(key, f"{IN_HEADERS} {key}")
    SimpleITK.WriteImage(image, file)


def refused_files(root: Path) -> None:
    """Files whose refusals could quote a name, one for each format and kind of text."""
    folder = root / f"{IN_PATHS}_refused"
    folder.mkdir()
    plane = make_ct(SHAPE_ZYX, 0)[0]
    tags: dict[str, object]
    for number, tags in enumerate(
        (
            {"Modality": IN_HEADERS},
            {"SOPClassUID": f"1.2.{IN_HEADERS}"},
            {"ImageType": ["LOCALIZER", IN_HEADERS]},
            {"RescaleType": IN_HEADERS},
            {"PixelSpacing": None, "StudyDescription": IN_HEADERS},
        )
    ):
        (folder / f"{IN_PATHS}{number}").mkdir()
        dataset = make_slice(plane, 0.0, **tags, SeriesInstanceUID=f"1.9.{number}")
        dataset.save_as(folder / f"{IN_PATHS}{number}" / f"{IN_PATHS}.dcm")
    fields = {
        "type": "short",
        "dimension": "3",
        "space": "left-posterior-superior",
        "sizes": "4 4 4",
        "space directions": "(1,0,0) (0,1,0) (0,0,1)",
        "kinds": "domain domain domain",
        "encoding": "raw",
        "space origin": "(0,0,0)",
    }
    for key in (*fields, "data file"):
        text = "".join(f"{k}: {v}\n" for k, v in {**fields, key: f"{IN_HEADERS} x"}.items())
        file = folder / f"{IN_PATHS}_{key.replace(' ', '')}.nrrd"
        file.write_bytes(f"NRRD0004\n{text}\n".encode() + bytes(128))
    for key in ("NDims", "DimSize", "ElementType", "ElementSpacing", "ElementDataFile"):
        meta = {"NDims": "3", "DimSize": "4 4 4", "ElementType": "MET_SHORT"}
        meta |= {"ElementSpacing": "1 1 1", "ElementDataFile": "LOCAL"}
        lines = "".join(f"{k} = {v}\n" for k, v in {**meta, key: f"{IN_HEADERS} x"}.items())
        (folder / f"{IN_PATHS}_{key}.mha").write_bytes(lines.encode() + bytes(128))
    whole = folder / f"{IN_PATHS}_cut.nii.gz"
    write_nifti(whole, make_ct(SHAPE_ZYX, 9))
    whole.write_bytes(whole.read_bytes()[:-200])
    write_nifti(folder / f"{IN_PATHS}_modality.nii.gz", make_ct(SHAPE_ZYX, 8))
    (folder / f"{IN_PATHS}_modality.json").write_text(json.dumps({"Modality": IN_HEADERS}))
    write_nifti(folder / f"{IN_PATHS}_broken.nii.gz", make_ct(SHAPE_ZYX, 7))
    (folder / f"{IN_PATHS}_broken.json").write_text(f'{{"{IN_HEADERS}": ')


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Scans of several people in all formats, some with labels, and files that are refused."""
    root = tmp_path / "archive"
    labels_ZYX = make_labels(SHAPE_ZYX)
    for number in range(6):
        scan = root / f"{IN_PATHS}_{number}" / f"{IN_PATHS}_{number}_scan.nii.gz"
        write_nifti(scan, make_ct(SHAPE_ZYX, number))
        write_nifti(scan.with_name(f"{IN_PATHS}_{number}_scan_seg.nii.gz"), labels_ZYX)
        if number == 0:
            write_side_car(scan)
    wrong = root / f"{IN_PATHS}_5" / f"{IN_PATHS}_5_scan_seg.nii.gz"
    write_nifti(wrong, labels_ZYX[:-1])  # labels that do not fit
    write_dicom(root / f"{IN_PATHS}_dicom", 20)
    write_itk(root / f"{IN_PATHS}_7.nrrd", make_ct(SHAPE_ZYX, 21))
    write_itk(root / f"{IN_PATHS}_8.mha", make_ct(SHAPE_ZYX, 22))
    write_nifti(root / f"{IN_PATHS}_copy.nii.gz", make_ct(SHAPE_ZYX, 1))  # a duplicate
    refused_files(root)
    return root


def texts_of(file: Path) -> Iterator[str]:
    """What a file holds, as text; of compressed formats their content."""
    yield file.read_bytes().decode("latin-1")
    if file.suffix == ".parquet":
        table = pyarrow.parquet.read_table(file)
        yield repr(table.schema.metadata)
        for name in table.column_names:
            if name not in PATH_COLUMNS:
                yield repr(table.column(name).to_pylist())
    elif file.suffix == ".b2nd":
        array = blosc2.open(str(file), mode="r")
        yield repr(dict(array.schunk.vlmeta[:]))
    elif file.suffix == ".npz":
        with np.load(file) as arrays:
            yield repr({name: arrays[name].dtype for name in arrays})


def test_the_journal_of_an_archive_has_names_of_files_in_its_columns_of_paths_alone(
    tmp_path: Path, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "tests")
    out = tmp_path / "grown"
    build_manifest(archive, out)
    parts = sorted((out / "parts").iterdir())
    assert {part.name.partition("-")[0] for part in parts} == {
        *("about.json", "heads", "labels", "scans"),
    }
    for part in parts:
        assert part.stat().st_mode & 0o77 == 0, part
        for number, text in enumerate(texts_of(part)):
            assert IN_HEADERS.lower() not in text.lower(), part
            assert number == 0 or IN_PATHS.lower() not in text.lower(), part


def test_planted_names_are_nowhere_but_in_the_columns_of_paths(
    tmp_path: Path, archive: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "tests")
    manifest, store, run = tmp_path / "m.parquet", tmp_path / "store", tmp_path / "run"
    printed = [
        shell.good("index", archive, "--out", manifest, "--workers", 0, "--min-depth", 3),
        shell.good("pack", manifest, "--out", store, "--workers", 0),
        shell.good("pack", manifest, "--out", store, "--verify"),
    ]
    table = pyarrow.parquet.read_table(manifest).to_pylist()
    accepted = [row for row in table if row["status"] == "accepted"]
    assert len(accepted) == 9 and sum(bool(row["label_path"]) for row in accepted) == 5
    assert {row["kind"] for row in accepted} == {"nifti", "nrrd", "meta", "dicom"}
    assert len([row for row in table if row["status"] == "refused"]) > 15
    assert all(IN_PATHS in row["path"] for row in table)

    labelled = {scan.patient for scan in Store(store).scans if scan.has_labels}
    seed = next(s for s in range(50) if 0 < len(patients_below(labelled, 0.5, s)) < 5)
    config = write_config(tmp_path, store)
    overrides = ["data.held_out=0.5", f"data.split_seed={seed}", "train.steps=2"]
    silent = [
        shell.good("train", config, *overrides),
        shell.good("eval", run),
        shell.good("report", run),
        shell.good("export", run),
        shell.good("compare", run, "--out", tmp_path / "compare.html"),
        shell.good("report", store),
        shell.good("contract", store),
    ]
    scan = archive / accepted[0]["path"]
    features = tmp_path / "features.npz"
    silent.append(shell.good("embed", run / "export", scan, "--out", features))

    for text in silent:
        assert IN_PATHS not in text
    for text in (*printed, *silent):
        assert IN_HEADERS.lower() not in text.lower()
    written = [
        file for file in tmp_path.rglob("*") if file.is_file() and archive not in file.parents
    ]
    assert len(written) > 25
    for file in written:
        for number, text in enumerate(texts_of(file)):
            assert IN_HEADERS.lower() not in text.lower(), file
            is_path_column = file == manifest and number == 0  # the raw bytes of the whole table
            assert is_path_column or IN_PATHS.lower() not in text.lower(), file
        assert not re.search(re.escape(str(archive)), file.read_bytes().decode("latin-1")), file


def test_only_the_owner_can_read_what_is_about_patients(tmp_path: Path, shell: Shell) -> None:
    scan = tmp_path / "archive" / "x1.nii.gz"
    write_nifti(scan, make_ct(SHAPE_ZYX, 1))
    shell.good("index", scan.parent, "--out", tmp_path / "m.parquet", "--workers", 0)
    shell.good("pack", tmp_path / "m.parquet", "--out", tmp_path / "store", "--workers", 0)
    private = [tmp_path / "m.parquet", tmp_path / KEY_FILE, *(tmp_path / "store").rglob("*.*")]
    assert len([file for file in private if file.suffix == ".b2nd"]) == 1
    for file in private:
        if file.name != ".lock":
            assert file.stat().st_mode & 0o777 == 0o600, file


def test_an_export_is_for_all_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        settings = FeatureSettings(Plugin("vit", vit.Config()), HUContract(), Preprocess())
        save_export(tmp_path / "export", torch.nn.Linear(2, 2), settings, {})
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "export").iterdir()} == {0o644}
    assert (tmp_path / "export").stat().st_mode & 0o777 == 0o755


def test_the_planted_dicom_is_read_at_all(tmp_path: Path) -> None:
    write_dicom(tmp_path / "series", 1)
    header = pydicom.dcmread(next((tmp_path / "series").iterdir()))
    planted = [element for element in header if IN_HEADERS in str(element.value)]
    assert len(planted) > 30 and not {element.keyword for element in planted} & set(KEPT)
