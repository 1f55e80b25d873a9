"""Which scans the weights of a run have been trained on, over all its starts, stores and sources.

The list is written before the first step of every start, so that it holds all scans that the steps
after it can draw. Weights that a run begins with bring their own list, or make it incomplete.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tapct.data.packed import trained_on
from tapct.data.packed.store_group import AnyStore, archives_of
from tapct.data.packed.trained_on import TrainedOn
from tapct.run_folder import RunFolder, has_step_name, step_of
from tapct.weights.export import scans_of_export


def update(
    run: Path,
    store: AnyStore,
    rows: Sequence[int] | np.ndarray,
    *,
    start: int,
    saved: Path | None,
    init: str,
) -> None:
    """Add the scans of this start to the list of the run. The first rank calls it, before the first
    step.

    Args:
        run: run folder.
        store: packed scans.
        rows: rows of the store that are trained on, ascending.
        start: finished steps.
        saved: checkpoint that the run resumes from; None for a new run.
        init: file that `train.init` was found to mean; empty without.
    Raises:
        UserError: the list cannot be written.
    """
    path = RunFolder(run).trained_on
    rows = np.asarray(rows, np.int64)
    parts = []
    for one, numbers in archives_of(store):
        low, high = np.searchsorted(rows, (numbers.start, numbers.stop))
        parts.append((one, rows[low:high] - numbers.start))
    if saved is None and not init:
        trained_on.write_first(path, parts, start)
        return
    if saved is not None and saved.parent.parent == run and path.is_file():
        # also the scans of steps after the checkpoint: weights of them may wait to be evaluated
        known = trained_on.read(path)
    elif saved is not None:
        known = scans_of_checkpoint(saved)
    else:
        known = scans_of_weights(Path(init)).at_start()
    for one, own_rows in parts:
        known = known.with_store(one, own_rows, start)
    known.write(path)


def scans_of_run(run: Path, step: int) -> TrainedOn:
    """The scans that the weights of a run after `step` steps have been trained on."""
    path = RunFolder(run).trained_on
    if not path.is_file():
        reason = (
            "the run was trained by a version of tapct that kept no list of the scans of "
            "pretraining"
        )
        return TrainedOn(unknown=(reason,))
    return trained_on.read(path).before(step)


def scans_of_checkpoint(saved: Path) -> TrainedOn:
    """The scans that a checkpoint has been trained on, by the list of the run that it lies in."""
    return scans_of_run(saved.parent.parent, step_of(saved))


def scans_of_weights(file: Path) -> TrainedOn:
    """The scans that a file of weights has been trained on: a checkpoint's, an export's, or of
    unknown origin.
    """
    if has_step_name(file.parent):
        return scans_of_checkpoint(file.parent)
    return scans_of_export(file.parent)
