"""Count the labels of an archive that was examined."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tapct.data.labels.names import table_of_dataset
from tapct.data.labels.pairing import LabelPairs
from tapct.data.labels.report import LabelReport
from tapct.data.manifest import ACCEPTED, Row

_NOT_USED = re.compile(r"its labels are not used: ([a-z0-9_]+):")


def not_used(reason: str) -> str:
    """The detail of a scan whose labels were found and cannot be used.

    Args:
        reason: the refusal, which begins with its reason code.
    """
    return f"its labels are not used: {reason}"


def path_from(root: Path, labels: Path) -> str:
    """Path of labels relative to the archive; it begins with .. where they lie elsewhere."""
    if labels.is_relative_to(root):
        return labels.relative_to(root).as_posix()
    return Path(os.path.relpath(labels.resolve(), root.resolve())).as_posix()


def label_report(
    pairs: LabelPairs, rows: Sequence[Row], root: Path, contradictions: Sequence[str] = ()
) -> LabelReport:
    """Count the labels of an archive.

    Args:
        pairs: which labels belong to which scan.
        rows: rows of all scans after they were examined.
        root: folder of the archive.
        contradictions: for each scan how its label files contradict each other; empty for most.
    """
    accepted = [row for row in rows if row.status == ACCEPTED]
    unusable: Counter[str] = Counter()
    for row in accepted:
        match = _NOT_USED.match(row.detail)
        if match:
            unusable[match[1]] += 1
    refused = {row.path for row in rows if row.status != ACCEPTED}
    unmatched = [_shown(path, root) for path in pairs.unmatched]
    likely = [_shown(path, root) for path in sorted(pairs.likely)]
    # a DICOM object may have its folder as the path of its row
    unmatched += [path for path in likely if {path, str(Path(path).parent)} & refused]
    notes: dict[str, None] = {}
    for path in {path.parent: path for path in pairs.label_of.values()}.values():
        notes.update(dict.fromkeys(table_of_dataset(path).notes))
    several = [
        (pairs.label_of[scan], pairs.others_of[scan][0])
        for scan in (root / row.path for row in accepted)
        if scan in pairs.others_of
    ]
    example = [_shown(path, root) for path in (several[0] if several else ())]
    return LabelReport(
        num_scans=len(accepted),
        num_labelled=sum(bool(row.label_path) for row in accepted),
        unusable=tuple(unusable.most_common()),
        unmatched=tuple(unmatched),
        num_given=pairs.num_given,
        num_given_used=pairs.num_given_used,
        notes=tuple(notes),
        num_several=len(several),
        contradiction=next(filter(None, contradictions), ""),
        example=(example[0], example[1]) if example else ("", ""),
    )


def _shown(path: Path, root: Path) -> str:
    """Path below the root where it lies there, else the whole path."""
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()
