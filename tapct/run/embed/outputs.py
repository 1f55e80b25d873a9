"""What `tapct embed` writes of each scan, and where.

    npz       OUT/CASE_ID.npz    dense features, or the vector of the scan
    zarr      OUT/CASE_ID.zarr   dense features, written while they are computed
    cvpr26    OUT/CASE_ID.h5     the vector, as the CVPR 2026 challenge on CT diagnosis reads it
    parquet   OUT/vectors.parquet    the vectors of all scans, see `vector_table.py`

Every file appears whole or not at all. It holds what it was made with and a stamp of the files of
its scan, by which a later call recognises what is done.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import zipfile
from abc import ABC, abstractmethod
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import numpy as np

from tapct.base import files
from tapct.base.exits import UserError
from tapct.base.extras import installing
from tapct.run.embed.named_scans import NamedScan
from tapct.run.embed.one_scan import ScanEncoder
from tapct.run.embed.scan_vector import VectorChoice, vector_of
from tapct.run.embed.zarr_features import ATTRIBUTES, write_zarr
from tapct.types import Volume
from tapct.weights.embedding import ArraySink, Embedding

NPZ, PARQUET, CVPR26, ZARR = "npz", "parquet", "cvpr26", "zarr"
FORMATS = (NPZ, PARQUET, CVPR26, ZARR)
DATASET, FACTS = "y_hat", "tapct"  # names in .h5 files; FACTS also in .npz files
_STALE_SECONDS = 86_400.0


class Output(ABC):
    """Where the results of scans go.

    Args:
        out: folder to write.
        encoder: model.
        wanted: vector; None for dense features.
    """

    def __init__(self, out: Path, encoder: ScanEncoder, wanted: VectorChoice | None) -> None:
        self.out, self.encoder, self.wanted = out, encoder, wanted
        self.made_with = made_with(encoder, wanted)
        self.stack = ExitStack()

    @property
    def what(self) -> str:
        """What there is one of for each scan."""
        return "feature file" if self.wanted is None else "vector"

    @property
    def place_of_results(self) -> Path:
        """File or folder to print at the end."""
        return self.out

    def __enter__(self) -> Output:
        """Make the folder.

        Raises:
            UserError: it cannot be written.
        """
        make_folder(self.out)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let go of the folder; what was written stays."""
        self.stack.close()

    @abstractmethod
    def is_done(self, case: NamedScan) -> bool:
        """Whether the result of a scan is there and up to date.

        Raises:
            UserError: it was made with another model or is of another kind.
        """

    @abstractmethod
    def add(self, case: NamedScan, volume: Volume, stamp: str) -> None:
        """Compute and write the result of a scan.

        Args:
            case: scan.
            volume: its voxels.
            stamp: stamp of its files before they were read.
        Raises:
            Refused: there is no result of this scan.
            UserError: it cannot be written.
        """

    @abstractmethod
    def remove(self, case: NamedScan) -> None:
        """Remove the result of an earlier version of a scan, if there is one."""

    @abstractmethod
    def finish(self) -> None:
        """Called once, after the last scan."""

    def check_facts(self, place: Path, facts: dict[str, Any]) -> str:
        """Compare what a result was made with.

        Args:
            place: file of the result.
            facts: what it holds.
        Returns:
            Its stamp.
        Raises:
            UserError: it was made with another model, or is of another kind.
        """
        return check_facts(place, facts, self.made_with)


def made_with(encoder: ScanEncoder, wanted: VectorChoice | None) -> dict[str, Any]:
    """What a result depends on beside its scan."""
    if wanted is None:
        return {"model": encoder.key.text, "vector": ""}
    return {
        "model": encoder.key.text,
        "vector": wanted.vector,
        "block": wanted.block,
        "organs": sorted(wanted.organs),
        "cached": encoder.cache is not None,  # features in the cache are rounded to 16 bits
    }


def check_facts(place: Path, facts: dict[str, Any], wanted: dict[str, Any]) -> str:
    """See `Output.check_facts`."""
    different = [key for key, value in wanted.items() if facts.get(key) != value]
    if different:
        raise UserError(
            f"{place} was made with another {different[0]}; one folder holds the results of one "
            "model and kind: give another --out, or remove its files"
        )
    return str(facts.get("stamp", ""))


def check_writable(out: Path) -> None:
    """Refuse a folder that cannot be made or written, before scans are searched.

    Raises:
        UserError: the permissions do not allow it.
    """
    there = out.absolute()
    while not there.exists():
        there = there.parent
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"--out {out} cannot be written: no permission to write to {there}")


def make_folder(out: Path) -> None:
    """Make the folder of the results, before a scan is read, and remove what a killed call has left
    half written more than a day ago.

    Raises:
        UserError: it is a file, or cannot be written.
    """
    files.check_new_path(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a folder for the results")
    try:
        out.mkdir(parents=True, exist_ok=True)
        files.write_atomically(out / ".writable", b"")
        (out / ".writable").unlink(missing_ok=True)  # another call may have removed it
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {files.first_cause(error)}") from error
    for left in out.glob(f".*{files.TEMPORARY_SUFFIX}"):
        try:
            if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        except OSError:
            continue  # another call has removed it


class _PerScan(Output):
    """One file or folder per scan."""

    suffix = ""

    def place(self, case: NamedScan) -> Path:
        """File or folder of a scan."""
        return self.out / f"{case.id}{self.suffix}"

    def is_done(self, case: NamedScan) -> bool:
        """See `Output.is_done`."""
        place = self.place(case)
        if not place.exists():
            return False
        try:
            facts = self.facts(place)
        except (OSError, KeyError, ValueError, TypeError, zipfile.BadZipFile):
            raise UserError(
                f"{place} is damaged or was not written by tapct embed; remove it, or give another "
                "--out"
            ) from None
        return self.check_facts(place, facts) == case.stamp()

    def remove(self, case: NamedScan) -> None:
        """See `Output.remove`."""
        place = self.place(case)
        if place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)

    def add(self, case: NamedScan, volume: Volume, stamp: str) -> None:
        """See `Output.add`."""
        place = self.place(case)
        try:
            self.write(place, case, volume, {**self.made_with, "stamp": stamp})
        except OSError as error:
            raise UserError(f"cannot write {place}: {files.first_cause(error)}") from error

    def finish(self) -> None:
        """Every file is finished already."""

    @abstractmethod
    def facts(self, place: Path) -> dict[str, Any]:
        """Read what a result was made with."""

    @abstractmethod
    def write(self, place: Path, case: NamedScan, volume: Volume, facts: dict[str, Any]) -> None:
        """Compute and write a result, whole or not at all."""


class NpzFiles(_PerScan):
    """One .npz per scan: the fields of `Embedding`, or `vector_D` and `spacing_mm`."""

    suffix = ".npz"

    def facts(self, place: Path) -> dict[str, Any]:
        """Read what a file was made with; its features are not read."""
        with np.load(place, allow_pickle=False) as content:
            found: dict[str, Any] = json.loads(str(content[FACTS]))
        return found

    def write(self, place: Path, case: NamedScan, volume: Volume, facts: dict[str, Any]) -> None:
        """Compute and write a file."""
        if self.wanted is None:
            arrays = embedding_of(self.encoder, volume).arrays()
        else:
            vector_D = vector_of(self.encoder, case, volume, self.wanted)
            arrays = {"vector_D": vector_D, "spacing_mm": np.asarray(volume.spacing_mm)}
        with files.replacing(place) as file:
            named = {**arrays, FACTS: np.asarray(json.dumps(facts))}
            np.savez_compressed(file, **named)  # type: ignore[arg-type]


class ZarrFolders(_PerScan):
    """One zarr group per scan, see `zarr_features.py`."""

    suffix = ".zarr"

    def facts(self, place: Path) -> dict[str, Any]:
        """Read what a group was made with."""
        found: dict[str, Any] = json.loads((place / "zarr.json").read_bytes())["attributes"]
        facts: dict[str, Any] = found[ATTRIBUTES]
        return facts

    def write(self, place: Path, case: NamedScan, volume: Volume, facts: dict[str, Any]) -> None:
        """Compute and write a group."""
        with files.replacing_folder(place) as aside:
            write_zarr(aside, self.encoder, volume, facts)


class ChallengeFiles(_PerScan):
    """One .h5 per scan: dataset `y_hat`, float32 (channels,), and an attribute `tapct`."""

    suffix = ".h5"

    def __init__(self, out: Path, encoder: ScanEncoder, wanted: VectorChoice | None) -> None:
        super().__init__(out, encoder, wanted)
        self.h5py = load_h5py()

    def facts(self, place: Path) -> dict[str, Any]:
        """Read what a file was made with."""
        with self.h5py.File(place, "r") as opened:
            if opened[DATASET].ndim != 1:
                raise ValueError
            found: dict[str, Any] = json.loads(opened.attrs[FACTS])
        return found

    def write(self, place: Path, case: NamedScan, volume: Volume, facts: dict[str, Any]) -> None:
        """Compute and write a file."""
        assert self.wanted is not None
        vector_D = vector_of(self.encoder, case, volume, self.wanted)
        with files.replacing(place) as opened, self.h5py.File(opened, "w") as content:
            content.create_dataset(DATASET, data=vector_D)
            content.attrs[FACTS] = json.dumps(facts)


def embedding_of(encoder: ScanEncoder, volume: Volume) -> Embedding:
    """Dense features of the last block."""
    last = encoder.num_blocks - 1
    sink = encoder.extract(volume, [last], ArraySink)
    return sink.embedding(volume, encoder.num_blocks, [last])


def load_h5py() -> ModuleType:
    """The library that writes .h5 files.

    Raises:
        UserError: it is not installed.
    """
    try:
        import h5py
    except ImportError as error:
        raise UserError(
            "--format cvpr26 writes .h5 files with h5py, which cannot be loaded; install it: "
            + installing("eval", "h5py")
        ) from error
    return h5py
