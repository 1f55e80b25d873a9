"""Evaluate a model on a public data set: `tapct eval MODEL --data NAME --root FOLDER`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tapct.base import console
from tapct.base.exits import UserError
from tapct.data.datasets.dataset import DataSet, read_dataset, shipped_names
from tapct.data.datasets.work import prepare
from tapct.run.model_source import Model
from tapct.run_folder import data_beside


@dataclass(frozen=True)
class Chosen:
    """The data set of an evaluation.

    Args:
        dataset: data set.
        root: folder of its files.
        work: parent of its work folder; None chooses it by the model.
    """

    dataset: DataSet
    root: Path
    work: Path | None


def choose(
    data: str, root: Path | None, work: Path | None, overrides: Sequence[str]
) -> Chosen | None:
    """Read the options of a data set, before a model is read.

    Args:
        data: option --data; empty for the store of the run.
        root: option --root.
        work: option --work.
        overrides: settings of the evaluation.
    Raises:
        UserError: an option is missing or stands without --data, or there is no such data set.
    """
    if not data:
        for option, value in (("--root", root), ("--work", work)):
            if value is not None:
                raise UserError(
                    f"{option} {value} needs --data NAME, the data set; tapct comes with "
                    f"{', '.join(shipped_names())}"
                )
        return None
    dataset = read_dataset(data)
    if root is None:
        raise UserError(
            f"--data {data} needs --root FOLDER, the folder of its files, with "
            f"{' or '.join(dataset.facts.scans)}; {dataset.where_to_ask()}"
        )
    stores = [text for text in overrides if text.startswith("data.store=")]
    if stores:
        raise UserError(f"--data {data} and {stores[0]} both name the data; give one of them")
    return Chosen(dataset, root, work)


def on_data(model: Model, chosen: Chosen, workers: int) -> Model:
    """Index and pack the data set, and let the evaluation of a model read it.

    The official split and the targets come as `eval.scan_labels`, unless this setting names another
    file.

    Args:
        model: model.
        chosen: data set.
        workers: number of processes that read the files.
    """
    for line in chosen.dataset.lines_about():
        console.say(line)
    config = model.config
    own_table = config.eval.scan_labels
    with_split = not own_table and config.eval.split_column != "none"
    work = chosen.work or data_beside(model.evaluations)
    prepared = prepare(chosen.dataset, chosen.root, work, with_split=with_split, workers=workers)
    if own_table:
        console.say(
            f"eval.scan_labels={own_table} replaces the official split and the labels of scans of "
            f"{chosen.dataset.name}"
        )
    table = own_table or str(prepared.scan_labels or "")
    return replace(
        model,
        config=replace(
            config,
            data=replace(config.data, store=prepared.store, stores=()),
            eval=replace(config.eval, scan_labels=table),
        ),
    )
