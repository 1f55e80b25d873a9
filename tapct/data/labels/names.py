"""Names of label values: from a JSON side-car, the label file itself, or `dataset.json`.

A name is free text in a file, so it is kept only where it can be the name of a label.
"""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from tapct.base.marks import file_name, quoted
from tapct.types import Refused

Names: TypeAlias = tuple[tuple[int, str], ...]  # label value and name, ascending

DATASET_FILE = "dataset.json"
_MAX_PARENTS = 2  # folders in which dataset.json is searched: labelsTr, and the one that it is in
_IGNORE_NAME = "ignore"  # name that nnU-Net reserves for the value of voxels without a label
_ALLOWED = re.compile(r"[A-Za-z0-9 _.()+-]{1,64}")


@dataclass(frozen=True)
class NameTable:
    """The table of a JSON file.

    Args:
        names: label value and name.
        ignore: label values that the table declares as not labelled.
        notes: one line for each kind of entry that is not used.
    """

    names: Names = ()
    ignore: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()


def clean_names(names: Iterable[tuple[int, str]], identity: Collection[str] = ()) -> Names:
    """Keep the names that can be names of labels, in the order of their values.

    Args:
        names: label value and text.
        identity: words, in lower case, that identify the patient; a name with one is left out.
    """
    kept = []
    for value, text in names:
        name = str(text).strip()
        words = re.split(r"[^a-z0-9]+", name.lower())
        if _ALLOWED.fullmatch(name) and not set(words) & set(identity):
            kept.append((value, name))
    return tuple(sorted(kept))


def with_given(names: Names, given: Names) -> Names:
    """Names of a label map, replaced by those of a data set where it has one for the value.

    Args:
        names: names that the files have.
        given: names of the data set.
    """
    return tuple(sorted({**dict(names), **dict(given)}.items()))


def values_of(stems: Sequence[str], given: Names) -> list[int]:
    """The label values of masks that hold one organ each.

    Args:
        stems: names of the masks, each once.
        given: names of a data set; a mask of this name gets the value, the others the values after
            the largest one.
    """
    known = {name: value for value, name in given}
    unknown = [stem for stem in stems if stem not in known]
    start = max(known.values(), default=0) + 1
    known.update(zip(unknown, range(start, start + len(unknown))))
    return [known[stem] for stem in stems]


def names_in(table: Mapping[str, Any], file: str) -> NameTable:
    """Read {"1": "liver"} or {"liver": 1}, as MSD, nnU-Net and side-cars write it.

    nnU-Net's regions ({"tumour": [1, 2]}) are no labels of their own and are left out. A value that
    is named `ignore` is one of voxels that nobody has labelled.

    Args:
        table: table of values and names.
        file: name of the file, for error lines and notes.
    Raises:
        Refused: `bad_sidecar`, an entry is not a value and a name.
    """
    pairs: list[tuple[int, str]] = []
    ignore: list[int] = []
    regions: list[str] = []
    for left, right in table.items():
        if isinstance(right, list):
            regions.append(left)
            continue
        value, name = (left, right) if str(left).lstrip("-").isdigit() else (right, left)
        if isinstance(value, bool) or not re.fullmatch(r"-?\d{1,9}", str(value)):
            raise Refused(
                "bad_sidecar",
                f"'labels' in {file} has {quoted(left)}: {quoted(right)}; rule: a value and a name",
            )
        if str(name).lower() == _IGNORE_NAME:
            ignore.append(int(value))
        elif int(value) >= 0:
            pairs.append((int(value), str(name)))
    names = clean_names(pairs)
    notes = []
    if regions:
        notes.append(f"{file}: {len(regions)} regions of several labels are not used")
    if len(names) < len(pairs):
        notes.append(
            f"{file}: {len(pairs) - len(names)} label names are not used; rule: letters, digits, "
            "space and _ . + - ( ), at most 64 characters"
        )
    return NameTable(names, tuple(ignore), tuple(notes))


def table_of_sidecar(path: Path, sidecar: Mapping[str, Any]) -> NameTable:
    """The table `labels` of a label file's side-car; empty where there is none.

    Args:
        path: path of the label map.
        sidecar: content of its side-car.
    Raises:
        Refused: `bad_sidecar`, `labels` is not a table of values and names.
    """
    table = sidecar.get("labels", {})
    if not isinstance(table, dict):
        raise Refused(
            "bad_sidecar",
            f"'labels' beside {file_name(path)} is not a JSON object of values and names",
        )
    return names_in(table, f"the side-car of {file_name(path)}")


def table_of_dataset(path: Path) -> NameTable:
    """The table `labels` of the nearest `dataset.json` above a label file.

    A file that cannot be used gives a note and no names: it is not the fault of one label map.
    """
    for folder in list(path.absolute().parents)[:_MAX_PARENTS]:
        file = folder / DATASET_FILE
        if file.is_file():
            try:
                status = file.stat()
                return _table_in(file, (status.st_size, status.st_mtime_ns, status.st_ino))
            except OSError as error:  # not kept: it may be over when the next label map is read
                problem = error.strerror or type(error).__name__
                return NameTable(notes=(f"{DATASET_FILE} gives no label names: {problem}",))
    return NameTable()


class _Object(dict[str, Any]):
    """A JSON object, which keeps the last value of a key that is given twice, and such keys.

    Args:
        pairs: keys and values in the order of the file.
    """

    def __init__(self, pairs: Sequence[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        counts = Counter(key for key, _ in pairs)
        self.repeats = {key for key, count in counts.items() if count > 1}


@functools.lru_cache(maxsize=64)
def _table_in(file: Path, stamp: tuple[int, int, int]) -> NameTable:
    """The table of one `dataset.json`, which is read once for all label files below it.

    Args:
        file: path of the file.
        stamp: its size, time of change and inode, so that a changed file is read again.
    Raises:
        OSError: the file cannot be read.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_Object)
        table = content.get("labels", _Object([])) if isinstance(content, _Object) else None
        if not isinstance(table, _Object):
            return NameTable(notes=(f"{DATASET_FILE} has no table 'labels'",))
        if table.repeats or "labels" in content.repeats:
            problem = "a key is given twice in its table 'labels', or the table itself"
            return NameTable(notes=(f"{DATASET_FILE} gives no label names: {problem}",))
        return names_in(table, DATASET_FILE)
    except (ValueError, RecursionError, Refused) as error:
        problem = error.detail if isinstance(error, Refused) else "it is not JSON"
        return NameTable(notes=(f"{DATASET_FILE} gives no label names: {problem}",))
