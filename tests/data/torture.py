"""Builders of the files in `torture_cases`: one clean scan, written with one fault."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from scan_files import LPS, make_ct, patch_bytes, write_nifti, write_series

SHAPE_ZYX = (20, 24, 26)
SPACING = (0.8, 0.7, 2.5)


@dataclass(frozen=True)
class Case:
    """One scan.

    Args:
        name: name of its folder and file, unique.
        verdict: accepted, accepted:MARK, or the reason of the refusal.
        build: function that writes it; its arguments are the folder, the name and a clean scan.
    """

    name: str
    verdict: str
    build: Callable[[Path, str, np.ndarray], object]


def write_all(root: Path, cases: tuple[Case, ...]) -> None:
    """Write each case into its own folder; no two scans have equal voxels."""
    for number, case in enumerate(cases):
        folder = root / case.name
        folder.mkdir(parents=True)
        case.build(folder, case.name, make_ct(SHAPE_ZYX, seed=number))


Edit = Callable[[np.ndarray], np.ndarray]


def same(hu: np.ndarray) -> np.ndarray:
    return hu


def values(edit: Edit, modality: str = "") -> Callable[[Path, str, np.ndarray], object]:
    """A NIfTI file with edited voxels, optionally with a side-car that declares a modality."""

    def build(folder: Path, name: str, hu: np.ndarray) -> None:
        edited = edit(hu.astype(np.int32))
        if edited.dtype.kind == "i":
            fits = np.abs(edited).max() < 32767
            edited = edited.astype(np.int16 if fits else np.int32)
        write_nifti(folder / f"{name}.nii", edited)
        if modality:
            (folder / f"{name}.json").write_text(json.dumps({"Modality": modality}))

    return build


def nifti(
    edit: Callable[[nibabel.Nifti1Image], nibabel.Nifti1Image | None] = lambda image: None,
    affine: np.ndarray | None = None,
    suffix: str = ".nii",
) -> Callable[[Path, str, np.ndarray], object]:
    """A NIfTI file with an edited image or another affine (LPS)."""

    def build(folder: Path, name: str, hu: np.ndarray) -> None:
        lps = np.diag([*SPACING, 1.0]) if affine is None else affine
        image = nibabel.Nifti1Image(hu.transpose(2, 1, 0), LPS @ lps)
        image = edit(image) or image
        nibabel.save(image, folder / f"{name}{suffix}")

    return build


def patched(*patches: tuple[int, bytes]) -> Callable[[Path, str, np.ndarray], object]:
    """An uncompressed NIfTI file with overwritten bytes."""

    def build(folder: Path, name: str, hu: np.ndarray) -> None:
        path = write_nifti(folder / f"{name}.nii", hu)
        for offset, data in patches:
            patch_bytes(path, offset, data)

    return build


def content(
    suffix: str, edit: Callable[[bytes], bytes], compress: bool = False, data: str = ""
) -> Callable[[Path, str, np.ndarray], object]:
    """A file of any format whose bytes are edited.

    Args:
        suffix: suffix of the file that SimpleITK writes.
        edit: function from the bytes of the file to the bytes that are written.
        compress: whether the voxels are compressed.
        data: suffix of the detached file to edit instead.
    """

    def build(folder: Path, name: str, hu: np.ndarray) -> None:
        image = SimpleITK.GetImageFromArray(hu)
        image.SetSpacing(SPACING)
        SimpleITK.WriteImage(image, folder / f"{name}{suffix}", compress)
        path = folder / f"{name}{data or suffix}"
        path.write_bytes(edit(path.read_bytes()))

    return build


def text(suffix: str, old: str, new: str) -> Callable[[Path, str, np.ndarray], object]:
    """A file with one edited field of its text header."""

    def edit(whole: bytes) -> bytes:
        assert old.encode() in whole, (suffix, old)
        return whole.replace(old.encode(), new.encode(), 1)

    return content(suffix, edit)


def dicom(
    edit: Callable[[int], dict[str, object]] = lambda index: {},
    hu: Edit = same,
    positions: Callable[[int], float] | None = None,
    cut: int = 0,
) -> Callable[[Path, str, np.ndarray], object]:
    """A DICOM series of 8 slices with edited tags, voxels or positions.

    Args:
        edit: function from the index of a slice to its tags.
        hu: edit of the voxels.
        positions: function from the index of a slice to its position in mm.
        cut: number of bytes that the last file lacks.
    """

    def build(folder: Path, name: str, clean: np.ndarray) -> None:
        places = None if positions is None else [positions(index) for index in range(8)]
        uid = f"1.2.{zlib.crc32(name.encode())}"

        def tags(index: int) -> dict[str, object]:
            return {"SeriesInstanceUID": uid, "StudyInstanceUID": uid, **edit(index)}

        write_series(folder, hu(clean[:8].astype(np.int32)), places, tags)
        if cut:
            last = sorted(folder.iterdir())[-1]
            last.write_bytes(last.read_bytes()[:-cut])

    return build


def pair(cut_slices: int = 0) -> Callable[[Path, str, np.ndarray], object]:
    """A NIfTI header (.hdr) with its voxels (.img), without the last slices of them."""

    def build(folder: Path, name: str, hu: np.ndarray) -> None:
        image = nibabel.Nifti1Pair(hu.transpose(2, 1, 0), np.diag([-0.8, -0.7, 2.5, 1.0]))
        nibabel.save(image, folder / f"{name}.hdr")
        voxels = folder / f"{name}.img"
        voxels.write_bytes(voxels.read_bytes()[: hu.nbytes - cut_slices * hu[0].nbytes])

    return build


def raw_file(suffix: str, data: bytes) -> Callable[[Path, str, np.ndarray], object]:
    """A file with these bytes."""
    return lambda folder, name, hu: (folder / f"{name}{suffix}").write_bytes(data)


def grid(spacing: tuple[float, ...], origin: tuple[float, ...] = (0, 0, 0)) -> np.ndarray:
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = origin
    return affine


def turned(degrees: float) -> np.ndarray:
    """An affine that is turned about x."""
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turn = np.eye(4)
    turn[1:3, 1:3] = [[cos, -sin], [sin, cos]]
    return turn


def sheared() -> np.ndarray:
    affine = grid(SPACING)
    affine[1, 2] = 0.2
    return affine


def second_form(
    edit: Callable[[np.ndarray], np.ndarray],
) -> Callable[[nibabel.Nifti1Image], None]:
    """An image whose qform is the edited sform."""

    def set_qform(image: nibabel.Nifti1Image) -> None:
        image.set_sform(image.affine, 1)
        image.set_qform(edit(image.affine.copy()), 1)

    return set_qform


def shifted(affine: np.ndarray) -> np.ndarray:
    affine[:3, 3] += [0, 40, 0]
    return affine


def mirrored(affine: np.ndarray) -> np.ndarray:
    affine[0] *= -1
    return affine


def part(edit: Edit, region: tuple[slice, ...]) -> Edit:
    """An edit of a region alone."""

    def apply(hu: np.ndarray) -> np.ndarray:
        hu = hu.copy()
        hu[region] = edit(hu[region])
        return hu

    return apply


def at_slices(hu: np.ndarray, first: int, last: int) -> np.ndarray:
    """1 in the slices from first to before last, else 0."""
    index = np.arange(len(hu))
    return ((index >= first) & (index < last)).astype(np.int32)[:, None, None]


def fill(value: int, *region: slice) -> Edit:
    return part(lambda hu: np.full_like(hu, value), region)


def shuffled(axis: int | None) -> Edit:
    """Voxels, or slices, in a random order."""

    def apply(hu: np.ndarray) -> np.ndarray:
        rng = np.random.default_rng(7)
        return (
            rng.permutation(hu.ravel()).reshape(hu.shape) if axis is None else rng.permutation(hu)
        )

    return apply


def random(kind: str) -> Edit:
    def apply(hu: np.ndarray) -> np.ndarray:
        rng = np.random.default_rng(8)
        if kind == "normal":
            return np.rint(rng.normal(0, 400, hu.shape)).astype(np.int32)
        return rng.integers(-1000, 1000, hu.shape)

    return apply


def tall(hu: np.ndarray) -> np.ndarray:
    """A scan with anatomy that changes along z, 40 slices deep."""
    return make_ct((40, 24, 26), seed=int(hu.ravel()[0]) % 97).astype(np.int32)


def wrapped(hu: np.ndarray) -> np.ndarray:
    """HU in signed words of 12 bits, which 2048 HU does not fit into."""
    return (hu + 2048) % 4096 - 2048


def table_of_values() -> dict[str, object]:
    """A table that leads from stored values to HU, in place of slope and intercept."""
    table = Dataset()
    table.LUTDescriptor, table.LUTData = [4096, 0, 16], b"\0\0" * 4096
    table.ModalityLUTType = "HU"
    return {"ModalityLUTSequence": Sequence([table])}


def like_mr(hu: np.ndarray) -> np.ndarray:
    """A body of smoothly varying intensity, scaled to -1000..1000."""
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, size) for size in hu.shape), indexing="ij")
    body = (y**2 + x**2 + 0.3 * z) < 0.7
    field = 0.5 + 0.3 * np.sin(3 * x + 1) * np.cos(4 * y) + 0.2 * z
    noise = np.random.default_rng(9).normal(0, 0.04, hu.shape)
    return np.rint(np.clip(np.abs(body * field + noise), 0, 1) * 2000 - 1000).astype(np.int32)


def blocks(hu: np.ndarray) -> np.ndarray:
    """A label map of cubes."""
    z, y, x = (np.arange(size) // 5 for size in hu.shape)
    labels = (z[:, None, None] * 7 + y[:, None] * 3 + x) % 23
    return labels.astype(np.int32)


def declared(edit: Edit) -> Callable[[Path, str, np.ndarray], object]:
    return values(edit, modality="CT")
