"""Find the scans of an archive and their label maps: list the files, put DICOM series together,
and pair scans with labels.
"""

from __future__ import annotations

import fnmatch
import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow
import pyarrow.compute as pc

from tapct.base.exits import UserError
from tapct.data import formats
from tapct.data.index.grouping import grouped
from tapct.data.index.inputs import Entry, IndexInputs
from tapct.data.index.journal import Journal
from tapct.data.index.label_counts import LabelsFound, Unpaired
from tapct.data.index.listing import Listed, list_files
from tapct.data.index.placed_rows import PLACE, PlacedRows
from tapct.data.index.scan_row import ExamineTask, ScanRules
from tapct.data.index.share import WHOLE, Share
from tapct.data.index.source_table import (
    FOUND_SCHEMA,
    LABEL_COLUMNS,
    SOURCE_SCHEMA,
    bytes_of,
    labels_of_row,
    row_of_found,
    row_of_source,
    source_of_row,
    text_of,
)
from tapct.data.labels.pairing import LabelPairs, may_hold_labels, pair_labels
from tapct.data.readers import LIBRARIES, load_libraries
from tapct.data.readers.dicom_kind import object_title
from tapct.data.search import passed_over as passed
from tapct.data.search.discover import DICOM_OBJECT, Source
from tapct.data.workers.process_pool import DEFAULT_LIMITS, ScanLimits, map_unordered
from tapct.data.workers.time_limit import NoAnswer, TimeLimit

In = TypeVar("In")
Out = TypeVar("Out")

_PAIRING_SECONDS = 1.0  # per scan or label map, beside the limit of one file
MODULES = ("tapct.data.index.build", *LIBRARIES)  # what a worker needs


class NoScans(UserError):
    """The folders hold no file that may be a scan."""


@dataclass(frozen=True)
class Machine:
    """What an index may use, and how it reports; arguments as in `build_manifest`."""

    workers: int = 0
    limits: ScanLimits = DEFAULT_LIMITS
    listed: Callable[[int, int, bool], None] = lambda done, total, is_all: None
    share: Share = WHOLE


@dataclass(frozen=True)
class ScansFound:
    """The scans of an archive.

    Args:
        inputs: what is indexed.
        listed: files that were listed.
        rows: rows of the sources to examine, in the order of their paths, with their labels, see
            `source_table`.
        unpaired: label files that no scan uses.
        passed_over: number of other files by kind.
        entries: entry of a list, by the path of the scan that it names.
    """

    inputs: IndexInputs
    listed: Listed
    rows: PlacedRows
    unpaired: Unpaired
    passed_over: Counter[str]
    entries: Mapping[Path, Entry] = field(default_factory=dict)

    def __len__(self) -> int:
        """Number of scans."""
        return len(self.rows)

    def sources(self) -> Iterator[Source]:
        """The sources to examine, in the order of their paths."""
        return map(source_of_row, self.rows.rows(SOURCE_SCHEMA.names))

    def labels(self) -> Iterator[LabelsFound]:
        """The labels that were found for each scan."""
        for row in self.rows.rows(["path", *LABEL_COLUMNS]):
            yield self._labels_of(Path(text_of(row["path"])), row)

    def tasks(self, rules: ScanRules) -> Iterator[ExamineTask]:
        """The work of the worker processes: each scan with its label maps."""
        for row in self.rows.rows():
            source = source_of_row(row)
            found = self._labels_of(source.path, row)
            entry = self.entries.get(source.path)
            yield ExamineTask(
                source,
                rules,
                labels=found.label,
                more_labels=found.more,
                num_other_labels=found.num_others,
                split="" if entry is None else entry.split,
            )

    def _labels_of(self, path: Path, row: Mapping[str, Any]) -> LabelsFound:
        """The labels of a scan: those of a list, else those that were found by names."""
        entry = self.entries.get(path)
        if entry is not None and entry.label is not None:
            return LabelsFound(entry.label)
        return labels_of_row(row)


@dataclass(frozen=True)
class _Request:
    """What `_found` needs.

    Args:
        inputs: what is indexed.
        labels: folder of `--labels`, or None.
        only: as in `build_manifest`.
        derived: as in `search`.
        seconds: longest time to wait for one file.
        journal: journal with the heads of the DICOM files.
        listed: files that were listed.
        scratch: folder for the rows.
    """

    inputs: IndexInputs
    labels: Path | None
    only: Sequence[str]
    derived: bool
    seconds: float
    journal: Journal
    listed: Listed
    scratch: Path


@dataclass(frozen=True)
class _Paired:
    """What `_found` returns; as in `ScansFound`."""

    rows: PlacedRows
    unpaired: Unpaired
    passed_over: Counter[str]


def find(
    inputs: IndexInputs,
    labels: Path | None,
    rules: ScanRules,
    journal: Journal,
    machine: Machine,
    scratch: Path,
    only: Sequence[str] = (),
) -> ScansFound:
    """Find all scans of an archive.

    Headers are read in worker processes, and a broken reader library is noticed first, since it
    would refuse every scan. The process of the command does not load these libraries.

    Args:
        inputs: what is indexed.
        labels: folder with label maps, or None.
        rules: what holds for all scans.
        journal: journal of the index.
        machine: processes and limits.
        scratch: folder for rows that wait.
        only: as in `build_manifest`.
    Raises:
        UserError: there is no scan, a library cannot be loaded, or the disk does not answer.
    """
    listed = list_files(
        *(inputs, journal, rules, scratch),
        check=lambda: _call(_load, None, machine, inputs),
        workers=machine.workers,
        limits=machine.limits,
        modules=MODULES,
        share=machine.share,
        listed=machine.listed,
    )
    seconds = machine.limits.seconds
    derived = rules.accept.derived
    request = _Request(inputs, labels, only, derived, seconds, journal, listed, scratch)
    paired: _Paired = _call(_found, request, machine, inputs)
    listed.sources.remove()
    is_part = machine.share.total > 1  # other processes may have what is missing here
    if not len(paired.rows) and not is_part:
        raise _no_scans(inputs, paired.passed_over)
    found = ScansFound(inputs, listed, paired.rows, paired.unpaired, paired.passed_over)
    return replace(found, entries=inputs.entry_of(found.sources(), strict=not is_part))


def matches_any(path: str, patterns: Sequence[str]) -> bool:
    """Whether a path matches one of some patterns as a whole; `*` matches folders too."""
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def _no_scans(inputs: IndexInputs, counts: Counter[str]) -> NoScans:
    """The error of a folder without anything to examine."""
    others = passed.summary(counts)
    beside = f", but {others}" if others else ""
    return NoScans(f"{inputs.root} holds no {formats.listed('or')} scans{beside}; check the path")


def _call(function: Callable[[In], Out], request: In, machine: Machine, inputs: IndexInputs) -> Out:
    """The result of a function in a worker process, or in this one without workers.

    Raises:
        UserError: the error that the function raised, or the process was lost.
    """
    if machine.workers == 0:
        return function(request)
    result: Out | UserError
    ((_, result),) = map_unordered(
        _result_or_error,
        [(function, request)],
        1,
        lambda _, failure: UserError(f"{inputs.root} cannot be searched: {failure.detail}"),
        limits=ScanLimits(seconds=math.inf),  # it takes as long as the archive is large
        modules=MODULES,
    )
    if isinstance(result, UserError):
        raise result
    return result


def _result_or_error(call: tuple[Callable[[In], Out], In]) -> Out | UserError:
    """What a function returns, or the error that a person can mend."""
    function, request = call
    try:
        return function(request)
    except ImportError as error:
        return UserError(f"a library that reads scans cannot be loaded ({error}); install it again")
    except UserError as error:
        return error


def _load(_: None) -> None:
    """Load the libraries that decode scans, so that a broken one ends the index."""
    load_libraries()


def _found(request: _Request) -> _Paired:
    """What lies in an archive, and which label map belongs to which scan."""
    inputs = request.inputs
    passed_over = Counter(request.listed.passed_over)
    sources = _in_order(request, passed_over)
    pairs = _pairs_of(sources, request)
    passed_over.update(pairs.passed_over)
    given = {entry.label for entry in inputs.entries}
    rows = PlacedRows(request.scratch / "found", FOUND_SCHEMA)
    for source in map(source_of_row, sources.rows()):
        if source.path in pairs.label_files or source.path in given:
            continue
        if source.kind == DICOM_OBJECT:
            passed_over[f"DICOM {object_title(source.sop_class)}"] += 1
        elif request.only and not matches_any(_below(source, inputs), request.only):
            passed_over["not part of the data set"] += 1
        else:
            rows.append(row_of_found(source, pairs))
    sources.remove()
    unpaired = Unpaired(pairs.unmatched, pairs.likely, pairs.num_given, pairs.num_given_used)
    return _Paired(rows, unpaired, passed_over)


def _in_order(request: _Request, passed_over: Counter[str]) -> PlacedRows:
    """The sources of an archive in the order of their paths.

    Args:
        request: what is searched.
        passed_over: counts to which the other DICOM files are added.
    """
    inputs, listed, scratch = request.inputs, request.listed, request.scratch
    rows = PlacedRows(scratch / "unordered", SOURCE_SCHEMA)
    series = grouped(inputs.root, request.journal, listed.current, scratch, derived=request.derived)
    of_files = ((source_of_row(row), "") for row in listed.sources.rows())
    for source, kind in itertools.chain(of_files, series):
        if source is None:
            passed_over[kind] += 1
        elif inputs.has_named(source):
            rows.append(row_of_source(source))
    places = _ranks([table.column("path") for table in rows.tables(("path",))], inputs.root)
    ordered = PlacedRows(scratch / "ordered", SOURCE_SCHEMA)
    for table in rows.tables():
        numbers = table.column(PLACE).to_numpy()
        ordered.add(table.drop_columns([PLACE]), places[numbers])
    rows.remove()
    return ordered


def _ranks(paths: Sequence[pyarrow.ChunkedArray], root: Path) -> np.ndarray:
    """The rank of each path among all, by their parts below the root; that of the root is a dot."""
    column = pyarrow.chunked_array([chunk for each in paths for chunk in each.chunks], "binary")
    own = bytes_of(root)
    column = pc.if_else(pc.equal(column, own), own.rstrip(b"/") + b"/.", column)
    order = pc.sort_indices(column).to_numpy()
    ranks = np.empty(len(order), np.int64)
    ranks[order] = np.arange(len(order))
    return ranks


def _pairs_of(sources: PlacedRows, request: _Request) -> LabelPairs:
    """Which label map belongs to which scan. All sources are in memory at once only if some may be
    label maps.
    """
    root = request.inputs.root
    all_sources = functools.partial(map, source_of_row)
    may_be_pairs = request.labels is not None or any(
        may_hold_labels(source, root) for source in all_sources(sources.rows())
    )
    if not may_be_pairs:
        return LabelPairs({}, frozenset())
    # side-cars, tables of labels and the headers of DICOM objects are read again
    limit = TimeLimit(request.seconds + _PAIRING_SECONDS * len(sources))
    try:
        given = (tuple(all_sources(sources.rows())), root, request.labels, request.seconds)
        return limit.call(pair_labels, *given)
    except NoAnswer as error:
        raise UserError(
            f"the files of {root} were listed, but reading side-cars and tables of labels had "
            f"{error}; check the disk"
        ) from error
    finally:
        limit.close()


def _below(source: Source, inputs: IndexInputs) -> str:
    """Path of a source below the root."""
    return source.path.relative_to(inputs.root).as_posix()
