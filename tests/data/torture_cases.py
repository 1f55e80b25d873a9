"""Files of every format with every fault, each with the verdict that `tapct index` must give.

To add a case, append it to one of the tables: name, expected verdict, function that writes the scan
into a folder of its own (see `torture`). A verdict is `accepted`, `accepted:MARK`, or the reason of
the refusal.
"""

from __future__ import annotations

import gzip
import struct

import nibabel
import numpy as np
from scan_files import make_ct, make_slice, patch_bytes, write_nifti
from torture import (
    SPACING,
    Case,
    at_slices,
    blocks,
    content,
    declared,
    dicom,
    fill,
    grid,
    like_mr,
    mirrored,
    nifti,
    pair,
    part,
    patched,
    random,
    raw_file,
    same,
    second_form,
    sheared,
    shifted,
    shuffled,
    table_of_values,
    tall,
    text,
    turned,
    values,
    wrapped,
)

FORMATS = (
    Case("nii", "accepted", nifti()),
    Case("nii-gz", "accepted", nifti(suffix=".nii.gz")),
    Case("nifti-2", "accepted", nifti(lambda i: nibabel.Nifti2Image(i.dataobj, i.affine))),
    Case(
        "plain-named-gz",
        "accepted",
        lambda f, n, hu: write_nifti(f / "t.nii", hu).rename(f / f"{n}.nii.gz"),
    ),
    Case("nii-int32", "accepted", values(lambda hu: hu + 100_000 * (hu > 10**6))),
    Case("nii-float", "accepted", values(lambda hu: hu.astype(np.float32) + 0.25)),
    Case(
        "nii-4d-of-one",
        "accepted",
        nifti(lambda i: nibabel.Nifti1Image(np.asarray(i.dataobj)[..., None], i.affine)),
    ),
    Case("nrrd", "accepted", content(".nrrd", lambda b: b)),
    Case("nrrd-gzip", "accepted", content(".nrrd", lambda b: b, compress=True)),
    Case("nhdr", "accepted", content(".nhdr", lambda b: b)),
    Case("mha", "accepted", content(".mha", lambda b: b)),
    Case("mha-zlib", "accepted", content(".mha", lambda b: b, compress=True)),
    Case("mhd", "accepted", content(".mhd", lambda b: b)),
    Case("dicom", "accepted", dicom()),
)

DAMAGE = (
    *(
        Case(
            f"truncated-{suffix[1:].replace('.', '-')}{'-z' * compress}",
            "truncated",
            content(suffix, lambda b: b[:-30], compress),
        )
        for suffix in (".nii", ".nii.gz", ".nrrd", ".mha")
        for compress in ((False,) if suffix != ".nrrd" else (False, True))
    ),
    Case("truncated-mhd", "truncated", content(".mhd", lambda b: b[:-30], data=".raw")),
    Case("truncated-dicom", "truncated", dicom(cut=40)),
    Case("truncated-pair", "truncated", pair(cut_slices=1)),
    Case("whole-pair", "accepted", pair()),
    *(
        Case(f"empty-{suffix[1:].replace('.', '-')}", "empty_file", raw_file(suffix, b""))
        for suffix in (".nii", ".nii.gz", ".nrrd", ".mha", ".dcm")
    ),
    *(
        Case(
            f"text-{suffix[1:].replace('.', '-')}",
            "corrupt",
            raw_file(suffix, b"no scan but a text " * 40),
        )
        for suffix in (".nii", ".nii.gz", ".nrrd", ".mha")
    ),
    Case(
        "bad-checksum",
        "corrupt",
        content(".nii.gz", lambda b: b[:-8] + bytes([b[-8] ^ 1]) + b[-7:]),
    ),
    Case(
        "broken-deflate", "corrupt", content(".nii.gz", lambda b: b[:400] + b"\xff" * 60 + b[460:])
    ),
    Case(
        "nrrd-no-data-file",
        "truncated",
        lambda f, n, hu: (content(".nhdr", lambda b: b)(f, n, hu), (f / f"{n}.raw").unlink()),
    ),
    Case(
        "broken-json",
        "bad_sidecar",
        lambda f, n, hu: (write_nifti(f / f"{n}.nii", hu), (f / f"{n}.json").write_text("{")),
    ),
)

HEADERS = (
    # the header claims fewer or smaller voxels than the file holds
    Case("fewer-slices-nii", "header_mismatch", patched((46, struct.pack("<h", 19)))),
    Case("fewer-columns-nii", "header_mismatch", patched((42, struct.pack("<h", 25)))),
    Case("smaller-voxels-nii", "header_mismatch", patched((70, struct.pack("<hh", 2, 8)))),
    Case(
        "fewer-slices-nii-gz",
        "header_mismatch",
        lambda f, n, hu: (f / f"{n}.nii.gz").write_bytes(
            gzip.compress(
                patch_bytes(
                    write_nifti(f / "t.nii", hu).rename(f / "t"), 46, struct.pack("<h", 12)
                ).read_bytes()
            )
        ),
    ),
    Case("bytes-appended-nii", "accepted", content(".nii", lambda b: b + b"\0" * 200)),
    Case(
        "fewer-slices-nrrd", "header_mismatch", text(".nrrd", "sizes: 26 24 20", "sizes: 26 24 19")
    ),
    Case(
        "fewer-slices-mha",
        "header_mismatch",
        text(".mha", "DimSize = 26 24 20", "DimSize = 26 24 19"),
    ),
    Case(
        "fewer-slices-mhd",
        "header_mismatch",
        text(".mhd", "DimSize = 26 24 20", "DimSize = 26 24 19"),
    ),
    # two sizes exchanged: as many voxels, cut into rows at wrong places
    Case("columns-rows-swapped-nii", "header_mismatch", patched((42, struct.pack("<hh", 24, 26)))),
    Case("rows-slices-swapped-nii", "header_mismatch", patched((44, struct.pack("<hh", 20, 24)))),
    Case(
        "columns-slices-swapped-nii",
        "header_mismatch",
        patched((42, struct.pack("<hhh", 20, 24, 26))),
    ),
    Case(
        "columns-rows-swapped-nrrd",
        "header_mismatch",
        text(".nrrd", "sizes: 26 24 20", "sizes: 24 26 20"),
    ),
    Case(
        "columns-rows-swapped-mha",
        "header_mismatch",
        text(".mha", "DimSize = 26 24 20", "DimSize = 24 26 20"),
    ),
    Case(
        "columns-rows-swapped-dicom",
        "header_mismatch",
        dicom(lambda i: {"Rows": 26, "Columns": 24}),
    ),
    Case("more-slices-nii", "truncated", patched((46, struct.pack("<h", 21)))),
    Case("more-slices-nrrd", "truncated", text(".nrrd", "sizes: 26 24 20", "sizes: 26 24 21")),
    # two statements about one grid
    Case("forms-agree", "accepted", nifti(second_form(same))),
    Case("forms-shifted", "header_mismatch", nifti(second_form(shifted))),
    Case("forms-mirrored", "header_mismatch", nifti(second_form(mirrored))),
    Case("forms-turned", "header_mismatch", nifti(second_form(lambda a: turned(20) @ a))),
    Case("pixdim-differs", "bad_spacing", patched((88, struct.pack("<f", 5.0)))),
    Case(
        "nrrd-spacings-differ",
        "header_mismatch",
        text(".nrrd", "encoding:", "spacings: 1 1 1\nencoding:"),
    ),
    Case(
        "mha-matrix-scaled",
        "header_mismatch",
        text(".mha", "TransformMatrix = 1 0 0", "TransformMatrix = 2 0 0"),
    ),
    Case(
        "mha-negative-spacing",
        "bad_spacing",
        text(".mha", "ElementSpacing = 0.8", "ElementSpacing = -0.8"),
    ),
    Case(
        "nrrd-centimetres",
        "bad_spacing",
        text(".nrrd", "encoding:", 'space units: "cm" "cm" "cm"\nencoding:'),
    ),
    # grids that no body has
    Case("pixdim-zero", "bad_spacing", patched((88, struct.pack("<f", 0.0)))),
    Case("pixdim-nan", "bad_spacing", patched((88, struct.pack("<f", np.nan)))),
    Case("affine-nan", "bad_affine", patched((280, struct.pack("<f", np.nan)))),
    Case("origin-inf", "bad_affine", patched((292, struct.pack("<f", np.inf)))),
    Case("no-orientation", "no_orientation", patched((252, struct.pack("<hh", 0, 0)))),
    Case("origin-20-m", "absurd_geometry", nifti(affine=grid(SPACING, (0, 20_000, 0)))),
    Case("origin-2-m", "accepted", nifti(affine=grid(SPACING, (0, 2_000, 0)))),
    Case("spacing-tiny", "bad_spacing", nifti(affine=grid((0.01, 0.7, 2.5)))),
    Case("spacing-huge", "bad_spacing", nifti(affine=grid((0.8, 0.7, 60)))),
    Case("spacing-uneven", "absurd_geometry", nifti(affine=grid((0.25, 0.25, 40)))),
    Case(
        "five-metres",
        "absurd_geometry",
        lambda f, n, hu: write_nifti(f / f"{n}.nii", make_ct((120, 24, 26)), grid((1, 1, 45))),
    ),
    Case("three-mm-wide", "absurd_geometry", nifti(affine=grid((0.1, 0.7, 2.5)))),
    Case("left-handed", "accepted", nifti(affine=grid((0.8, -0.7, 2.5)))),
    Case("sheared", "sheared", nifti(affine=sheared())),
    Case("turned-45", "oblique", nifti(affine=turned(45))),
    Case("turned-30", "accepted", nifti(affine=turned(30))),
    Case(
        "metres",
        "accepted",
        nifti(lambda i: i.header.set_xyzt_units("meter"), grid((0.0008, 0.0007, 0.0025))),
    ),
    # not one scan
    Case("two-axes", "not_3d", patched((40, struct.pack("<h", 2)))),
    Case("no-axes", "corrupt", patched((40, struct.pack("<h", 0)))),
    Case("no-voxels", "bad_shape", patched((42, struct.pack("<h", 0)))),
    Case("too-many-voxels", "bad_shape", patched((42, struct.pack("<hhh", 32767, 32767, 32767)))),
    Case(
        "two-volumes",
        "not_3d",
        nifti(lambda i: nibabel.Nifti1Image(np.stack([np.asarray(i.dataobj)] * 2, 3), i.affine)),
    ),
    Case("complex", "not_scalar", patched((70, struct.pack("<hh", 32, 64)))),
    Case("rgb", "not_scalar", patched((70, struct.pack("<hh", 128, 24)))),
    Case("nrrd-vectors", "not_3d", text(".nrrd", "dimension: 3", "dimension: 4")),
    Case("nrrd-no-space", "no_orientation", text(".nrrd", "space: left-posterior-superior\n", "")),
    Case("nrrd-bzip2", "unsupported", text(".nrrd", "encoding: raw", "encoding: bzip2")),
    Case(
        "nrrd-byte-skip",
        "unsupported",
        text(".nrrd", "encoding: raw", "byte skip: 4\nencoding: raw"),
    ),
    Case("mha-text", "unsupported", text(".mha", "BinaryData = True", "BinaryData = False")),
    Case(
        "mha-rgb",
        "not_scalar",
        text(
            ".mha",
            "ElementType = MET_SHORT",
            "ElementNumberOfChannels = 3\nElementType = MET_SHORT",
        ),
    ),
)

VALUES = (
    # scans that are unusual and right
    *(
        Case(f"padded{pad}", "accepted", values(fill(pad, slice(None), slice(0, 4))))
        for pad in (-1000, -2000, -3024)
    ),
    Case("empty-end-slices", "accepted", values(fill(-1024, slice(0, 3)))),
    Case(
        "noise-60",
        "accepted",
        values(
            lambda hu: hu + np.rint(np.random.default_rng(3).normal(0, 60, hu.shape)).astype(int)
        ),
    ),
    Case("metal", "accepted", values(fill(3071, slice(8, 11), slice(10, 13), slice(10, 13)))),
    Case(
        "metal-beyond-12-bits",
        "accepted",
        values(fill(20_000, slice(8, 11), slice(10, 13), slice(10, 13))),
    ),
    Case(
        "inside-the-body",
        "accepted",
        declared(lambda hu: np.rint(np.random.default_rng(4).normal(30, 25, hu.shape)).astype(int)),
    ),
    Case(
        "little-water-padding", "accepted:values_filled", values(fill(0, slice(None), slice(0, 1)))
    ),
    Case("clipped-at-400", "accepted:values_windowed", values(lambda hu: np.minimum(hu, 400))),
    Case("lung-window", "accepted:values_windowed", values(lambda hu: np.clip(hu, -1350, 150))),
    Case("even-values", "accepted:values_coarse", values(lambda hu: hu // 2 * 2)),
    # another offset, slope or sign
    Case("lost-intercept", "no_rescale", values(lambda hu: hu + 1024)),
    Case(
        "lost-intercept-padded",
        "no_rescale",
        values(lambda hu: fill(-1024, slice(None), slice(0, 4))(hu + 1024)),
    ),
    Case(
        "lost-intercept-declared",
        "no_rescale",
        declared(lambda hu: fill(-2000, slice(0, 4))(hu + 1024)),
    ),
    Case("half-intercept", "not_hu", declared(lambda hu: hu + 512)),
    Case("half-intercept-undeclared", "not_ct", values(lambda hu: hu + 512)),
    Case("intercept-twice", "not_ct", values(lambda hu: np.maximum(hu - 1024, -1024))),
    Case("intercept-twice-declared", "not_hu", declared(lambda hu: np.maximum(hu - 1024, -1024))),
    Case("slope-2", "not_ct", values(lambda hu: hu * 2)),
    Case("slope-half", "not_hu", values(lambda hu: hu // 2)),
    Case("slope-tenth", "not_hu", declared(lambda hu: np.rint(hu * 0.1).astype(int))),
    Case("slope-10", "not_hu", values(lambda hu: np.maximum(hu, -100) * 10)),
    Case("slope-thousandth", "normalised", values(lambda hu: (hu / 1000).astype(np.float32))),
    Case("sign-turned", "not_hu", declared(lambda hu: -hu)),
    Case(
        "8-bit",
        "not_ct",
        values(lambda hu: np.rint((np.clip(hu, -1024, 1000) + 1024) / 8).astype(int)),
    ),
    Case(
        "8-bit-declared",
        "not_hu",
        declared(lambda hu: np.rint((np.clip(hu, -160, 240) + 160) * 0.6375).astype(int)),
    ),
    Case(
        "8-bit-rescaled",
        "label_map",
        values(lambda hu: np.rint((np.clip(hu, -1000, 1000) + 1000) / 16).astype(int) * 16 - 1000),
    ),
    # metal above 2047 HU, wrapped around to -2048 HU; padding and clipped metal are no such thing
    *(
        Case(
            f"signed-12-bits-{metal}",
            "not_hu",
            values(
                lambda hu, by=metal: wrapped(
                    fill(by, slice(8, 12), slice(10, 14), slice(10, 13))(hu.astype(np.int32))
                )
            ),
        )
        for metal in (2100, 2600)
    ),
    Case(
        "signed-12-bits-padded",
        "not_hu",
        values(
            lambda hu: fill(-2000, slice(None), slice(0, 4))(
                wrapped(fill(2300, slice(8, 12), slice(10, 14), slice(10, 13))(hu))
            )
        ),
    ),
    Case(
        "clipped-at-12-bits-with-streaks",
        "accepted",
        values(
            lambda hu: fill(-2048, slice(8, 12), slice(10, 14), slice(13, 14))(
                fill(2047, slice(8, 12), slice(10, 14), slice(10, 13))(hu)
            )
        ),
    ),
    Case(
        "body-beside-padding",
        "accepted",
        values(lambda hu: fill(-2000, slice(None), slice(9, 15), slice(23, 26))(hu)),
    ),
    # windows
    Case("soft-window", "not_ct", values(lambda hu: np.clip(hu, -160, 240))),
    Case("soft-window-declared", "windowed", declared(lambda hu: np.clip(hu, -160, 240))),
    Case("bone-window", "windowed", values(lambda hu: np.clip(hu, -500, 1300))),
    Case("brain-window-declared", "not_hu", declared(lambda hu: np.clip(hu, 0, 80))),
    # no CT at all
    Case("mr-by-side-car", "not_ct", values(same, modality="MR")),
    Case("mr-scaled", "not_ct", values(like_mr)),
    Case("label-map", "label_map", values(blocks)),
    Case("labels-scaled", "label_map", values(lambda hu: blocks(hu) * 60 - 1000)),
    Case("mask-scaled", "label_map", values(lambda hu: np.where(hu > -500, 40, -1000))),
    Case("shares", "normalised", values(lambda hu: ((hu + 1024) / 2000).astype(np.float32))),
    Case(
        "z-scores",
        "normalised",
        values(lambda hu: ((hu - hu.mean()) / hu.std()).astype(np.float32)),
    ),
    Case("normal-noise", "noise", values(random("normal"))),
    Case("even-noise", "noise", values(random("even"))),
    Case("voxels-shuffled", "noise", values(shuffled(None))),
    # too few voxels to be checked, whatever they are
    Case("tiny-scan", "too_small", values(lambda hu: hu[:9, 4:14, 6:17])),
    Case("tiny-scan-declared", "too_small", declared(lambda hu: hu[:9, 4:14, 6:17])),
    Case("tiny-mr", "too_small", values(lambda hu: like_mr(hu)[8:16, 8:18, 8:18])),
    Case(
        "tiny-label-map",
        "too_small",
        declared(lambda hu: blocks(hu)[:9, :10, :10] * 60 - 1000),
    ),
    Case("small-scan", "accepted", values(lambda hu: hu[:8, ::2, ::2])),
    Case("constant", "constant", values(lambda hu: np.full_like(hu, -1000))),
    Case("all-clamped", "constant", declared(lambda hu: hu - 9999)),
    Case(
        "nearly-all-clamped",
        "clamped",
        declared(
            lambda hu: fill(50, slice(3, 5), slice(3, 8), slice(3, 9))(np.full_like(hu, -1024))
        ),
    ),
    Case(
        "nan",
        "not_finite",
        values(lambda hu: np.where(hu == hu.max(), np.nan, hu).astype(np.float32)),
    ),
    Case(
        "infinite",
        "not_finite",
        values(lambda hu: np.where(hu == hu.max(), np.inf, hu).astype(np.float32)),
    ),
    Case("beyond-int16", "out_of_range", values(lambda hu: hu + 40_000 * (hu == hu.max()))),
    Case(
        "air-alone",
        "not_ct",
        values(
            lambda hu: np.rint(np.random.default_rng(5).normal(-1000, 10, hu.shape)).astype(int)
        ),
    ),
    Case("padded-with-water", "filled", values(fill(0, slice(None), slice(0, 5)))),
    # slices
    Case("empty-slice-inside", "empty_slices", values(fill(-1024, slice(9, 10)))),
    Case("every-second-slice-empty", "empty_slices", values(fill(-1024, slice(1, None, 2)))),
    Case("water-slice-at-the-end", "empty_slices", values(fill(0, slice(0, 1)))),
    Case("mostly-empty", "empty_slices", values(fill(-1024, slice(0, 12)))),
    Case("slices-twice", "repeated_slices", values(lambda hu: np.repeat(hu, 2, axis=0))),
    Case("half-copied", "repeated_slices", values(lambda hu: np.concatenate([hu[:10], hu[:10]]))),
    Case("one-slice-turned-in-sign", "slice_order", values(part(lambda hu: -hu, (slice(9, 10),)))),
    *(
        Case(
            f"{first}-to-{last}-shifted-{hu_shift}",
            "not_hu",
            values(part(lambda hu, by=hu_shift: np.maximum(hu + by, -1024), (slice(first, last),))),
        )
        for first, last, hu_shift in ((9, 12, 1024), (5, 13, 200), (5, 13, -500))
    ),
    Case("5-to-13-half-slope", "not_hu", values(part(lambda hu: hu // 2, (slice(5, 13),)))),
    Case("slices-shuffled", "slice_order", values(lambda hu: shuffled(0)(tall(hu)))),
    Case(
        "slices-interleaved",
        "slice_order",
        values(lambda hu: tall(hu).reshape(2, 20, 24, 26).swapaxes(0, 1).reshape(40, 24, 26)),
    ),
)

SERIES = (
    Case(
        "dicom-table-of-values",
        "no_rescale",
        dicom(lambda i: {"RescaleSlope": None, "RescaleIntercept": None} | table_of_values()),
    ),
    Case(
        "dicom-named-nii",
        "corrupt",
        lambda f, n, hu: make_slice(hu[0], 0.0).save_as(f / f"{n}.nii"),
    ),
    Case("dicom-mr", "not_ct", dicom(lambda i: {"Modality": "MR"})),
    Case("dicom-no-rescale", "no_rescale", dicom(lambda i: {"RescaleIntercept": None})),
    Case(
        "dicom-lost-intercept",
        "no_rescale",
        dicom(lambda i: {"RescaleIntercept": 0}, lambda hu: hu + 1024),
    ),
    Case(
        "dicom-all-clamped",
        "constant",
        dicom(lambda i: {"RescaleIntercept": -9999}, lambda hu: hu - 8975),
    ),
    Case("dicom-no-position", "no_orientation", dicom(lambda i: {"ImagePositionPatient": None})),
    Case("dicom-gap", "missing_slices", dicom(positions=lambda i: 2.0 * i + 4.0 * (i > 4))),
    Case("dicom-uneven", "uneven_slices", dicom(positions=lambda i: 2.0 * i + 0.7 * (i % 3))),
    # slope and intercept that differ from slice to slice
    *(
        Case(
            f"dicom-intercept-of-slices-{shift}",
            "not_hu",
            dicom(
                lambda i, by=shift: {"RescaleIntercept": -1024 + by * (i in (3, 4, 5))},
                lambda hu, by=shift: hu + by * at_slices(hu, 3, 6),
            ),
        )
        for shift in (200, 1024)
    ),
    Case(
        "dicom-intercepts-of-right-hu",
        "accepted",
        dicom(lambda i: {"RescaleIntercept": -1024 - 50 * i, "PatientID": "P-008"}),
    ),
    Case("dicom-fewer-rows", "header_mismatch", dicom(lambda i: {"Rows": 23})),
    Case("dicom-more-rows", "truncated", dicom(lambda i: {"Rows": 25})),
    Case("dicom-10-m-away", "absurd_geometry", dicom(positions=lambda i: 50_000 + 2.0 * i)),
)

CASES = FORMATS + DAMAGE + HEADERS + VALUES + SERIES
