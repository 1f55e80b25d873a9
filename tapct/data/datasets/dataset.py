"""Public data sets by name: where their scans, labels and official splits lie, and where to ask for
them. `configs/data/NAME.yaml` describes one; nothing is downloaded.

All patterns are matched with the whole path below the folder of the data, as in `eval.only`: `*`
also matches `/`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tapct.base.exits import UserError
from tapct.base.files import expand_path
from tapct.config import ConfigError, load_config, setting
from tapct.config.yamlfile import Layer, one_line, read_chain, shipped_folder
from tapct.data.labels.names import Names, clean_names
from tapct.types import IGNORE_LABEL

TRAIN, VAL, TEST = "train", "val", "test"
LABELS = "labels"
_NAME = re.compile(r"[a-z0-9][a-z0-9-]*")


@dataclass(frozen=True)
class SplitRule:
    """The official split of a data set: patterns of paths, or columns of a table."""

    train: tuple[str, ...] = setting((), "patterns of the scans of the training side")
    val: tuple[str, ...] = setting(
        (), "patterns of scans on which settings are chosen; they belong to the training side"
    )
    test: tuple[str, ...] = setting((), "patterns of the scans of the test side")
    table: str = setting("", "pattern of the CSV files with the split; empty: by the patterns")
    key: str = setting("", "column of the table that names the scan")
    column: str = setting("", "column of the table with train, val or test")

    def __post_init__(self) -> None:
        if self.table and not (self.key and self.column):
            raise UserError(f"table {self.table} needs key and column, the names of its columns")
        if self.table and (self.train or self.val or self.test):
            raise UserError(f"table {self.table} stands beside patterns; give one of them")
        if bool(self.train) != bool(self.test):
            raise UserError("train and test need patterns, both or neither")

    @property
    def sides(self) -> dict[str, tuple[str, ...]]:
        """The patterns of each side that has some."""
        sides = {TRAIN: self.train, VAL: self.val, TEST: self.test}
        return {side: patterns for side, patterns in sides.items() if patterns}


@dataclass(frozen=True)
class TargetRule:
    """Labels of scans as a whole, in CSV files of the data set."""

    table: str = setting("", "pattern of the CSV files; empty: the data set has none")
    key: str = setting("", "column that names the scan")
    columns: tuple[str, ...] = setting(
        (), "columns that are targets; a file may lack some of them; empty: all other columns"
    )
    presence: str = setting(
        "", "name of a target that is true of scans with a row and false of scans without one"
    )

    def __post_init__(self) -> None:
        if self.table and not self.key:
            raise UserError(f"table {self.table} needs key, the column that names the scan")
        if self.presence and self.columns:
            raise UserError(f"presence {self.presence} stands beside columns; give one of them")


@dataclass(frozen=True)
class Facts:
    """What the file of a data set holds, except for the names of its labels."""

    title: str = setting("", "full name")
    home: str = setting("", "web page")
    licence: str = setting("", "licence of the data, or where to read it")
    ask: str = setting("", "where to ask for the data")
    sources: tuple[str, ...] = setting((), "where these facts come from")
    unverified: tuple[str, ...] = setting((), "facts that could not be checked, in words")
    scans: tuple[str, ...] = setting((), "patterns of the scans")
    masks: tuple[str, ...] = setting((), "patterns of the label maps; empty: there are none")
    mask_folder: str = setting(
        "",
        "folder with label maps that have the names of the scans; empty: they are found by the "
        "layouts of docs/data.md",
    )
    patient: str = setting(
        "", "regular expression; group 1, searched in the path of a scan, names its patient"
    )
    split: SplitRule = field(
        default_factory=SplitRule, metadata={"doc": "official split of the scans"}
    )
    targets: TargetRule = field(
        default_factory=TargetRule, metadata={"doc": "labels of scans as a whole"}
    )

    def __post_init__(self) -> None:
        for key in ("title", "licence", "ask", "scans", "patient"):
            if not getattr(self, key):
                raise UserError(f"{key} is missing; every data set has one")
        try:
            groups = re.compile(self.patient).groups
        except re.error as error:
            raise UserError(f"patient {self.patient!r} is no regular expression: {error}") from None
        if groups < 1:
            raise UserError(f"patient {self.patient!r} has no group in brackets")
        if self.mask_folder and not self.masks:
            raise UserError(f"mask_folder {self.mask_folder} needs masks, patterns of its files")


@dataclass(frozen=True)
class DataSet:
    """One public data set.

    Args:
        name: name of its file, without suffix; results on it lie in folders that begin with it.
        facts: content of its file.
        label_names: label value and name, ascending; empty without label maps.
    """

    name: str
    facts: Facts
    label_names: Names = ()

    def where_to_ask(self) -> str:
        """Where to get the data, as the end of an error line."""
        return f"ask for the data at {self.facts.ask} (licence: {self.facts.licence})"

    def lines_about(self) -> list[str]:
        """What the data set is, and which facts about it were not checked, as lines for people."""
        facts = self.facts
        where = f", {facts.home}" if facts.home else ""
        lines = [f"{self.name}: {facts.title}{where}; licence: {facts.licence}"]
        if facts.unverified:
            checked = f"; the others come from {', '.join(facts.sources)}" if facts.sources else ""
            lines.append(f"{self.name}: not verified: {'; '.join(facts.unverified)}{checked}")
        return lines


def shipped_folder_of_data() -> Path:
    """The folder of the data sets that come with tapct."""
    return shipped_folder() / "data"


def shipped_names() -> list[str]:
    """Names of the data sets that come with tapct, sorted."""
    return sorted(file.stem for file in shipped_folder_of_data().glob("*.yaml"))


def read_dataset(named: Path | str) -> DataSet:
    """Read the description of a data set.

    Args:
        named: name of a data set that comes with tapct, such as `amos22`, or a YAML file with the
            same keys.
    Raises:
        UserError: there is no such data set, or its file breaks a rule; one line with file:line.
    """
    file = _file_of(expand_path(named))
    if not _NAME.fullmatch(file.stem):
        raise UserError(
            f"{file}: a data set has the name of its file, which must have lower-case letters, "
            "digits and hyphens only, e.g. my-scans.yaml"
        )
    facts = load_config(Facts, file, (), upgrade=_without_labels).value
    label_names = _labels_in(read_chain(file))
    if facts.masks and not label_names:
        raise UserError(f"{file}: labels is missing; with masks, it names the label values")
    return DataSet(file.stem, facts, label_names)


def _file_of(named: Path) -> Path:
    """The file of a data set that a person has named.

    Raises:
        UserError: there is none.
    """
    if named.suffix in (".yaml", ".yml") and named.is_file():
        return named
    shipped = shipped_folder_of_data() / f"{named}.yaml"
    if named.parent == Path() and shipped.is_file():
        return shipped
    names = shipped_names()
    near = difflib.get_close_matches(named.name.lower(), names, n=2, cutoff=0.5)
    guess = f"did you mean {' or '.join(near)}? " if near else ""
    raise UserError(
        f"--data {named}: there is no such data set; {guess}tapct comes with {', '.join(names)}; "
        "a YAML file with the same keys describes another one (docs/datasets.md)"
    )


def _without_labels(tree: dict[str, Any]) -> dict[str, Any]:
    """A file's content without the names of the labels, which are no setting but a table."""
    return {key: value for key, value in tree.items() if key != LABELS}


def _labels_in(layers: Sequence[Layer]) -> Names:
    """The names of the labels, by value.

    Raises:
        ConfigError: `labels` is not a table of values and names, or two values have one name.
    """
    names: dict[int, str] = {}
    for layer in layers:
        table = layer.tree.get(LABELS) or {}
        where = layer.sources.get((LABELS,), "")
        if not isinstance(table, Mapping):
            raise ConfigError(f"{where}: labels: must be a table, e.g. {{1: liver, 2: spleen}}")
        for value, name in table.items():
            line = layer.sources.get((LABELS, value), where)
            given = f"{line}: labels.{value} = {one_line(name)}"
            if not value.isdigit() or not 0 < int(value) < IGNORE_LABEL:
                raise ConfigError(f"{given}: the value must be a whole number from 1 to 65534")
            if not isinstance(name, str) or not clean_names([(int(value), name)]):
                raise ConfigError(
                    f"{given}: a name must have letters, digits, space and _ . + - ( ) only, at "
                    "most 64 characters"
                )
            if name in names.values():
                raise ConfigError(f"{given}: another value has the same name; each needs its own")
            names[int(value)] = name
    return tuple(sorted(names.items()))
