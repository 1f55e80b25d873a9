"""Read the labels of a scan, in whatever form they lie on disk, as a `LabelMap`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tapct.base.files import expand_path
from tapct.base.marks import file_name
from tapct.data import formats
from tapct.data.labels.dicom_masks import read_dicom_labels
from tapct.data.labels.grid import fit_to_scan
from tapct.data.labels.merging import merge
from tapct.data.labels.names import (
    Names,
    clean_names,
    table_of_dataset,
    table_of_sidecar,
    values_of,
    with_given,
)
from tapct.data.labels.overlay import Overlay
from tapct.data.labels.values import MAX_LABEL, to_label_values
from tapct.data.readers import DICOM, FORMATS, format_of, stem_of
from tapct.data.readers.dicom_elements import quiet
from tapct.data.readers.nrrd import read_slicer, segments_of
from tapct.data.readers.raw import Image
from tapct.data.scans.geometry import to_lps
from tapct.data.scans.headers import read_sidecar
from tapct.data.scans.ingest import load_library, read_image, refusing
from tapct.data.search.discover import Source, find_source
from tapct.types import IGNORE_LABEL, LabelMap, Refused, Volume

UNNAMED = "values without a name in the data set"
MOST_VALUES = 8  # in a note


@dataclass(frozen=True)
class ReadLabels:
    """Labels on the grid of their scan.

    Args:
        label_map: the labels.
        notes: one line for each thing that was left out or decided, e.g. overlaps.
    """

    label_map: LabelMap
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _OnOwnGrid:
    """A label file on its own grid.

    Args:
        label_map: the labels.
        first_voxel_mm: LPS position of the first voxel in the file; None for a file that is cropped
            by design.
        notes: as in `ReadLabels`.
    """

    label_map: LabelMap
    first_voxel_mm: np.ndarray | None
    notes: tuple[str, ...] = ()


def read_labels(path: Path | str, ignore: Collection[int] = ()) -> LabelMap:
    """Read one label file on its own grid.

    Names come from NAME.json {"labels": {"1": "liver"}}, else from the file's own table (Slicer
    segments, the label table of a NIfTI extension), else from `dataset.json` in its folder or the
    one above, else they stay empty.

    Args:
        path: path of a file of any scan format but DICOM.
        ignore: label values of voxels that nobody has labelled.
    Returns:
        Labels as uint16, (Z, Y, X) in LPS.
    Raises:
        Refused: a reason for which a scan is refused too, or `not_labels`: values that are not
            whole numbers from 0 to 65534.
    """
    path = expand_path(path)
    with refusing():
        files = _files_of(path)
    _load_libraries_of(files)
    with refusing():
        return _read_file(path, ignore).label_map


def read_labels_of(
    volume: Volume,
    path: Path,
    ignore: Collection[int] = (),
    more: Sequence[Path] = (),
    names: Names = (),
) -> ReadLabels:
    """Read the labels of a scan and bring them onto its grid.

    Args:
        volume: scan.
        path: path of a label file, of a folder with one mask per organ, or of a DICOM SEG or
            RTSTRUCT.
        ignore: label values of voxels that nobody has labelled.
        more: paths of further DICOM objects, which are merged with the first one.
        names: label names that replace those of the files; a mask of one organ with such a name
            gets the value of it.
    Raises:
        Refused: the labels break a rule; nothing else is raised, whatever the files contain.
    """
    with refusing():
        files = _files_of(path)
    _load_libraries_of(files)
    with refusing():
        if path.is_dir():
            return _read_masks(path, volume, ignore, names)
        if format_of(path) is None:
            return _read_objects((path, *more), volume)
        found = _read_file(path, ignore)
        on_scan = fit_to_scan(found.label_map, volume, found.first_voxel_mm)
        if not names:
            return ReadLabels(on_scan, found.notes)
        named = replace(on_scan, names=with_given(on_scan.names, names))
        return ReadLabels(named, (*_about_unnamed(named, names), *found.notes))


def _about_unnamed(labels: LabelMap, names: Names) -> tuple[str, ...]:
    """A note on the values of a label map that a data set has no names for; empty for none."""
    present = np.flatnonzero(np.bincount(labels.labels_ZYX.reshape(-1)))
    unnamed = sorted({*present.tolist()} - {0, IGNORE_LABEL, *dict(names)})
    if not unnamed:
        return ()
    return (f"{UNNAMED}: {', '.join(map(str, unnamed[:MOST_VALUES]))}",)


def _read_objects(paths: Sequence[Path], volume: Volume) -> ReadLabels:
    """Read the DICOM objects of a scan and merge them where there are several."""
    several = len(paths) > 1
    with quiet():
        objects = [read_dicom_labels(path, volume, keep_voxels=several) for path in paths]
    if not several:
        notes = (objects[0].overlaps, *objects[0].notes)
        return ReadLabels(objects[0].label_map, tuple(filter(None, notes)))
    return ReadLabels(*merge(objects))


def _files_of(path: Path) -> Sequence[Path]:
    """The files that hold the labels."""
    return mask_files(path) if path.is_dir() else (path,)


def _load_libraries_of(files: Sequence[Path]) -> None:
    """Load what decodes the labels; a library that cannot be loaded is not a fault of a file."""
    for file in files:
        file_format = format_of(file)
        name = DICOM.name if file_format is None else file_format.name
        load_library(Source(file, name, (file,)))


def _read_file(path: Path, ignore: Collection[int]) -> _OnOwnGrid:
    """Read one file with all labels of a scan."""
    source = find_source(path)
    if source.kind == DICOM.name:
        raise Refused(
            "unsupported",
            f"{file_name(path)} is DICOM, whose labels are read together with their scan; give a "
            f"{formats.listed('or', without=DICOM.name)} file",
        )
    sidecar = table_of_sidecar(path, read_sidecar(path))
    if segments_of(path):
        return _read_slicer(path, sidecar.names, (*ignore, *sidecar.ignore))
    image = read_image(source)
    names, more_ignored = sidecar.names or clean_names(image.names), sidecar.ignore
    notes = list(sidecar.notes)
    if not names:
        dataset = table_of_dataset(path)  # its notes are reported once, by `report`
        names, more_ignored = dataset.names, dataset.ignore
    label_map = _on_own_grid(file_name(path), image, (*ignore, *more_ignored), names)
    return _OnOwnGrid(label_map, image.affine[:3, 3], tuple(notes))


def _on_own_grid(
    name: str, image: Image, ignore: Collection[int], names: tuple[tuple[int, str], ...] = ()
) -> LabelMap:
    """An image whose values are labels, in LPS."""
    view_ZYX, spacing_mm, origin_mm, directions = to_lps(image.voxels_IJK, image.affine)
    labels_ZYX = to_label_values(name, view_ZYX, image.slope, image.intercept, ignore)
    return LabelMap(labels_ZYX, spacing_mm, origin_mm, names, directions)


def _read_slicer(
    path: Path, names: tuple[tuple[int, str], ...], ignore: Collection[int]
) -> _OnOwnGrid:
    """Read a segmentation of 3D Slicer.

    One layer keeps its label values. With several layers, each segment gets the value of its place
    in the list of segments, from 1, and overlaps are decided by size (see `Overlay`).

    Args:
        path: path of the file.
        names: names of a side-car, which replace those of the file.
        ignore: label values of voxels that nobody has labelled.
    """
    layers, segments = read_slicer(path), segments_of(path)
    maps = [_on_own_grid(file_name(path), layer, ignore) for layer in layers]
    if len(maps) == 1:
        named = [(segment.value, segment.name) for segment in segments]
        return _OnOwnGrid(replace(maps[0], names=names or clean_names(named)), None)
    overlay = Overlay(maps[0].labels_ZYX.shape)
    unclaimed = [np.unique(layer.labels_ZYX) for layer in maps]
    for number, segment in enumerate(segments, 1):
        if not 0 <= segment.layer < len(maps):
            raise Refused(
                "not_labels",
                f"a segment of {file_name(path)} is in layer {segment.layer} of {len(maps)}",
            )
        overlay.add(number, maps[segment.layer].labels_ZYX == segment.value)
        claimed = unclaimed[segment.layer]
        unclaimed[segment.layer] = claimed[claimed != segment.value]
    for layer, values in enumerate(unclaimed):
        if values.any():
            raise Refused(
                "not_labels",
                f"layer {layer} of {file_name(path)} holds value {values.max()}, which is no "
                "segment",
            )
    named = [(number, segment.name) for number, segment in enumerate(segments, 1)]
    label_map = replace(maps[0], labels_ZYX=overlay.labels_ZYX, names=names or clean_names(named))
    notes = (overlay.note(),) if overlay.note() else ()
    return _OnOwnGrid(label_map, None, notes)


def _read_masks(
    folder: Path, volume: Volume, ignore: Collection[int], names: Names = ()
) -> ReadLabels:
    """Read a folder with one mask per organ; the organs get the values 1, 2, ... in the order of
    their file names. With `names`, they get the values of their names; the values of masks without
    one follow.
    """
    files = mask_files(folder)
    if not files:
        raise Refused("not_labels", f"folder {file_name(folder)} holds no mask")
    stems: dict[str, Path] = {}
    for file in files:
        first = stems.setdefault(stem_of(file), file)
        if first != file:
            raise Refused(
                "contradictory_labels",
                f"{file_name(first)} and {file_name(file)} are two masks of one name; remove one",
            )
    if len(files) > MAX_LABEL:
        raise Refused("not_labels", f"folder {file_name(folder)} holds {len(files)} files")
    if len(files) == 1:
        found = _read_file(files[0], ignore)
        if found.label_map.labels_ZYX.max() > 1 or found.label_map.names:
            on_scan = fit_to_scan(found.label_map, volume, found.first_voxel_mm)
            return ReadLabels(on_scan, found.notes)
    overlay = Overlay(volume.hu_ZYX.shape)
    values = values_of([stem_of(file) for file in files], names)
    for number, file in zip(values, files):
        mask_ZYX = _read_mask(file, volume, ignore)
        overlay.add(number, mask_ZYX)
    named = [(number, stem_of(file)) for number, file in zip(values, files)]
    label_map = LabelMap(
        overlay.labels_ZYX,
        volume.spacing_mm,
        volume.origin_mm,
        clean_names(named),
        volume.directions,
    )
    notes = (overlay.note(),) if overlay.note() else ()
    return ReadLabels(label_map, notes)


def _read_mask(file: Path, volume: Volume, ignore: Collection[int]) -> np.ndarray:
    """The mask of one organ on the grid of the scan: bool (Z, Y, X)."""
    image = read_image(find_source(file))
    own_name = file_name(f"{file.parent.name}/{file.name}")
    own = _on_own_grid(own_name, image, ignore)
    on_scan = fit_to_scan(own, volume, image.affine[:3, 3])
    values = np.unique(on_scan.labels_ZYX)
    if len(values[values != 0]) > 1 or IGNORE_LABEL in values:
        raise Refused(
            "not_labels",
            f"{own_name} holds the values {values[:6].tolist()}; rule for one "
            "mask per organ: 0 and one other value",
        )
    mask_ZYX: np.ndarray = on_scan.labels_ZYX != 0
    return mask_ZYX


def mask_files(folder: Path) -> Sequence[Path]:
    """The files of a folder with one mask per organ, in the order of their names."""
    suffixes = tuple(
        suffix for known in FORMATS if not known.is_series for suffix in known.suffixes
    )
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and not path.name.startswith(".") and path.name.lower().endswith(suffixes)
    )
