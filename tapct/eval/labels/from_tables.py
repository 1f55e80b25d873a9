"""The labels of an evaluation that come from tables and not from the store."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from tapct.base import console
from tapct.data.packed.store import Store
from tapct.eval.labels.landmarks import read_landmarks
from tapct.eval.labels.scan_values import read_scan_labels
from tapct.eval.scans.labelled_scan import Landmarks, ScanLabels, TableLabels


def read_tables(store: Store, scan_labels: str, landmarks: str, split_column: str) -> TableLabels:
    """Read the tables of an evaluation, and print what was found.

    Args:
        store: packed scans.
        scan_labels: file of `eval.scan_labels`; empty for none.
        landmarks: file of `eval.landmarks`; empty for none.
        split_column: `eval.split_column`.
    Raises:
        UserError: a table cannot be used.
    """
    values: ScanLabels = {}
    sides: Mapping[str, str] = {}
    points: Landmarks = {}
    digests = []
    if scan_labels:
        table = read_scan_labels(scan_labels, store.scans, split_column)
        values, sides = table.values, table.sides
        digests.append(table.digest)
        console.say(table.summary)
    if landmarks:
        named = read_landmarks(landmarks, store.scans, store.places())
        points = named.points
        digests.append(named.digest)
        console.say(named.summary)
    digest = hashlib.blake2b(" ".join(digests).encode(), digest_size=16).hexdigest()
    return TableLabels(values, points, sides, digest if digests else "")
