"""The evaluations that a run folder holds: one folder per data set and step.

The name of a data set is the name of its store and the first digits of the store's digest. The
digits decide: a store that was moved keeps its folder, and another store never shares one.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from tapct.base.exits import UserError
from tapct.eval.results import json_file
from tapct.eval.results.json_file import Evaluation
from tapct.run_folder import EvaluationFolder, RunFolder, step_of

DIGITS = 8  # of the digest in a name
GENERIC = (
    "store",
    "packed",
    "data",
)  # names that identify no store; the name of its parent is used
MAX_NAME = 32
LEFTOVER_S = 3600.0  # age of a folder for a new link from which no process can be using it
EARLIER = "unknown data set (of an earlier version of tapct)"


@dataclass(frozen=True)
class SavedEvaluation:
    """The newest evaluation of a run on one data set.

    Args:
        folder: its folder.
        dataset: name of the data set; empty for an evaluation of an earlier version.
        step: step of the checkpoint; None where an earlier version did not record it.
        is_own: whether it is the data set that the run was trained on.
        evaluation: content of results.json; None if it cannot be used.
        why_not: reason why it is None.
    """

    folder: EvaluationFolder
    dataset: str
    step: int | None
    is_own: bool
    evaluation: Evaluation | None
    why_not: str

    @property
    def title(self) -> str:
        """Data set and step in words."""
        step = "" if self.step is None else f", step {self.step}"
        return f"{self.dataset or EARLIER}{step}"


def dataset_name(evaluations: Path, store: Path, digest: str) -> str:
    """The name of a data set among the evaluations of a model.

    Args:
        evaluations: parent of the evaluations, such as RUN/eval; one of the same data set gives the
            name that it already has.
        store: folder of the store.
        digest: digest of the store.
    """
    ending = f"-{digest[:DIGITS]}"
    for known in sorted(evaluations.glob(f"*{ending}")):
        if known.is_dir():
            return known.name
    parts = [part for part in store.absolute().parts if part.lower() not in GENERIC]
    slug = re.sub(r"[^a-z0-9]+", "-", parts[-1].lower())[:MAX_NAME].strip("-")
    return f"{slug or 'store'}{ending}"


def find(run: Path) -> list[SavedEvaluation]:
    """The newest evaluation on each data set: the run's own first, then by name; one of an earlier
    version last.
    """
    newest: dict[str, EvaluationFolder] = {}
    for dataset, folder in RunFolder(run).evaluations_of_steps():
        before = newest.get(dataset)
        is_newer = before is None or step_of(before.path) < step_of(folder.path)
        if folder.results.is_file() and is_newer:
            newest[dataset] = folder
    earlier = RunFolder(run).earlier_evaluation
    if earlier.results.is_file() and not earlier.results.is_symlink():
        newest[""] = earlier
    own = own_digest(run)
    found = []
    for dataset, folder in newest.items():
        evaluation, why_not = json_file.read(folder.path)
        step = None if folder == earlier else step_of(folder.path)
        found.append(
            SavedEvaluation(folder, dataset, step, is_own(dataset, own), evaluation, why_not)
        )
    return sorted(found, key=lambda one: (not one.is_own, not one.dataset, one.dataset))


def link_newest(run: Path) -> None:
    """Make RUN/eval/results.json a link to the newest results on the run's own data set, for
    scripts that read it. A file of an earlier version stays.
    """
    link = RunFolder(run).newest_results
    own = next((one for one in find(run) if one.is_own), None)
    if own is None or (link.exists() and not link.is_symlink()):
        return
    target = own.folder.results.relative_to(link.parent)
    with contextlib.suppress(OSError):
        if os.readlink(link) == str(target):
            return
    # a folder of its own for the new link: no other process, on no other machine, uses its name
    with contextlib.suppress(OSError):  # a file system without links
        _remove_leftovers(link)
        with tempfile.TemporaryDirectory(prefix=f".{link.name}.", dir=link.parent) as aside:
            new = Path(aside) / link.name
            new.symlink_to(target)
            os.replace(new, link)


def _remove_leftovers(link: Path) -> None:
    """Remove what processes left that were killed while they made the link."""
    for left in link.parent.glob(f".{link.name}.*"):
        with contextlib.suppress(OSError):  # another process has removed it
            if left.is_symlink():  # of an earlier version
                left.unlink()
            elif time.time() - left.stat().st_mtime > LEFTOVER_S:
                shutil.rmtree(left)


def pick(found: list[SavedEvaluation], wanted: str = "") -> SavedEvaluation | None:
    """The evaluation to show.

    Args:
        found: as `find` returns them.
        wanted: name of a data set, or the beginning of one; empty for the run's own. Without one of
            its own, an evaluation of an earlier version is shown, never one on another data set.
    Returns:
        None where there is none.
    Raises:
        UserError: several data sets have names that begin in this way.
    """
    if not wanted:
        return next((one for one in found if one.is_own or not one.dataset), None)
    name = dataset_of(wanted, [one.dataset for one in found])
    return next((one for one in found if name and one.dataset == name), None)


def dataset_of(wanted: str, names: Collection[str]) -> str:
    """The name of the data set that the user means; empty where there is none.

    Args:
        wanted: name of a data set, or the beginning of one.
        names: names of all data sets.
    Raises:
        UserError: several names begin in this way, and none is equal.
    """
    if wanted in names:
        return wanted
    candidates = sorted({name for name in names if name.startswith(wanted)})
    if len(candidates) > 1:
        raise UserError(
            f"--data {wanted}: the names of several data sets begin in this way: "
            f"{', '.join(candidates)}; give more of the name"
        )
    return candidates[0] if candidates else ""


def check_wanted(found: list[SavedEvaluation], wanted: str) -> None:
    """Raise UserError where no evaluation is of the wanted data set, or several may be meant."""
    names = sorted({one.dataset for one in found if one.dataset})
    if wanted and not dataset_of(wanted, names):
        raise UserError(
            f"--data {wanted}: there is no evaluation on a data set of that name; there are: "
            f"{', '.join(names) or 'none'}"
        )


def is_own(dataset: str, digest: str) -> bool:
    """Whether the name of a data set is that of the store with a digest; False if it is empty."""
    return bool(digest) and dataset.endswith(f"-{digest[:DIGITS]}")


def own_digest(run: Path) -> str:
    """Digest of the store that a run was trained on last; empty where unknown."""
    try:
        content = json.loads(RunFolder(run).provenance.read_text(encoding="utf-8"))
        return str(content["manifest"]["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
