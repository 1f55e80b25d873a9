"""The section `data` of a run's config: which scans it learns from, and how they are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tapct.base.exits import UserError
from tapct.config import setting
from tapct.data import selection
from tapct.data.loading import loader
from tapct.data.packed import local_cache
from tapct.data.packed.scan_list import ScanList
from tapct.data.packed.store_group import GroupScans
from tapct.data.patients import split


@dataclass(frozen=True)
class StoreConfig:
    """One of several archives that a run is trained on."""

    path: Path = setting(dataclasses.MISSING, "folder written by `tapct pack`")
    weight: float = setting(
        1.0, "share of the samples, relative to the weights of the other archives", gt=0.0, le=1e9
    )
    name: str = setting("", "name in lines and metrics; empty: the name of the folder")


@dataclass(frozen=True)
class DataConfig:
    """Which scans a run learns from."""

    store: Path = setting(
        Path("data/store"), "folder written by `tapct pack`; not read if data.stores is set"
    )
    stores: tuple[StoreConfig, ...] = setting(
        (),
        "list of {path, weight, name}, used instead of data.store: archives on which the run is "
        "trained together; each of them gives a share of the samples that is proportional to its "
        "weight. `tapct eval` evaluates the first archive",
    )
    join_patients: bool = setting(
        False,
        "whether equal patient hashes in several of data.stores are one patient; the archives must "
        "have been indexed with one key",
    )
    select: str = setting(
        "",
        "expression over columns of the manifest that chooses the scans of pretraining, e.g. "
        "\"spacing_z_mm <= 5 and kernel not in ['B70f']\"; empty: all scans",
    )
    held_out: float = setting(
        0.0,
        "share of the patients that pretraining does not see; these are the test patients of "
        "`tapct eval`",
        ge=0.0,
        lt=1.0,
    )
    held_out_start: float = setting(
        0.0,
        "place between 0 and 1 at which the held-out share begins: with data.held_out=0.2, the "
        "values 0, 0.2, 0.4, 0.6 and 0.8 are the five folds of a cross-validation",
        ge=0.0,
        lt=1.0,
    )
    split_seed: int = setting(
        0,
        "random seed of the choice of held-out patients; it does not follow `seed`, so runs with "
        "other seeds hold out the same patients",
        ge=0,
        lt=2**63,
    )
    split_version: int = setting(
        split.VERSION,
        "rule by which held-out patients are chosen; a run that began with rule 1 keeps it",
        choices=(1, split.VERSION),
    )
    on_change: str = setting(
        "refuse",
        "when a run is resumed and the store has other scans than before: refuse, or rebase "
        "(resume with the new scans)",
        choices=("refuse", "rebase"),
    )
    loader: loader.Config = field(default_factory=loader.Config)
    cache: local_cache.Config = field(default_factory=local_cache.Config)

    def __post_init__(self) -> None:
        if self.select.strip():
            selection.parse(self.select, "data.select")
        if self.held_out_start + self.held_out > 1 + 1e-9:
            raise UserError(
                f"data.held_out_start {self.held_out_start:g} and data.held_out {self.held_out:g} "
                "end beyond 1; their sum must be 1 or less"
            )

    @property
    def evaluated(self) -> Path:
        """Folder of the store that `tapct eval` evaluates."""
        return self.folders[0]

    @property
    def folders(self) -> tuple[Path, ...]:
        """Folders of all stores that the run is trained on."""
        return tuple(one.path for one in self.stores) or (self.store,)

    def held_out_mask(self, scans: ScanList | GroupScans, run_seed: int) -> np.ndarray:
        """Whether each scan is of a patient that pretraining does not see: bool, one per scan.

        Args:
            scans: scans of the store.
            run_seed: `seed` of the run, which rule 1 uses.
        """
        if self.held_out <= 0:
            return np.zeros(len(scans), bool)
        if self.split_version == split.VERSION:
            numbers = scans.patient_numbers()
            return split.are_below(numbers, self.held_out, self.split_seed, self.held_out_start)
        patients = scans.column("patient").to_pylist()
        chosen = self.held_out_patients(patients, run_seed)
        return np.fromiter((patient in chosen for patient in patients), bool, len(patients))

    def held_out_patients(self, patients: Iterable[str], run_seed: int) -> frozenset[str]:
        """The patients of a store that pretraining does not see.

        Args:
            patients: keyed hashes, one per scan.
            run_seed: `seed` of the run, which rule 1 uses.
        """
        return split.split_of_version(
            self.split_version,
            patients,
            self.held_out,
            split_seed=self.split_seed,
            run_seed=run_seed,
            start=self.held_out_start,
        )

    def one_sided(self, patients: Iterable[str], run_seed: int) -> str:
        """One line about a share above 0 that holds out nobody or everybody; empty where it does
        not. Arguments as in `held_out_patients`.
        """
        names = set(patients)
        num = len(self.held_out_patients(names, run_seed))
        if self.held_out <= 0 or not names or 0 < num < len(names):
            return ""
        if self.split_version == 1:  # it holds out nobody where there is one patient, only
            return (
                f"data.held_out {self.held_out:g} holds out none of the store's patients "
                f"({len(names)}) by rule 1 (data.split_version); set data.held_out=0"
            )
        return split.imbalance(names, self.held_out, self.split_seed, self.held_out_start)
