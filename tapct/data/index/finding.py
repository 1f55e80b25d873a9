"""Find the scans of an archive and their label maps: list the files, put DICOM series together,
and pair scans with labels.
"""

from __future__ import annotations

import fnmatch
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from tapct.base.exits import UserError
from tapct.data import formats
from tapct.data.index.grouping import grouped
from tapct.data.index.inputs import Entry, IndexInputs
from tapct.data.index.journal import Journal
from tapct.data.index.listing import Listed, list_files
from tapct.data.index.scan_row import ExamineTask, ScanRules
from tapct.data.index.share import WHOLE, Share
from tapct.data.labels.pairing import LabelPairs, pair_labels
from tapct.data.readers import LIBRARIES, load_libraries
from tapct.data.readers.dicom_kind import object_title
from tapct.data.search import passed_over as passed
from tapct.data.search.discover import DICOM_OBJECT, Source, in_order
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
        scans: sources to examine, in the order of their paths.
        pairs: which labels belong to which scan.
        passed_over: number of other files by kind.
        entries: entry of a list, by the path of the scan that it names.
    """

    inputs: IndexInputs
    listed: Listed
    scans: Sequence[Source]
    pairs: LabelPairs
    passed_over: Counter[str]
    entries: Mapping[Path, Entry]

    def tasks(self, rules: ScanRules) -> list[ExamineTask]:
        """The work of the worker processes: each scan with its label maps."""
        pairs = self.pairs
        return [
            ExamineTask(
                scan,
                rules,
                labels=pairs.label_of.get(scan.path),
                more_labels=pairs.more_of.get(scan.path, ()),
                num_other_labels=len(pairs.others_of.get(scan.path, ())),
            )
            for scan in self.scans
        ]


@dataclass(frozen=True)
class _Request:
    """What `_found` needs.

    Args:
        inputs: what is indexed.
        labels: folder of `--labels`, or None.
        derived: as in `search`.
        seconds: longest time to wait for one file.
        journal: journal with the heads of the DICOM files.
        listed: files that were listed.
    """

    inputs: IndexInputs
    labels: Path | None
    derived: bool
    seconds: float
    journal: Journal
    listed: Listed


@dataclass(frozen=True)
class _Pairs:
    """The sources of an archive, the label maps of its scans, and the other files by kind."""

    sources: Sequence[Source]
    pairs: LabelPairs
    passed_over: Counter[str]


def find(
    inputs: IndexInputs,
    labels: Path | None,
    rules: ScanRules,
    journal: Journal,
    machine: Machine,
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
        only: as in `build_manifest`.
    Raises:
        UserError: there is no scan, a library cannot be loaded, or the disk does not answer.
    """
    listed = list_files(
        *(inputs, journal, rules),
        check=lambda: _call(_load, None, machine, inputs),
        workers=machine.workers,
        limits=machine.limits,
        modules=MODULES,
        share=machine.share,
        listed=machine.listed,
    )
    seconds = machine.limits.seconds
    request = _Request(inputs, labels, rules.accept.derived, seconds, journal, listed)
    found: _Pairs = _call(_found, request, machine, inputs)
    scans, passed_over = _scans_of(found, inputs, only)
    is_part = machine.share.total > 1  # other processes may have what is missing here
    if not scans and not is_part:
        raise _no_scans(inputs, passed_over)
    entries = inputs.entry_of(scans, strict=not is_part)
    pairs = _with_labels_of_list(found.pairs, entries)
    return ScansFound(inputs, listed, scans, pairs, passed_over, entries)


def _with_labels_of_list(pairs: LabelPairs, entries: Mapping[Path, Entry]) -> LabelPairs:
    """Pairs of which those of a list replace the ones that were found by names."""
    given = {path: entry.label for path, entry in entries.items() if entry.label is not None}
    if not given:
        return pairs
    rest = [pairs.others_of, pairs.more_of]
    others_of, more_of = ({k: v for k, v in each.items() if k not in given} for each in rest)
    label_of = {**pairs.label_of, **given}
    return replace(pairs, label_of=label_of, others_of=others_of, more_of=more_of)


def _scans_of(
    found: _Pairs, inputs: IndexInputs, only: Sequence[str]
) -> tuple[list[Source], Counter[str]]:
    """The sources to examine as scans, and the other files, counted by kind."""
    given = {entry.label for entry in inputs.entries}
    scans: list[Source] = []
    passed_over = found.passed_over + Counter(found.pairs.passed_over)
    for source in found.sources:
        if source.path in found.pairs.label_files or source.path in given:
            continue
        if source.kind == DICOM_OBJECT:
            passed_over[f"DICOM {object_title(source.sop_class)}"] += 1
        elif only and not matches_any(source.path.relative_to(inputs.root).as_posix(), only):
            passed_over["not part of the data set"] += 1
        else:
            scans.append(source)
    return scans, passed_over


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


def _found(request: _Request) -> _Pairs:
    """What lies in an archive, and which label map belongs to which scan."""
    inputs, listed = request.inputs, request.listed
    series, passed_over = grouped(
        inputs.root, request.journal, listed.current, derived=request.derived
    )
    sources = in_order(inputs.root, filter(inputs.has_named, [*listed.sources, *series]))
    # side-cars, tables of labels and the headers of DICOM objects are read again
    limit = TimeLimit(request.seconds + _PAIRING_SECONDS * len(sources))
    try:
        pairs = limit.call(pair_labels, sources, inputs.root, request.labels, request.seconds)
        return _Pairs(sources, pairs, listed.passed_over + passed_over)
    except NoAnswer as error:
        raise UserError(
            f"the files of {inputs.root} were listed, but reading side-cars and tables of labels "
            f"had {error}; check the disk"
        ) from error
    finally:
        limit.close()
