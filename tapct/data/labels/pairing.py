"""Which label map belongs to which scan, by name alone; content and grid are checked afterwards.

Rules, first match wins; "same stem" means the file name without its format's suffix:
1. `--labels DIR`: DIR/<the scan's folder below the root>/<stem>, or DIR/<stem> where no other scan
has that stem.
2. The scan lies in a folder images*: the folder labels* beside it (imagesTr -> labelsTr), same
    stem.
3. Beside the scan: NAME_seg, NAME-seg, NAME.seg, NAME_label, NAME_labels, with or without a number
(NAME_seg62). In 1 and 2 a channel number as nnU-Net writes it (case_0000) may be missing from the
label's name.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tapct.data.discover import Source, find_sources, stem_of

_BESIDE = re.compile(r"(?P<name>.+?)(?:[_.-]seg\d*|[_-]labels?\d*)", re.IGNORECASE)
_CHANNEL = re.compile(r"_0000$")


def pair_labels(
    sources: Sequence[Source], root: Path, labels: Path | None
) -> tuple[dict[Path, Path], set[Path]]:
    """Find the label map of every source.

    Args:
        sources: what `find_sources(root)` found.
        root: the archive.
        labels: folder of `--labels`, or None.
    Returns:
        Path of a scan to path of its labels, and all paths that are labels and therefore no scans.
    """
    given = {} if labels is None else _by_folder_and_stem(find_sources(labels), labels)
    taken = {_real(path) for path in given.values()}
    candidates = [source for source in sources if _real(source.path) not in taken]
    local = _by_folder_and_stem(candidates, root)
    stems = Counter(stem_of(source.path) for source in candidates)
    beside: dict[tuple[Path, str], Path] = {}
    for (folder, stem), path in local.items():
        match = _BESIDE.fullmatch(stem)
        if match and path.is_file():
            beside.setdefault((folder, match["name"]), path)
    found: dict[Path, Path] = {}
    for source in candidates:
        folder, stem = (
            source.path.parent.relative_to(root) if source.path != root else Path(),
            stem_of(source.path),
        )
        keys = [(folder, stem), (folder, _CHANNEL.sub("", stem))]
        if stems[stem] == 1:
            keys += [(Path(), stem), (Path(), _CHANNEL.sub("", stem))]
        match_given = next((given[key] for key in keys if key in given), None)
        chosen = match_given or _in_sibling(local, folder, stem) or beside.get((folder, stem))
        if chosen is not None:
            found[source.path] = chosen
    are_labels = set(found.values()) | {
        source.path for source in sources if _real(source.path) in taken
    }
    return {scan: path for scan, path in found.items() if scan not in are_labels}, are_labels


def _by_folder_and_stem(sources: Sequence[Source], root: Path) -> dict[tuple[Path, str], Path]:
    """(folder below root, stem) to path; the first in order where two files share a stem."""
    table: dict[tuple[Path, str], Path] = {}
    for source in sources:
        if source.path != root:
            table.setdefault(
                (source.path.parent.relative_to(root), stem_of(source.path)), source.path
            )
    return table


def _in_sibling(local: dict[tuple[Path, str], Path], folder: Path, stem: str) -> Path | None:
    """images*/STEM -> labels*/STEM."""
    if not folder.name.lower().startswith("images"):
        return None
    name = ("labels" if folder.name[0] == "i" else "Labels") + folder.name[len("images") :]
    keys = ((folder.parent / name, stem), (folder.parent / name, _CHANNEL.sub("", stem)))
    return next((local[key] for key in keys if key in local), None)


def _real(path: Path) -> Path:
    return path.resolve()
