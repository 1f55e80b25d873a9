"""What a manifest remembers of patients beyond its rows, so that they keep their hashes when the
archive is indexed again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class KnownScan:
    """A scan whose patient was decided by an index.

    Args:
        id: keyed hash of its path.
        digest: digest of its voxels; empty where unknown.
        patient: keyed hash of its patient.
        patient_from: rule that identified the patient.
    """

    id: str
    digest: str
    patient: str
    patient_from: str


@dataclass(frozen=True)
class PatientMemory:
    """Patients of earlier indexes that the rows of a manifest do not show.

    Args:
        gone: scans that earlier indexes found, and the last one did not.
        same_as: keyed hash that a rule gave to a patient -> keyed hash that this patient has.
    """

    gone: tuple[KnownScan, ...] = ()
    same_as: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """The memory as text, equal for equal memories; empty for an empty one."""
        if not self.gone and not self.same_as:
            return ""
        gone = sorted(dataclasses.astuple(scan) for scan in self.gone)
        return json.dumps({"gone": gone, "same_as": dict(sorted(self.same_as.items()))})

    @classmethod
    def from_json(cls, text: str) -> PatientMemory:
        """The memory that `to_json` wrote."""
        if not text:
            return cls()
        content = json.loads(text)
        return cls(tuple(KnownScan(*scan) for scan in content["gone"]), content["same_as"])


@dataclass(frozen=True)
class PatientChanges:
    """What became of the patients of the older manifest.

    Args:
        num_scans: scans that have another patient now.
        num_patients: patients of the older manifest that these scans had.
        num_kept: scans with the hash of the older manifest where today's rules give another one.
        num_undivided: patients that today's rules would divide.
        forgotten: whether the older patients were forgotten on request.
        split_seed: seed of the split by which the hash of joined patients was chosen.
        problem: why the older manifest cannot be used; empty where it can.
    """

    num_scans: int = 0
    num_patients: int = 0
    num_kept: int = 0
    num_undivided: int = 0
    forgotten: bool = False
    split_seed: int = 0
    problem: str = ""
