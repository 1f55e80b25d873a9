"""Layout of BIDS derivatives: sub-01_ct and derivatives/NAME/.../sub-01_dseg.

The label file repeats the entities of its scan (sub-, ses-, acq-, ...) and may have further ones
(space-, desc-, seg-). Its suffix is dseg, mask, msk or seg.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

from tapct.data.labels.archive import LabelArchive, Layout
from tapct.data.readers import stem_of
from tapct.data.search.discover import Source

_SUFFIXES = ("dseg", "mask", "msk", "seg")
_ENTITY = re.compile(r"[A-Za-z]+-[A-Za-z0-9]+")
_ADDED = ("space", "desc", "label", "seg", "res", "den", "atlas", "hemi")  # by a derivative


def sign(source: Source, root: Path) -> bool:
    """Whether a source may be a label file by this layout."""
    entities, suffix = _parse(stem_of(source.path))
    return bool(entities) and suffix.lower() in _SUFFIXES


def build(archive: LabelArchive) -> Layout:
    """Find all label files of an archive that carry BIDS entities."""
    labels: dict[frozenset[str], list[Path]] = defaultdict(list)
    for (_, stem), path in archive.files.items():
        entities, suffix = _parse(stem)
        if entities and suffix.lower() in _SUFFIXES and path.is_file():
            labels[_own(entities)].append(path)
    num_scans: dict[frozenset[str], int] = defaultdict(int)
    for _, stem in archive.files:
        entities, suffix = _parse(stem)
        if entities and suffix.lower() not in _SUFFIXES:
            num_scans[_own(entities)] += 1

    def find(scan: Source) -> Path | None:
        entities, suffix = _parse(stem_of(scan.path))
        if not entities or suffix.lower() in _SUFFIXES:
            return None
        key = _own(entities)
        # several files of one scan (one per organ, or per derivative) have names that do not differ
        return labels[key][0] if len(labels.get(key, ())) == 1 and num_scans[key] == 1 else None

    return Layout(find, likely=frozenset(path for paths in labels.values() for path in paths))


def _parse(stem: str) -> tuple[tuple[str, ...], str]:
    """Entities and suffix of a BIDS name; no entities for any other name."""
    *entities, suffix = stem.split("_")
    if not stem.startswith("sub-") or not all(_ENTITY.fullmatch(entity) for entity in entities):
        return (), ""
    return tuple(entities), suffix


def _own(entities: tuple[str, ...]) -> frozenset[str]:
    """The entities that a label file shares with its scan."""
    return frozenset(entity for entity in entities if entity.split("-")[0] not in _ADDED)
