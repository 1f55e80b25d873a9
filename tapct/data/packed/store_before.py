"""What a store lists before `tapct pack` writes to it, and which manifests may replace that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from tapct.base.counted import counted
from tapct.base.exits import UserError
from tapct.data.manifest import Manifest
from tapct.data.packed.scan_list import ScanList, StoredScan
from tapct.data.packed.store import INDEX_NAME, read_index

_NEXT_STEP = (
    "choose another --out, or let this manifest replace the list of the store with --replace-store"
)


@dataclass(frozen=True)
class StoreBefore:
    """The list of a store before it is written again.

    Args:
        folder: folder of the store.
        scans: its scans; None where there is no store, or its list cannot be read.
        patient_key: name of the key of the patient hashes; empty where unknown.
        manifest_file: file of the manifest that was packed; None where unknown.
    """

    folder: Path
    scans: ScanList | None = None
    patient_key: str = ""
    manifest_file: Path | None = None

    @classmethod
    def read(cls, folder: Path) -> StoreBefore:
        """Read the list of a store; one that is damaged counts as empty, since `tapct pack` is
        what restores it.
        """
        if not (folder / INDEX_NAME).is_file():
            return cls(folder)
        try:
            scans, info = read_index(folder)
        except UserError:
            return cls(folder)
        manifest = info.get("manifest_file", "")
        return cls(
            folder,
            scans,
            info.get("patient_key", ""),
            folder / manifest if manifest else None,
        )

    def has_key_of(self, manifest: Manifest) -> bool:
        """Whether the ids and patients of both come from one key, as far as that is known."""
        keys = {self.patient_key, manifest.patient_key} - {""}
        return len(keys) < 2

    def of_same_patients(self, manifest: Manifest, ids: Sequence[str]) -> Mapping[str, StoredScan]:
        """The scans of the store with some ids, where its ids and patients can stand beside those
        of a manifest; empty where they cannot.
        """
        if self.scans is None or not ids or not self.has_key_of(manifest):
            return {}
        known = self.scans.column("id")
        places = pc.index_in(pa.array(ids, known.type), value_set=known).to_pylist()
        return {scan_id: self.scans[at] for scan_id, at in zip(ids, places) if at is not None}

    def check_replaceable_by(self, manifest: Manifest) -> None:
        """Refuse a manifest of another archive.

        Raises:
            UserError: the manifest has another patient key, or knows no scan of the store.
        """
        if not self.scans:
            return
        table = manifest.table()
        if not self.has_key_of(manifest):
            raise UserError(
                f"the store {self.folder} was packed with patient key {self.patient_key}, and the "
                f"manifest has key {manifest.patient_key}, so it is another archive, or was "
                f"indexed beside another key file; {_NEXT_STEP}"
            )
        digests = table.column("digest")
        is_read = pc.not_equal(digests, "")
        if _have_one_in_common(self.scans.column("checksum"), digests.filter(is_read)):
            return
        # An id stands for a path below the archive, and two archives may have the same paths. So an
        # id alone is trusted where `tapct index` refused the scan before it had read the voxels, or
        # where the manifest is the file that was packed before.
        ids = table.column("id")
        is_same_file = False
        if self.manifest_file is not None and manifest.file is not None:
            is_same_file = self.manifest_file.resolve() == manifest.file.resolve()
        trusted = ids if is_same_file else ids.filter(pc.invert(is_read))
        if _have_one_in_common(self.scans.column("id"), trusted):
            return
        num_scans = counted(len(self.scans), "scan")
        raise UserError(
            f"the manifest of {manifest.root} has no scan of the store {self.folder} "
            f"({num_scans}), so it is another archive; {_NEXT_STEP}"
        )


def _have_one_in_common(first: pa.Array, second: pa.ChunkedArray) -> bool:
    """Whether two columns of text have a value in common."""
    texts = second.cast(first.type)
    return bool(pc.any(pc.is_in(first, value_set=texts)).as_py())
