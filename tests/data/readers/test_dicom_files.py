"""Kinds of DICOM files beside the plain one: what is read gives the right HU, in silence."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom import config
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import JPEGExtended12Bit
from scan_files import (
    make_ct,
    make_slice,
    refusal,
    write_enhanced,
    write_series,
)

from tapct.data.index.build import build_manifest
from tapct.data.readers import dicom_pixels
from tapct.data.scans.ingest import read_volume
from tapct.data.scans.read_rules import ReadRules
from tapct.data.search.discover import find_source, find_sources, search
from tapct.types import Refused


def strip_meta(path: Path, syntax: str) -> None:
    """Write a file again without preamble and meta header."""
    dataset = pydicom.dcmread(path)
    dataset.preamble, dataset.file_meta = None, FileMetaDataset()  # type: ignore[assignment]
    if syntax == "big endian":
        pixels = np.frombuffer(dataset.PixelData, "<u2")
        dataset.PixelData = pixels.astype(">u2").tobytes()
    pydicom.dcmwrite(
        path,
        dataset,
        implicit_vr=syntax == "implicit",
        little_endian=syntax != "big endian",
        enforce_file_format=False,
    )


@pytest.mark.parametrize("syntax", ["implicit", "explicit", "big endian"])
@pytest.mark.parametrize("suffix", ["", ".dcm"])
def test_files_without_preamble_are_read(tmp_path: Path, syntax: str, suffix: str) -> None:
    folder = write_series(tmp_path / "s", make_ct())
    for path in sorted(folder.iterdir()):
        strip_meta(path, syntax)
        path.rename(path.with_suffix(suffix))
    np.testing.assert_array_equal(read_volume(folder).hu_ZYX, make_ct())


def test_other_files_are_not_taken_for_dicom_without_preamble(tmp_path: Path) -> None:
    (tmp_path / "random").write_bytes(np.random.default_rng(0).bytes(4000))
    (tmp_path / "group8").write_bytes(b"\x08\x00\x05\x00CS\x04\x00ABCD" + b"\x01" * 500)
    (tmp_path / "zeros").write_bytes(b"\0" * 4000)
    (tmp_path / "text").write_text("SOPClassUID 1.2.840.10008.5.1.4.1.1.2 " * 40)
    listing = search(tmp_path)
    assert listing.sources == ()
    assert listing.passed_over == {"without suffix": 4}


def test_ct_storage_without_modality_is_ct(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "s", make_ct(), edit=lambda i: {"Modality": None})
    np.testing.assert_array_equal(read_volume(folder).hu_ZYX, make_ct())
    mr = {"Modality": None, "SOPClassUID": "1.2.840.10008.5.1.4.1.1.4"}
    assert refusal(write_series(tmp_path / "t", make_ct(), edit=lambda i: mr)) == "not_ct"


@pytest.mark.parametrize("shared_rescale", [False, True])
def test_enhanced_multiframe_is_read(tmp_path: Path, shared_rescale: bool) -> None:
    path = write_enhanced(tmp_path / "e" / "x", make_ct(), shared_rescale=shared_rescale)
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.hu_ZYX, make_ct())
    np.testing.assert_allclose(volume.spacing_mm, (2.0, 0.7, 0.8))
    np.testing.assert_allclose(volume.origin_mm, (-10, -20, 100))
    assert volume.facts.kernel == "B30f"


def test_the_parts_of_a_concatenation_are_one_scan(tmp_path: Path) -> None:
    def part(number: int) -> Callable[[Dataset], None]:
        def edit(dataset: Dataset) -> None:
            dataset.ConcatenationUID, dataset.SOPInstanceUID = "1.9", f"1.2.3.{number}"

        return edit

    write_enhanced(tmp_path / "e" / "a", make_ct()[:5], part(1))
    write_enhanced(tmp_path / "e" / "b", make_ct()[5:], part(2), first_mm=110.0)
    (source,) = find_sources(tmp_path)
    assert len(source.files) == 2
    np.testing.assert_array_equal(read_volume(tmp_path / "e").hu_ZYX, make_ct())


def test_multiframe_pixels_have_the_length_that_the_header_describes(tmp_path: Path) -> None:
    def longer(dataset: Dataset) -> None:
        dataset.PixelData += dataset.PixelData[: 2 * dataset.Rows * dataset.Columns]

    def shorter(dataset: Dataset) -> None:
        dataset.PixelData = dataset.PixelData[:-2]

    for edit, reason in ((longer, "header_mismatch"), (shorter, "truncated")):
        assert refusal(write_enhanced(tmp_path / edit.__name__ / "x", make_ct(), edit)) == reason


@pytest.mark.parametrize(("num_bytes", "reason"), [(9, ""), (10, ""), (11, "header_mismatch")])
def test_one_byte_may_pad_pixels_to_an_even_length(num_bytes: int, reason: str) -> None:
    if not reason:
        dicom_pixels._check_length(Path("x"), num_bytes, 9)
        return
    with pytest.raises(Refused, match="11 bytes of pixels; its header describes 9") as caught:
        dicom_pixels._check_length(Path("x"), num_bytes, 9)
    assert caught.value.reason == reason


def test_frames_that_make_no_stack_are_refused(tmp_path: Path) -> None:
    def repeat(dataset: Dataset) -> None:
        first, second = dataset.PerFrameFunctionalGroupsSequence[:2]
        second.PlanePositionSequence = first.PlanePositionSequence

    def localizer(dataset: Dataset) -> None:
        frame = dataset.PerFrameFunctionalGroupsSequence[3]
        frame.CTImageFrameTypeSequence = Sequence([Dataset()])
        frame.CTImageFrameTypeSequence[0].FrameType = ["ORIGINAL", "PRIMARY", "LOCALIZER", "NONE"]

    def too_few(dataset: Dataset) -> None:
        dataset.PerFrameFunctionalGroupsSequence = dataset.PerFrameFunctionalGroupsSequence[:-1]

    def projection(dataset: Dataset) -> None:
        dataset.ImageType = ["DERIVED", "PRIMARY", "VOLUME", "MAXIMUM"]

    for edit, reason in (
        (repeat, "duplicate_slices"),
        (localizer, "missing_slices"),  # the other frames; the localizer has a row of its own
        (too_few, "multiframe"),
        (projection, "derived_image"),
    ):
        assert refusal(write_enhanced(tmp_path / edit.__name__ / "x", make_ct(), edit)) == reason


def jpeg_12_bit(pixels: np.ndarray) -> bytes:
    """A 12-bit JPEG of an image whose blocks of 8 x 8 pixels are flat, after ITU T.81: only the
    first coefficient of a block differs from zero, so its value is exact.
    """
    blocks = pixels[::8, ::8].astype(int) - 2048  # with 8 as the first step of quantisation
    bits, previous = "", 0
    for value in blocks.ravel():
        difference, previous = int(value) - previous, int(value)
        category = abs(difference).bit_length()
        bits += f"{category:04b}"
        if category:
            low = difference if difference > 0 else difference + (1 << category) - 1
            bits += f"{low:0{category}b}"
        bits += "0"  # end of block
    bits += "1" * (-len(bits) % 8)
    scan = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\x00")
    rows, columns = pixels.shape
    segments = [
        (0xDB, bytes([0, 8, *[1] * 63])),
        (0xC1, struct.pack(">BHHB", 12, rows, columns, 1) + bytes([1, 0x11, 0])),
        (0xC4, bytes([0x00, 0, 0, 0, 14, *[0] * 12, *range(14)])),
        (0xC4, bytes([0x10, 1, *[0] * 15, 0])),
        (0xDA, bytes([1, 1, 0x00, 0, 63, 0])),
    ]
    head = b"".join(
        bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body for marker, body in segments
    )
    return b"\xff\xd8" + head + scan + b"\xff\xd9"


def write_jpeg_series(folder: Path, *, cut: int = 0, **tags: object) -> np.ndarray:
    """Five slices of flat blocks as 12-bit JPEG; the HU that were written."""
    blocks = make_ct((5, 8, 8), seed=2)
    blocks = np.where(blocks > -500, blocks, -1000)
    hu_ZYX = blocks.repeat(8, axis=1).repeat(8, axis=2)
    write_series(folder, hu_ZYX, edit=lambda i: dict(tags))
    for path, plane in zip(sorted(folder.iterdir()), hu_ZYX):
        dataset = pydicom.dcmread(path)
        dataset.BitsStored, dataset.HighBit = 12, 11
        stream = jpeg_12_bit(plane + 1024)
        dataset.PixelData = encapsulate([stream[: len(stream) - cut]])
        dataset["PixelData"].is_undefined_length = True
        dataset.file_meta.TransferSyntaxUID = JPEGExtended12Bit
        dataset.save_as(path, enforce_file_format=True)
    return hu_ZYX


def test_jpeg_of_12_bits_is_decoded_and_its_ratio_is_known(tmp_path: Path) -> None:
    written = write_jpeg_series(tmp_path / "s", LossyImageCompressionRatio=4.5)
    volume = read_volume(tmp_path / "s", accept=ReadRules(checks=None))  # its blocks are flat
    np.testing.assert_array_equal(volume.hu_ZYX, written)
    assert (volume.marks, volume.facts.lossy_ratio) == (("lossy",), 4.5)
    write_jpeg_series(tmp_path / "t")  # the ratio of the file itself, since the header has none
    assert refusal(tmp_path / "t") == "lossy"
    write_jpeg_series(tmp_path / "u", cut=40)
    assert refusal(tmp_path / "u") == "truncated"


def test_what_no_library_decodes_is_refused_without_the_text_of_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(reader: object) -> None:
        raise RuntimeError(f"ITK ERROR: {tmp_path} of Muster^Erika has no codec")

    monkeypatch.setattr("SimpleITK.ImageFileReader.Execute", fail)
    write_jpeg_series(tmp_path / "s", LossyImageCompressionRatio=4.5)
    with pytest.raises(Refused, match="neither pydicom nor GDCM decodes") as caught:
        read_volume(tmp_path / "s")
    assert caught.value.reason == "unsupported"
    assert "Muster" not in caught.value.marked and str(tmp_path) not in caught.value.marked


def test_lossy_compression_is_marked_or_refused_beyond_a_ratio(tmp_path: Path) -> None:
    for name, ratios in (("a", [4]), ("b", [3, 12]), ("c", None)):
        lossy = {"LossyImageCompression": "01", "LossyImageCompressionRatio": ratios}
        plain = {"LossyImageCompression": "00"}
        write_series(
            tmp_path / "x" / name,
            make_ct(seed=ord(name)),
            edit=lambda i, lossy=lossy, plain=plain, name=name: {  # type: ignore[misc]
                **(lossy if i == 3 else plain),
                "SeriesInstanceUID": f"1.2.{ord(name)}",
            },
        )
    built = build_manifest(tmp_path / "x", tmp_path / "m.parquet")
    assert [(row.path, row.reason, row.marks) for row in built.rows] == [
        ("a", "", "lossy"),
        ("b", "lossy", ""),
        ("c", "", "lossy"),
    ]
    assert built.rows[0].lossy_ratio == 4
    assert np.isnan(built.rows[2].lossy_ratio)
    built = build_manifest(
        tmp_path / "x", tmp_path / "m.parquet", accept=ReadRules(max_lossy_ratio=12)
    )
    assert [row.marks for row in built.rows] == ["lossy"] * 3


def test_private_compression_has_a_reason_of_its_own(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "s", make_ct())
    for path in folder.iterdir():
        dataset = pydicom.dcmread(path)
        block = dataset.private_block(0x07A1, "ELSCINT1", create=True)
        block.add_new(0x11, "LO", "PMSCT_RLE1")
        block.add_new(0x0A, "OB", dataset.PixelData[:100])
        del dataset.PixelData
        dataset.save_as(path)
    assert refusal(folder) == "private_compression"


@pytest.mark.filterwarnings("error")
def test_values_that_the_standard_forbids_are_read_in_silence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    odd = {
        "PixelSpacing": ["0.70000000000000000001", "0.8000000000000000000"],
        "ImagePositionPatient": ["-10.000000000000000001", "-20.0", None],
        "InstanceNumber": "5.0",
        "SeriesInstanceUID": "1.2.840.x.0001",
        "StudyInstanceUID": "1." + "9" * 70,
        "PatientAge": "63 years",
        "StudyDate": "2020-01-31",
        "AcquisitionNumber": "1.5",
        "RescaleSlope": "1.0000000000000000000000",
        "PatientID": "P\u00e4ule",
    }
    modes = config.settings.writing_validation_mode, config.settings.reading_validation_mode
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config.settings.writing_validation_mode = config.IGNORE
        config.settings.reading_validation_mode = config.IGNORE
        try:
            for i, plane in enumerate(make_ct()):
                places = ["-10.000000000000000001", "-20.0", f"{100 + 2 * i}.0000000000000000000"]
                dataset = make_slice(plane, 0.0, i, **{**odd, "ImagePositionPatient": places})
                (tmp_path / "a" / "s").mkdir(parents=True, exist_ok=True)
                dataset.save_as(tmp_path / "a" / "s" / f"{i}.dcm", enforce_file_format=True)
        finally:
            config.settings.writing_validation_mode = modes[0]
            config.settings.reading_validation_mode = modes[1]
    (row,) = build_manifest(tmp_path / "a", tmp_path / "m.parquet").rows
    assert (row.reason, row.depth, row.age_years, row.study_date) == ("", 9, 63, "2020")
    np.testing.assert_allclose((row.spacing_z_mm, row.spacing_y_mm), (2.0, 0.7))
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


def test_objects_without_an_image_are_listed_by_their_class(tmp_path: Path) -> None:
    write_series(tmp_path / "s", make_ct())
    for name, sop_class, modality in (
        ("seg", "1.2.840.10008.5.1.4.1.1.66.4", "SEG"),
        ("sr", "1.2.840.10008.5.1.4.1.1.88.33", "SR"),
        ("rt", "1.2.840.10008.5.1.4.1.1.481.3", "RTSTRUCT"),
    ):
        dataset = make_slice(make_ct()[0], 0.0, SOPClassUID=sop_class, Modality=modality)
        dataset.SeriesInstanceUID = f"1.2.{int(name == 'sr')}"
        dataset.save_as(tmp_path / f"{name}.dcm", enforce_file_format=True)
    objects = [source for source in find_sources(tmp_path) if source.kind == "dicom_object"]
    assert [(source.path.name, source.modality) for source in objects] == [
        ("rt.dcm", "RTSTRUCT"),
        ("seg.dcm", "SEG"),
        ("sr.dcm", "SR"),
    ]
    built = build_manifest(tmp_path, tmp_path / "m.parquet")
    assert [row.path for row in built.rows] == ["s"]
    assert built.passed_over == {"DICOM structured report": 1}
    # the other two are labels that belong to no scan
    assert built.label_report is not None
    assert {Path(path).name for path in built.label_report.unmatched} == {"rt.dcm", "seg.dcm"}
    with pytest.raises(Refused, match="segmentation"):
        read_volume(tmp_path / "seg.dcm")
    assert find_source(tmp_path / "s" / "slice003.dcm").path == tmp_path / "s"


def test_a_meta_header_without_transfer_syntax_is_read(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "s", make_ct())
    for path in folder.iterdir():
        dataset = pydicom.dcmread(path)
        del dataset.file_meta.TransferSyntaxUID
        dataset.save_as(path, implicit_vr=False, little_endian=True, enforce_file_format=False)
    np.testing.assert_array_equal(read_volume(folder).hu_ZYX, make_ct())
